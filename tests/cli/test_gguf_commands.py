"""GGUF as its users meet it: what is written, from what, what is refused, what stays untouched."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import yaml
from builders.command_line import ROOT, SMALL, contents
from builders.tiny_models import tiny_model
from safetensors.torch import load_file, save_file

from qtool.cli.app import run

SIZES = {"hidden": 256, "intermediate": 512, "layers": 1, "dtype": torch.bfloat16}
EVAL = ("--ctx", "32", "-n", "2")
NO_EVAL = ("--eval", "none", "-q")
# File type -> the types that a model of one block gets, its head included.
TYPES = {
    "F32": {"F32"},
    "F16": {"F16", "F32"},
    "BF16": {"BF16", "F32"},
    "Q8_0": {"Q8_0", "F32"},
    "Q6_K": {"Q6_K", "F32"},
    "Q5_K_M": {"Q5_K", "Q6_K", "F32"},
    "Q5_K_S": {"Q5_K", "Q6_K", "F32"},
    "Q5_0": {"Q5_0", "Q6_K", "F32"},
    "Q5_1": {"Q5_1", "Q6_K", "F32"},
    "Q4_K_M": {"Q4_K", "Q6_K", "F32"},
    "Q4_K_S": {"Q4_K", "Q5_K", "Q6_K", "F32"},
    "Q4_0": {"Q4_0", "Q6_K", "F32"},
    "Q4_1": {"Q4_1", "Q6_K", "F32"},
    "IQ4_XS": {"IQ4_XS", "Q6_K", "F32"},
    "IQ4_NL": {"IQ4_NL", "Q6_K", "F32"},
    "Q3_K_L": {"Q3_K", "Q5_K", "Q6_K", "F32"},
    "Q3_K_M": {"Q3_K", "Q4_K", "Q5_K", "Q6_K", "F32"},
    "Q3_K_S": {"Q3_K", "Q6_K", "F32"},
    "Q2_K": {"Q2_K", "Q3_K", "Q6_K", "F32"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Models, statistics and GGUF files of them; not to be changed."""
    directory = tmp_path_factory.mktemp("sources")
    model = tiny_model("llama", directory / "model", **SIZES)
    tiny_model("llama", directory / "tied", tied=True, **SIZES)
    tiny_model("llama", directory / "narrow", hidden=48, intermediate=80, layers=1)
    statistics = ("calibrate", model, "-o", directory / "stats.gguf", *SMALL, "-q")
    assert run([str(argument) for argument in statistics]) == 0
    for kind in ("F16", "Q4_K_M"):
        arguments = ("export", model, "-f", f"gguf:{kind}", "-o", directory / f"{kind}.gguf", "-q")
        assert run([str(argument) for argument in arguments]) == 0
    return directory


