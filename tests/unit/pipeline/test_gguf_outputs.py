"""Parts of a GGUF output: what carries over, which rules count, what is placed and checked."""

import pytest
import torch

from qtool.checkpoint.gguf_values import text, u32
from qtool.checkpoint.output import OutputFile, check_output, output_place
from qtool.errors import DamagedError, NumericalError, UsageError
from qtool.formats.ggml_blocks import dequantize, pack
from qtool.grids.ggml import GgmlGrid
from qtool.grids.integer import IntegerGrid, IntegerParameters
from qtool.grids.protocol import QuantizedTensor
from qtool.model.conversion import ConvertedTensor
from qtool.pipeline.gguf_output import PlannedGguf, PlannedTensor, verify_gguf, write_modelfile
from qtool.pipeline.gguf_plan import check_type_rules
from qtool.pipeline.gguf_rows import encoded, packed
from qtool.pipeline.gguf_sources import as_blocks, same_codes
from qtool.pipeline.outputs import CalibrationNote
from qtool.recipe.schema import Rule

ROWS, COLUMNS = 5, 96


def integers(bits, size=32, *, symmetric=True, granularity="group", dtype=torch.float16):
    return IntegerGrid(
        bits=bits,
        group_size=size,
        symmetric=symmetric,
        granularity=granularity,
        search=False,
        scale_dtype=dtype,
        lowest_zero=0,
    )


