"""A model without its weights: parameters on meta, buffers real, one module filled at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.reader import check_finite
from qtool.checkpoint.untrusted import naming, shown_path
from qtool.errors import DamagedError
from qtool.model.family import Family, family_of

# Not of the model: how it is stored, what a call is to return, which is ours to ask for, and which
# kernels compute its attention: one that is not installed, or that transformers gets from the hub.
NOT_OF_THE_MODEL = frozenset(
    {"quantization_config", "output_attentions", "output_hidden_states", "return_dict"}
    | {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
)


class WeightSource(Protocol):
    """Where dense weights come from: float files, or packed ones that are unpacked on the way."""

    def read(self, name: str) -> Tensor:
        """Return the dense tensor called `name` on the CPU, in its stored dtype."""

    def file(self, name: str) -> Path:
        """Return the file that it lies in, for messages."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put every parameter that is registered on the meta device; leave buffers (rope) real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Skeleton:
    """A transformers model that holds no weights, and knows where they belong.

    Args:
        config: config.json as a mapping; NOT_OF_THE_MODEL in it is ignored.
        family: its family.
        dtype: in which modules are materialised.
        device: where modules are materialised and buffers live.

    Raises:
        DamagedError: transformers cannot build, or could not run, what config.json says.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        family: Family,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {k: v for k, v in config.items() if k not in NOT_OF_THE_MODEL}
        model_type = fields.pop("model_type")
        self.family = family
        self.dtype = dtype
        self.device = device
        faults = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)
        try:
            self.config = AutoConfig.for_model(model_type, **fields)
            with _parameters_on_meta():
                self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        except (*faults, StrictDataclassError) as error:
            said = " ".join(str(error).split())
            raise DamagedError(
                f"config.json does not describe a {family.name} model: {said}",
                "compare it with the original model's config.json",
            ) from error
        kinds = getattr(self.config, "layer_types", None) or ()
        if "sliding_attention" in kinds and getattr(self.config, "sliding_window", None) is None:
            raise DamagedError(
                "config.json: layer_types has sliding attention, but there is no sliding_window",
                "compare it with the original model's config.json",
            )
        self.model.eval()
        for buffers in self.model.modules():
            for name, buffer in buffers.named_buffers(recurse=False):
                setattr(buffers, name, buffer.to(device))

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        return list(self.model.get_submodule(self.family.blocks))

    def block_prefix(self, index: int) -> str:
        """Return what precedes the parameter names of block `index`."""
        return f"{self.family.blocks}.{index}."

    def load(self, path: str, source: WeightSource) -> dict[str, Tensor]:
        """Materialise the module at `path` and return its tensors as stored, by name below it.

        Raises:
            DamagedError: a tensor is missing, or has another shape than the config says.
            NumericalError: a value is not finite; names file and tensor.
        """
        module = self.model.get_submodule(path)
        stored: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            full = f"{path}.{name}"
            if full not in source:
                raise DamagedError(
                    f"tensor '{full}' is missing from the checkpoint",
                    "the download is incomplete, or config.json is another model's",
                )
            tensor = source.read(full)
            if tensor.shape != parameter.shape:
                raise DamagedError(
                    f"{shown_path(source.file(full))}: tensor '{full}' has shape "
                    f"{list(tensor.shape)}, config.json says {list(parameter.shape)}",
                    "config.json and weights belong to different models",
                )
            check_finite(full, tensor, source.file(full))
            stored[name] = tensor
        self.assign(module, stored)
        return stored

    def assign(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Give a module these parameters, in the skeleton's dtype and on its device."""
        placed = {name: tensor.to(self.device, self.dtype) for name, tensor in tensors.items()}
        module.load_state_dict(placed, strict=False, assign=True)
        module.requires_grad_(requires_grad=False)

    def drop(self, path: str) -> None:
        """Free the weights of the module at `path`."""
        release(self.model.get_submodule(path))


def skeleton_of(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Skeleton:
    """Return the skeleton of a directory's model.

    Raises:
        DamagedError: as `Skeleton`; names the directory.
    """
    with naming(checkpoint.path):
        return Skeleton(checkpoint.config, family_of(checkpoint.config), dtype=dtype, device=device)


def release(module: nn.Module) -> None:
    """Free the weights of a module at once.

    A decoder block refers to itself (transformers binds its forward), so that one which is merely
    forgotten keeps its weights until the next garbage collection.
    """
    empty = {name: p.to("meta") for name, p in module.named_parameters()}
    module.load_state_dict(empty, strict=False, assign=True)
