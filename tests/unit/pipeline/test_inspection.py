"""inspect counts what a model has, says what is odd about it, and never needs torch."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from qtool.checkpoint.locate import locate
from qtool.checkpoint.shards import ShardWriter, StoredTensor, plan_shards
from qtool.cli.inspect_model import render_inspection, run_inspect
from qtool.formats.protocol import FORMATS, QuantizedModule
from qtool.grids.integer import IntegerGrid
from qtool.pipeline.inspection import READABLE_METHODS, inspect_model
from qtool.pipeline.packed_headers import ENGINES, packed_modules

ROOT = Path(__file__).parents[3]
HIDDEN, INNER, VOCABULARY, LAYERS = 128, 192, 320, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
OTHERS = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}
OTHERS |= {
    f"model.layers.{i}.{name}.weight": (HIDDEN,)
    for i in range(LAYERS)
    for name in ("input_layernorm", "post_attention_layernorm")
}
IN_LINEARS = LAYERS * sum(rows * columns for rows, columns in LINEARS.values())
TOTAL = IN_LINEARS + 2 * VOCABULARY * HIDDEN + (1 + 2 * LAYERS) * HIDDEN


def linears():
    return {
        f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LINEARS.items()
    }


def write(directory, tensors, config=CONFIG):
    """Write a directory of zeros with these tensors: name -> (dtype, shape)."""
    directory.mkdir(exist_ok=True)
    plan = plan_shards([StoredTensor(name, *layout) for name, layout in tensors.items()])
    ShardWriter(plan, directory)  # the body stays sparse: headers are all that counts
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def float_tensors():
    tensors = {name: ("BF16", shape) for name, shape in OTHERS.items()}
    return tensors | {f"{name}.weight": ("BF16", shape) for name, shape in linears().items()}


def packed_directory(directory, format_name, grid):
    chosen = FORMATS[format_name]
    modules = [QuantizedModule(name, grid, shape) for name, shape in linears().items()]
    tensors = {name: ("BF16", shape) for name, shape in OTHERS.items()}
    for module in modules:
        layout = chosen.layout(module)
        tensors |= {name: (stored.dtype, stored.shape) for name, stored in layout.items()}
    config = CONFIG | {"quantization_config": chosen.config(modules, ["lm_head"])}
    return write(directory, tensors, config)


def inspect(directory, **options):
    return inspect_model(locate(str(directory), headers_only=True), **options)


def codes(result):
    return {warning["code"] for warning in result["warnings"]}


def test_a_float_model_is_counted_exactly(tmp_path):
    result = inspect(write(tmp_path, float_tensors()))
    assert result["parameters"] == {"total": TOTAL, "active": TOTAL}
    assert result["tensors"]["bytes"] == 2 * TOTAL
    assert result["tensors"]["bits_per_weight"] == 16
    assert result["quantization"] is None
    assert result["support"]["commands"] == ["inspect", "calibrate", "quantize", "eval"]
    assert result["architecture"]["head_dim"] == HIDDEN // 4
    assert result["architecture"]["tied_embeddings"] is False
    assert result["architecture"]["fused_groups"] == [
        {"name": "q_proj+k_proj+v_proj", "stored": "separate", "count": LAYERS},
        {"name": "gate_proj+up_proj", "stored": "separate", "count": LAYERS},
    ]
    assert result["warnings"] == []


GRIDS = [
    ("gptq", IntegerGrid(bits=4, group_size=64, symmetric=True, lowest_zero=1)),
    ("gptq", IntegerGrid(bits=3, group_size=32, symmetric=False, lowest_zero=1)),
    ("gptq", IntegerGrid(bits=8, granularity="channel", symmetric=True, lowest_zero=1)),
    ("awq", IntegerGrid(bits=4, group_size=64, symmetric=False)),
    ("compressed-tensors", IntegerGrid(bits=4, group_size=32, symmetric=True)),
    ("compressed-tensors", IntegerGrid(bits=8, granularity="channel", symmetric=False)),
]


@pytest.mark.parametrize(
    ("format_name", "grid"), GRIDS, ids=lambda value: getattr(value, "name", value)
)
def test_a_packed_model_has_the_parameters_of_its_original(tmp_path, format_name, grid):
    directory = packed_directory(tmp_path, format_name, grid)
    result = inspect(directory)
    found = result["quantization"]
    assert result["parameters"]["total"] == TOTAL
    assert found["method"] == format_name
    assert found["bits"] == grid.bits
    assert found["group_size"] == (grid.group_size if grid.granularity == "group" else -1)
    assert found["symmetric"] is grid.symmetric
    assert found["modules"] == LAYERS * len(LINEARS)
    refs = locate(str(directory)).refs
    packed_bytes = sum(ref.n_bytes for name, ref in refs.items() if name not in OTHERS)
    assert found["bits_per_weight"] == pytest.approx(8 * packed_bytes / IN_LINEARS)
    assert found["bits_per_weight"] >= grid.bits
    assert result["support"]["commands"] == ["inspect", "eval"]
    assert result["warnings"] == []


@pytest.mark.parametrize("columns", [100, 33, 576])
def test_rows_that_end_inside_a_word_are_counted_by_their_stored_shape(tmp_path, columns):
    words = -(-columns // 8)
    tensors = {
        "x.weight_packed": torch.zeros(7, words, dtype=torch.int32),
        "x.weight_scale": torch.zeros(7, 1),
        "x.weight_shape": torch.tensor([7, columns]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    module = packed_modules(locate(str(tmp_path / "model.safetensors"), headers_only=True).refs, {})
    assert module["x"].weights == 7 * columns
    assert module["x"].group_size == -1


def test_a_stored_shape_that_cannot_be_is_not_believed(tmp_path):
    tensors = {
        "x.weight_packed": torch.zeros(7, 4, dtype=torch.int32),
        "x.weight_shape": torch.tensor([7, 2**31]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    module = packed_modules(locate(str(tmp_path / "model.safetensors"), headers_only=True).refs, {})
    assert module["x"].weights == 7 * 32


OTHER_METHODS = {
    "nf4": (
        {
            "x.weight": ("U8", (64 * 64 // 2, 1)),
            "x.weight.absmax": ("F32", (64,)),
            "x.weight.quant_map": ("F32", (16,)),
            "x.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
        },
        4,
        64,
    ),
    "bnb int8": (
        {"x.weight": ("I8", (64, 64)), "x.SCB": ("F32", (64,)), "x.weight_format": ("U8", ())},
        8,
        0,
    ),
    "fp8 blocks": (
        {"x.weight": ("F8_E4M3", (64, 64)), "x.weight_scale_inv": ("F32", (1, 1))},
        8,
        0,
    ),
    "fp8 rows": ({"x.weight": ("F8_E4M3", (64, 64)), "x.weight_scale": ("BF16", (64, 1))}, 8, -1),
    "mxfp4": ({"x_blocks": ("U8", (2, 32, 2, 16)), "x_scales": ("U8", (2, 32, 2))}, 4, 32),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_other_quantizations_are_counted_too(tmp_path, name):
    tensors, bits, group = OTHER_METHODS[name]
    config = CONFIG | {"quantization_config": {"quant_method": "something"}}
    result = inspect(write(tmp_path, tensors, config))
    assert result["parameters"]["total"] == 64 * 64
    assert (result["quantization"]["bits"], result["quantization"]["group_size"]) == (bits, group)
    assert result["support"]["commands"] == ["inspect"]
    assert "something" in result["support"]["reason"]


def test_only_chosen_experts_are_active(tmp_path):
    experts = {
        f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": ("BF16", (10, 10))
        for i in range(LAYERS)
        for e in range(8)
    }
    fused = {"model.layers.0.mlp.experts.gate_up_proj": ("BF16", (8, 5, 5))}
    config = CONFIG | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    result = inspect(write(tmp_path, float_tensors() | experts | fused, config))
    in_experts = LAYERS * 800 + 200
    assert result["parameters"] == {
        "total": TOTAL + in_experts,
        "active": TOTAL + in_experts // 4,
    }
    assert result["support"]["commands"] == ["inspect"]


def test_a_head_stored_beside_tied_embeddings_counts_once(tmp_path):
    result = inspect(write(tmp_path, float_tensors(), CONFIG | {"tie_word_embeddings": True}))
    assert result["parameters"]["total"] == TOTAL - VOCABULARY * HIDDEN
    assert codes(result) == {"head_stored"}


def test_where_the_config_is_silent_the_weights_tell_about_tied_embeddings(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    tensors = float_tensors()
    assert (
        inspect(write(tmp_path / "a", tensors, config))["architecture"]["tied_embeddings"] is False
    )
    del tensors["lm_head.weight"]
    assert (
        inspect(write(tmp_path / "b", tensors, config))["architecture"]["tied_embeddings"] is True
    )


def test_contradictions_are_warned_of(tmp_path):
    tensors = float_tensors()
    del tensors["lm_head.weight"]
    config = CONFIG | {
        "num_hidden_layers": 3,
        "vocab_size": 999,
        "quantization_config": {"quant_method": "gptq", "bits": 4},
    }
    found = codes(inspect(write(tmp_path, tensors, config)))
    assert found == {"no_head", "layers", "embedding", "not_quantized", "unusable"}


def test_tokenizer_and_template_are_hashed(tmp_path):
    write(tmp_path, float_tensors())
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    template = "{{ messages }}"
    settings = {"eos_token": {"content": "</s>"}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    result = inspect(tmp_path)["tokenizer"]
    assert result["sha256"] == hashlib.sha256(b'{"model": {}}').hexdigest()
    assert result["chat_template"]["sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert result["special"] == {"eos_token": "</s>"}
    (tmp_path / "chat_template.jinja").write_text("another")  # its own file wins
    result = inspect(tmp_path)["tokenizer"]
    assert result["chat_template"]["sha256"] == hashlib.sha256(b"another").hexdigest()


def test_diff_lists_what_differs_and_nothing_else(tmp_path):
    ignored = {"transformers_version": "5.0"}
    nested = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
    changed = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    one = write(tmp_path / "one", float_tensors(), CONFIG | nested)
    two = write(tmp_path / "two", float_tensors(), CONFIG | changed | ignored)
    for directory, token in ((one, "<s>"), (two, "<bos>")):
        (directory / "tokenizer.json").write_text("{}")
        (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
    (two / "chat_template.jinja").write_text("x")
    diff = run_inspect(str(one), diff=str(two))["diff"]
    assert diff["tokenizer"]["same"] is True
    assert diff["chat_template"]["same"] is False
    assert diff["special_tokens"] == [{"key": "bos_token", "left": "<s>", "right": "<bos>"}]
    assert diff["config"] == [{"key": "rope_parameters.rope_theta", "left": 1e5, "right": 1e6}]
    same = run_inspect(str(one), diff=str(one))["diff"]
    assert same["tokenizer"]["same"]
    assert same["special_tokens"] == same["config"] == []


def rendered(result):
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(render_inspection(result))
    return capture.get()


def test_the_last_line_is_the_next_command(tmp_path):
    result = run_inspect(str(write(tmp_path, float_tensors())))
    lines = rendered(result).rstrip().splitlines()
    assert (
        lines[-1].rstrip()
        == f"next: qtool quantize {tmp_path} --method awq --bits 4 --group-size 64"
    )
    assert f"{TOTAL:,}" in rendered(result)


@pytest.mark.parametrize(
    "evil", ["\x1b[2J", "\x9b31m", "\u202e", "\x1b]52;c;aGk=\x07", "[red]", "a\nb"]
)
def test_names_from_files_never_reach_the_terminal_raw(tmp_path, evil):
    config = CONFIG | {"architectures": [evil], "model_type": evil, "extra" + evil: evil}
    tensors = float_tensors() | {"weights" + evil: ("F32", (1,))}
    directory = write(tmp_path / "evil", tensors, config)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (directory / name).write_text(json.dumps({"eos_token": evil, "bos_token_id": evil}))
    sound = write(tmp_path / "sound", float_tensors())
    text = rendered(run_inspect(str(directory), tensors=True, diff=str(sound)))
    assert all(character.isprintable() or character == "\n" for character in text)
    if evil == "[red]":
        assert "weights[red]" in text
    if evil == "a\nb":
        assert r"weightsa\nb" in text


@pytest.mark.parametrize("extra", [[], ["--tensors"]])
def test_torch_and_transformers_are_never_imported(tmp_path, extra):
    directory = packed_directory(
        tmp_path, "awq", IntegerGrid(bits=4, group_size=64, symmetric=False)
    )
    code = (
        "import sys\n"
        "from rich.console import Console\n"
        "from qtool.cli.inspect_model import render_inspection, run_inspect\n"
        f"model = {str(directory)!r}\n"
        f"result = run_inspect(model, tensors={bool(extra)}, diff=model)\n"
        "Console().print(render_inspection(result))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'safetensors'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_result_is_json(tmp_path):
    result = run_inspect(str(write(tmp_path, float_tensors())), tensors=True, diff=str(tmp_path))
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again == result
    assert len(again["tensors"]["list"]) == again["tensors"]["count"] == len(float_tensors())


def test_what_inspect_says_of_formats_is_what_they_say():
    assert set(FORMATS) == READABLE_METHODS
    for name in FORMATS:
        assert set(FORMATS[name].loads_in) == set(ENGINES[name])
