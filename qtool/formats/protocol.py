"""What every on-disk dialect offers: grids it holds, how they are packed, what config.json says.

A format is pure: `pack` and `unpack` are exact inverses on tensors, and `layout` knows every
dtype and shape before a weight is read, so that the plan can place each byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qtool.errors import UnsupportedError
from qtool.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qtool.grids.protocol import Grid, QuantizedTensor


@dataclass(frozen=True)
class TensorLayout:
    """Dtype (as safetensors writes it: I32, F16, BF16, I64, ...) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizedModule:
    """One quantized linear as the configuration sees it."""

    name: str  # module path without `.weight`
    grid: Grid
    shape: tuple[int, int]


class Format(Protocol):
    """One on-disk dialect."""

    name: str
    loads_in: tuple[str, ...]  # engines known to read it, for the report and the model card

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which this format stores scales for a model of `model_dtype`."""

    def lowest_zero(self) -> int:
        """Return the least zero point that the format can store."""

    def check(self, module: QuantizedModule) -> None:
        """Raise UnsupportedError or UsageError, with what works, if the module cannot be held."""

    def layout(self, module: QuantizedModule) -> dict[str, TensorLayout]:
        """Return full tensor name -> layout of everything stored for the module but its bias."""

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Return full tensor name -> tensor, as `layout` promised."""

    def unpack(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Rebuild what `pack` was given; the exact inverse."""

    def config(self, modules: list[QuantizedModule], kept: list[str]) -> dict[str, Any]:
        """Return `quantization_config` for config.json; `kept` are linears left unquantized."""

    def grids(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout]
    ) -> dict[str, Grid]:
        """Return module name -> grid of a directory, from its configuration and headers.

        Args:
            config: the value of `quantization_config`.
            tensors: tensor name -> layout, from the headers of all shards.

        Raises:
            UnsupportedError: the directory uses a variant of the dialect that qtool cannot read.
            DamagedError: a packed tensor's shape contradicts the configuration.
        """


FORMATS: Registry[Format] = Registry(
    "format",
    {
        "gptq": "qtool.formats.gptq:GPTQ",
        "awq": "qtool.formats.awq:AWQ",
        "compressed-tensors": "qtool.formats.compressed_tensors:COMPRESSED_TENSORS",
    },
)

# Method -> what reads its configuration and headers, without torch.
LAYOUTS: Registry[Callable[[Mapping[str, Any], Mapping[str, TensorLayout]], Mapping[str, object]]]
LAYOUTS = Registry(
    "format",
    {
        "gptq": "qtool.formats.gptq_layout:read_gptq",
        "awq": "qtool.formats.awq_layout:read_awq",
        "compressed-tensors": ("qtool.formats.compressed_tensors_layout:read_compressed_tensors"),
    },
)


def format_of(config: Mapping[str, Any]) -> Format | None:
    """Return the format that a model's config.json declares, None for a float model.

    Raises:
        UnsupportedError: quantized in a way that qtool does not read.
    """
    declared = config.get("quantization_config")
    if not declared:
        return None
    method = str(declared.get("quant_method", ""))
    if method not in FORMATS:
        raise UnsupportedError(
            f"the model is already quantized as '{method}', which qtool cannot read",
            f"formats it reads: {', '.join(FORMATS)}; quantize the original model instead",
        )
    return FORMATS[method]
