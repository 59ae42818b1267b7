"""The table of `qtool eval` shows every figure at every width of a terminal."""

import io

import pytest
from rich.console import Console

from qtool.cli.comparison_table import ComparisonTable

TITLES = ("model", "format", "size", "perplexity", "llama.cpp's", "ratio", "KL divergence",
          "99 % below", "same top", "flips")  # fmt: skip
ROWS = [
    [f"/a/path/to/{name}", kind, size, ppl, "9.66 ± 3.85", "1.0739", kld, "0.27", "88.9 %", "4.6 %"]
    for name, kind, size, ppl, kld in (
        ("smol-Q4_K_M.gguf", "gguf:Q4_K_M", "104 MB", "10.72 ± 1.42", "0.0484 ± 0.0033"),
        ("rtn4", "compressed-tensors", "113 MB", "14.61 ± 2.06", "0.4307 ± 0.0248"),
        ("smol-Q5_K_M.gguf", "gguf:Q5_K_M", "119 MB", "10.33 ± 1.41", "0.0121 ± 0.0007"),
        ("smol-Q8_0.gguf", "gguf:Q8_0", "143 MB", "10.05 ± 1.43", "0.0042 ± 0.0002"),
    )
]  # fmt: skip


def shown(width, rows=ROWS):
    page = io.StringIO()
    Console(file=page, width=width, highlight=False).print(ComparisonTable(TITLES, rows))
    return page.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_no_figure_is_cut_at_any_width(width, count):
    lines = shown(width, ROWS[:count])
    text = "\n".join(lines)
    assert "…" not in text
    assert max(map(len, lines)) <= width
    for row in ROWS[:count]:
        assert all(figure in text for figure in row[1:])
    assert all(title in text for title in TITLES)


def test_names_can_be_read_whole_where_columns_are_narrow():
    above, below, *_ = shown(80, ROWS[:2])
    assert above.split() == ["/a/path/to/smol-Q4"]
    assert below.split() == ["model", "_K_M.gguf", "/a/path/to/rtn4"]


def test_a_wide_terminal_has_a_line_for_each_model():
    assert len(shown(200)) == 1 + len(ROWS)
    assert shown(200)[1].split()[0] == ROWS[0][0]


def test_models_that_do_not_fit_beside_each_other_stand_below_each_other():
    """In 80 cells 3 models fit: their widest figure is 18 cells, titles take 13."""
    lines = shown(80)
    first, second = (line for line in lines if line.startswith("ratio"))
    assert (first.count("1.0739"), second.count("1.0739")) == (3, 1)
