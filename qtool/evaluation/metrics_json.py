"""An evaluation's figures in the terms of the JSON contract, and which of them were asked for."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.errors import UsageError
from qtool.evaluation.divergence import Comparison
from qtool.evaluation.perplexity import Estimate

# What --metrics may name. `ppl` counts every token of a window but the first, `ppl_llama_cpp` those
# of its second half, as llama-perplexity does.
METRICS = ("ppl", "ppl_llama_cpp", "kld", "top1", "flips")
DEFAULT_METRICS = ("ppl", "kld", "top1")
NEED_REFERENCE = frozenset({"kld", "top1", "flips"})
ALL, NONE = "all", "none"


def parse_metrics(text: str | None) -> tuple[str, ...]:
    """Read `ppl,kld,top1,flips`; perplexity is always among them, `all` names all, `none` none.

    Raises:
        UsageError: an unknown name.
    """
    if text is None:
        return DEFAULT_METRICS
    names = [name.strip() for name in text.split(",") if name.strip()]
    if ALL in names:
        return METRICS
    if names == [NONE]:
        return ()
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1)
            meant = f", did you mean '{near[0]}'?" if near else ""
            raise UsageError(
                f"--metrics: there is no metric '{printable(name)}'{meant}",
                f"choose from: {', '.join(METRICS)}, all or none",
            )
    return tuple(name for name in METRICS if name in names or name == "ppl")


def metrics_json(
    perplexity: Estimate | None,
    second_half: Estimate | None,
    comparison: Comparison | None,
    names: Collection[str],
) -> dict[str, Any]:
    """Return the figures that `names` asks for and that are there.

    Args:
        perplexity: of the model; None where no text was run.
        second_half: the same by llama.cpp's rule.
        comparison: with the reference, None without one.
        names: members of METRICS; perplexity is always given.
    """
    if perplexity is None:
        return {}
    found: dict[str, Any] = {"ppl": _estimate(perplexity)}
    if second_half is not None and "ppl_llama_cpp" in names:
        found["ppl_llama_cpp"] = _estimate(second_half)
    if comparison is None:
        return found
    _add_reference(found["ppl"], comparison.reference_perplexity, comparison.ratio)
    if "ppl_llama_cpp" in found and comparison.second_half is not None:
        _, reference, ratio = comparison.second_half
        _add_reference(found["ppl_llama_cpp"], reference, ratio)
    if "kld" in names:
        found["kld"] = divergence_json(comparison)
    if "top1" in names:
        found["top1"] = _estimate(comparison.top1)
    if "flips" in names:
        found["flips"] = _estimate(comparison.flips)
    return found


def divergence_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything about the divergence."""
    found: dict[str, Any] = {
        "mean": comparison.divergence.value,
        "se": comparison.divergence.standard_error,
    }
    for name, estimate in (
        ("median", comparison.divergence_median),
        ("p99", comparison.divergence_p99),
        ("p999", comparison.divergence_p999),
    ):
        found[name] = estimate.value
        found[f"{name}_se"] = estimate.standard_error
    found["tokens"] = comparison.divergence.tokens
    if comparison.approximation is not None:
        found["tail_error"] = comparison.approximation.value
        found["tail_error_se"] = comparison.approximation.standard_error
        found["tail_error_tokens"] = comparison.approximation.tokens
    return found


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "se": estimate.standard_error, "tokens": estimate.tokens}


def _add_reference(found: dict[str, Any], reference: Estimate, ratio: Estimate) -> None:
    found["reference"] = reference.value
    found["reference_se"] = reference.standard_error
    found["ratio"] = ratio.value
    found["ratio_se"] = ratio.standard_error
