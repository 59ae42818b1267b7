"""What cannot be done is said in two lines, with the right exit code, and leaves nothing behind."""

import json
import shutil

import pytest
from builders.command_line import SMALL, contents

QUANTIZE = ("quantize", "./model", "-m", "gptq", *SMALL)


def assert_refused(outcome, code, *words):
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    lines = [x for x in outcome.err.splitlines() if x.startswith(("error: ", "  try: ", "Trace"))]
    assert [line[:6] for line in lines] == ["error:", "  try:"], outcome.err
    for word in words:
        assert word in outcome.err


# what a user types -> exit code, words of the message
REQUESTS = {
    "no such command": (("frobnicate",), 2, "frobnicate", "qtool --help"),
    "unknown flag": ((*QUANTIZE, "--bitz", "4"), 2, "--bitz", "qtool quantize --help"),
    "a flag without its value": ((*QUANTIZE, "--bits"), 2, "--bits"),
    "a number that is none": ((*QUANTIZE, "--bits", "four"), 2, "--bits"),
    "no windows": ((*QUANTIZE, "-n", "0"), 2, "--windows"),
    "no model": (("quantize",), 2, "no model"),
    "no model to inspect": (("inspect",), 2, "MODEL"),
    "no model to evaluate": (("eval",), 2, "MODEL"),
    "a path that is not there": (("quantize", "./nowhere"), 2, "nowhere"),
    "an id that the hub's cache lacks": (("quantize", "no/body"), 7, "no/body", "--offline"),
    "unknown method": (("quantize", "./model", "-m", "gptqq"), 2, "gptqq", "mean 'gptq'"),
    "unknown format": ((*QUANTIZE, "-f", "gptqq"), 2, "gptqq", "mean 'gptq'"),
    "bits that no grid has": ((*QUANTIZE, "-b", "5"), 2, "bits", "5"),
    "a format that cannot hold the grid": ((*QUANTIZE, "-f", "awq", "-b", "8"), 5, "awq", "int8"),
    "a group that divides no row": ((*QUANTIZE, "-g", "96"), 2, "96", "128", "32, 64, 128"),
    "a setting without a value": ((*QUANTIZE, "--set", "nonsense"), 2, "KEY=VALUE"),
    "a setting of an unknown key": ((*QUANTIZE, "--set", "quantise.bits=8"), 2, "'quantize'"),
    "a setting of a wrong type": ((*QUANTIZE, "--set", "quantize.bits=x"), 2, "quantize.bits"),
    "an override that matches nothing": ((*QUANTIZE, "--override", "nope=bits:8"), 2, "nope"),
    "an override without a key": ((*QUANTIZE, "--override", "nope"), 2, "PATTERN=KEY:VALUE"),
    "an override that splits q, k, v": (
        (*QUANTIZE, "--override", "q_proj=bits:8"),
        2,
        "q_proj, k_proj, v_proj",
    ),
    "everything ignored": ((*QUANTIZE, "--ignore", "*"), 2, "nothing is left"),
    "unknown device": ((*QUANTIZE, "--device", "tpu"), 2, "tpu"),
    "unknown evaluation": ((*QUANTIZE, "--eval", "thorough"), 2, "thorough", "quick or none"),
    "unknown chat template mode": ((*QUANTIZE, "--chat-template", "yes"), 2, "chat_template"),
    "a size that is none": ((*QUANTIZE, "--max-ram", "plenty"), 2, "plenty", "24GB"),
    "a missing recipe": ((*QUANTIZE, "--recipe", "nope.yaml"), 2, "nope.yaml"),
    "missing statistics": (("quantize", "./model", "--statistics", "no.gguf"), 2, "no.gguf"),
    "statistics for a method that needs a Hessian": (
        (*QUANTIZE, "--statistics", "no.gguf"),
        2,
        "Hessian",
        "--method awq",
    ),
    "a missing data set": ((*QUANTIZE, "-d", "nope.txt"), 2, "nope.txt"),
    "a data set of no known kind": ((*QUANTIZE, "-d", "table.csv"), 2, "table.csv"),
    "no place for statistics": (("calibrate", "./model"), 2, "-o"),
    "a lone file instead of a model": (("eval", "./model/config.json"), 2, "not a model"),
    "an unknown dtype": (("eval", "./model", "--ctx", "32", "--dtype", "int8"), 2, "int8"),
    "a text shorter than a window": (("eval", "./model", "--ctx", "999999999"), 2, "window"),
}


