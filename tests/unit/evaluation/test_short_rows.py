"""Divergence from a reference of which only a few hundred tokens a row are kept."""

import pytest
import torch

from qtool.evaluation.rows import WholeRows
from qtool.evaluation.short_rows import shortened

VOCABULARY = 3001


def distributions(rows, seed=1, spread=2.0, noise=0.4):
    draw = torch.Generator().manual_seed(seed)
    reference = spread * torch.randn(rows, VOCABULARY, generator=draw)
    return reference, reference + noise * torch.randn(rows, VOCABULARY, generator=draw)


def short(reference, *, kept=(), top=64, drawn=32, seed=0):
    targets = torch.arange(len(reference))
    draw = torch.Generator().manual_seed(seed)
    places = torch.tensor(kept, dtype=torch.int64)
    return shortened(reference, targets, places, draw, top=top, drawn=drawn), targets


def test_what_is_kept_is_the_top_and_a_draw_of_the_rest():
    reference, _ = distributions(20)
    rows, targets = short(reference)
    logs = reference.double().log_softmax(-1)
    assert rows.ids.shape == (20, 96)
    assert torch.equal(rows.ids[:, :64].sort(dim=1)[0], logs.topk(64)[1].sort(dim=1)[0])
    torch.testing.assert_close(rows.logs.double(), logs.gather(1, rows.ids), atol=1e-6, rtol=1e-6)
    for row in range(20):  # nothing of the top is drawn again
        assert not set(rows.ids[row, :64].tolist()) & set(rows.ids[row, 64:].tolist())
    torch.testing.assert_close(rows.tail, 1 - logs.topk(64)[0].exp().sum(-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rows.losses, -logs[torch.arange(20), targets], atol=1e-6, rtol=1e-6)


def test_the_estimate_is_right_on_average_and_lumping_the_tail_is_not():
    reference, model = distributions(200)
    targets = torch.arange(200)
    exact = WholeRows(reference).against(model, targets).divergences
    rows, _ = short(reference)
    assert rows.tail.mean() > 0.2  # most of what is left out would be missed
    errors = torch.stack(
        [
            short(reference, seed=seed)[0].against(model, targets).divergences - exact
            for seed in range(5)
        ]
    )
    assert errors.mean().abs() < 4 * errors.std() / errors.numel() ** 0.5
    assert errors.std() < 0.5 * exact.mean()
    q = model.double().log_softmax(-1)
    p, ids = rows.logs[:, :64].double(), rows.ids[:, :64]
    lumped = (p.exp() * (p - q.gather(1, ids))).sum(-1)
    lumped += rows.tail * (rows.tail / (1 - q.gather(1, ids).exp().sum(-1))).log()
    assert (exact - lumped).mean() > 0.2 * exact.mean()
    assert errors.mean().abs() < 0.1 * (exact - lumped).mean()


def test_a_model_does_not_diverge_from_its_own_short_rows():
    reference, _ = distributions(50, spread=6.0)
    rows, targets = short(reference)
    assert rows.against(reference, targets).divergences.max() < 2e-6


def test_other_figures_are_exact():
    reference, model = distributions(40)
    rows, targets = short(reference)
    exact = WholeRows(reference).against(model, targets)
    found = rows.against(model, targets)
    assert torch.equal(found.losses, exact.losses)
    assert torch.equal(found.reference_losses, exact.reference_losses)
    assert torch.equal(found.top, exact.top)
    assert torch.equal(found.reference_top, exact.reference_top)


def test_a_vocabulary_that_fits_leaves_no_tail_and_no_error():
    reference, model = distributions(10)
    reference, model = reference[:, :60].contiguous(), model[:, :60].contiguous()
    rows, targets = short(reference, kept=(0, 9))
    exact = WholeRows(reference).against(model, targets).divergences
    found = rows.against(model, targets)
    torch.testing.assert_close(found.divergences, exact, atol=1e-6, rtol=1e-5)
    assert rows.ids.shape == (10, 60)
    assert rows.tail.tolist() == [0.0] * 10
    assert found.differences.abs().max() < 1e-6


def test_the_error_is_measured_on_the_rows_that_are_kept_whole():
    reference, model = distributions(30)
    rows, targets = short(reference, kept=(3, 28), drawn=1)
    exact = WholeRows(reference).against(model, targets).divergences
    found = rows.against(model, targets)
    expected = (found.divergences - exact)[[3, 28]]
    torch.testing.assert_close(found.differences, expected, atol=1e-6, rtol=1e-4)
    assert expected.abs().min() > 1e-4  # one draw is little


def test_equal_logits_flip_nothing():
    """In 16 bits the largest logits are often equal, and `topk` and `max` pick different ones."""
    reference, _ = distributions(300)
    reference = (4 * reference).round() / 4
    rows, targets = short(reference)
    found = rows.against(reference, targets)
    assert torch.equal(found.top, found.reference_top)


@pytest.mark.parametrize("cut", [7, 28])
def test_a_part_of_short_rows_is_the_short_rows_of_a_part(cut):
    reference, model = distributions(30)
    rows, targets = short(reference, kept=(3, 28))
    whole = rows.against(model, targets)
    parts = [
        rows.rows(part.start, part.stop).against(model[part], targets[part])
        for part in (slice(0, cut), slice(cut, 30))
    ]
    assert torch.equal(torch.cat([p.divergences for p in parts]), whole.divergences)
    torch.testing.assert_close(torch.cat([p.differences for p in parts]), whole.differences)