@pytest.fixture
def place(sources, tmp_path, monkeypatch):
    """An own working directory with links to the models in it, and copies of the files."""
    for path in sources.iterdir():
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
        else:
            shutil.copy(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(outcome, code, *words):
    assert outcome.code == code, outcome.err
    lines = [x for x in outcome.err.splitlines() if x.startswith(("error: ", "  try: ", "Trace"))]
    assert [line[:6] for line in lines] == ["error:", "  try:"], outcome.err
    for word in words:
        assert word in outcome.err


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What is written


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_written_and_gguf_py_reads_it(place, qtool, kind):
    value = qtool("export", "./model", "-f", f"gguf:{kind}", "-o", "x.gguf", "--json").value
    tensors = tensors_of(place / "x.gguf")
    assert {tensor.tensor_type.name for tensor in tensors.values()} == TYPES[kind]
    assert sum(value["types"].values()) == len(tensors)
    (artifact,) = value["artifacts"]
    assert artifact["bytes"] == (place / "x.gguf").stat().st_size
    assert artifact["sha256"] == {"x.gguf": digest(place / "x.gguf")}
    original = load_file(place / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    stored = tensors["blk.0.ffn_up.weight"]
    found = gguf.dequantize(stored.data, stored.tensor_type)
    error = np.linalg.norm(found - original.float().numpy()) / float(original.float().norm())
    assert error < (0.4 if kind == "Q2_K" else 0.25)
    weights = sum(tensor.n_elements for tensor in tensors.values())
    n_bytes = sum(tensor.n_bytes for tensor in tensors.values())
    assert value["bits_per_weight"] == pytest.approx(8 * n_bytes / weights)


def test_a_plan_names_what_is_then_written_and_writes_nothing(place, qtool):
    before = contents(place)
    arguments = ("export", "./model", "-f", "gguf:Q4_K_M", "--split-max-size", "200KB")
    planned = qtool(*arguments, "--dry-run", "--json").value
    assert contents(place) == before
    written = qtool(*arguments, "--json").value
    assert planned["artifacts"][0]["bytes"] == written["artifacts"][0]["bytes"]
    assert planned["artifacts"][0]["path"] == written["artifacts"][0]["path"]
    assert planned["types"] == written["types"]


def test_the_command_after_a_dry_run_does_what_was_planned(place, qtool):
    flags = ("-f", "gguf:Q4_K_M", "--override", "attn_*=Q8_0", "--embed-type", "F16")
    arguments = ("export", "./model", *flags, "-o", "with-types.gguf")
    last = qtool(*arguments, "--dry-run").out.splitlines()[-1]
    assert "'attn_*=Q8_0'" in last
    words = [word.strip("'") for word in last.split()[2:]]
    assert qtool(*words).code == 0
    tensors = tensors_of(place / "with-types.gguf")
    assert tensors["blk.0.attn_v.weight"].tensor_type.name == "Q8_0"
    assert tensors["token_embd.weight"].tensor_type.name == "F16"


def test_the_commands_that_results_propose_run(place, qtool):
    for output in ("one.gguf", "directory"):
        arguments = ("-f", "gguf:Q8_0", "-o", output, "--split-max-size", "100KB")
        line = qtool("export", "./model", *arguments).out.splitlines()[-1]
        assert "-00001-of-" in line
        assert qtool(*line.split()[2:], *EVAL).code == 0
    line = qtool("quantize", "./model", *arguments, "-o", "two.gguf", *NO_EVAL).out.splitlines()[-1]
    assert qtool(*line.split()[2:], *EVAL).code == 0


def test_a_directory_is_named_after_the_model_and_replaced_with_overwrite(place, qtool):
    arguments = ("export", "./model", "-f", "gguf:Q8_0", "-o", "out", "--modelfile", "-q")
    assert qtool(*arguments).code == 0
    assert sorted(contents(place / "out")) == ["Modelfile", "model-Q8_0.gguf"]
    assert (place / "out" / "Modelfile").read_text().startswith("FROM ./model-Q8_0.gguf\n")
    refuse(qtool(*arguments), 2, "not empty", "--overwrite")
    assert qtool(*arguments, "--overwrite").code == 0


def test_a_collection_of_models_is_not_overwritten(place, qtool):
    (place / "mine").mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(place / "F16.gguf", place / "mine" / name)
    before = contents(place)
    arguments = ("export", "./model", "-f", "gguf:Q8_0", "-o", "mine", "--overwrite")
    refuse(qtool(*arguments), 2, "does not look like a model")
    assert contents(place) == before


def test_a_file_has_its_small_files_beside_it(place, qtool):
    arguments = ("quantize", "./model", "-f", "gguf:Q8_0", "-o", "x.gguf", "--modelfile")
    assert qtool(*arguments, *NO_EVAL).code == 0
    made = {path.name for path in place.glob("x*")}
    assert made == {"x.gguf", "x.Modelfile", "x.qtool-recipe.yaml", "x.qtool-report.json"}
    assert (place / "x.Modelfile").read_text().startswith("FROM ./x.gguf\n")


def test_a_model_in_parts_leaves_no_older_parts(place, qtool):
    arguments = ("export", "./model", "-f", "gguf:Q8_0", "-o", "x.gguf", "--overwrite", "-q")
    for size in ("100KB", "500KB"):
        assert qtool(*arguments, "--split-max-size", size).code == 0
        parts = sorted(path.name for path in place.glob("x*.gguf"))
        assert parts == [f"x-{i:05d}-of-{len(parts):05d}.gguf" for i in range(1, len(parts) + 1)]
    assert len(parts) == 2
    assert qtool(*arguments).code == 0
    assert [path.name for path in place.glob("x*.gguf")] == ["x.gguf"]


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (("--override", "lm_head=Q8_0"), {"output.weight": "Q8_0"}),
        (("--override", "embed_tokens=Q8_0"), {"token_embd.weight": "Q8_0"}),
        (("--override", "model.layers.0.*q_proj=F16"), {"blk.0.attn_q.weight": "F16"}),
        (("--override", "blk.*.attn_v.weight=F16"), {"blk.0.attn_v.weight": "F16"}),
        (("--override", r"re:blk\.0\.attn_output=q5_k"), {"blk.0.attn_output.weight": "Q5_K"}),
        (("--override", "re:.*up_proj=BF16"), {"blk.0.ffn_up.weight": "BF16"}),
        (("--output-type", "F16"), {"output.weight": "F16"}),
        (("--embed-type", "q6_k"), {"token_embd.weight": "Q6_K"}),
        (
            ("--override", "ffn_up=Q8_0", "--override", "ffn_*=Q2_K"),
            {
                "blk.0.ffn_up.weight": "Q8_0",
                "blk.0.ffn_gate.weight": "Q2_K",
                "blk.0.ffn_down.weight": "Q2_K",
            },
        ),
    ],
)
@pytest.mark.parametrize("command", ["export", "quantize"])
def test_a_tensor_has_the_type_asked_for_under_either_name(place, qtool, command, flags, changed):
    extra = ("-m", "rtn", "--eval", "none") if command == "quantize" else ()
    plain = tensors_of(place / "Q4_K_M.gguf")
    arguments = (command, "./model", "-f", "gguf:Q4_K_M", "-o", "x.gguf", "-q", *extra)
    assert qtool(*arguments, *flags).code == 0
    found = {name: x.tensor_type.name for name, x in tensors_of(place / "x.gguf").items()}
    assert found == {name: x.tensor_type.name for name, x in plain.items()} | changed