@pytest.mark.parametrize(
    ("grid", "columns", "kind"),
    [
        (integers(4), 64, "Q4_0"),
        (integers(8), 64, "Q8_0"),
        (integers(8, 64), 192, "Q8_0"),
        (integers(4, granularity="channel"), 96, "Q4_0"),
        (integers(8, granularity="tensor"), 96, "Q8_0"),
        (integers(8, dtype=torch.bfloat16), 64, "Q8_0"),
        (integers(4, symmetric=False), 64, None),
        (integers(3), 64, None),
        (integers(2), 64, None),
        (integers(8, 16), 64, None),  # two scales in a block
        (integers(8, 48), 96, None),  # a scale that ends within a block
        (integers(8, granularity="channel"), 80, None),  # half a block
        (GgmlGrid("Q8_0"), 64, None),
    ],
)
def test_symmetric_integers_are_blocks_where_scales_cover_whole_ones(grid, columns, kind):
    assert same_codes(grid, columns) == kind


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
@pytest.mark.parametrize("size", [32, 96])
def test_every_code_and_scale_carries_over_bit_for_bit(bits, kind, size):
    grid = integers(bits, size)
    draw = torch.Generator().manual_seed(bits + size)
    codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=draw).to(torch.uint8)
    codes[0, :2] = torch.tensor([0, 2**bits - 1])  # the lowest has no positive counterpart
    scale = torch.rand(ROWS, COLUMNS // size, generator=draw).half().float()
    zero = torch.full_like(scale, 2 ** (bits - 1))
    quantized = QuantizedTensor(codes, IntegerParameters(scale, zero), grid)
    stored = pack(as_blocks(quantized, kind))
    assert torch.equal(dequantize(kind, stored, COLUMNS), quantized.dequantize())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS"])
def test_weights_beyond_a_types_scales_are_refused_by_name(kind):
    rows = torch.ones(2, 256)
    rows[1, 7] = 1e30
    with pytest.raises(NumericalError, match=f"'blk.0.x' has values beyond what {kind} holds"):
        encoded("blk.0.x", kind, rows)
    grid = GgmlGrid(kind)
    parameters = grid.fit(rows)
    with pytest.raises(NumericalError, match="beyond"):
        packed("blk.0.x", QuantizedTensor(grid.encode(rows, parameters), parameters, grid))
    assert encoded("blk.0.x", kind, rows.clamp(max=1e3)).dtype == torch.uint8


def test_float16_overflow_is_refused_and_bfloat16_is_not():
    rows = torch.full((1, 4), 65520.0)
    with pytest.raises(NumericalError, match="F16"):
        encoded("x", "F16", rows)
    assert torch.equal(encoded("x", "BF16", rows).view(torch.bfloat16).float(), rows.bfloat16())


TENSORS = (
    ConvertedTensor("token_embd.weight", "model.embed_tokens.weight", (8, 32)),
    ConvertedTensor("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", (8, 32)),
    ConvertedTensor("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight", (32,)),
)
HEAD = ConvertedTensor("output.weight", "lm_head.weight", (8, 32))


@pytest.mark.parametrize("match", ["attn_q", "q_proj", "blk.*", "re:blk", "embed_tokens", "*"])
def test_a_rule_names_matrices_in_either_way(match):
    check_type_rules("m", TENSORS, [Rule(match=match, type="Q8_0")])


@pytest.mark.parametrize("match", ["attn_norm", "attn_k", "blk.1.*"])
def test_a_rule_that_names_no_matrix_is_refused_with_examples(match):
    with pytest.raises(UsageError) as refusal:
        check_type_rules("m", TENSORS, [Rule(match=match, type="Q8_0")])
    assert match in refusal.value.message
    assert "blk.0.attn_q.weight or model.layers.0.self_attn.q_proj.weight" in refusal.value.hint


@pytest.mark.parametrize("match", ["lm_head", "output"])
def test_a_head_that_the_embeddings_serve_as_cannot_be_named(match):
    rule = Rule(match=match, type="Q8_0")
    with pytest.raises(UsageError, match="embeddings of m serve as its head"):
        check_type_rules("m", TENSORS, [rule])
    check_type_rules("m", (*TENSORS, HEAD), [rule])


def test_rules_of_other_formats_are_none_of_ours():
    rules = [Rule(match="nothing", bits=8), Rule(match="nothing", keep=True)]
    check_type_rules("m", TENSORS, rules)


def output(**settings):
    tensors = tuple(PlannedTensor(x, "F32") for x in TENSORS)
    return PlannedGguf("F32", "m", tensors, {"general.architecture": text("llama")}, **settings)


def write(planned, directory):
    """Write ones under every name, with the container's own writer."""
    from qtool.checkpoint.gguf_writer import GgufWriter

    with GgufWriter(planned.layout, directory) as writer:
        for name, tensor in planned.layout.tensors.items():
            writer.write(name, [torch.ones(tensor.shape).view(torch.uint8).numpy().data])


def test_a_note_is_part_of_the_plan_and_of_its_bytes():
    note = CalibrationNote("stats.gguf", ("a.txt", "builtin"), 7, 3)
    noted = output().noted(note)
    assert noted.metadata["quantize.imatrix.dataset"] == text("a.txt, builtin")
    assert noted.metadata["quantize.imatrix.entries_count"] == u32(3)
    assert noted.n_bytes > output().n_bytes
    assert output().noted(None) == output()


def test_what_is_opened_is_the_file_or_its_first_part(tmp_path):
    assert output().opened_at(tmp_path) == tmp_path / "m.gguf"
    assert output().opened_at(tmp_path / "x.gguf") == tmp_path / "x.gguf"
    parts = output(split_bytes=1200)
    assert parts.n_files == 3
    assert parts.opened_at(tmp_path / "x.gguf") == tmp_path / "x-00001-of-00003.gguf"


def test_verification_sees_types_shapes_missing_tensors_and_values(tmp_path):
    planned = output()
    write(planned, tmp_path)
    verify_gguf(planned, tmp_path)
    others = {
        "type": PlannedTensor(TENSORS[0], "F16"),
        "shape": PlannedTensor(ConvertedTensor("token_embd.weight", None, (8, 16)), "F32"),
        "name": PlannedTensor(HEAD, "F32"),
    }
    for tensor in others.values():
        wrong = output()
        object.__setattr__(wrong, "tensors", (tensor, *planned.tensors[1:]))
        with pytest.raises(DamagedError, match=tensor.converted.name):
            verify_gguf(wrong, tmp_path)
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    raw[-4:] = b"\xff\xff\xff\x7f"  # the last norm
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(DamagedError, match=r"attn_norm\.weight.*not finite"):
        verify_gguf(planned, tmp_path)


def test_a_modelfile_names_the_first_part(tmp_path):
    write_modelfile(output(split_bytes=1200), tmp_path)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./m-00001-of-00003.gguf\n")


# Places


def fill(place, *names):
    with place as directory:
        for name in names:
            (directory / name).write_text("new")
        return place.commit()


def test_parts_and_small_files_get_their_names_and_nothing_else_does(tmp_path):
    parts = ("x-00001-of-00002.gguf", "x-00002-of-00002.gguf")
    made = fill(OutputFile(tmp_path / "x.gguf"), *parts, "Modelfile", "README.md", "SHA256SUMS")
    assert made == tmp_path / parts[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*parts, "x.Modelfile"]


def test_what_is_replaced_leaves_no_part_of_an_older_model(tmp_path):
    for name in ("x.gguf", "x-00001-of-00009.gguf", "y.gguf", "x-extra.gguf"):
        (tmp_path / name).write_text("old")
    fill(OutputFile(tmp_path / "x.gguf", overwrite=True), "x-00001-of-00001.gguf")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"x-00001-of-00001.gguf": "new", "y.gguf": "old", "x-extra.gguf": "old"}


