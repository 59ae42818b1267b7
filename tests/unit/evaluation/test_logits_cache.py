"""The logits cache: whole windows or none, continued, repaired, and never another model's."""

import errno
import json
import os
import shutil

import pytest
import torch
from builders.tiny_models import tiny_model, token_ids

from qtool.calibration.tokens import DatasetSource, Windows
from qtool.checkpoint.locate import locate
from qtool.errors import CapacityError, DamagedError, UsageError
from qtool.evaluation import logits_cache
from qtool.evaluation.cache_directory import identity
from qtool.evaluation.logits_cache import LogitsCache
from qtool.evaluation.rows import WholeRows
from qtool.evaluation.runners import StreamedModel
from qtool.evaluation.scores import row_pieces, score_windows
from qtool.evaluation.short_rows import DRAWN, TOP
from qtool.pipeline import evaluate_reference
from qtool.pipeline.evaluate import Extent, evaluate_fully
from qtool.pipeline.progress import Silent

CPU = torch.device("cpu")
WINDOWS, LENGTH, VOCABULARY = 4, 150, 500
KEY = {"reference": "some"}


def logits_of(seed):
    return 2 * torch.randn(
        WINDOWS, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(seed)
    )


def ids():
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (WINDOWS, LENGTH), generator=draw)


def filled(directory, logits, key=KEY):
    cache = LogitsCache(directory, key, ids(), VOCABULARY)
    for index in cache.missing()[0]:
        cache.save(index, row_pieces(logits[index : index + 1]))
    return cache


def files(directory):
    return sorted(directory.glob("*/*.logits"))


def test_what_was_written_is_read_and_is_close_to_the_logits_themselves(tmp_path):
    reference, model = logits_of(2), logits_of(3)
    cache = filled(tmp_path, reference)
    assert LogitsCache(tmp_path, KEY, ids(), VOCABULARY).missing() == ([], 0)
    found = score_windows(row_pieces(model), cache.pieces(), ids())
    exact = score_windows(row_pieces(model), map(WholeRows, row_pieces(reference)), ids())
    for one, other in zip(found, exact, strict=True):
        assert torch.equal(one.reference.right, other.reference.right)
        assert torch.equal(one.reference.same_top, other.reference.same_top)
        torch.testing.assert_close(one.reference.losses, other.reference.losses)
        assert len(one.reference.differences) == 1
        means = [window.reference.divergences.mean().item() for window in (one, other)]
        assert means[0] == pytest.approx(means[1], rel=0.02)
    kept = LENGTH * ((TOP + DRAWN) * (4 + 2) + 2 + 8 + 8) + 4 * VOCABULARY
    assert all(kept < path.stat().st_size < kept + 1000 for path in files(tmp_path))


def test_only_missing_windows_are_asked_for(tmp_path):
    filled(tmp_path, logits_of(2))
    files(tmp_path)[1].unlink()
    again = LogitsCache(tmp_path, KEY, ids(), VOCABULARY)
    missing, damaged = again.missing()
    assert (len(missing), damaged) == (1, 0)
    fewer = LogitsCache(tmp_path, KEY, ids()[:2], VOCABULARY)
    assert set(fewer.missing()[0]) <= set(missing)  # a shorter run finds its windows
    assert LogitsCache(tmp_path, {"reference": "another"}, ids(), VOCABULARY).missing()[0] == [
        *range(WINDOWS)
    ]


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_window_is_computed_again(tmp_path, spoil):
    reference = logits_of(2)
    cache = filled(tmp_path, reference)
    path = files(tmp_path)[0]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(
        {"flip": bytes(raw), "cut": bytes(raw[:-9]), "empty": b"", "foreign": b"x" * 99}[spoil]
    )
    missing, damaged = cache.missing()
    assert (len(missing), damaged) == (1, 1)
    with pytest.raises(DamagedError, match="was changed"):
        list(cache.pieces())
    assert filled(tmp_path, reference).missing() == ([], 0)


