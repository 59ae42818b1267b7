"""Statistics files: written and read back, as the gguf package reads them, and damaged."""

import random
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from builders.plans import random_windows
from builders.tiny_models import tiny_model

from qtool.calibration.moments import Moments
from qtool.calibration.statistics_file import (
    Statistics,
    read_statistics,
    tensor_names,
    write_statistics,
)
from qtool.checkpoint.locate import locate
from qtool.errors import DamagedError, UnsupportedError, UsageError
from qtool.model.family import FAMILIES, family_of
from qtool.pipeline.calibrate import importance_for, statistics_for
from qtool.pipeline.calibration_run import CalibrationSettings, calibrate_to
from qtool.pipeline.progress import Silent

TOKENS = 40


def moments(columns=33, seed=0, tokens=TOKENS):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(columns, 20, generator=draw).exp()
    return Moments(tokens, values.mean(dim=1), values.square().mean(dim=1))


def statistics():
    held = {"blk.0.attn_q.weight": moments(33), "blk.1.ffn_down.weight": moments(100, seed=1)}
    return Statistics(held, ("builtin", "my notes.txt"), 5, 8)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "statistics.gguf"
    write_statistics(path, statistics(), "llama")
    return path


def test_what_was_written_is_read(written):
    got, expected = read_statistics(written), statistics()
    assert replace(got, moments={}) == replace(expected, moments={})
    assert set(got.moments) == set(expected.moments)
    for name, there in expected.moments.items():
        here = got.moments[name]
        assert here.tokens == TOKENS
        torch.testing.assert_close(here.mean_abs, there.mean_abs, rtol=1e-6, atol=0)
        torch.testing.assert_close(here.diagonal, there.diagonal, rtol=1e-6, atol=0)
        assert here.hessian is None
        assert here.second is here.diagonal


def test_the_gguf_package_reads_an_importance_matrix(written):
    reader = gguf.GGUFReader(written)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["builtin", "my notes.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (5, 8)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    for name, there in statistics().moments.items():
        sums = tensors[f"{name}.in_sum2"].data
        assert sums.shape == (1, len(there.diagonal))
        np.testing.assert_allclose(sums[0], there.diagonal.numpy() * TOKENS, rtol=1e-6)
        absolute = tensors[f"{name}.in_abs"].data
        np.testing.assert_allclose(absolute[0], there.mean_abs.numpy() * TOKENS, rtol=1e-6)
        assert tensors[f"{name}.counts"].data.tolist() == [[TOKENS]]
    assert len(tensors) == 6


def by_hand(path, tensors, fields=None):
    """A GGUF file as another program may write it."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in (fields or {}).items():
        getattr(writer, "add_string" if isinstance(value, str) else "add_uint32")(name, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NAME = "blk.0.attn_q.weight"


def llama_cpp(**changes):
    """The tensors of one linear as llama.cpp's own tool writes them, without in_abs."""
    squares = np.arange(1, 34, dtype=np.float32)[None] * TOKENS
    tensors = {"in_sum2": squares, "counts": np.full((1, 1), TOKENS, np.float32), **changes}
    return {f"{NAME}.{part}": values for part, values in tensors.items() if values is not None}


def test_a_file_of_llama_cpp_has_the_root_mean_square_for_the_mean_magnitude(tmp_path):
    got = read_statistics(by_hand(tmp_path / "imatrix.gguf", llama_cpp()))
    here = got.moments[NAME]
    np.testing.assert_allclose(here.diagonal.numpy(), np.arange(1, 34), rtol=1e-6)
    np.testing.assert_allclose(here.mean_abs.numpy(), np.sqrt(np.arange(1, 34)), rtol=1e-6)
    assert (got.datasets, got.windows, got.sequence_length) == ((), 0, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counts": None}, "no token counts"),
        ({"counts": np.ones((1, 8), np.float32)}, "33 sums of squares for 8 token counts"),
        ({"counts": np.ones((1, 1), np.float16)}, "F16, not F32"),
        ({"in_sum2": np.ones((1, 33), np.float16)}, "F16, not F32"),
        ({"in_abs": np.ones((1, 32), np.float32)}, "33 sums of squares but 32"),
    ],
)
def test_sums_that_contradict_each_other_are_damage_and_name_the_linear(changes, said, tmp_path):
    path = by_hand(tmp_path / "imatrix.gguf", llama_cpp(**changes))
    with pytest.raises(DamagedError, match=said) as caught:
        read_statistics(path)
    assert NAME in caught.value.message
    assert str(path) in caught.value.message


