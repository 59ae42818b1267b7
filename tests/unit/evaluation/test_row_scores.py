"""Losses, likeliest tokens and divergences of rows of logits, against float64 and closed forms."""

import math

import pytest
import torch

from qtool.evaluation.rows import BLOCK, WholeRows, blocks_of, score_rows


def draw(rows, vocabulary, seed, spread=3.0):
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def divergence_slowly(reference, model):
    """Token by token in Python's floats."""
    found = []
    for a, b in zip(reference.tolist(), model.tolist(), strict=True):
        total_a, total_b = (math.fsum(math.exp(x) for x in row) for row in (a, b))
        found.append(
            math.fsum(
                math.exp(x) / total_a * (x - math.log(total_a) - y + math.log(total_b))
                for x, y in zip(a, b, strict=True)
            )
        )
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (33, 100), (5, 576), (2, 2)])
def test_scores_are_those_of_the_definition(rows, vocabulary):
    model, reference = draw(rows, vocabulary, 1), draw(rows, vocabulary, 2)
    targets = torch.arange(rows) % vocabulary
    found = WholeRows(reference).against(model, targets)
    torch.testing.assert_close(
        found.divergences, divergence_slowly(reference, model), rtol=1e-6, atol=1e-6
    )
    for losses, logits in ((found.losses, model), (found.reference_losses, reference)):
        expected = -logits.double().log_softmax(-1)[torch.arange(rows), targets]
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert found.top.tolist() == [row.index(max(row)) for row in model.tolist()]
    assert found.reference_top.tolist() == [row.index(max(row)) for row in reference.tolist()]
    alone = score_rows(model, targets)
    assert torch.equal(alone.losses, found.losses)
    assert alone.divergences is None


def test_a_model_does_not_diverge_from_itself_at_all():
    logits = draw(50, 1001, 3, spread=20.0)
    found = WholeRows(logits).against(logits.clone(), torch.zeros(50, dtype=torch.int64))
    assert found.divergences.tolist() == [0.0] * 50


@pytest.mark.parametrize("raised", [-2.0, 1e-3, 0.5, 6.0])
def test_a_perturbation_of_known_divergence_is_recovered(raised):
    """One logit of a uniform distribution raised by c: log((V - 1 + e^c) / V) - c / V."""
    vocabulary = 300
    reference = torch.full((4, vocabulary), 1.5)
    model = reference.clone()
    model[:, 17] += raised
    known = math.log((vocabulary - 1 + math.exp(raised)) / vocabulary) - raised / vocabulary
    found = WholeRows(reference).against(model, torch.zeros(4, dtype=torch.int64)).divergences
    assert found.tolist() == pytest.approx([known] * 4, abs=1e-6)


def test_a_shift_of_all_logits_means_nothing():
    reference, model = draw(9, 200, 4), draw(9, 200, 5)
    targets = torch.zeros(9, dtype=torch.int64)
    plain = WholeRows(reference).against(model, targets)
    shifted = WholeRows(reference + 30).against(model - 12, targets)
    torch.testing.assert_close(shifted.divergences, plain.divergences, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shifted.losses, plain.losses, rtol=1e-4, atol=1e-5)


def test_rows_are_taken_as_many_at_a_time_as_the_cache_holds():
    logits = torch.zeros(10, BLOCK["cpu"] // 4)
    assert [block.stop - block.start for block in blocks_of(logits)][:2] == [4, 4]
    assert len(blocks_of(torch.zeros(3, 2 * BLOCK["cpu"]))) == 3  # longer rows go one by one
    reference, model = draw(7, BLOCK["cpu"] // 3, 6), draw(7, BLOCK["cpu"] // 3, 7)
    targets = torch.arange(7)
    together = WholeRows(reference).against(model, targets)
    for row in range(7):
        part = slice(row, row + 1)
        alone = WholeRows(reference[part]).against(model[part], targets[part])
        assert alone.divergences.item() == pytest.approx(together.divergences[row].item(), rel=1e-5)


def test_the_logits_themselves_stay_as_they_are():
    reference, model = draw(3, 50, 8), draw(3, 50, 9)
    before = reference.clone(), model.clone()
    WholeRows(reference).against(model, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(reference, before[0])
    assert torch.equal(model, before[1])