def test_ignored_linears_stay_as_they_are_stored(place, qtool):
    arguments = ("quantize", "./model", "-f", "gguf:Q4_K_M", "-o", "x.gguf", *SMALL, *NO_EVAL)
    assert qtool(*arguments, "--ignore", "mlp.*").code == 0
    tensors = tensors_of(place / "x.gguf")
    assert {tensors[f"blk.0.ffn_{x}.weight"].tensor_type.name for x in ("up", "down")} == {"BF16"}
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "Q4_K"
    stored = load_file(place / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    held = torch.frombuffer(bytearray(tensors["blk.0.ffn_up.weight"].data), dtype=torch.bfloat16)
    assert torch.equal(held.view(stored.shape), stored)


# What rows do not allow


def test_a_fallback_is_a_warning_and_strictly_an_error(place, qtool):
    outcome = qtool("export", "./narrow", "-f", "gguf:Q8_0", "-o", "x.gguf", "--json")
    (warning,) = outcome.value["warnings"]
    assert warning["code"] == "fallback_types"
    assert "Q8_0 -> F16" in warning["message"]
    assert "16.05 bits per weight instead of 8.57" in warning["message"]
    assert warning["message"] in outcome.err
    assert {x.tensor_type.name for x in tensors_of(place / "x.gguf").values()} == {"F16", "F32"}
    strictly = qtool("export", "./narrow", "-f", "gguf:Q8_0", "-o", "y.gguf", "--strict")
    refuse(strictly, 2, "Q8_0 -> F16", "--strict")
    arguments = ("quantize", "./narrow", "-f", "gguf:Q8_0", "-o", "y.gguf", "--strict")
    refuse(qtool(*arguments, *NO_EVAL), 2, "Q8_0 -> F16")
    assert not list(place.glob("y*"))


# What cannot be carried out; -> exit code and words of the message
EXPORT = ("export", "./model", "-o", "x.gguf")
QUANTIZE = ("quantize", "./model", "-o", "x.gguf")
K = ("-f", "gguf:Q4_K_M")
REFUSED = {
    "no type": ((*EXPORT, "-f", "gguf"), 2, "gguf:Q4_K_M"),
    "an empty type": ((*EXPORT, "-f", "gguf:"), 2, "gguf:Q4_K_M"),
    "an unknown type": ((*EXPORT, "-f", "gguf:Q9_K"), 2, "Q9_K", "did you mean"),
    "a type that is not written": ((*EXPORT, "-f", "gguf:IQ2_XS"), 5, "IQ2_XS", "IQ4_XS"),
    "a ternary type": ((*QUANTIZE, "-f", "gguf:TQ1_0"), 5, "TQ1_0"),
    "a packed format": (("export", "./model", "-f", "gptq"), 5, "quantize MODEL -m rtn -f gptq"),
    "an unknown format": (("export", "./model", "-f", "nonsense"), 5, "nonsense", "gguf:TYPE"),
    "a directory as a file": ((*EXPORT, "-f", "safetensors"), 2, "x.gguf", "directory"),
    "a packed directory as a file": ((*QUANTIZE, "-f", "gptq"), 2, "x.gguf", "directory"),
    "several formats as a file": ((*QUANTIZE, *K, "-f", "gguf:Q8_0"), 2, "2 formats"),
    "a format twice": ((*QUANTIZE, *K, "-f", "gguf:q4_k_m"), 2, "twice"),
    "capital letters": ((*EXPORT, *K, "-o", "x.GGUF"), 2, "x.GGUF", ".gguf"),
    "an override of nothing": ((*EXPORT, *K, "--override", "typo=Q6_K"), 2, "typo", "blk.0."),
    "a norm's type": ((*EXPORT, *K, "--override", "output_norm=Q8_0"), 2, "output_norm"),
    "bits": ((*EXPORT, *K, "--override", "q_proj=bits:8"), 2, "'q_proj=Q6_K'"),
    "bits to quantize": ((*QUANTIZE, *K, "--override", "q_proj=bits:8"), 2, "'q_proj=Q6_K'"),
    "the flag for bits": ((*QUANTIZE, *K, "-b", "3"), 2, "--bits", "gguf:Q5_K_M"),
    "a type for floats": (
        ("export", "./model", "-f", "safetensors", "--override", "q_proj=Q6_K"), 2, "--override",
    ),
    "statistics for floats": (
        ("export", "./model", "-f", "safetensors", "--statistics", "stats.gguf"), 2, "--statistics",
    ),
    "a pre-tokenizer for floats": (
        ("export", "./model", "-f", "safetensors", "--pre", "gpt-2"), 2, "--pre",
    ),
    "a type that no override may have": ((*EXPORT, *K, "--override", "attn_v=IQ2_XS"), 5, "IQ2_XS"),
    "an integer type": ((*EXPORT, *K, "--output-type", "I32"), 5, "I32"),
    "no type at all": ((*EXPORT, *K, "--embed-type", "Q9"), 2, "Q9"),
    "a type that does not fit": (
        ("export", "./narrow", "-f", "gguf:Q8_0", "--embed-type", "Q8_0"), 2, "48",
    ),
    "a head that is not there": (
        ("export", "./tied", *K, "--override", "lm_head=Q8_0"), 2, "token_embd=Q8_0",
    ),
    "a head that is not there to quantize": (
        ("quantize", "./tied", *K, "--override", "lm_head=Q8_0"), 2, "token_embd=Q8_0",
    ),
    "an unknown pre-tokenizer": ((*EXPORT, *K, "--pre", "nonsense"), 2, "nonsense"),
    "a size that is none": ((*EXPORT, *K, "--split-max-size", "plenty"), 2, "plenty"),
    "missing statistics": ((*EXPORT, *K, "--statistics", "no.gguf"), 2, "no.gguf"),
    "a model as statistics": ((*EXPORT, *K, "--statistics", "F16.gguf"), 2, "F16.gguf"),
    "statistics of another model": (
        ("export", "./narrow", *K, "--statistics", "stats.gguf"), 2, "another model",
    ),
    "statistics as a model": (("export", "stats.gguf", *K), 5, "importance matrix"),
    "statistics as floats": (("export", "stats.gguf", "-f", "safetensors"), 5, "importance"),
    "a GGUF to quantize": (("quantize", "F16.gguf", *K), 5, "safetensors directory"),
    "a second rounding": (("export", "Q4_K_M.gguf", "-f", "gguf:Q8_0"), 2, "--allow-requantize"),
}  # fmt: skip


@pytest.mark.parametrize("request_name", REFUSED)
@pytest.mark.parametrize("extra", [(), ("--dry-run",)])
def test_what_cannot_be_carried_out_is_refused_before_anything_is_written(
    place, qtool, request_name, extra
):
    arguments, code, *words = REFUSED[request_name]
    before = contents(place)
    outcome = qtool(*arguments, *extra)
    refuse(outcome, code, *words)
    assert outcome.out == ""
    assert contents(place) == before


def test_a_place_below_a_file_is_refused(place, qtool):
    refuse(qtool("export", "./model", *K, "-o", "F16.gguf/x.gguf"), 2, "F16.gguf")


def test_a_refusal_is_a_json_object(place, qtool):
    error = qtool("export", "./model", "-f", "gguf:Q9_K", "--json").value["error"]
    assert error["code"] == "usage"
    assert qtool("export", "--json", "-f", "gguf:Q8_0").value["schema"] == "qtool.export/1"


# Inputs are never lost


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Q4_K_M.gguf", *K, "-o", "Q4_K_M.gguf"), "is the input"),
        (("Q4_K_M.gguf", *K, "-o", "."), "inside the output"),
        (("link.gguf", *K, "-o", "Q4_K_M.gguf"), "is the input"),
        (("Q4_K_M.gguf", *K, "-o", "link.gguf"), "is a link"),
        (("s-00001-of-00002.gguf", "-f", "gguf:F16", "-o", "s.gguf"), "is the input"),
        (
            ("s-00002-of-00002.gguf", "-f", "gguf:Q8_0", "-o", "s.gguf", "--split-max-size", "9KB"),
            "is the input",
        ),
        (("./model", "-f", "gguf:Q8_0", "-o", "./model"), "is the input"),
        (("./model", *K, "--statistics", "stats.gguf", "-o", "stats.gguf"), "is the input"),
    ],
)
def test_an_input_is_never_overwritten(place, qtool, arguments, words):
    (place / "link.gguf").symlink_to("Q4_K_M.gguf")
    parts = ("-f", "gguf:Q8_0", "-o", "s.gguf", "--split-max-size", "500KB", "-q")
    assert qtool("export", "./model", *parts).code == 0
    assert (place / "s-00002-of-00002.gguf").exists()
    before = contents(place)
    refuse(qtool("export", *arguments, "--overwrite"), 2, words)
    assert contents(place) == before