@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_request_that_cannot_be_carried_out_is_refused(here, qtool, request_name):
    arguments, code, *words = REQUESTS[request_name]
    before = contents(here)
    assert_refused(qtool(*arguments), code, *words)
    assert contents(here) == before
    assert [path.name for path in here.iterdir()] == ["model"]


TEXTS = {
    "empty": ("calibration.txt", b"", 2, "empty"),
    "one token": ("calibration.txt", b"a", 2, "1 token"),
    "not text": ("calibration.txt", b"\xff\xfe\x00", 6, "UTF-8"),
    "a line that is not JSON": ("rows.jsonl", b'{"text": "a"}\n{broken\n', 6, "rows.jsonl:2"),
    "rows without text": ("rows.jsonl", b'{"other": "a"}\n', 2, "other"),
    "not parquet": ("rows.parquet", b"nope", 6, "parquet"),
}


@pytest.mark.parametrize("text_name", TEXTS)
def test_calibration_text_that_gives_nothing_is_refused(here, qtool, text_name):
    file, content, code, *words = TEXTS[text_name]
    (here / file).write_bytes(content)
    assert_refused(qtool(*QUANTIZE, "-d", file), code, file, *words)
    assert sorted(path.name for path in here.iterdir()) == sorted(["model", file])


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


MODELS = {
    "no config": (lambda d: (d / "config.json").unlink(), 6, "config.json"),
    "truncated weights": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:-100]
        ),
        6,
        "truncated",
    ),
    "absurd sizes": (lambda d: change_config(d, hidden_size=10**12), 6, "hidden_size"),
    "more layers than weights": (lambda d: change_config(d, num_hidden_layers=5), 6, "layers.2"),
    "other sizes than the weights": (lambda d: change_config(d, hidden_size=64), 6, "[300, 64]"),
    "mixture of experts": (
        lambda d: change_config(d, model_type="mixtral", num_local_experts=8),
        5,
        "mixture of experts",
        "llama",
    ),
    "unknown architecture": (lambda d: change_config(d, model_type="mamba"), 5, "mamba", "llama"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), 6, "tokenizer"),
}


@pytest.mark.parametrize("model_name", MODELS)
def test_a_damaged_or_unknown_model_is_refused(here, qtool, model_name):
    spoil, code, *words = MODELS[model_name]
    spoil(here / "model")
    assert_refused(qtool(*QUANTIZE), code, *words)
    assert [path.name for path in here.iterdir()] == ["model"]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_weights_that_are_not_finite_are_named_and_leave_no_output(originals, here, qtool, method):
    shutil.copytree(originals / "spoiled" / "nan", here / "nan")
    outcome = qtool("quantize", "./nan", "-m", method, *SMALL)
    assert_refused(outcome, 8, "model.layers.1.mlp.up_proj.weight", "[3, 5]")
    assert sorted(path.name for path in here.iterdir()) == ["model", "nan"]


def test_a_model_that_is_quantized_already_is_refused(here, packed, qtool):
    assert_refused(qtool("quantize", packed["gptq"]), 5, "already quantized")


GATES = {
    "a figure that nothing measures": (("--gate", "kld<=1", "--eval", "none"), 2, "'kld<=1'"),
    "an unknown figure": (("--gate", "speed>=9"), 2, "'speed'", "kld_p99"),
    "an unknown figure in a recipe": (("--set", "gates=['speed>=9']"), 2, "'speed'"),
    "no condition in a recipe": (("--set", "gates=['good']"), 2, "'gates'", "kld<=0.05"),
    "a size that the plan exceeds": (("--gate", "size<=10kB"), 3, "planned gptq", "nothing was"),
}


@pytest.mark.parametrize("case", GATES)
def test_gates_that_cannot_be_met_or_held_are_refused_before_any_work(here, qtool, case):
    flags, code, *words = GATES[case]
    assert_refused(qtool(*QUANTIZE, *flags), code, *words)
    assert [path.name for path in here.iterdir()] == ["model"]


def test_what_is_wrong_in_a_recipe_is_said_of_the_file_and_the_rest_of_the_command_line(
    here, qtool
):
    recipe = here / "recipe.yaml"
    recipe.write_text("version: 1\nquantize: {bitz: 4}\n")
    assert_refused(qtool("quantize", "./model", "--recipe", recipe), 2, f"{recipe}", "'bits'")
    recipe.write_text("version: 1\nquantize: {bits: 4}\n")
    outcome = qtool("quantize", "./model", "--recipe", recipe, "-b", "5")
    assert_refused(outcome, 2, "command line", "quantize.bits")
