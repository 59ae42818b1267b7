"""A model without its weights: parameters on meta, buffers real, one module filled at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qtool.errors import DamagedError
from qtool.model.family import Family


class WeightSource(Protocol):
    """Where dense weights come from: float files, or packed ones that are unpacked on the way."""

    def read(self, name: str) -> Tensor:
        """Return the dense tensor called `name` on the CPU, in its stored dtype."""

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
        config: config.json as a mapping; a `quantization_config` in it is ignored.
        family: its family.
        dtype: in which modules are materialised.
        device: where modules are materialised and buffers live.
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

        fields = {k: v for k, v in config.items() if k != "quantization_config"}
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
                    f"tensor '{full}' has shape {list(tensor.shape)}, config.json says "
                    f"{list(parameter.shape)}",
                    "config.json and weights belong to different models",
                )
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


def release(module: nn.Module) -> None:
    """Free the weights of a module at once.

    A decoder block refers to itself (transformers binds its forward), so that one which is merely
    forgotten keeps its weights until the next garbage collection.
    """
    empty = {name: p.to("meta") for name, p in module.named_parameters()}
    module.load_state_dict(empty, strict=False, assign=True)
