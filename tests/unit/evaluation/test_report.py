"""A report shows what was measured, survives what is missing, and obeys nothing in a name."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from builders.evaluations import MODELS, evaluation
from fontTools.ttLib import TTFont

from qtool.errors import UsageError
from qtool.evaluation.report import OUR_FILES, check_report, report_files, write_report
from qtool.evaluation.report_facts import best_for_size, short_labels
from qtool.evaluation.report_heat import heat_map, shade
from qtool.evaluation.report_layers import layers_beside, with_layers
from qtool.evaluation.report_markdown import literal
from qtool.evaluation.report_numbers import percent_with_error, plain, tick, with_error
from qtool.evaluation.report_plots import NARROW, WIDE, Figure, loss_against_size
from qtool.evaluation.report_png import font_files
from qtool.evaluation.report_reading import facts_of
from qtool.evaluation.report_svg import Axis, Box, axis_for, place_labels, spread_out
from qtool.evaluation.report_words import alerts, verdict
from qtool.recipe.sizes import shown_size

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    '<script>alert("x")</script>',
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></svg><script>1</script>",
    "{{ 7 * 7 }}{% raw %}",
    "a|b\n# heading [link](https://example.org) ![i](x) `code`",
    "evil\u202egnp.gguf\x1b[2J\x00",
    "n" * 5000,
    "&lt;already&gt; & more",
    "",
)
DRAWN = ("svg", "style", "rect", "line", "path", "circle", "text", "title")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def texts(svg):
    return [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_tasks_stand_beside_the_originals_score():
    value = evaluation()
    files = report_files(value)
    page = Page(files["index.html"]).words
    assert "quiz, acc: gptq4 72.5 ± 5.6 % 75.0 % -2.5 ± 3.0 % 3, 4 0.40 60" in page
    line = r"| quiz, acc\_norm: gptq4 | 70.0 ± 5.6 % | 72.0 % | \-2.0 ± 3.0 % | 3, 4 | 0.40 | 60 |"
    assert line in files["REPORT.md"]
    for result in value["results"]:
        del result["metrics"]["tasks"]
    assert "Tasks" not in Page(report_files(value)["index.html"]).words


@pytest.mark.parametrize("name", HOSTILE)
def test_a_task_may_be_called_anything(name):
    value = evaluation()
    tasks = value["results"][0]["metrics"]["tasks"]
    tasks[name] = {**tasks.pop("quiz"), "metric": name, "other": {name: {"value": 0.5}}}
    files = report_files(value)
    clean = report_files(evaluation())
    page, expected = Page(files["index.html"]), Page(clean["index.html"])
    assert set(page.tags) == set(expected.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on")]


def test_a_report_has_a_page_its_text_its_plots_and_its_figures(tmp_path):
    paths = write_report(evaluation(), tmp_path / "report")
    assert paths[0] == tmp_path / "report" / "index.html"
    assert {path.name for path in paths} == OUR_FILES
    assert {path.name for path in (tmp_path / "report").iterdir()} == OUR_FILES
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == evaluation()


def test_the_headline_names_the_smallest_model_that_passes():
    said = verdict(facts_of(evaluation()))
    assert said.mood == "good"
    assert said.headline.startswith("1 of 4 models passes both gates: Q4_K_M, 612 kB")
    stricter = verdict(facts_of(evaluation(gates=["kld<=0.001"])))
    assert (stricter.mood, stricter.headline) == ("bad", "None of 4 models passes the gate.")
    assert stricter.lines[0] == ("Nearest to passing: Q8_0, where kld<=0.001 is 0.00310 ± 0.00012.")
    looser = verdict(facts_of(evaluation(gates=["kld<=9"])))
    assert looser.headline == (
        "All 4 models pass the gate; the smallest is gptq4, 562 kB, KL divergence 0.0740 ± 0.0030."
    )
    two = evaluation(gates=["kld<=9"])
    two["results"] = two["results"][:2]
    assert verdict(facts_of(two)).headline.startswith("Both models pass the gate; the smallest is ")


def test_a_gate_that_other_text_could_decide_is_called_close():
    """0.061 +- 0.0024 is near 0.065 but not near 0.07."""
    near, far = (facts_of(evaluation(gates=[f"kld<={limit}"])) for limit in (0.065, 0.07))
    assert any("Q4_K_M is within two standard errors" in line for line in verdict(near).lines)
    assert not any("Q4_K_M is within" in line for line in verdict(far).lines)


def test_the_table_is_sorted_by_size_and_marks_what_nothing_beats():
    rows = facts_of(evaluation()).rows
    assert [row.label for row in rows] == ["gptq4", "rtn4", "Q4_K_M", "Q8_0"]
    assert [row.frontier for row in rows] == [True, False, True, True]
    assert [row.number for row in rows] == [1, 2, 3, 4]


def test_least_loss_for_its_size_takes_a_bit_for_a_factor_of_four():
    """0.04 at 4 bits is as good as 0.01 at 5; a little less at 4 wins, a little less at 5 too."""
    for small, expected in ((0.039, "small"), (0.041, "large")):
        models = [("small", "f", 4.0, small), ("large", "f", 5.0, 0.01)]
        found = best_for_size(facts_of(evaluation(models)).rows)
        assert found.name == expected


def test_twins_on_the_frontier_are_counted_once():
    models = [("a", "f", 4.0, 0.1), ("b", "f", 4.0, 0.1)]
    assert [row.frontier for row in facts_of(evaluation(models)).rows] == [True, False]


def test_the_figures_of_every_model_are_on_the_page():
    page = Page(report_files(evaluation())["index.html"]).words
    for text in (
        "0.0610 ± 0.0024",
        "0.427",
        "✗ fails size<=800kB",
        "90.1 ± 0.9 %",
        "612 kB",
        "KL 0.000400 ± 0.000020, the original in bfloat16",
        "4 of 1024 tokens",
        64 * "a",
    ):
        assert text in page, text


def test_every_table_has_headers_and_every_picture_says_what_it_shows():
    text = report_files(evaluation())["index.html"]
    tree = Page(text)
    assert text.count("<td>") > 100
    assert text.count("<thead>") == text.count("<table")
    assert text.count('<th scope="row"') >= 4 * 4
    assert all("scope=" in tag for tag in re.findall(r"<th\b[^>]*>", text))
    pictures = re.findall(r"<svg[^>]*>", text)
    assert len(pictures) == 8
    for picture in pictures:
        assert 'role="img"' in picture
        assert len(re.search(r'aria-label="([^"]*)"', picture)[1]) > 60
    assert ("lang", "en") in tree.attributes


def test_a_page_asks_nothing_of_the_network_and_has_no_scripts():
    page = Page(report_files(evaluation())["index.html"])
    assert not {"script", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    addresses = {value for name, value in page.attributes if name in {"href", "src"}}
    assert addresses <= {*OUR_FILES, "data:,"}
    assert any("default-src 'none'" in str(value) for _, value in page.attributes)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_is_obeyed(name):
    value = evaluation()
    value["results"][0]["model"] = name
    value["results"][1]["layers"][0]["name"] = f"model.layers.0.{name}"
    value["results"][1]["layers"][1]["name"] = f"model.layers.1.{name}.x"
    value["results"][1]["domains"] = {name: value["results"][1]["domains"]["prose"], "b": {}}
    value["results"][1]["tokenizer"] = {"same": False, "template": name, "differences": [name]}
    value["results"][1]["format"] = value["reference"]["model"] = value["data"]["name"] = name
    value["warnings"] = [{"code": name, "message": name}]
    value["gates"].append(
        {"expression": name, "model": name, "value": name, "se": None, "pass": False}
    )
    value["noise_floor"]["dtype"] = name
    value["environment"] = {name: name}
    files = report_files(value)
    page = Page(files["index.html"])  # tags match: nothing broke out of its place
    assert not {"script", "img"} & set(page.tags)
    assert not any(key.startswith("on") for key, _ in page.attributes)
    for file, text in files.items():
        assert text.replace("\n", "").isprintable(), file
        if file.endswith(".svg"):
            tags = {element.tag for element in ET.fromstring(text).iter()}
            assert tags <= {SVG + tag for tag in DRAWN}
    assert "49" not in page.text
    assert not re.search(r"(?<!\\)<(?!/?br)[a-z/!]", files["REPORT.md"])
    assert not re.search(r"(?<!\\)\]\((?!k|error)", files["REPORT.md"])
    assert "\n# heading" not in files["REPORT.md"]
    assert len(files["index.html"]) < 400_000


def test_markdown_tables_keep_their_columns_whatever_a_name_contains():
    value = evaluation()
    value["results"][0]["model"] = "a|b\\|c`|`"
    lines = report_files(value)["REPORT.md"].splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| model"))
    widths = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines[first : first + 6]}
    assert len(widths) == 1


def test_literal_markdown_reads_as_it_was():
    assert literal("a_b*c") == r"a\_b\*c"
    assert literal("<b>&") == "&lt;b&gt;&amp;"
    assert literal("https://x.y") == "https&#58;//x.y"


MISSING = {
    "no reference": lambda v: [
        r.update(metrics={"ppl": r["metrics"]["ppl"]}) for r in v["results"]
    ],
    "no positions": lambda v: [r.pop("positions") for r in v["results"]],
    "no domains": lambda v: [r.pop("domains") for r in v["results"]],
    "no layers": lambda v: [r.pop("layers") for r in v["results"]],
    "no tokenizer": lambda v: [r.pop("tokenizer") for r in v["results"]],
    "no gates": lambda v: v.pop("gates"),
    "no noise floor": lambda v: v.pop("noise_floor"),
    "no data": lambda v: v.pop("data"),
    "no metrics": lambda v: [r.update(metrics={}) for r in v["results"]],
    "no bytes": lambda v: [r.pop("bytes") for r in v["results"]],
    "no results": lambda v: v.update(results=[]),
    "one model": lambda v: v.update(results=v["results"][:1]),
    "nothing": lambda v: v.clear(),
    "nonsense": lambda v: v.update(dict.fromkeys(list(v), 7)),
    "nonsense results": lambda v: v.update(results=[None, 3, "x", [], {"metrics": [1]}]),
    "nonsense metrics": lambda v: [
        r.update(metrics={"kld": {"mean": "x", "se": []}, "ppl": {"value": True}}, bytes=-5)
        for r in v["results"]
    ],
    "a divergence of nothing": lambda v: v["results"][0]["metrics"]["kld"].update(mean=0.0, se=0.0),
    "all divergences nothing": lambda v: [
        r["metrics"]["kld"].update(mean=0.0, se=0.0) for r in v["results"]
    ],
    "a huge number": lambda v: v["results"][0]["metrics"]["kld"].update(mean=10**400),
    "one bucket": lambda v: [r.update(positions=r["positions"][:1]) for r in v["results"]],
    "other layers": lambda v: [
        r.update(layers=[{"name": "lm_head", "relative_error": 0.1}]) for r in v["results"]
    ],
    "errors of nothing": lambda v: [
        layer.update(relative_error=0.0) for r in v["results"] for layer in r["layers"]
    ],
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_left_out(case):
    value = evaluation()
    MISSING[case](value)
    files = report_files(value)
    Page(files["index.html"])
    for name, text in files.items():
        assert "nan" not in text.lower().replace("<title", "").replace("attention", ""), name
        assert "inf" not in re.findall(r"\binf\b", text)
        if name.endswith(".svg"):
            ET.fromstring(text)


@pytest.mark.parametrize("missing", [math.nan, math.inf, None])
def test_a_standard_error_that_does_not_exist_is_not_shown(missing):
    value = evaluation()
    for result in value["results"]:
        for metric in result["metrics"].values():
            metric["se"] = missing
        for bucket in result["positions"]:
            bucket["kld_se"] = missing
        for domain in result["domains"].values():
            domain["kld_se"] = missing
    value["noise_floor"]["kld"]["se"] = missing
    value["gates"] = []
    files = report_files(value)
    assert "0.0610 ±" not in files["index.html"]
    assert "0.0610" in files["index.html"]
    assert 'class="bar' not in files["kl-against-size.svg"]
    assert json.loads(files["report.json"])["results"][0]["metrics"]["kld"]["se"] is None


def test_a_model_compared_with_itself_has_a_report():
    """All its windows agree alike: a standard error of nothing is none."""
    value = evaluation(gates=["kld<=0"])
    metrics = value["results"][0]["metrics"]
    metrics["kld"] |= {key: 0.0 for key in metrics["kld"] if key != "tokens"}
    metrics["top1"] |= {"value": 1.0, "se": 0.0}
    metrics["flips"] |= {"value": 0.0, "se": 0.0}
    metrics["ppl"] |= {"ratio": 1.0, "ratio_se": 0.0}
    page = Page(report_files(value)["index.html"]).words
    assert "100.0 %" in page
    assert "100.0 ±" not in page


def test_without_an_original_the_report_says_what_that_means():
    value = evaluation(gates=[])
    MISSING["no reference"](value)
    said = verdict(facts_of(value))
    assert said.headline == "Perplexity of 4 models, without an original to compare with."
    assert "--ref" in " ".join(said.lines)
    assert "kl-against-size.svg" not in report_files(value)


def test_another_tokenizer_or_template_is_a_loud_notice():
    value = evaluation()
    value["results"][1]["tokenizer"] = {"same": True, "template": "different", "differences": []}
    value["results"][2]["tokenizer"] = {
        "same": False, "template": "same", "differences": ["eos token 2 instead of 3"],
    }  # fmt: skip
    value["results"][3]["tokenizer"] = {"same": True, "template": "absent", "differences": []}
    found = {alert.model: alert.lines for alert in alerts(facts_of(value))}
    assert found == {
        "gptq4": ("the chat template is another",),
        "rtn4": ("eos token 2 instead of 3",),
    }
    files = report_files(value)
    assert 'role="alert"' in files["index.html"]
    assert "**Not the original's tokens: rtn4**" in files["REPORT.md"]
    assert 'role="alert"' not in report_files(evaluation())["index.html"]


def boxes_of_labels(svg, names):
    """Rectangles of texts, with a font a tenth narrower than the plot supposes."""
    found = []
    for element in ET.fromstring(svg).iter(f"{SVG}text"):
        if element.text in names:
            width = 0.56 * 12 * len(element.text)
            x, y = float(element.get("x")), float(element.get("y"))
            left = x - width * {"end": 1, "middle": 0.5}.get(element.get("text-anchor"), 0)
            found.append(Box(left, y - 9, left + width, y + 2))
    return found


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_labels_of_a_crowd_do_not_lie_on_each_other(width):
    models = [
        (f"model-{index:02d}-of-the-crowd-{'x' * (index % 5)}", "f", 4.5 + 0.01 * (index % 7),
         0.05 * (1 + 0.02 * (index * 5 % 13)))
        for index in range(14)
    ]  # fmt: skip
    facts = facts_of(evaluation(models))
    svg = loss_against_size(facts, width).svg()
    names = {row.label for row in facts.rows} | {str(row.number) for row in facts.rows}
    boxes = boxes_of_labels(svg, names)
    assert len(boxes) >= 8
    for index, box in enumerate(boxes):
        assert box.within(Box(0, 0, width, 430))
        assert not any(box.meets(other) for other in boxes[:index])


def test_a_bar_spans_95_percent():
    value = evaluation([("a", "f", 4.0, 0.1), ("b", "f", 8.0, 0.001)], gates=[])
    svg = loss_against_size(facts_of(value), WIDE).svg()
    bars = [
        line
        for line in ET.fromstring(svg).iter(f"{SVG}line")
        if line.get("class").startswith("bar") and line.get("x1") == line.get("x2")
    ]
    one, other = ((float(bar.get("y1")), float(bar.get("y2"))) for bar in bars)
    middles = [float(c.get("cy")) for c in ET.fromstring(svg).iter(f"{SVG}circle")]
    pixels_per_e = (middles[1] - middles[0]) / math.log(0.1 / 0.001)
    for (low, high), middle in zip((one, other), middles, strict=True):
        assert low - middle == pytest.approx(-math.log(1 - 1.96 * 0.04) * pixels_per_e, abs=0.2)
        assert middle - high == pytest.approx(math.log(1 + 1.96 * 0.04) * pixels_per_e, abs=0.2)


def test_a_bar_does_not_run_through_a_cross():
    """One that ends near it has no cap either: together they would look like an hourglass."""
    models = [("near", "f", 4.0, 0.1), ("low", "f", 8.0, 0.001)]
    for spread, caps in ((0.01, 0), (0.045, 0), (0.2, 1)):
        value = evaluation(models, gates=["kld<=0.00001"])
        value["results"][0]["metrics"]["kld"]["se"] = 0.1 * spread
        value["results"][1]["metrics"]["kld"].pop("se")
        svg = ET.fromstring(loss_against_size(facts_of(value), WIDE).svg())
        (point,) = [p for p in svg.iter(f"{SVG}path") if "near" in "".join(p.itertext())]
        middle = float(re.match(r"M\S+ ([\d.]+)m", point.get("d"))[1])
        bars = [b for b in svg.iter(f"{SVG}line") if b.get("class").startswith("bar")]
        heights = [(float(b.get("y1")), float(b.get("y2"))) for b in bars]
        assert all(min(abs(y - middle) for y in pair) >= 4.9 for pair in heights)
        assert sum(first == last for first, last in heights) == 2 * caps
        assert (len(heights) == 0) is (spread == 0.01)


def test_gates_and_the_noise_floor_are_lines_in_the_plot():
    found = texts(report_files(evaluation())["kl-against-size.svg"])
    assert "gate: kld<=0.07" in found
    assert "gate: size<=800kB" in found
    assert "noise floor: the original in bfloat16" in found


def box_of_note(element):
    """The rectangle of a text in 11 pixels of DejaVu Sans, by the advances in the font itself."""
    font = TTFont(font_files()[0])
    letters, advances = font.getBestCmap(), font["hmtx"]
    units = sum(advances[letters[ord(letter)]][0] for letter in element.text)
    width, x, y = 11 * units / font["head"].unitsPerEm, *(float(element.get(a)) for a in "xy")
    left = x - width if element.get("text-anchor") == "end" else x
    return Box(left, y - 9, left + width, y + 2)


@pytest.mark.parametrize("limit", range(540, 1120, 20))
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_names_of_level_lines_do_not_cross_the_gate_on_size(width, limit):
    facts = facts_of(evaluation(gates=["kld<=0.0005", f"size<={limit}kB"]))
    svg = loss_against_size(facts, width).svg()
    upright = [float(line.get("x1")) for line in ET.fromstring(svg).iter(f"{SVG}line")
               if line.get("class") == "limit" and line.get("x1") == line.get("x2")]  # fmt: skip
    boxes = [box_of_note(note) for note in ET.fromstring(svg).iter(f"{SVG}text")
             if note.text.startswith(("noise", "gate: kld"))]  # fmt: skip
    assert (len(upright), len(boxes)) == (1, 2)
    assert not any(box.left < upright[0] < box.right for box in boxes)
    assert not boxes[0].meets(boxes[1])
    assert all(box.left >= 0 and box.right <= width for box in boxes)


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"),
    [(0, 1, False), (3, 3.001, False), (7e7, 2e8, False), (1e-4, 3, True), (0.05, 0.06, True),
     (0.9, 1.1, True), (1e-12, 1e3, True), (-1, 1, False)],
)  # fmt: skip
def test_axes_have_round_ticks_inside(low, high, logarithmic):
    axis = Axis(low, high, 0, 100, logarithmic)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-12 <= value <= high * (1 + 1e-12) for value in ticks)
    assert ticks == sorted(ticks)
    assert len({tick(value) for value in ticks}) == len(ticks) or low == 3


@pytest.mark.parametrize("middle", [1.003e8, 1.05e8, 1.17e8, 2.49e8, 7.7e8, 9.99e8, 1.234e10])
@pytest.mark.parametrize("most", [4, 6, 7])
def test_labels_of_ticks_are_their_values(middle, most):
    axis = axis_for([middle * 0.99, middle * 1.08], 0, 100, logarithmic=False)
    for value in axis.ticks(most):
        number, unit = shown_size(int(value)).split()
        assert float(number) * {"MB": 1e6, "GB": 1e9}[unit] == pytest.approx(value, rel=1e-9)


def test_axes_map_their_ends_and_keep_what_lies_beyond_on_them():
    axis = axis_for([0.01, 1.0], 0, 100, logarithmic=True, margin=0)
    assert axis.at(0.01) == pytest.approx(0)
    assert axis.at(0.1) == pytest.approx(50)
    assert axis.at(1e9) == pytest.approx(100)


def test_a_label_keeps_clear_of_what_is_taken_or_is_left_out():
    bounds = Box(0, 0, 200, 100)
    free, blocked = place_labels([(50, 50), (150, 50)], [40, 40], [Box(100, 0, 200, 100)], bounds)
    assert free.box.left == 59
    assert blocked is None


def test_heights_spread_out_stay_inside_and_in_order():
    heights = spread_out([50, 50, 51, 99], 10, 0, 100)
    assert sorted(heights) == heights
    assert min(b - a for a, b in pairwise(heights)) >= 10
    assert 0 <= heights[0] <= heights[-1] <= 100


def test_labels_leave_out_what_all_names_share_and_keep_apart():
    assert short_labels(["x/m-a.gguf", "x/m-b"]) == ["a", "b"]
    assert short_labels(["a/model", "b/model"]) == ["a/model", "b/model"]
    assert short_labels(["same", "same"]) == ["same (1)", "same (2)"]
    long = short_labels([f"{'x' * 90}{end}" for end in ("1", "2")])
    assert long[0] != long[1]
    assert max(map(len, long)) <= 26
    assert short_labels([".gguf", "/"]) == [".gguf", "/"]


def test_experts_of_a_block_share_a_row_that_shows_the_worst():
    value = evaluation()
    value["results"][0]["layers"] = [
        {"name": f"model.layers.3.mlp.experts.{expert}.up_proj", "relative_error": 0.1 * expert}
        for expert in range(1, 5)
    ]
    row = next(row for row in facts_of(value).rows if row.label == "Q4_K_M")
    assert heat_map(row).errors == {(3, "mlp.experts.*.up_proj"): pytest.approx(0.4)}


def test_shades_double_every_two_steps():
    assert [shade(error, 0.1) for error in (0.0, 0.05, 0.1, 0.2, 0.4, 9.0)] == [0, 2, 4, 6, 8, 8]


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.05781, 0.00183, "0.0578 ± 0.0018"),
        (13.2496, 1.6995, "13.2 ± 1.7"),
        (123.4, 25.0, "123 ± 25"),
        (0.0578, None, "0.0578"),
        (3.1e-6, 2e-7, "3.10·10⁻⁶ ± 2.0·10⁻⁷"),
        (0.0, None, "0"),
        (1234567.0, None, "1.23·10⁶"),
    ],
)
def test_numbers_have_the_digits_that_their_error_supports(value, error, shown):
    assert with_error(Figure(value, error)) == shown


def test_rounding_up_does_not_add_a_digit_or_lose_one():
    assert plain(0.09996) == "0.100"
    assert plain(None) == "-"
    assert percent_with_error(Figure(0.9646, 0.0009)) == "96.46 ± 0.09 %"
    assert percent_with_error(Figure(1.0, 1e-12)) == "100.000000 ± 0.000000 %"
    assert [tick(v) for v in (150.0, 0.05, 1000.0, 1e-5, 2e-5, 2.5)] == [
        "150", "0.05", "1000", "10⁻⁵", "2·10⁻⁵", "2.5"]  # fmt: skip


def test_an_older_report_is_replaced_and_nothing_else_is(tmp_path):
    place = tmp_path / "report"
    write_report(evaluation(), place)
    write_report(evaluation(MODELS[:1]), place)
    assert not (place / "kl-against-size.svg").exists()
    (place / "notes.txt").write_text("mine")
    for attempt in (check_report, lambda path: write_report(evaluation(), path)):
        with pytest.raises(UsageError, match=r"notes\.txt") as caught:
            attempt(place)
        assert "--report" in caught.value.hint
    assert (place / "notes.txt").read_text() == "mine"


def test_what_is_in_the_way_is_listed(tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="other files than a report: a, b, c and 2 more"):
        check_report(tmp_path)


@pytest.mark.parametrize("kind", ["file", "link", "model"])
def test_what_is_in_the_way_is_refused(tmp_path, kind):
    place = tmp_path / "report"
    if kind == "file":
        place.write_text("x")
    elif kind == "link":
        place.symlink_to(tmp_path)
    else:
        place.mkdir()
        (place / "config.json").write_text("{}")
    with pytest.raises(UsageError):
        write_report(evaluation(), place)
    assert not list(tmp_path.glob(".*partial*"))


def test_a_failure_leaves_the_older_report_and_no_half_one(tmp_path, monkeypatch):
    place = tmp_path / "report"
    write_report(evaluation(), place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qtool.checkpoint.output.sync", broken)
    with pytest.raises(Exception, match="No space left"):
        write_report(evaluation(MODELS[:1]), place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_the_object_itself_is_not_changed():
    value = evaluation()
    before = copy.deepcopy(value)
    report_files(value)
    assert value == before


REPORT = {"layers": [{"name": "model.layers.0.a", "relative_error": 0.1, "seconds": 3}, "odd"]}
FOUND = [{"name": "model.layers.0.a", "relative_error": 0.1, "bits_per_weight": None}]


@pytest.mark.parametrize(
    ("model", "report"),
    [
        ("packed/", "packed/qtool-report.json"),
        ("m.gguf", "m.qtool-report.json"),
        ("m-00001-of-00003.gguf", "m.qtool-report.json"),
        ("folder/m.gguf", "folder/qtool-report.json"),
    ],
)
def test_layers_are_found_beside_a_model(tmp_path, model, report):
    path = tmp_path / model
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if model.endswith("/") else path.touch()
    assert layers_beside(path) == []
    (tmp_path / report).write_text(json.dumps(REPORT))
    assert layers_beside(path) == FOUND
    value = with_layers(evaluation(MODELS[:2]), [path, None])
    assert value["results"][0]["layers"] == FOUND
    assert value["results"][1] == evaluation(MODELS[:2])["results"][1]


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": "x"}', '{"layers": [1, null]}', "{}"])
def test_a_damaged_report_beside_a_model_costs_only_the_heat_map(tmp_path, text):
    (tmp_path / "qtool-report.json").write_text(text)
    assert layers_beside(tmp_path) == []
