"""Recipe files: what is wrong is named with file, key, value and what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qtool.errors import UsageError
from qtool.recipe.ladder import steps_of
from qtool.recipe.load import apply_overrides, dump_recipe, load_recipe, parse_recipe, read_mapping
from qtool.recipe.schema import Recipe, resolved

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
SHORTEST = "version: 1\nmodel: {id: some/model}\n"

CONTRACT = """
version: 1
metadata: {name: qwen3-8b-w4, description: AWQ for vLLM and a GGUF for Ollama}
model: {id: Qwen/Qwen3-8B, revision: main}
calibration: {datasets: [{name: builtin, windows: 96},
  {path: ./domain.jsonl, column: text, windows: 32}], sequence_length: 2048}
quantize: {method: awq, bits: 4, group_size: 128, symmetric: false}
rules:
  - {match: "lm_head", keep: true}
  - {match: "re:.*down_proj$", bits: 8, why: "..."}
export: [{format: awq, target: vllm}, {format: "gguf:Q4_K_M", modelfile: true}]
eval: {metrics: [ppl, kld, top1], data: builtin, context: 2048}
gates: ["kld<=0.05", "top1>=0.9"]
output: ./out
seed: 42
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_the_contracts_example_loads(tmp_path):
    recipe = load_recipe(write(tmp_path / "r.yaml", CONTRACT))
    assert recipe.quantize.group_size == 128
    assert recipe.rules[1].changes == {"bits": 8}
    assert [d.windows for d in recipe.calibration.datasets] == [96, 32]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_resolves(path):
    recipe = load_recipe(path)
    assert recipe.metadata.name == path.stem
    steps = [step.recipe for step in steps_of(recipe)] if recipe.ladder else [recipe]
    assert len(steps) == max(1, len(recipe.ladder))
    assert all(resolved(step) == step for step in steps)  # it says everything itself


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_shipped_recipe_has_a_comment(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if ":" in line]
    keys = [line for line in lines if not line.startswith("#")]
    assert len(keys) > 20
    assert [line for line in keys if "  # " not in line] == []


def test_all_nine_recipes_are_shipped():
    assert {path.stem for path in RECIPES} == {
        "rtn-w8", "rtn-w4g128", "gptq-w4g128", "gptq-w3g128", "awq-w4g128", "awq-gptq-w4g128",
        "gguf-q4_k_m", "ladder", "vllm-and-ollama",
    }  # fmt: skip


@pytest.mark.parametrize("text", [SHORTEST, CONTRACT, *(p.read_text("utf-8") for p in RECIPES)])
@pytest.mark.parametrize("decide", [resolved, lambda recipe: recipe])
def test_a_dumped_recipe_reads_back_equal(text, decide, tmp_path):
    recipe = decide(load_recipe(write(tmp_path / "r.yaml", text)))
    dumped = dump_recipe(recipe)
    assert load_recipe(write(tmp_path / "again.yaml", dumped)) == recipe
    assert dump_recipe(load_recipe(tmp_path / "again.yaml")) == dumped


def test_a_dumped_recipe_holds_every_key_in_the_schemas_order():
    data = yaml.safe_load(dump_recipe(parse_recipe(yaml.safe_load(SHORTEST), "r")))
    assert list(data) == list(Recipe.model_fields)
    assert data["quantize"]["damp_percent"] == 0.05
    assert data["calibration"]["datasets"][0]["name"] == "builtin"