def test_statistics_survive_quantize(place, qtool):
    before = contents(place)
    arguments = ("-m", "rtn", *K, "--statistics", "stats.gguf", "-o", "stats.gguf", "--overwrite")
    refuse(qtool("quantize", "./model", *arguments, *NO_EVAL), 2, "is the input")
    assert contents(place) == before


def test_what_is_in_the_way_stays_without_overwrite(place, qtool):
    for name in ("x.gguf", "x.Modelfile", "x-00001-of-00003.gguf"):
        (place / name).write_text("precious")
        refuse(qtool(*EXPORT, *K), 2, name, "--overwrite")
        assert (place / name).read_text() == "precious"
        (place / name).unlink()
    assert qtool(*EXPORT, *K, "-q").code == 0


# Failures leave nothing


def spoil(directory, name, value, place=(3, 5)):
    weights = load_file(directory / "model.safetensors")
    weights[name][place[: weights[name].dim()]] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("model.layers.0.mlp.up_proj.weight", float("nan"), "Q4_K_M"),
        ("model.layers.0.self_attn.q_proj.weight", float("inf"), "F16"),
        ("model.norm.weight", float("-inf"), "Q8_0"),
        ("model.embed_tokens.weight", float("nan"), "Q8_0"),
        ("lm_head.weight", float("nan"), "Q2_K"),
    ],
)
@pytest.mark.parametrize("command", [("export",), ("quantize", "-m", "rtn", *NO_EVAL)])
def test_weights_that_are_not_finite_are_named(place, qtool, command, name, value, kind):
    spoil(place / "model", name, value)
    before = contents(place)
    command, *flags = command
    outcome = qtool(command, "./model", "-f", f"gguf:{kind}", "-o", "deep/x.gguf", *flags)
    refuse(outcome, 8, name, "not finite")
    assert contents(place) == before
    assert not (place / "deep").exists()


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M", "Q5_1", "IQ4_XS"])
def test_values_that_a_type_cannot_hold_are_not_cut_off(place, qtool, kind):
    spoil(place / "model", "model.layers.0.mlp.up_proj.weight", 3e38)
    outcome = qtool("export", "./model", "-f", f"gguf:{kind}", "-o", "x.gguf")
    refuse(outcome, 8, "blk.0.ffn_up.weight", "beyond what", "BF16")
    assert qtool("export", "./model", "-f", "gguf:BF16", "-o", "x.gguf", "-q").code == 0


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_gguf_with_values_that_are_not_finite_is_not_passed_on(place, qtool, kind):
    reader = gguf.GGUFReader(place / "F16.gguf", "r+")
    (tensor,) = (x for x in reader.tensors if x.name == "blk.0.ffn_up.weight")
    tensor.data[3, 5] = np.nan
    reader.data.flush()
    outcome = qtool("export", "F16.gguf", "-f", f"gguf:{kind}", "-o", "x.gguf")
    refuse(outcome, 8, "blk.0.ffn_up.weight", "not finite")
    assert not list(place.glob("*x.gguf*"))


