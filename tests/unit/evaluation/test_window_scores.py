"""What becomes of rows: windows, perplexity by both rules, flips, quantiles, positions."""

import math

import numpy as np
import pytest
import torch
from builders.tiny_models import tiny_model, token_ids
from transformers import AutoModelForCausalLM

from qtool.calibration.tokens import DatasetSource, Windows
from qtool.checkpoint.locate import locate
from qtool.errors import NumericalError, UnsupportedError, UsageError
from qtool.evaluation.buckets import by_position, parse_long_context
from qtool.evaluation.divergence import compared, quantiles, second_half
from qtool.evaluation.rows import PIECE_ROWS, WholeRows
from qtool.evaluation.runners import StreamedModel
from qtool.evaluation.scores import row_pieces, score_windows
from qtool.pipeline.evaluate import Extent, evaluate, evaluate_fully, metrics_of
from qtool.pipeline.progress import Silent

CPU = torch.device("cpu")
LENGTH = PIECE_ROWS + 37  # the last piece of a window is shorter


def logits_of(seed, windows=3, length=LENGTH, vocabulary=61):
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(windows, length, vocabulary, generator=draw)


def ids_below(vocabulary, windows=3, length=LENGTH):
    draw = torch.Generator().manual_seed(9)
    return torch.randint(0, vocabulary, (windows, length), generator=draw)


def scored(model, reference=None, ids=None):
    expected = None if reference is None else map(WholeRows, row_pieces(reference))
    return score_windows(row_pieces(model), expected, ids_below(61) if ids is None else ids)


def test_figures_are_those_of_loops_over_tokens():
    model, reference, ids = logits_of(1), logits_of(2), ids_below(61)
    found = compared(scored(model, reference))
    losses, reference_losses, flips, same = [], [], [], []
    for window in range(3):
        for place in range(LENGTH):
            p, q = reference[window, place], model[window, place]
            same.append(int(p.argmax()) == int(q.argmax()))
            if place + 1 == LENGTH:
                continue
            token = int(ids[window, place + 1])
            losses.append(-float(q.double().log_softmax(-1)[token]))
            reference_losses.append(-float(p.double().log_softmax(-1)[token]))
            flips.append((int(p.argmax()) == token) != (int(q.argmax()) == token))
    assert found.perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert found.ratio.value == pytest.approx(
        math.exp(np.mean(losses) - np.mean(reference_losses)), rel=1e-6
    )
    assert found.flips.value == pytest.approx(np.mean(flips))
    assert found.top1.value == pytest.approx(np.mean(same))
    assert found.flips.tokens == 3 * (LENGTH - 1)
    assert found.top1.tokens == found.divergence.tokens == 3 * LENGTH
    assert 0 < found.flips.value < 1 - found.top1.value


def test_a_ratio_has_the_error_of_pairs_not_that_of_two_perplexities():
    reference = logits_of(3)
    found = compared(scored(reference + 0.01 * logits_of(4), reference))
    assert found.ratio.standard_error < 0.2 * found.perplexity.standard_error


