"""A directory's whole model in memory, to generate text: every token takes all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtool import device as devices
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.reader import TensorReader
from qtool.errors import CapacityError
from qtool.evaluation.continuations import Begin, Tokens
from qtool.evaluation.runners import load_head
from qtool.evaluation.scores import not_finite
from qtool.formats.reading import DenseSource
from qtool.model.skeleton import Skeleton, skeleton_of
from qtool.model.streaming import embedding_path
from qtool.recipe.sizes import shown_size

# Of free memory that weights and cache may take; the rest is for activations.
USABLE_PART = 0.9
CACHE_PART = 0.2  # of free memory that caches of a batch may take beside the weights
MOST_AT_ONCE = {"cpu": 16, "cuda": 64}  # prompts


class WholeModel:
    """A float or packed directory, unpacked, whole and on the device.

    Args:
        checkpoint: float, or of any format qtool writes.
        device: where to compute.
        dtype: in which to compute.
        vocabulary: only the first so many tokens may be chosen; None for all.
        begin: told about phases.

    Raises:
        CapacityError: it does not fit.
        UnsupportedError, DamagedError, NumericalError: as `StreamedTasks`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        vocabulary: int | None,
        begin: Begin,
    ) -> None:
        self._name, self._device, self._begin = checkpoint.name, device, begin
        self._vocabulary = vocabulary
        self._skeleton = skeleton = skeleton_of(checkpoint, dtype=dtype, device=device)
        _check_fits(skeleton, checkpoint.name)
        tick = begin(f"loading {checkpoint.name}", len(skeleton.blocks), "block")
        with torch.no_grad(), TensorReader(checkpoint.refs) as reader:
            source = DenseSource(checkpoint, reader)
            skeleton.load(embedding_path(skeleton), source)
            for index in range(len(skeleton.blocks)):
                path = skeleton.block_prefix(index).removesuffix(".")
                skeleton.load(path, source)
                tick()
            load_head(skeleton, source)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Tokens], most: Sequence[int], ended: Callable[[int, Tokens], bool]
    ) -> list[Tokens]:
        """Go on greedily from prompts, those of like length together.

        Args:
            prompts: token ids, none empty.
            most: tokens that each may go on with.
            ended: told a prompt's number and the tokens so far, whether that is enough.

        Raises:
            NumericalError: logits that are not finite.
        """
        found: list[Tokens] = [()] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
        tick = self._begin(f"generating with {self._name}", len(prompts), "prompt")
        while order:
            count = self._at_once(len(prompts[order[0]]) + most[order[0]])
            batch, order = order[:count], order[count:]
            for index, tokens in self._batch(batch, prompts, most, ended):
                found[index] = tokens
                tick()
        return found

    def _at_once(self, length: int) -> int:
        """Return how many prompts fit together, each with what it goes on with."""
        config = self._skeleton.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        even = config.hidden_size // config.num_attention_heads
        width = getattr(config, "head_dim", None) or even
        token = 2 * config.num_hidden_layers * heads * width * self._skeleton.dtype.itemsize
        room = CACHE_PART * devices.free_memory(self._device)
        return max(1, min(MOST_AT_ONCE[self._device.type], int(room / (token * length))))

    def _batch(
        self,
        batch: Sequence[int],
        prompts: Sequence[Tokens],
        most: Sequence[int],
        ended: Callable[[int, Tokens], bool],
    ) -> list[tuple[int, Tokens]]:
        """Generate for some prompts, filled up on the left so that all go on at the same place."""
        from transformers import DynamicCache

        model: Any = self._skeleton.model
        length = max(len(prompts[index]) for index in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, length - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, length - len(prompts[index]) :] = 1
        places = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._skeleton.config)
        made: dict[int, list[int]] = {index: [] for index in batch}
        rows = [index for index in batch if most[index] > 0]  # of which the cache has entries
        alive = set(rows)
        ids, mask, places = (t[[index in alive for index in batch]] for t in (ids, mask, places))
        while alive:
            output = model(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                position_ids=places.to(self._device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            chosen = self._likeliest(output.logits[:, -1]).tolist()
            for index, token in zip(rows, chosen, strict=True):
                if index not in alive:
                    continue
                made[index].append(token)
                if len(made[index]) >= most[index] or ended(index, tuple(made[index])):
                    alive.remove(index)
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], dim=1)
            ids, places = torch.tensor(chosen)[:, None], places[:, -1:] + 1
            if 2 * len(alive) <= len(rows):  # the others would only cost time
                kept = torch.tensor(
                    [row for row, index in enumerate(rows) if index in alive], dtype=torch.int64
                )
                rows = [rows[row] for row in kept.tolist()]
                ids, mask, places = ids[kept], mask[kept], places[kept]
                if rows:
                    cache.batch_select_indices(kept.to(self._device))
        return [(index, tuple(tokens)) for index, tokens in made.items()]

    def _likeliest(self, logits: Tensor) -> Tensor:
        known = logits[:, : self._vocabulary].to(torch.float32)
        if not bool(torch.isfinite(known).all()):
            raise not_finite(self._name)
        return known.argmax(-1)


def _check_fits(skeleton: Skeleton, name: str) -> None:
    weights = sum(p.numel() for p in skeleton.model.parameters()) * skeleton.dtype.itemsize
    free = devices.free_memory(skeleton.device)
    if weights > USABLE_PART * free:
        raise CapacityError(
            f"a task generates text, which needs the whole of {name} in memory: "
            f"{shown_size(weights)}, and {shown_size(free)} are free",
            "use --dtype bfloat16, a GGUF file of the model, or tasks that choose between answers",
        )
