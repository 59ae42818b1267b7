"""What a model's tokenizer files say, and how two models differ in them.

Two models can only be compared token by token when their tokenizers are the same, and a chat
model answers badly under another one's template; hashes tell both at a glance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import open_regular, read_json_object

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
)
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_SETTINGS_BYTES = 64 << 20  # added tokens of large vocabularies take several megabytes
CHUNK_BYTES = 1 << 20
# Who wrote a configuration with what is no difference between two models.
IGNORED_KEYS = frozenset({"transformers_version", "_name_or_path", "_model_name_or_path"})


def describe_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return hashes of the tokenizer and chat template, and the special tokens.

    Raises:
        DamagedError: a tokenizer file is not readable, or not the JSON that its name promises.
    """
    if not checkpoint.config:  # a lone file of weights: what lies beside it need not belong to it
        return {"class": None, "sha256": None, "files": [], "chat_template": None, "special": {}}
    present = [name for name in TOKENIZER_FILES if (checkpoint.path / name).exists()]
    files = [_hashed(checkpoint.path / name) for name in present]
    settings = _settings(checkpoint.path / SETTINGS_FILE)
    template = _chat_template(checkpoint.path, settings)
    together = hashlib.sha256("".join(file["sha256"] for file in files).encode()).hexdigest()
    return {
        "class": settings.get("tokenizer_class"),
        # The hash of the one file where there is one, so that sha256sum agrees.
        "sha256": files[0]["sha256"] if len(files) == 1 else together if files else None,
        "files": files,
        "chat_template": None
        if template is None
        else {
            "sha256": hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest(),
            "characters": len(template),
        },
        "special": _special_tokens(checkpoint, settings),
    }


def compare_models(left: Checkpoint, right: Checkpoint) -> dict[str, Any]:
    """Return how two models differ in tokenizer, chat template, special tokens and config.

    Raises:
        DamagedError: a tokenizer file of either is not readable.
    """
    ours, theirs = describe_tokenizer(left), describe_tokenizer(right)
    templates = [
        side["chat_template"] and side["chat_template"]["sha256"] for side in (ours, theirs)
    ]
    return {
        "other": right.source,
        "tokenizer": pair(ours["sha256"], theirs["sha256"]),
        "chat_template": pair(*templates),
        "special_tokens": differences(ours["special"], theirs["special"]),
        "config": differences(_flat(left.config), _flat(right.config)),
    }


def _hashed(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    file, size = open_regular(path)
    with file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _settings(path: Path) -> dict[str, Any]:
    return read_json_object(path, max_bytes=MAX_SETTINGS_BYTES) if path.exists() else {}


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the chat template as text, from its own file or from the settings."""
    path = directory / TEMPLATE_FILE
    if path.exists():
        file, _ = open_regular(path)
        with file:
            return file.read(MAX_SETTINGS_BYTES).decode("utf-8", errors="backslashreplace")
    template = settings.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    return json.dumps(template, sort_keys=True)  # several, by name


def _special_tokens(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    generation = _settings(checkpoint.path / GENERATION_FILE)
    found: dict[str, Any] = {}
    for key in SPECIAL_TOKENS:
        token = settings.get(key)
        found[key] = token.get("content") if isinstance(token, dict) else token
    for key in SPECIAL_IDS:
        found[key] = generation.get(key, checkpoint.config.get(key))
    return {key: value for key, value in found.items() if value is not None}


def pair(left: object, right: object) -> dict[str, Any]:
    """Return two values and whether they are the same."""
    return {"same": left == right, "left": left, "right": right}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value, without keys that say nothing about the model."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key in IGNORED_KEYS:
            continue
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each key that only one side has, or both with different values."""
    return [
        {"key": key, "left": left.get(key), "right": right.get(key)}
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]