def test_a_model_without_its_tokenizer_is_refused(place, qtool):
    (place / "model" / "tokenizer.json").unlink()
    refuse(qtool(*EXPORT, *K), 5, "tokenizer.json")
    refuse(qtool(*QUANTIZE, *K, "-m", "rtn", *NO_EVAL), 5, "tokenizer.json")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from qtool.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def test_a_full_disk_is_said_and_leaves_nothing(place):
    """A limit on the size of files stands in for the disk: the kernel answers the same way."""
    before = contents(place)
    command = [sys.executable, "-c", LIMITED, *EXPORT, "-f", "gguf:F16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "x.gguf" in done.stderr
    assert contents(place) == before
    assert not list(place.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "quantize"])
def test_an_interrupted_run_leaves_nothing_but_finished_blocks(tmp_path, command):
    tiny_model("llama", tmp_path / "model", hidden=256, intermediate=1024, layers=8)
    flags = ("--eval", "none", *SMALL) if command == "quantize" else ()
    arguments = (command, "./model", *K, "-o", "out/x.gguf", *flags)
    settings = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        "stderr": subprocess.PIPE,
        "text": True,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    process = subprocess.Popen([sys.executable, "-m", "qtool", *arguments], **settings)
    assert any("block" in line for line in process.stderr)
    assert list(tmp_path.glob("out/.*"))
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("out/*")]
    assert left == (["out/.x.gguf.qtool"] if command == "quantize" else [])