def test_a_window_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    cache = LogitsCache(tmp_path, KEY, ids(), VOCABULARY)

    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(logits_cache.Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.save(0, row_pieces(logits_of(2)))
    assert cache.missing()[0] == [*range(WINDOWS)]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["reference.json"]


def test_logits_that_are_not_finite_are_not_kept(tmp_path):
    logits = logits_of(2)
    logits[1, 149, 7] = float("nan")
    cache = LogitsCache(tmp_path, KEY, ids(), VOCABULARY)
    assert cache.save(0, row_pieces(logits[:1]))
    assert not cache.save(1, row_pieces(logits[1:2]))
    assert cache.missing()[0] == [1, 2, 3]


def test_the_same_windows_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        filled(tmp_path / name, logits_of(2))
    one, two = (files(tmp_path / name) for name in ("one", "two"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_a_full_disk_keeps_what_is_there_and_can_be_continued(tmp_path, monkeypatch):
    cache = LogitsCache(tmp_path, KEY, ids(), VOCABULARY)
    pieces = row_pieces(logits_of(2))
    assert cache.save(0, pieces)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logits_cache.Path, "write_bytes", full)
        with pytest.raises(CapacityError, match="No space left") as caught:
            cache.save(1, pieces)
    assert caught.value.resumable
    assert cache.missing() == ([1, 2, 3], 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write the logits cache"):
        LogitsCache(tmp_path / "cache", KEY, ids(), VOCABULARY)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write the logits cache"):
        LogitsCache(tmp_path / "cache", KEY, ids(), VOCABULARY)


# --- with models ---------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    tiny_model("llama", tmp_path / "original", seed=1)
    tiny_model("llama", tmp_path / "other", seed=2)
    return tmp_path


def text():
    return Windows(token_ids(5, 40, 7), (DatasetSource("random", "", 5),), "")


def measured(models, progress=None, **extent):
    both = [locate(str(models / name)) for name in ("other", "original")]
    extent = Extent(cache=models / "cache", **extent)
    return evaluate_fully(both[:1], both[1], text(), CPU, progress or Silent(), extent).results[0]


@pytest.fixture
def runs(monkeypatch):
    """Names of the models that were run, and on how many windows."""
    seen = []
    original = StreamedModel.__init__

    def noted(self, checkpoint, windows, *arguments):
        seen.append((checkpoint.name, len(windows)))
        original(self, checkpoint, windows, *arguments)

    monkeypatch.setattr(StreamedModel, "__init__", noted)
    return seen


def test_the_original_is_run_once(models, runs):
    first = measured(models)
    assert runs == [("original", 5), ("other", 5)]
    second = measured(models)
    assert runs[2:] == [("other", 5)]
    assert first.comparison == second.comparison
    exact = evaluate_fully(
        [locate(str(models / "other"))],
        locate(str(models / "original")),
        text(),
        CPU,
        Silent(),
        Extent(),
    ).results[0]
    assert exact.comparison.approximation is None
    assert first.comparison.approximation.tokens == 5
    assert first.comparison.divergence.value == pytest.approx(
        exact.comparison.divergence.value, rel=0.02
    )
    assert first.comparison.reference_perplexity == exact.comparison.reference_perplexity


def test_an_interrupted_run_continues_from_what_it_has(models, runs, monkeypatch):
    monkeypatch.setattr(evaluate_reference, "TOKENS_AT_ONCE", {"cpu": 80})  # two windows a time
    save, saved = LogitsCache.save, []

    def third_time(self, index, pieces):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(index)
        return save(self, index, pieces)

    monkeypatch.setattr(LogitsCache, "save", third_time)
    with pytest.raises(KeyboardInterrupt):
        measured(models)
    assert runs == [("original", 2), ("original", 2)]
    monkeypatch.setattr(LogitsCache, "save", save)
    del runs[:]
    continued = measured(models)
    assert runs == [("original", 2), ("other", 5)]
    shutil.rmtree(models / "cache")
    assert measured(models).comparison == continued.comparison


def test_damage_is_told(models):
    measured(models)
    path = files(models / "cache")[2]
    path.write_bytes(path.read_bytes()[:-1])
    progress = Silent()
    measured(models, progress)
    assert [code for code, _ in progress.warnings] == ["damaged_cache"]
    assert "1 window" in progress.warnings[0][1]


def test_another_reference_has_another_identity_and_a_hash_is_taken_once(models, monkeypatch):
    cache = models / "cache"
    first, other = (identity(locate(str(models / name)), cache) for name in ("original", "other"))
    assert first != other
    shutil.copytree(models / "original", models / "copy")
    assert identity(locate(str(models / "copy")), cache) == first
    config = json.loads((models / "copy" / "config.json").read_text())
    (models / "copy" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert identity(locate(str(models / "copy")), cache) != first
    monkeypatch.setattr(logits_cache.hashlib, "sha256", lambda: pytest.fail("hashed again"))
    assert identity(locate(str(models / "original")), cache) == first


def test_the_notes_of_hashes_may_be_lost_or_spoiled(models):
    cache, model = models / "cache", locate(str(models / "original"))
    first = identity(model, cache)
    for content in ("{", "[]", '{"x": 1}'):
        (cache / "weights.json").write_text(content)
        assert identity(model, cache) == first


def test_a_changed_file_is_hashed_again(models):
    cache, path = models / "cache", models / "original" / "model.safetensors"
    first = identity(locate(str(models / "original")), cache)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(1, 1))
    assert identity(locate(str(models / "original")), cache) != first


def test_another_model_of_the_same_size_and_time_is_hashed_again(models):
    """As when both come from archives that were made to be reproducible."""
    cache, path = models / "cache", models / "original" / "model.safetensors"
    os.utime(path, ns=(1, 1))
    first = identity(locate(str(models / "original")), cache)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.unlink()
    path.write_bytes(raw)
    os.utime(path, ns=(1, 1))
    assert identity(locate(str(models / "original")), cache) != first
