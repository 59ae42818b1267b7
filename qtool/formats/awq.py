"""The AWQ layout, GEMM version, as AutoAWQ defined it and vLLM, GPTQModel and transformers read it.

    weight[n, k] = scales[k // g, n] * (q[k, n] - zero[k // g, n])

Stored per module: `qweight` I32, codes packed along R; `qzeros` I32, zero points as they are,
packed likewise; `scales` F16. Eight output columns share a word, the even ones first.

A symmetric grid is stored with explicit zero points of 8 and `zero_point: true`: that is the one
variant which every reader takes. It is therefore read back as an asymmetric grid.

Layout: https://github.com/casper-hansen/AutoAWQ (gemm.py); paper: https://arxiv.org/abs/2306.00978
Shapes: R = out_features, C = in_features, G = groups along C (1 unless per group).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtool.errors import UnsupportedError
from qtool.formats.awq_layout import BITS, WORD_COLUMNS, read_awq
from qtool.formats.bitpack import pack_words, unpack_words
from qtool.formats.integer_modules import grid_of, groups, holdable, integer_grid
from qtool.formats.module_patterns import skip_rules
from qtool.formats.protocol import Format, QuantizedModule, TensorLayout
from qtool.grids.integer import IntegerParameters
from qtool.grids.protocol import Grid, QuantizedTensor

COLUMN_AT = (0, 2, 4, 6, 1, 3, 5, 7)  # place in the word -> column
PLACE_OF = tuple(COLUMN_AT.index(column) for column in range(WORD_COLUMNS))


class AwqFormat:
    """AutoAWQ's GEMM layout."""

    name: str = "awq"
    loads_in: tuple[str, ...] = ("vLLM", "GPTQModel", "transformers")

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float16: readers expect it whatever the model's dtype."""
        del model_dtype
        return torch.float16

    def lowest_zero(self) -> int:
        """Return 0: zero points are stored as they are."""
        return 0

    def check(self, module: QuantizedModule) -> None:
        """Refuse what the layout cannot hold.

        Raises:
            UnsupportedError: other than 4-bit integers, a scale per tensor, or a number of outputs
                that does not fill whole words.
            UsageError: the group size does not divide the row.
        """
        holdable(
            self.name,
            module,
            bits=(BITS,),
            granularities=("channel", "group"),
            scales=(torch.float16,),
        )
        if module.shape[0] % WORD_COLUMNS:
            raise UnsupportedError(
                f"{module.name} has {module.shape[0]} outputs: the awq format packs them only in "
                f"multiples of {WORD_COLUMNS}",
                f"leave it unquantized with --ignore {module.name}, or use -f compressed-tensors",
            )

    def layout(self, module: QuantizedModule) -> dict[str, TensorLayout]:
        """Return the layout of `qweight`, `qzeros` and `scales`."""
        self.check(module)
        rows, columns = module.shape
        count = groups(integer_grid(module.grid), columns)
        words = rows // WORD_COLUMNS
        return {
            f"{module.name}.qweight": TensorLayout("I32", (columns, words)),
            f"{module.name}.qzeros": TensorLayout("I32", (count, words)),
            f"{module.name}.scales": TensorLayout("F16", (count, rows)),
        }

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that `layout` promised."""
        self.check(QuantizedModule(name, quantized.grid, quantized.shape))
        parameters: IntegerParameters = quantized.parameters
        return {
            f"{name}.qweight": _interleave(quantized.codes.T),
            f"{name}.qzeros": _interleave(parameters.zero.T.to(torch.uint8)),
            f"{name}.scales": parameters.scale.T.to(torch.float16).contiguous(),
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Rebuild a module."""
        codes = _straighten(tensors[f"{name}.qweight"]).T.contiguous()
        zero = _straighten(tensors[f"{name}.qzeros"]).T.to(torch.float32).contiguous()
        scale = tensors[f"{name}.scales"].to(torch.float32).T.contiguous()
        return QuantizedTensor(codes, IntegerParameters(scale, zero), grid)

    def config(self, modules: list[QuantizedModule], kept: list[str]) -> dict[str, Any]:
        """Return the configuration, which is one for all modules.

        Raises:
            UnsupportedError: the modules do not all have the same group size.
        """
        sizes: dict[int, str] = {}
        for module in modules:
            grid = integer_grid(module.grid)
            sizes.setdefault(grid.group_size if grid.granularity == "group" else -1, module.name)
        if len(sizes) > 1:
            (one, first), (other, second) = list(sizes.items())[:2]
            raise UnsupportedError(
                f"the awq format holds one group size: {first} has {one}, {second} has {other}",
                "use -f gptq or -f compressed-tensors for mixed schemes",
            )
        # transformers and vLLM read `modules_to_not_convert`, GPTQModel only `dynamic`.
        skipped = skip_rules(kept)
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": next(iter(sizes)),
            "zero_point": True,
            "modules_to_not_convert": list(kept),
            **({"dynamic": skipped} if skipped else {}),
        }

    def grids(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout]
    ) -> dict[str, Grid]:
        """Return the grid of every module that has a `qweight`.

        Raises:
            UnsupportedError, DamagedError: as `read_awq`.
        """
        found = read_awq(config, tensors)
        return {name: grid_of(module) for name, module in found.items()}


def _interleave(values: Tensor) -> Tensor:
    """Pack [rows, R] values below 16 into words [rows, R / 8] int32."""
    ordered = values.reshape(len(values), -1, WORD_COLUMNS)[..., list(COLUMN_AT)]
    return pack_words(ordered.flatten(1), BITS)


def _straighten(words: Tensor) -> Tensor:
    """Unpack words [rows, R / 8] int32 into values [rows, R] uint8."""
    ordered = unpack_words(words, BITS, words.shape[1] * WORD_COLUMNS)
    return ordered.reshape(len(words), -1, WORD_COLUMNS)[..., list(PLACE_OF)].flatten(1)


AWQ: Format = AwqFormat()