def test_a_failure_leaves_the_older_file(tmp_path):
    (tmp_path / "x.gguf").write_text("old")
    with OutputFile(tmp_path / "x.gguf", overwrite=True) as directory:
        (directory / "x.gguf").write_text("half")  # and no commit
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.gguf": "old"}


@pytest.mark.parametrize("source", ["x.gguf", "x-00002-of-00003.gguf"])
def test_a_source_is_no_place(tmp_path, source):
    (tmp_path / source).write_text("precious")
    (tmp_path / "link.gguf").symlink_to(source)
    for named in (source, "link.gguf"):
        with pytest.raises(UsageError, match="is the input"):
            OutputFile(tmp_path / "x.gguf", overwrite=True, sources=[tmp_path / named])


@pytest.mark.parametrize("taken", ["x.gguf", "x-00001-of-00003.gguf", "x.Modelfile"])
def test_what_exists_is_replaced_only_if_asked(tmp_path, taken):
    (tmp_path / taken).write_text("precious")
    with pytest.raises(UsageError, match=f"{taken} exists"):
        output_place(tmp_path / "x.gguf")
    output_place(tmp_path / "x.gguf", overwrite=True)
    output_place(tmp_path / "other.gguf")


def test_links_directories_and_capitals_are_no_places(tmp_path):
    (tmp_path / "link.gguf").symlink_to("nowhere.gguf")
    (tmp_path / "directory.gguf").mkdir()
    for name, words in (("link", "is a link"), ("directory", "is a directory")):
        with pytest.raises(UsageError, match=words):
            output_place(tmp_path / f"{name}.gguf", overwrite=True)
    with pytest.raises(UsageError, match="GGUF"):
        output_place(tmp_path / "x.GGUF")


@pytest.mark.parametrize(
    ("names", "replaceable"),
    [
        (("m-Q8_0.gguf",), True),
        (("m-Q8_0.gguf", "Modelfile"), True),
        (("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"), True),
        (("a.gguf", "b.gguf"), False),
        (("m-Q8_0.gguf", "notes.txt"), False),
        (("Modelfile",), False),
        (("a.gguf", "b.gguf", "qtool-recipe.yaml"), True),
    ],
)
def test_a_directory_is_replaced_only_if_it_is_one_model(tmp_path, names, replaceable):
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text("")
    if replaceable:
        assert check_output(tmp_path / "out", overwrite=True) == tmp_path / "out"
    else:
        with pytest.raises(UsageError, match="does not look like a model"):
            check_output(tmp_path / "out", overwrite=True)
