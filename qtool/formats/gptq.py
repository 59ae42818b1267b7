"""The GPTQ layout, version 1, as AutoGPTQ defined it and GPTQModel, vLLM and transformers read it.

    weight[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n])

Stored per module: `qweight` I32, codes packed along C; `qzeros` I32, zero points **minus one**
packed along R; `scales` F16; `g_idx` I32, the group of each input column. Version 2
(`checkpoint_format: gptq_v2`) stores zero points as they are; it is read but not written.

Layout: https://github.com/AutoGPTQ/AutoGPTQ (qlinear_cuda), https://github.com/ModelCloud/GPTQModel
Shapes: R = out_features, C = in_features, G = groups along C (1 unless per group).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtool import __version__
from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.bitpack import count_unit, pack_words, unpack_words
from qtool.formats.gptq_layout import BITS, read_gptq
from qtool.formats.integer_modules import grid_of, groups, holdable, integer_grid
from qtool.formats.module_patterns import pattern_of, skip_rules
from qtool.formats.packed_layouts import WORD_BITS, words_for
from qtool.formats.protocol import Format, QuantizedModule, TensorLayout
from qtool.grids.integer import IntegerGrid, IntegerParameters
from qtool.grids.protocol import Grid, QuantizedTensor

ZERO_HINT = "fit the grid with zero points from 1 (lowest_zero=1)"

# GPTQModel loads asymmetric version 1 files only if this list names a gptqmodel of at least 0.9:
# earlier writers let zero points of 0 underflow. Ours are at least 1, so the rule is met, and the
# third field says that the entry is about the layout, not about who wrote the file.
ASYMMETRIC_MARK = "gptqmodel:0.9.0:zero points as there, written by qtool"


class GptqFormat:
    """AutoGPTQ's layout with groups in column order."""

    name: str = "gptq"
    loads_in: tuple[str, ...] = ("GPTQModel", "vLLM", "transformers")

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float16: readers expect it whatever the model's dtype."""
        del model_dtype
        return torch.float16

    def lowest_zero(self) -> int:
        """Return 1: a stored `zero - 1` below 0 wraps, and every reader undoes that differently."""
        return 1

    def check(self, module: QuantizedModule) -> None:
        """Refuse what the layout cannot hold.

        Raises:
            UnsupportedError: another grid, a scale per tensor, sizes that do not fill whole words,
                or an asymmetric grid with zero points of 0.
            UsageError: the group size does not divide the row.
        """
        grid = holdable(
            self.name,
            module,
            bits=BITS,
            granularities=("channel", "group"),
            scales=(torch.float16,),
        )
        unit = count_unit(grid.bits)
        rows, columns = module.shape
        if rows % unit or columns % unit:
            fits = [b for b in BITS if not (rows % count_unit(b) or columns % count_unit(b))]
            widths = f"{', '.join(map(str, fits))} bits fit it; or " if fits else ""
            raise UnsupportedError(
                f"{module.name} is {rows} x {columns}: the gptq format packs {grid.bits}-bit "
                f"weights only where both are multiples of {unit}",
                f"{widths}leave it unquantized with --ignore {module.name}, or use -f "
                "compressed-tensors",
            )
        if not grid.symmetric and grid.lowest_zero < self.lowest_zero():
            raise UnsupportedError(
                f"{module.name}: the gptq format cannot store a zero point of 0",
                ZERO_HINT,
            )

    def layout(self, module: QuantizedModule) -> dict[str, TensorLayout]:
        """Return the layout of `qweight`, `qzeros`, `scales` and `g_idx`."""
        self.check(module)
        grid = integer_grid(module.grid)
        rows, columns = module.shape
        count = groups(grid, columns)
        return {
            f"{module.name}.qweight": TensorLayout("I32", (words_for(columns, grid.bits), rows)),
            f"{module.name}.qzeros": TensorLayout("I32", (count, words_for(rows, grid.bits))),
            f"{module.name}.scales": TensorLayout("F16", (count, rows)),
            f"{module.name}.g_idx": TensorLayout("I32", (columns,)),
        }

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that `layout` promised.

        Raises:
            UnsupportedError: the module, or one of its zero points, cannot be held.
        """
        self.check(QuantizedModule(name, quantized.grid, quantized.shape))
        grid = integer_grid(quantized.grid)
        parameters: IntegerParameters = quantized.parameters
        columns = quantized.shape[1]
        if bool((parameters.zero < self.lowest_zero()).any()):
            raise UnsupportedError(
                f"{name}: the gptq format cannot store a zero point of 0", ZERO_HINT
            )
        zeros = (parameters.zero - 1).to(torch.uint8)  # [R, G]
        return {
            f"{name}.qweight": pack_words(quantized.codes, grid.bits).T.contiguous(),
            f"{name}.qzeros": pack_words(zeros.T, grid.bits),
            f"{name}.scales": parameters.scale.T.to(torch.float16).contiguous(),
            f"{name}.g_idx": _group_of_column(columns, grid, quantized.codes.device),
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Rebuild a module; a grid with `lowest_zero` 1 is version 1, with 0 version 2.

        Raises:
            UnsupportedError: the groups are not in column order.
            DamagedError: a symmetric module whose zero points are not in the middle.
        """
        integers = integer_grid(grid)
        words = tensors[f"{name}.qweight"]
        columns = words.shape[0] * WORD_BITS // integers.bits
        index = tensors.get(f"{name}.g_idx")
        if index is not None and not torch.equal(
            index.to(torch.int32), _group_of_column(columns, integers, index.device)
        ):
            raise UnsupportedError(
                f"{name}: its groups follow the activation order (g_idx), which qtool cannot read",
                "load it with GPTQModel, or quantize the original model with qtool, whose "
                "act-order needs no g_idx",
            )
        scale = tensors[f"{name}.scales"].to(torch.float32).T.contiguous()
        zero = _zero_points(name, tensors[f"{name}.qzeros"], integers, scale.shape[0])
        codes = unpack_words(words.T, integers.bits, columns)
        return QuantizedTensor(codes, IntegerParameters(scale, zero), grid)

    def config(self, modules: list[QuantizedModule], kept: list[str]) -> dict[str, Any]:
        """Return the configuration; what most modules share is the base, the rest is `dynamic`."""
        settings = {module.name: _settings(module.grid) for module in modules}
        base = Counter(settings.values()).most_common(1)[0][0]
        rules = skip_rules(kept)  # first: where both match, GPTQModel tries these first anyway
        for name, own in settings.items():
            if own != base:
                rules[f"+:{pattern_of(name)}"] = dict(own)
        quantizers = [f"qtool:{__version__}"]
        if any(not own["sym"] for own in map(dict, settings.values())):
            quantizers.append(ASYMMETRIC_MARK)
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            **dict(base),
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            **({"dynamic": rules} if rules else {}),
            "meta": {"quantizer": quantizers},
        }

    def grids(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout]
    ) -> dict[str, Grid]:
        """Return the grid of every module that has a `qweight`.

        Raises:
            UnsupportedError, DamagedError: as `read_gptq`.
        """
        found = read_gptq(config, tensors)
        return {name: grid_of(module) for name, module in found.items()}


