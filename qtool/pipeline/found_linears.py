"""Find the linears of every block from headers alone; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qtool.checkpoint.locate import Checkpoint
from qtool.errors import DamagedError, UsageError, shortened
from qtool.model.conversion import converted_tensors
from qtool.model.family import Family
from qtool.recipe.rules import matches
from qtool.recipe.schema import Recipe


@dataclass(frozen=True)
class FoundLinear:
    """One linear of a block."""

    path: str
    block: int
    tap: str
    shape: tuple[int, int]


def block_linears(checkpoint: Checkpoint, family: Family) -> dict[str, FoundLinear]:
    """Return full module path -> where it stands, for every linear of every block.

    Raises:
        DamagedError: headers and configuration disagree.
    """
    found: dict[str, FoundLinear] = {}
    _check_surplus(checkpoint, family)
    for block in range(int(checkpoint.config["num_hidden_layers"])):
        for tap in family.taps:
            for path in tap.linears:
                name = f"{family.blocks}.{block}.{path}"
                ref = checkpoint.refs.get(f"{name}.weight")
                if ref is None:
                    raise DamagedError(
                        f"tensor '{name}.weight' is missing from {checkpoint.path}",
                        f"config.json says {family.name} with "
                        f"{checkpoint.config['num_hidden_layers']} layers: the download is "
                        "incomplete, or config.json is another model's",
                    )
                if len(ref.shape) != 2:
                    raise DamagedError(
                        f"tensor '{name}.weight' in {ref.file} has shape {list(ref.shape)}, "
                        "not rows and columns",
                        "the file is not what config.json describes",
                    )
                found[name] = FoundLinear(path, block, tap.name, (ref.shape[0], ref.shape[1]))
    return found


def _check_surplus(checkpoint: Checkpoint, family: Family) -> None:
    """Blocks that config.json does not count would be carried along as they are, unused."""
    prefix = f"{family.blocks}."
    below = [name.removeprefix(prefix) for name in checkpoint.refs if name.startswith(prefix)]
    indices = {name.partition(".")[0] for name in below}
    stored = max((int(index) for index in indices if index.isdecimal()), default=-1) + 1
    declared = int(checkpoint.config["num_hidden_layers"])
    if stored > declared:
        raise DamagedError(
            f"{checkpoint.path} holds {stored} blocks, its config.json says {declared}",
            "config.json and weights belong to different models",
        )


def check_rules(
    recipe: Recipe, checkpoint: Checkpoint, family: Family, modules: Sequence[str]
) -> None:
    """Refuse rules that can do nothing: a typing error in them would go unnoticed.

    Raises:
        UsageError: a rule matches nothing, or says what no output can hold.
    """
    # A rule may name the head or the embeddings too: packed formats keep them in any case.
    names = [*modules, family.head, "model.embed_tokens"]
    gguf = [export for export in recipe.export if export.gguf_type]
    if gguf:
        names += stored_names(checkpoint, family)
    for rule in recipe.rules:
        if not any(matches(rule.match, name) for name in names):
            raise UsageError(
                f"rule '{shortened(rule.match)}' matches no linear of the model",
                f"names look like {next(iter(modules))}",
            )
        if not gguf and not rule.keep and not rule.changes:
            raise UsageError(
                f"rule '{shortened(rule.match)}' gives a type of GGUF, but no output is a GGUF",
                "give bits, or --format gguf:Q4_K_M",
            )
        if len(gguf) == len(recipe.export) and not rule.keep and rule.type is None:
            raise UsageError(
                f"rule '{shortened(rule.match)}' gives bits or a group size, but a GGUF has types",
                f"write for example --override '{shortened(rule.match)}=Q6_K'",
            )


def stored_names(checkpoint: Checkpoint, family: Family) -> list[str]:
    """Return llama.cpp's names of all matrices, without `.weight`: rules may use them too."""
    tensors = converted_tensors(checkpoint.config, family, checkpoint.refs)
    return [x.name.removesuffix(".weight") for x in tensors if len(x.shape) > 1]
