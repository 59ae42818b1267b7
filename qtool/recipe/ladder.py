"""Ladders: ways to quantize one model, from the largest and safest to the smallest and dearest.

The advice of every guide - eight bits first, then four by rounding, then by calibration - as data.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtool.errors import UsageError
from qtool.recipe.schema import Export, Recipe, Rung, resolved

INTEGERS = (
    Rung(method="rtn", bits=8),
    Rung(method="rtn", bits=4),
    Rung(method="awq", bits=4),
    Rung(method="gptq", bits=4),
    Rung(method="awq+gptq", bits=4),
)
GGUF = (
    Rung(method="rtn", format="gguf:Q8_0"),
    Rung(method="rtn", format="gguf:Q6_K"),
    Rung(method="awq+gptq", format="gguf:Q5_K_M"),
    Rung(method="rtn", format="gguf:Q4_K_M"),
    Rung(method="awq", format="gguf:Q4_K_M"),
    Rung(method="gptq", format="gguf:Q4_K_M"),
    Rung(method="awq+gptq", format="gguf:Q4_K_M"),
)


@dataclass(frozen=True)
class Step:
    """One rung with everything decided."""

    name: str
    recipe: Recipe


def steps_of(recipe: Recipe) -> tuple[Step, ...]:
    """Return the rungs of a recipe that is not resolved yet, each as a resolved recipe.

    Raises:
        UsageError: two rungs are the same.
    """
    steps = [_step(recipe, rung) for rung in recipe.ladder]
    names = [step.name for step in steps]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"the ladder has the rung {twice} twice", "leave one of them out")
    return tuple(steps)


def _step(recipe: Recipe, rung: Rung) -> Step:
    changes = {
        key: value
        for key, value in rung.model_dump(exclude={"format"}).items()
        if value is not None
    }
    export: tuple[Export, ...] = ()
    if rung.format is not None:
        template = next((x for x in recipe.export if x.gguf_type is not None), None)
        whole = Export(format=rung.format)
        if template is not None and whole.gguf_type is not None:
            whole = template.model_copy(update={"format": rung.format})
        export = (whole,)
    elif recipe.export and recipe.export[0].gguf_type is None:
        export = recipe.export[:1]
    changed = recipe.model_copy(
        update={
            "quantize": recipe.quantize.model_copy(update=changes),
            "export": export,
            "ladder": (),
        }
    )
    final = resolved(changed)
    return Step(_name(final), final)


def _name(recipe: Recipe) -> str:
    """Return a name such as `awq-w4g128` or `gptq-Q4_K_M`, of letters that a file name may have."""
    method = str(recipe.quantize.method).replace("+", "-")
    kind = recipe.export[0].gguf_type
    if kind is not None:
        return f"{method}-{kind}"
    size = recipe.quantize.group_size
    spread = {-1: "", 0: "-tensor"}.get(size, f"g{size}")
    sign = "" if recipe.quantize.symmetric else "-asym"
    return f"{method}-w{recipe.quantize.bits}{spread}{sign}-{recipe.export[0].format}"