def _settings(grid: Grid) -> tuple[tuple[str, int | bool], ...]:
    """The settings of a module that readers let vary, as a hashable dictionary."""
    integers = integer_grid(grid)
    size = integers.group_size if integers.granularity == "group" else -1
    return (("bits", integers.bits), ("group_size", size), ("sym", integers.symmetric))


def _group_of_column(columns: int, grid: IntegerGrid, device: torch.device) -> Tensor:
    """The group of each column [C] int32, in order."""
    index = torch.arange(columns, dtype=torch.int32, device=device)
    return index // grid.width(columns)


def _zero_points(name: str, words: Tensor, grid: IntegerGrid, rows: int) -> Tensor:
    """Zero points [R, G] float32 from `qzeros` words [G, w]."""
    if grid.symmetric:
        return _middle(name, words, grid, rows)
    if grid.lowest_zero and WORD_BITS % grid.bits == 0:
        # GPTQModel takes 1 off whole words, so a zero point of 0 borrows from its neighbour.
        # Adding to whole words undoes that too; for all others it is the same as field by field.
        ones = sum(1 << shift for shift in range(0, WORD_BITS, grid.bits))
        words = (words.to(torch.int64) + ones).to(torch.int32)
        zero = unpack_words(words, grid.bits, rows)
    else:
        zero = (unpack_words(words, grid.bits, rows) + grid.lowest_zero) & grid.max_code
    return zero.T.to(torch.float32).contiguous()


def _middle(name: str, words: Tensor, grid: IntegerGrid, rows: int) -> Tensor:
    """The one zero point of a symmetric grid as [R, G] float32.

    Files that declare version 1 and store the zero points of version 2 are in circulation. For a
    symmetric grid both are unmistakable.
    """
    middle = (grid.max_code + 1) // 2
    found = unpack_words(words, grid.bits, rows)
    if not (bool((found == middle).all()) or bool((found == middle - 1).all())):
        raise DamagedError(
            f"{name}: declared symmetric, but its zero points are not all {middle}",
            "repair 'sym' in the quantization_config, or download the model again",
        )
    return torch.full((rows, words.shape[0]), float(middle), device=words.device)


GPTQ: Format = GptqFormat()