def test_a_field_of_another_type_is_damage(tmp_path):
    path = by_hand(tmp_path / "x.gguf", llama_cpp(), {"imatrix.chunk_count": "many"})
    with pytest.raises(DamagedError, match="malformed"):
        read_statistics(path)


def test_a_gguf_model_is_not_statistics(tmp_path):
    path = by_hand(tmp_path / "model.gguf", {"token_embd.weight": np.ones((4, 32), np.float32)})
    with pytest.raises(UsageError, match="holds no calibration statistics"):
        read_statistics(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"not a GGUF file", b"{}"])
def test_other_files_are_not_statistics(content, tmp_path):
    path = tmp_path / "statistics.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a statistics file") as caught:
        read_statistics(path)
    assert "qtool calibrate" in caught.value.hint


def test_a_missing_file_or_a_directory_is_a_usage_error(tmp_path):
    for path in (tmp_path / "nothing.gguf", tmp_path):
        with pytest.raises(UsageError, match="cannot read statistics"):
            read_statistics(path)


def test_a_file_cut_anywhere_is_refused_and_nothing_else_happens(written):
    content = written.read_bytes()
    end = len(content.rstrip(b"\0"))  # behind it stands padding
    for length in range(0, end - 1, 3):
        written.write_bytes(content[:length])
        with pytest.raises((DamagedError, UsageError)):
            read_statistics(written)


def test_flipped_bytes_are_refused_or_read_and_nothing_else_happens(written):
    content = written.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 2])):
            damaged[draw.randrange(len(damaged))] = draw.choice([0, 1, 128, 255])
        written.write_bytes(bytes(damaged))
        try:
            read_statistics(written)
        except (DamagedError, UnsupportedError, UsageError):
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_family_has_a_name_in_llama_cpp(family):
    known = FAMILIES[family]
    linears = [f"{known.blocks}.1.{path}" for tap in known.taps for path in tap.linears]
    names = tensor_names(known.gguf_architecture, 2, linears)
    assert list(names) == linears
    assert all(name.startswith("blk.1.") and name.endswith(".weight") for name in names.values())
    assert len(set(names.values())) == len(linears)


def test_fused_linears_have_the_names_that_llama_cpp_keeps_them_under():
    known = FAMILIES["phi3"]
    linears = [f"{known.blocks}.0.{path}" for tap in known.taps for path in tap.linears]
    names = set(tensor_names(known.gguf_architecture, 1, linears).values())
    assert names == {
        f"blk.0.{part}.weight" for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    }


