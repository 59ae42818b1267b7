"""How far a quantized model's predictions are from the original's, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import UnsupportedError
from qtool.evaluation.perplexity import Estimate, mean_over_windows, perplexity, token_losses


@dataclass(frozen=True)
class Comparison:
    """A model against its reference on the same windows."""

    perplexity: Estimate
    reference_perplexity: Estimate
    divergence: Estimate  # KL(reference || model) in nats per token
    divergence_p99: float
    divergence_median: float
    top1: Estimate  # fraction of tokens where both find the same token likeliest


def kl_divergence(reference: Tensor, model: Tensor) -> Tensor:
    """Return KL(reference || model) [length] in nats from log probabilities [length, tokens]."""
    return (reference.exp() * (reference - model)).sum(dim=-1).clamp(min=0)


def compare(model: Iterable[Tensor], reference: Iterable[Tensor], windows: Tensor) -> Comparison:
    """Compare logits window by window; never holds more than one window of each.

    Args:
        model: logits [length, vocabulary] float32 of each window.
        reference: the same of the original model.
        windows: token ids [windows, length].

    Raises:
        UnsupportedError: the vocabularies differ.
    """
    losses, reference_losses, divergences, agreements = [], [], [], []
    for ids, logits, wanted in zip(windows, model, reference, strict=True):
        if logits.shape != wanted.shape:
            raise UnsupportedError(
                f"the model predicts {logits.shape[-1]} tokens, the reference {wanted.shape[-1]}",
                "compare a model with the one it was made from",
            )
        agreements.append((logits.argmax(-1) == wanted.argmax(-1)).float())
        found, expected = logits.log_softmax(-1), wanted.log_softmax(-1)
        divergences.append(kl_divergence(expected, found))
        losses.append(token_losses(found, ids))
        reference_losses.append(token_losses(expected, ids))
    values = torch.cat(divergences).double()
    return Comparison(
        perplexity=perplexity(losses),
        reference_perplexity=perplexity(reference_losses),
        divergence=mean_over_windows(divergences),
        divergence_p99=float(values.quantile(0.99)) if values.numel() < 2**24 else float("nan"),
        divergence_median=float(values.median()),
        top1=mean_over_windows(agreements),
    )


def perplexity_of(model: Iterable[Tensor], windows: Tensor) -> Estimate:
    """Return the perplexity of a model from its logits, window by window."""
    losses = [
        token_losses(logits.log_softmax(-1), ids)
        for ids, logits in zip(windows, model, strict=True)
    ]
    return perplexity(losses)
