"""Run decoder blocks one at a time, exactly as the whole model would.

The model's own forward is called once on each batch of token ids with every block replaced by a
recorder, so masks, rotary embeddings and sliding windows are what the model itself makes of them.
A block is then run with the arguments recorded for it, and hooks see what its linears read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.model.family import Family, Tap
from qtool.model.skeleton import Skeleton

# What a hook is told: the tap and its input, [tokens, C] in the block's dtype.
InputWatcher = Callable[[Tap, Tensor], None]


class _StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Leaves a block's forward once the wanted input has been seen."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments, besides hidden states, with which the model calls one of its blocks."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What enters the first block, and how each block is called on a batch of this size."""

    hidden: Tensor  # [batch, length, hidden size]
    calls: tuple[BlockCall, ...]


def enter(skeleton: Skeleton, token_ids: Tensor) -> Entry:
    """Run the model up to its first block on token ids [batch, length] and record block calls.

    The embeddings must be materialised.
    """
    calls: dict[int, BlockCall] = {}
    first: list[Tensor] = []

    def recorder(index: int) -> Callable[..., Tensor]:
        def record(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            if not first:
                first.append(hidden_states)
            calls[index] = BlockCall(arguments, keywords)
            return hidden_states

        return record

    blocks = skeleton.blocks
    originals = [block.forward for block in blocks]
    norm = skeleton.model.get_submodule(final_norm(skeleton.family))
    forward_norm = norm.forward
    try:
        for index, block in enumerate(blocks):
            block.forward = recorder(index)
        norm.forward = _identity
        inner = skeleton.model.get_submodule(skeleton.family.blocks.rpartition(".")[0])
        inner(input_ids=token_ids.to(skeleton.device), use_cache=False)
    finally:
        for block, forward in zip(blocks, originals, strict=True):
            block.forward = forward
        norm.forward = forward_norm
    return Entry(first[0], tuple(calls[index] for index in range(len(blocks))))


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def final_norm(family: Family) -> str:
    """Return the path of the norm behind the last block."""
    return family.blocks.rpartition(".")[0] + ".norm"


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Return the block's output hidden states [batch, length, hidden size]."""
    output = block(hidden, *call.arguments, **call.keywords)
    return output[0] if isinstance(output, tuple) else output


def run_watched(
    block: nn.Module,
    taps: tuple[Tap, ...],
    hidden: Tensor,
    call: BlockCall,
    watch: InputWatcher,
    *,
    stop_at: Tap | None = None,
) -> Tensor | None:
    """Run the block and show `watch` the input of each tap just before its first linear runs.

    `watch` may replace the weights of the tap's linears: the forward goes on with the new ones.

    Returns:
        The block's output, or None if the forward was left at `stop_at`, whose input `watch`
        has seen.
    """
    with _hooks(block, taps, watch, stop_at):
        try:
            return run_block(block, hidden, call)
        except _StopForward:
            return None


@contextlib.contextmanager
def _hooks(
    block: nn.Module, taps: tuple[Tap, ...], watch: InputWatcher, stop_at: Tap | None
) -> Iterator[None]:
    def hook_for(tap: Tap) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            del module
            watch(tap, arguments[0].reshape(-1, arguments[0].shape[-1]))
            if stop_at is not None and tap.name == stop_at.name:
                raise _StopForward

        return hook

    with contextlib.ExitStack() as stack:
        for tap in taps:
            handle = block.get_submodule(tap.linears[0]).register_forward_pre_hook(hook_for(tap))
            stack.callback(handle.remove)
        yield


def head_logits(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    """Return logits [batch, length, vocabulary] of hidden states behind the last block.

    The head must be materialised. Runs the model's own head code, so that soft-capping and
    logit scaling are what the model says.
    """
    inner_path = skeleton.family.blocks.rpartition(".")[0]
    inner = skeleton.model.get_submodule(inner_path)
    norm = skeleton.model.get_submodule(final_norm(skeleton.family))
    from transformers.modeling_outputs import BaseModelOutputWithPast

    forward = inner.forward

    def already_run(*_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=norm(hidden))

    inner.forward = already_run
    try:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        logits: Tensor = skeleton.model(input_ids=ids, use_cache=False).logits
    finally:
        inner.forward = forward
    return logits
