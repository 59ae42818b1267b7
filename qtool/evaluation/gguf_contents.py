"""What a GGUF file holds, told by its metadata; no torch."""

from __future__ import annotations

from qtool.checkpoint.gguf_header import GgufContents
from qtool.checkpoint.untrusted import shown_path
from qtool.errors import UnsupportedError

OTHER_CONTENTS = {  # general.type -> what the file is
    "imatrix": "an importance matrix",
    "adapter": "an adapter",
    "mmproj": "the vision or audio part of a model",
    "vocab": "a vocabulary without weights",
}


def check_is_model(contents: GgufContents) -> None:
    """Check that a file, or the first of its parts, holds a model at all.

    Raises:
        UnsupportedError: it is something else.
    """
    known = {key: value.content for key, value in contents.metadata.items()}
    architecture = known.get("general.architecture")
    named = "mmproj" if architecture == "clip" else str(known.get("general.type", "model"))
    other = OTHER_CONTENTS.get(named)
    if other is None and (not contents.tensors or not isinstance(architecture, str)):
        other = "no model: it has no tensors, or names no architecture"
    if other is None and not architecture:
        other = "no model: the name of its architecture is empty"
    if other is not None:
        raise UnsupportedError(
            f"{shown_path(contents.path)} is {other}",
            "give a model; statistics go beside one, as --statistics FILE",
        )


def check_continues_text(contents: GgufContents) -> None:
    """Check by a file's metadata that it is a language model that predicts the next token.

    Args:
        contents: of the file, or of the first of its parts.

    Raises:
        UnsupportedError: it is something else.
    """
    known = {key: value.content for key, value in contents.metadata.items()}
    architecture = known.get("general.architecture")
    pooled = f"{architecture}.pooling_type" in known
    other = OTHER_CONTENTS.get(str(known.get("general.type", "")))
    if other is None and architecture == "clip":
        other = OTHER_CONTENTS["mmproj"]
    if other is None and (pooled or known.get(f"{architecture}.attention.causal") is False):
        other = "a model that embeds text"
    if other is None and not contents.tensors:
        other = OTHER_CONTENTS["vocab"]
    if other is None and architecture is None:
        other = "no model: it names no architecture"
    if other is not None:
        raise UnsupportedError(
            f"{shown_path(contents.path)} is {other}",
            "give the GGUF file of a language model",
        )