@pytest.mark.parametrize("length", [2, 3, 4, 31, 32])
def test_the_second_half_begins_where_llama_perplexity_does(length):
    losses = torch.arange(length - 1, dtype=torch.float64)  # loss at a position is its number
    expected = list(range(length // 2, length - 1))
    found = second_half([losses])
    assert [half.tolist() for half in found] == ([expected] if expected else [])


@pytest.mark.parametrize(("spoiled", "named"), [("model", "small"), ("reference", "original")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused_and_the_model_named(spoiled, named, value):
    logits = {"model": logits_of(1), "reference": logits_of(2)}
    logits[spoiled][1, PIECE_ROWS + 3, 5] = value
    expected = map(WholeRows, row_pieces(logits["reference"]))
    with pytest.raises(NumericalError, match=f"{named} gives logits that are not finite") as caught:
        score_windows(
            row_pieces(logits["model"]), expected, ids_below(61), names=("small", "original")
        )
    assert ("more bits" in caught.value.hint) is (spoiled == "model")


def test_quantiles_and_their_errors():
    draw = torch.Generator().manual_seed(0)
    windows = [torch.rand(500, generator=draw).double() for _ in range(16)]
    median, p99, p999 = quantiles(windows)
    assert (median.value, p99.value, p999.value) == pytest.approx((0.5, 0.99, 0.999), abs=0.02)
    # The deviation of a uniform sample's median is 1 / (2 sqrt n).
    assert median.standard_error == pytest.approx(0.5 / math.sqrt(8000), rel=0.5)
    assert p999.standard_error < p99.standard_error < median.standard_error
    # Windows that are alike inside and differ from each other tell less than their tokens suggest.
    unlike = [torch.full((500,), float(number)).double() for number in range(16)]
    assert quantiles(unlike)[0].standard_error > 1
    assert math.isnan(quantiles(windows[:1])[0].standard_error)


def test_positions_split_the_tokens_and_lose_none():
    model, reference = logits_of(5), logits_of(6)
    model[:, 64:] = reference[:, 64:]  # only the beginning has changed
    scores = scored(model, reference)
    buckets = by_position(scores, (10, 64, LENGTH))
    assert [(b.start, b.stop) for b in buckets] == [(0, 10), (10, 64), (64, LENGTH)]
    assert [b.loss.tokens for b in buckets] == [30, 3 * 54, 3 * (LENGTH - 65)]
    assert buckets[0].divergence.value > 0.1
    assert buckets[2].divergence.value == 0
    assert buckets[2].loss == buckets[2].reference_loss
    total = sum(b.loss.value * b.loss.tokens for b in buckets) / (3 * (LENGTH - 1))
    assert math.exp(total) == pytest.approx(compared(scores).perplexity.value)


@pytest.mark.parametrize(
    ("text", "ends"), [("4k,8k,16k", (4096, 8192, 16384)), (" 128 , 1K", (128, 1024)), ("2", (2,))]
)
def test_lengths_are_read(text, ends):
    assert parse_long_context(text) == ends


@pytest.mark.parametrize(
    "text", ["", "8k,4k", "4k,4k", "1", "four", "4k,", "4m", "9999999k", "-4k"]
)
def test_lengths_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match="--long-ctx"):
        parse_long_context(text)


# --- whole models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a model, a perturbed one and one with another vocabulary."""
    directory = tmp_path_factory.mktemp("models")
    tiny_model("llama", directory / "original", seed=1, hidden=64)
    tiny_model("llama", directory / "other", seed=2, hidden=64)
    tiny_model("llama", directory / "larger", seed=1, vocab_size=320)
    return directory


def windows(count=3, length=LENGTH):
    return Windows(token_ids(count, length, 5), (DatasetSource("random", "", count),), "")


def test_perplexity_is_that_of_an_independent_script(models):
    found = evaluate([locate(str(models / "original"))], None, windows(), CPU, Silent())[0]
    # --- the script ---
    model = AutoModelForCausalLM.from_pretrained(models / "original", dtype=torch.float32)
    total, half, count, half_count = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for ids in token_ids(3, LENGTH, 5).tolist():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for place, token in enumerate(ids[1:]):
                loss = -scores[place, token].item()
                total, count = total + loss, count + 1
                if place >= LENGTH // 2:
                    half, half_count = half + loss, half_count + 1
    # ---
    assert found.perplexity.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.llama_cpp.value == pytest.approx(math.exp(half / half_count), rel=1e-4)
    assert (found.perplexity.tokens, found.llama_cpp.tokens) == (count, half_count)


def test_pieces_are_the_rows_of_the_logits(models, tmp_path):
    text = windows().ids
    model = StreamedModel(locate(str(models / "original")), text, CPU, torch.float32, tmp_path)
    pieces = list(model.pieces())
    assert [len(piece) for piece in pieces[:3]] == [PIECE_ROWS, 37, PIECE_ROWS]
    whole = torch.cat(list(model.logits()))
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)


def test_every_metric_has_an_error_and_a_number_of_tokens(models):
    both = [locate(str(models / name)) for name in ("other", "original")]
    found = metrics_of(
        evaluate(both[:1], both[1], windows(), CPU, Silent())[0],
        ("ppl", "ppl_llama_cpp", "kld", "top1", "flips"),
    )
    assert all(metric["tokens"] >= 3 * (LENGTH // 2) for metric in found.values())
    errors = {f"{m}.{key}": value for m in found for key, value in found[m].items() if "se" in key}
    assert len(errors) == 3 + 3 + 4 + 1 + 1
    # A random model is hardly ever right, so there may be no flips at all.
    assert all(value > 0 for name, value in errors.items() if not name.startswith("flips"))
    assert found["ppl_llama_cpp"]["reference"] != found["ppl"]["reference"]
    assert found["kld"]["median"] < found["kld"]["p99"] < found["kld"]["p999"]


def test_the_noise_floor_is_small_and_not_zero(models):
    reference = locate(str(models / "original"))
    found = evaluate_fully(
        [reference], reference, windows(), CPU, Silent(), Extent(noise_floor=True)
    )
    assert found.results[0].comparison.divergence.value == 0
    assert 0 < found.noise_floor.divergence.value < 0.01


def test_another_vocabulary_is_refused_before_anything_is_run(models, monkeypatch):
    monkeypatch.setattr(StreamedModel, "__init__", lambda *_: pytest.fail("a model was run"))
    both = [locate(str(models / name)) for name in ("larger", "original")]
    with pytest.raises(UnsupportedError, match="larger predicts 320 tokens, the reference 300"):
        evaluate(both[:1], both[1], windows(), CPU, Silent())