# GGUF as MODEL


def test_a_float16_file_is_quantized_to_the_bytes_that_the_model_gives(place, qtool):
    # bfloat16 weights are exact in float16, but for those next to zero.
    assert qtool("export", "F16.gguf", *K, "-o", "x.gguf", "-q").code == 0
    assert digest(place / "x.gguf") == digest(place / "Q4_K_M.gguf")


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
def test_the_same_type_again_is_a_copy(place, qtool, kind):
    arguments = ("export", f"{kind}.gguf", "-f", f"gguf:{kind}", "-o", "x.gguf", "-q")
    assert qtool(*arguments).code == 0
    assert digest(place / "x.gguf") == digest(place / f"{kind}.gguf")


def test_a_copy_keeps_what_the_file_says_of_its_statistics(place, qtool):
    arguments = ("export", "./model", *K, "--statistics", "stats.gguf", "-o", "first.gguf", "-q")
    assert qtool(*arguments).code == 0
    assert qtool("export", "first.gguf", *K, "-o", "copy.gguf", "-q").code == 0
    assert digest(place / "copy.gguf") == digest(place / "first.gguf")
    fields = gguf.GGUFReader(place / "copy.gguf").fields
    assert fields["quantize.imatrix.file"].contents() == "stats.gguf"
    assert qtool("export", "copy.gguf", "-f", "gguf:F16", "-o", "f16.gguf", "-q").code == 0
    fields = gguf.GGUFReader(place / "f16.gguf").fields
    assert not [key for key in fields if key.startswith("quantize.imatrix.")]