def calibrate_at(path, checkpoint, windows, **settings):
    settings = CalibrationSettings(torch.device("cpu"), **settings)
    return calibrate_to(path, checkpoint, windows, settings, Silent())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(checkpoint, statistics file) of a tiny model, calibrated once."""
    directory = tmp_path_factory.mktemp("calibrated")
    checkpoint = locate(str(tiny_model("llama", directory / "model", layers=2)))
    path = directory / "deep" / "statistics.gguf"
    calibrate_at(path, checkpoint, random_windows(3, 33))
    return checkpoint, path


def test_the_input_of_the_head_has_the_name_of_the_tensor_that_serves_as_head(calibrated, tmp_path):
    directory = tiny_model("llama", tmp_path / "tied", layers=1, tied=True)
    windows = random_windows(2, 17)
    tied = calibrate_at(tmp_path / "tied.gguf", locate(str(directory)), windows)
    assert "token_embd.weight" in tied.moments
    assert "output.weight" not in tied.moments
    untied = read_statistics(calibrated[1]).moments
    assert "output.weight" in untied
    assert "token_embd.weight" not in untied


def test_no_path_of_a_text_is_written(calibrated, tmp_path):
    checkpoint, _ = calibrated
    windows = random_windows(1, 9)
    names = ("/home/somebody/secret/notes.txt", "hf:org/data:train", "builtin")
    sources = tuple(replace(windows.sources[0], name=name) for name in names)
    windows = replace(windows, sources=sources)
    found = calibrate_at(tmp_path / "statistics.gguf", checkpoint, windows)
    assert found.datasets == ("notes.txt", "hf:org/data:train", "builtin")


def test_statistics_find_the_taps_they_were_made_for(calibrated):
    checkpoint, path = calibrated
    by_block, read = statistics_for(path, checkpoint)
    taps = family_of(checkpoint.config).taps
    assert {block: set(found) for block, found in by_block.items()} == {
        block: {tap.name for tap in taps} for block in range(2)
    }
    assert by_block[1]["mlp_out"].diagonal.shape == (160,)
    assert by_block[0]["attn_in"].tokens == 3 * 33
    assert (read.windows, read.sequence_length) == (3, 33)
    assert list(Path(path).parent.iterdir()) == [path]  # no temporary file is left


def test_an_existing_file_is_replaced_only_when_asked(calibrated, tmp_path):
    path = tmp_path / "statistics.gguf"
    path.write_text("mine")
    again = (path, calibrated[0], random_windows(3, 33))
    with pytest.raises(UsageError, match="exists"):
        calibrate_at(*again)
    assert path.read_text() == "mine"
    calibrate_at(*again, overwrite=True)
    assert path.read_bytes() == calibrated[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 3}, "lacks 'blk.2"),
        ({"hidden": 128}, "has another size for 'blk.0.attn_q.weight'"),
        ({"intermediate": 192}, "has another size for 'blk.0.ffn_down.weight'"),
    ],
)
def test_statistics_of_another_model_are_a_usage_error(calibrated, changes, said, tmp_path):
    other = locate(str(tiny_model("llama", tmp_path / "model", **{"layers": 2, **changes})))
    with pytest.raises(UsageError, match=said) as caught:
        statistics_for(calibrated[1], other)
    assert "another model" in caught.value.hint


def test_a_linear_that_a_file_lacks_is_left_out_where_that_is_allowed(calibrated, tmp_path):
    checkpoint, path = calibrated
    whole = read_statistics(path)
    gone = {name for name in whole.moments if name.startswith("blk.1.ffn_down")}
    kept = {name: found for name, found in whole.moments.items() if name not in gone}
    # One linear of a tap that the others still describe is no loss.
    del kept["blk.0.attn_q.weight"]
    poor = tmp_path / "poor.gguf"
    write_statistics(poor, replace(whole, moments=kept), "llama")
    with pytest.raises(UsageError, match=r"lacks 'blk\.1\.ffn_down\.weight'"):
        statistics_for(poor, checkpoint)
    by_block, read = statistics_for(poor, checkpoint, complete=False)
    taps = {tap.name for tap in family_of(checkpoint.config).taps}
    assert set(by_block[0]) == taps
    assert set(by_block[1]) == taps - {"mlp_out"}
    assert len(read.warnings) == 1
    assert "blk.1.ffn_down.weight" in read.warnings[0]
    assert "without importance" in read.warnings[0]


def test_importance_comes_by_name_and_shape(calibrated):
    path = calibrated[1]
    names = {"blk.0.attn_q.weight": 64, "output.weight": 64, "blk.9.attn_q.weight": 64}
    found, read = importance_for(path, names)
    assert set(found) == {"blk.0.attn_q.weight", "output.weight"}
    assert found["output.weight"].shape == (64,)
    assert "blk.9.attn_q.weight" in read.warnings[0]
    with pytest.raises(UsageError, match=r"another size for 'output\.weight'"):
        importance_for(path, {"output.weight": 96})
    with pytest.raises(UsageError, match=r"lacks 'blk\.9\.attn_q\.weight'"):
        importance_for(path, {"blk.9.attn_q.weight": 64})


def test_calibration_sums_what_the_model_itself_reads(calibrated):
    """Oracle: hooks on the full model of transformers."""
    from builders.tiny_models import token_ids
    from transformers import AutoModelForCausalLM

    checkpoint, path = calibrated
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, arguments, name=name: seen.update({name: arguments[0].flatten(0, 1)})
            )
    with torch.no_grad():
        model(token_ids(3, 33), use_cache=False)
    x = seen["lm_head"].double()
    head = read_statistics(path).moments["output.weight"]
    torch.testing.assert_close(head.diagonal, x.square().mean(0).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.mean_abs, x.abs().mean(0).float(), rtol=1e-4, atol=1e-6)
    by_block, _ = statistics_for(path, checkpoint)
    for block, taps in by_block.items():
        for tap in family_of(checkpoint.config).taps:
            for linear in tap.linears:
                x = seen[f"model.layers.{block}.{linear}"].double()
                here = taps[tap.name]
                expected = x.square().mean(dim=0).float()
                torch.testing.assert_close(here.diagonal, expected, rtol=1e-4, atol=1e-6)
                expected = x.abs().mean(dim=0).float()
                torch.testing.assert_close(here.mean_abs, expected, rtol=1e-4, atol=1e-6)