WRONG = {
    # what is added to the shortest recipe: (what the message says, what the hint says)
    "quantise: {bits: 4}": ("unknown key 'quantise'", "'quantize'"),
    "quantize: {bit: 4}": ("unknown key 'quantize.bit'", "'bits'"),
    "bits: 4": ("unknown key 'bits'", "'quantize.bits'"),
    "1: 2": ("unknown key '1'", "choose from"),
    "calibration: {datasets: [{nam: builtin}]}": (
        "unknown key 'calibration.datasets.0.nam'",
        "'name'",
    ),
    "rules: [{match: a, keep: true}, {mach: b, keep: true}]": (
        "unknown key 'rules.1.mach'",
        "'match'",
    ),
    "quantize: {bits: 5}": ("'quantize.bits' is 5, must be 2, 3, 4 or 8", ""),
    "quantize: {bits: '4'}": ("'quantize.bits' is '4', must be 2, 3, 4 or 8", ""),
    "quantize: {bits: true}": ("'quantize.bits' is true", ""),
    "quantize: {method: gtpq}": ("'quantize.method' is 'gtpq'", "'gptq'"),
    "quantize: {group_size: -2}": ("'quantize.group_size' is -2, must be >= -1", ""),
    "quantize: {group_size: tensor}": ("must be a whole number", ""),
    "quantize: {symmetric: 1}": ("'quantize.symmetric' is 1, must be true or false", ""),
    "quantize: {damp_percent: 1}": ("must be < 1", ""),
    "quantize: {damp_percent: much}": ("is 'much', must be a number", ""),
    "quantize:": ("'quantize' is empty, must be a mapping", ""),
    "quantize: 4": ("'quantize' is 4, must be a mapping", ""),
    "rules: {match: a}": ("'rules' must be a list", ""),
    "rules: [{match: a}]": ("'rules.0' must be either keep: true or", ""),
    "rules: [{match: a, keep: true, bits: 8}]": ("'rules.0' must be either keep: true or", ""),
    "rules: [{match: 're:(', keep: true}]": ("'rules.0.match' is 're:(', must be a regular", ""),
    "export: [{format: awq, target: vlm}]": ("'export.0.target' is 'vlm'", "'vllm'"),
    "export: [{target: vllm}]": ("the key 'export.0.format' is missing", "add it"),
    "eval: {metrics: [klld]}": ("'eval.metrics.0' is 'klld'", "'kld'"),
    "gates: [kld < good]": ("'gates' must be comparisons such as kld<=0.05", ""),
    "calibration: {datasets: []}": ("must be a list that is not empty", ""),
    "calibration: {datasets: [builtin]}": ("'calibration.datasets.0' is 'builtin'", ""),
    "calibration: {datasets: [{name: builtin, path: a}]}": ("exactly one of the keys", ""),
    "calibration: {datasets: [{path: a.txt, split: x}]}": ("split only beside hf", ""),
    "calibration: {windows: 0}": ("'calibration.windows' is 0, must be >= 1", ""),
    "calibration: {sequence_length: 1}": ("must be >= 2", ""),
    "calibration: {chat_template: maybe}": ("is 'maybe', must be 'auto', 'on' or 'off'", ""),
    "seed: -1": ("'seed' is -1, must be >= 0", ""),
    "seed: null": ("'seed' is empty, must be a whole number", ""),
    "max_shard_size: lots": ("'max_shard_size' is 'lots', must be a size", ""),
}


@pytest.mark.parametrize("addition", WRONG)
def test_a_wrong_key_or_value_is_one_line_with_file_key_and_what_is_expected(addition, tmp_path):
    path = write(tmp_path / "mine.yaml", f"{SHORTEST}{addition}\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    said, advised = WRONG[addition]
    assert caught.value.message.startswith(f"{path}: ")
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert advised in caught.value.hint
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds nothing where a mapping"),
        ("- version: 1\n", "holds a list where a mapping"),
        ("just words", "holds a str where a mapping"),
        ("model: {id: a}\n", "the key 'version' is missing"),
        ("version: 1\n", "the key 'model' is missing"),
        ("version: 1\nmodel: {}\n", "the key 'model.id' is missing"),
        ("version: 2\nmodel: {id: a}\n", "'version' is 2, must be 1"),
        (f"{SHORTEST}rules: [\n", "mine.yaml:4: not YAML"),
        (f"{SHORTEST}seed: 1\nseed: 2\n", "mine.yaml:4: not YAML: the key 'seed' stands twice"),
        (f"{SHORTEST}quantize: {{bits: 4, bits: 8}}\n", "mine.yaml:3: not YAML: the key 'bits'"),
        (f"{SHORTEST}? [a]\n: 1\n", "is not a word"),
        (f"{SHORTEST}output: !!python/object/apply:os.system [true]\n", "mine.yaml:3: not YAML"),
        (f"{SHORTEST}rules: {'[' * 5000}\n", "not YAML"),
        ("version: 1\n---\nversion: 1\n", "not YAML"),
    ],
)
def test_what_is_not_a_recipe_is_refused_with_file_and_line(text, said, tmp_path):
    with pytest.raises(UsageError) as caught:
        load_recipe(write(tmp_path / "mine.yaml", text))
    assert said in caught.value.message
    assert "mine.yaml" in caught.value.message
    assert caught.value.hint


def test_a_recipe_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"mine\.yaml': No such file"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_bytes(b"version: 1\n# \xe9\n")
    with pytest.raises(UsageError, match=r"mine\.yaml: not UTF-8 text, offset 13"):
        load_recipe(tmp_path / "mine.yaml")


