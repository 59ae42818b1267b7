"""Models are found, bounded and described without torch."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from qtool.checkpoint.locate import locate
from qtool.errors import CapacityError, DamagedError, HubError, UnsupportedError, UsageError

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8}


def model_at(directory, config=CONFIG):
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"model.embed_tokens.weight": torch.ones(4, 8)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_directory_is_a_checkpoint(tmp_path):
    found = locate(str(model_at(tmp_path / "tiny")))
    assert (found.name, found.revision, found.path) == ("tiny", None, tmp_path / "tiny")
    assert found.config == CONFIG
    assert found.total_bytes == 4 * 8 * 4
    assert found.refs["model.embed_tokens.weight"].shape == (4, 8)


def test_the_current_directory_has_its_own_name(tmp_path, monkeypatch):
    monkeypatch.chdir(model_at(tmp_path / "tiny"))
    assert locate(".").name == "tiny"


def test_what_belongs_to_a_model_is_kept_and_nothing_else(tmp_path):
    model_at(tmp_path)
    kept = [
        "LICENSE.txt",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
    ]
    dropped = [
        "README.md",
        "modeling_evil.py",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "quantize_config.json",
        "qtool-report.json",
        "other.safetensors",
    ]
    for name in kept + dropped:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = locate(str(tmp_path))
    assert [path.relative_to(found.path).as_posix() for path in found.extra_files] == kept


def test_a_lone_file_is_only_for_inspection(tmp_path):
    model_at(tmp_path)
    file = str(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="one file of a model"):
        locate(file)
    found = locate(file, headers_only=True)
    assert found.config == {}
    assert list(found.refs) == ["model.embed_tokens.weight"]


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedError, match="GGUF"):
        locate(str(tmp_path / "model.gguf"))
    with pytest.raises(UnsupportedError, match="GGUF"):
        locate(str(tmp_path))
    for wrong in ("notes.txt", "empty", "absent/", "absent.safetensors"):
        with pytest.raises(UsageError):
            locate(str(tmp_path / wrong))
    for wrong in ("", "a b", "./absent", "one/two/three", "x\0y", "x" * 5000):
        with pytest.raises((UsageError, HubError)):
            locate(wrong, offline=True)


def test_a_directory_has_no_revision(tmp_path):
    with pytest.raises(UsageError, match="--revision"):
        locate(str(model_at(tmp_path)), "main")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", [2]),
        ("num_hidden_layers", None),
        ("hidden_size", 2**40),
        ("hidden_size", float("nan")),
        ("hidden_size", {}),
        ("vocab_size", -5),
        ("head_dim", 0),
        ("intermediate_size", [1, 0]),
        ("intermediate_size", []),
        ("model_type", None),
        ("model_type", 5),
        ("model_type", ""),
        ("tie_word_embeddings", "yes"),
        ("quantization_config", "gptq"),
    ],
)
def test_an_absurd_config_names_its_key(tmp_path, key, value):
    model_at(tmp_path, CONFIG | {key: value})
    with pytest.raises(DamagedError, match=key) as caught:
        locate(str(tmp_path))
    assert "config.json" in caught.value.message


def test_the_text_part_of_a_config_is_checked_too(tmp_path):
    config = {"model_type": "gemma3", "text_config": {"hidden_size": -1}}
    with pytest.raises(DamagedError, match=r"text_config\.hidden_size"):
        locate(str(model_at(tmp_path, config)))


def test_layers_of_different_sizes_are_no_absurdity(tmp_path):
    config = CONFIG | {"intermediate_size": [8, 16], "head_dim": None}
    assert locate(str(model_at(tmp_path, config))).config == config


def hub_errors():
    from huggingface_hub import errors

    answer = SimpleNamespace(status_code=401, headers={}, request=None)

    def with_response(kind):
        made = kind.__new__(kind)
        Exception.__init__(made, "from the hub")
        made.response = answer
        return made

    return [
        (errors.HFValidationError("bad id"), UsageError, "neither"),
        (with_response(errors.GatedRepoError), HubError, "gated"),
        (with_response(errors.RevisionNotFoundError), HubError, "revision"),
        (with_response(errors.RepositoryNotFoundError), HubError, "no model"),
        (with_response(errors.HfHubHTTPError), HubError, "refused access"),
        (vars(errors)["HTTPError"]("no route"), HubError, "did not answer"),
        (errors.LocalEntryNotFoundError("not cached"), HubError, "not in the hub's cache"),
        (errors.OfflineModeIsEnabled("offline"), HubError, "could not get"),
        (OSError(28, "No space left on device"), CapacityError, "space"),
        (ConnectionError("reset"), HubError, "could not get"),
    ]


@pytest.mark.parametrize("number", range(10))
def test_trouble_with_the_hub_is_explained(monkeypatch, number):
    raised, kind, words = hub_errors()[number]

    def download(*args, **options):
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(kind, match=words) as caught:
        locate("org/name")
    assert caught.value.hint


def test_a_hub_id_is_pinned_to_its_commit(tmp_path, monkeypatch):
    asked = {}

    def download(hub_id, **options):
        asked.update(options, hub_id=hub_id)
        return str(model_at(tmp_path / "snapshots" / "abc123"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = locate("org/name@v2", offline=True)
    assert (found.source, found.name, found.revision) == ("org/name", "name", "abc123")
    assert (asked["hub_id"], asked["revision"], asked["local_files_only"]) == (
        "org/name",
        "v2",
        True,
    )
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


def test_only_headers_are_fetched_for_inspection(tmp_path, monkeypatch):
    snapshot = model_at(tmp_path / "snapshots" / "abc123")
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **o: str(snapshot))
    info = SimpleNamespace(dtype="BF16", shape=[4, 8], data_offsets=(0, 64))
    header = SimpleNamespace(tensors={"w": info})
    metadata = SimpleNamespace(files_metadata={"model.safetensors": header})
    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", lambda *a, **o: metadata)
    found = locate("org/name", headers_only=True)
    assert found.refs["w"].n_bytes == 64
    assert found.revision == "abc123"
    with pytest.raises(UnsupportedError, match="pickle"):
        locate("org/name")
    with pytest.raises(HubError, match="offline"):
        locate("org/name", offline=True, headers_only=True)