def test_a_second_rounding_is_done_when_it_is_asked_for(place, qtool):
    arguments = ("export", "Q4_K_M.gguf", "-f", "gguf:Q8_0", "--allow-requantize", "-o", "x.gguf")
    assert qtool(*arguments, "-q").code == 0
    assert tensors_of(place / "x.gguf")["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_parts_are_joined_to_the_bytes_of_one_file(place, qtool):
    parts = ("-o", "s.gguf", "--split-max-size", "100KB", "-q")
    assert qtool("export", "./model", *K, *parts).code == 0
    any_part = sorted(place.glob("s-*.gguf"))[2]
    assert qtool("export", any_part, *K, "-o", "x.gguf", "-q").code == 0
    assert digest(place / "x.gguf") == digest(place / "Q4_K_M.gguf")


def test_a_file_becomes_a_directory_that_computes_the_same(place, qtool):
    assert qtool("export", "F16.gguf", "-f", "safetensors:F32", "-o", "back", "-q").code == 0
    result = qtool("eval", "./back", "--ref", "./model", *EVAL, "--json").value["results"][0]
    assert result["metrics"]["kld"]["mean"] < 1e-6
    original = load_file(place / "model" / "model.safetensors")
    back = load_file(place / "back" / "model.safetensors")
    assert original.keys() == back.keys()
    for name, values in back.items():
        exact = original[name].half() if values.dim() > 1 else original[name]
        assert torch.equal(values, exact.float())


def test_every_command_takes_what_export_wrote(place, qtool):
    assert qtool("inspect", "Q4_K_M.gguf", "--json").value["quantization"]["bits"]
    value = qtool("eval", "Q4_K_M.gguf", "--ref", "./model", *EVAL, "--json").value
    assert 0 < value["results"][0]["metrics"]["kld"]["mean"] < 0.3


# Statistics, several formats, recipes


def test_statistics_weigh_errors_and_are_named_in_the_file(place, qtool):
    arguments = ("export", "./model", *K, "--statistics", "stats.gguf", "-o", "x.gguf", "--json")
    value = qtool(*arguments).value
    assert value["artifacts"][0]["bytes"] == (place / "x.gguf").stat().st_size
    fields = gguf.GGUFReader(place / "x.gguf").fields
    assert fields["quantize.imatrix.file"].contents() == "stats.gguf"
    assert fields["quantize.imatrix.dataset"].contents() == "builtin"
    assert fields["quantize.imatrix.chunks_count"].contents() == 4
    assert digest(place / "x.gguf") != digest(place / "Q4_K_M.gguf")


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_statistics_serve_quantize(place, qtool, method):
    arguments = ("quantize", "./model", *K, "-m", method, "--statistics", "stats.gguf")
    assert qtool(*arguments, "-o", "x.gguf", *NO_EVAL).code == 0
    fields = gguf.GGUFReader(place / "x.gguf").fields
    assert fields["quantize.imatrix.file"].contents() == "stats.gguf"


def test_statistics_weigh_the_head_too_and_alike_in_both_commands(place, qtool):
    statistics = ("--statistics", "stats.gguf")
    assert (
        qtool("quantize", "./model", *K, "-m", "rtn", *statistics, "-o", "x.gguf", *NO_EVAL).code
        == 0
    )
    assert qtool("export", "./model", *K, *statistics, "-o", "y.gguf", "-q").code == 0
    found, other = tensors_of(place / "x.gguf"), tensors_of(place / "y.gguf")
    plain = tensors_of(place / "Q4_K_M.gguf")
    for name in found:
        assert (found[name].data == other[name].data).all(), name
    assert (found["output.weight"].data != plain["output.weight"].data).any()
    recipe = (place / "x.qtool-recipe.yaml").read_text()
    assert "--statistics THE_SAME_FILE" in recipe.splitlines()[1]


def test_a_calibrated_run_weighs_the_head_by_what_it_reads(place, qtool):
    assert qtool(*QUANTIZE, *K, "-m", "gptq", *SMALL, *NO_EVAL).code == 0
    found, plain = tensors_of(place / "x.gguf"), tensors_of(place / "Q4_K_M.gguf")
    assert (found["output.weight"].data != plain["output.weight"].data).any()
    assert (found["token_embd.weight"].data == plain["token_embd.weight"].data).all()


def test_a_type_that_needs_importance_is_refused_without(place, qtool):
    coarse = ("-f", "gguf:Q2_K_S", "-o", "x.gguf")
    refuse(qtool("export", "./model", *coarse), 2, "too coarse", "--statistics")
    assert qtool("export", "./model", *coarse, "--statistics", "stats.gguf", "-q").code == 0


def test_rounding_to_nearest_is_what_export_does(place, qtool):
    assert qtool(*QUANTIZE, *K, "-m", "rtn", *NO_EVAL).code == 0
    assert digest(place / "x.gguf") == digest(place / "Q4_K_M.gguf")


@pytest.mark.slow
def test_several_formats_share_the_text_and_each_recipe_makes_the_same_bytes(place, qtool):
    formats = ("-f", "gptq", "-f", "gguf:Q4_K", "-f", "gguf:Q8_0")
    arguments = ("quantize", "./model", "-m", "gptq", *formats, *SMALL, "-o", "out", "--modelfile")
    value = qtool(*arguments, *NO_EVAL, "--json").value
    kinds = {x["format"]: x for x in value["artifacts"]}
    assert list(kinds) == ["gptq", "gguf:Q4_K_M", "gguf:Q8_0"]
    for name, artifact in kinds.items():
        recipe = next((place / "out").glob(f"{name[:9].replace(':', '-')}*/qtool-recipe.yaml"))
        again = qtool("quantize", "./model", "--recipe", recipe, "-o", "again", "-q", "--json")
        assert again.value["artifacts"][0]["sha256"] == artifact["sha256"]
        shutil.rmtree(place / "again")


def test_a_recipe_writes_several_formats_with_rules_of_both_kinds(place, qtool):
    recipe = {
        "version": 1,
        "quantize": {"method": "rtn"},
        "rules": [
            {"match": "mlp.*", "bits": 8},
            {"match": "lm_head", "type": "Q8_0"},
            {"match": "attn_v", "type": "Q6_K"},
        ],
        "export": [
            {"format": "compressed-tensors"},
            {"format": "gguf:Q4_K_M", "modelfile": True, "embed_type": "Q5_K"},
        ],
        "eval": {"metrics": []},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    value = qtool("quantize", "./model", "--recipe", "recipe.yaml", "-o", "out", "--json").value
    paths = {x["format"]: x["path"] for x in value["artifacts"]}
    assert list(paths) == ["compressed-tensors", "gguf:Q4_K_M"]
    (file,) = (place / "out" / "gguf-Q4_K_M").glob("*.gguf")
    assert (file.parent / "Modelfile").exists()
    kinds = {name: x.tensor_type.name for name, x in tensors_of(file).items()}
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_v.weight"] == "Q6_K"
    assert kinds["token_embd.weight"] == "Q5_K"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_K"  # bits are for the other format


# From packed directories


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (("-f", "gptq", "-b", "4", "-g", "32"), "Q4_0"),
        (("-f", "gptq", "-b", "8", "-g", "128"), "Q8_0"),
        (("-f", "compressed-tensors", "-b", "4", "-g", "64"), "Q4_0"),
        (("-f", "compressed-tensors", "-b", "8", "-g", "-1"), "Q8_0"),
    ],
)
def test_symmetric_integers_carry_over_exactly(place, qtool, flags, kind):
    assert qtool("quantize", "./model", "-m", "rtn", *flags, *NO_EVAL, "-o", "packed").code == 0
    outcome = qtool("export", "./packed", "-f", f"gguf:{kind}", "-o", "x.gguf", "--json")
    assert [w["code"] for w in outcome.value["warnings"]] == ["carried_over"]
    assert qtool("export", "./packed", "-f", "safetensors:F32", "-o", "floats", "-q").code == 0
    assert qtool("export", "x.gguf", "-f", "safetensors:F32", "-o", "back", "-q").code == 0
    floats = load_file(place / "floats" / "model.safetensors")
    back = load_file(place / "back" / "model.safetensors")
    linears = [name for name in floats if "_proj" in name]
    assert len(linears) == 7
    assert all(torch.equal(floats[name], back[name]) for name in linears)


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_packed_directories_become_float_files_with_one_note(place, qtool, name):
    method = ("-m", "rtn", "-b", "4", "-g", "32", "--asym", "-f", name)
    assert qtool("quantize", "./model", *method, *NO_EVAL, "-o", "packed").code == 0
    outcome = qtool("export", "./packed", "-f", "gguf:F32", "-o", "x.gguf", "--json")
    (note,) = outcome.value["warnings"]
    assert note["message"] == f"7 linears packed as {name} are dequantized"
    refuse(qtool("export", "./packed", *K, "-o", "y.gguf"), 2, "--allow-requantize")
    assert qtool("export", "./packed", *K, "--allow-requantize", "-o", "y.gguf", "-q").code == 0
    assert qtool("export", "./packed", "-f", "safetensors:F32", "-o", "floats", "-q").code == 0
    assert qtool("export", "x.gguf", "-f", "safetensors:F32", "-o", "back", "-q").code == 0
    floats = load_file(place / "floats" / "model.safetensors")
    back = load_file(place / "back" / "model.safetensors")
    assert all(torch.equal(floats[tensor], back[tensor]) for tensor in floats)


def test_a_report_may_lie_beside_the_file_that_it_is_about(place, qtool):
    pytest.importorskip("xllamacpp")
    outcome = qtool("eval", "F16.gguf", "--ctx", "24", "-n", "2", "--report", "report")
    assert outcome.code == 0, outcome.err
    assert (place / "report" / "index.html").exists()