def test_bare_on_and_off_and_numbers_with_an_exponent_are_understood(tmp_path):
    text = f"{SHORTEST}calibration: {{chat_template: off}}\nquantize: {{damp_percent: 1e-3}}\n"
    recipe = load_recipe(write(tmp_path / "r.yaml", text))
    assert recipe.calibration.chat_template == "off"
    assert recipe.quantize.damp_percent == 0.001


def test_recipes_are_read_without_torch_or_transformers():
    code = (
        "import sys, qtool.recipe.load, qtool.recipe.rules, qtool.recipe.schema;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


# --- --set key=value


def base():
    return {"version": 1, "model": {"id": "a"}, "rules": [{"match": "a", "keep": True}]}


@pytest.mark.parametrize(
    ("override", "section", "expected"),
    [
        ("quantize.bits=8", "quantize", {"bits": 8}),
        ("quantize.damp_percent=1e-3", "quantize", {"damp_percent": 0.001}),
        ("quantize={method: rtn, bits: 8}", "quantize", {"method": "rtn", "bits": 8}),
        ("quantize.symmetric=null", "quantize", {"symmetric": None}),
        ("rules.0.why=a=b", "rules", [{"match": "a", "keep": True, "why": "a=b"}]),
        ("rules=[]", "rules", []),
        ("eval.metrics=[ppl]", "eval", {"metrics": ["ppl"]}),
        ("model.id=x/y", "model", {"id": "x/y"}),
        ("seed=7", "seed", 7),
    ],
)
def test_a_setting_changes_one_key_and_leaves_its_input_alone(override, section, expected):
    data = base()
    changed = apply_overrides(data, [override])
    assert changed[section] == expected
    assert data == base()
    assert {**changed, section: None} == {**base(), section: None}


def test_later_settings_win_and_may_pass_through_states_that_are_wrong():
    changed = apply_overrides(base(), ["seed=1", "rules.0.keep=false", "rules.0.bits=8", "seed=2"])
    recipe = parse_recipe(changed, "r")
    assert recipe.seed == 2
    assert recipe.rules[0].changes == {"bits": 8}


@pytest.mark.parametrize(
    ("override", "said", "advised"),
    [
        ("quantize.bit=8", "unknown key 'quantize.bit'", "'bits'"),
        ("quantise.bits=8", "unknown key 'quantise'", "'quantize'"),
        ("bits=8", "unknown key 'bits'", "'quantize.bits'"),
        ("seed.x=8", "unknown key 'seed.x'", "'seed' is a single value"),
        ("output.x=8", "unknown key 'output.x'", "'output' is a single value"),
        ("rules.1.bits=8", "'rules' has no item 1", "it has 1"),
        ("rules.first.bits=8", "'rules' has no item first", "numbered from 0"),
        ("rules.0.bit=8", "unknown key 'rules.0.bit'", "'bits'"),
        ("calibration.datasets.0.windows=8", "is a list without items", "calibration.datasets=["),
        ("quantize.bits=5", "'quantize.bits' is 5, must be 2, 3, 4 or 8", "'quantize.bits'"),
        ("quantize={bit: 4}", "unknown key 'quantize.bit'", "'bits'"),
        ("seed=", "'seed' is empty", "correct"),
        ("seed", "not KEY=VALUE", "--set quantize.bits=8"),
        ("=8", "not KEY=VALUE", "--set quantize.bits=8"),
        ("quantize..bits=8", "not KEY=VALUE", "--set quantize.bits=8"),
        ("rules=[", "not YAML", "correct"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_by_name(override, said, advised):
    with pytest.raises(UsageError) as caught:
        apply_overrides(base(), [override])
    assert caught.value.message.startswith(f"--set {override}: ")
    assert said in caught.value.message
    assert advised in caught.value.hint


def test_the_files_own_fault_is_not_blamed_on_a_setting(tmp_path):
    path = write(tmp_path / "mine.yaml", f"{SHORTEST}quantize: {{bits: 5}}\n")
    changed = apply_overrides(read_mapping(path), ["seed=1"])
    with pytest.raises(UsageError, match=r"mine\.yaml: 'quantize\.bits' is 5"):
        parse_recipe(changed, str(path))
    assert parse_recipe(apply_overrides(changed, ["quantize.bits=8"]), "r").quantize.bits == 8
