"""What a graphics card really offers: names and sizes -> bytes that programs can allocate.

A card sold as 24 GB reports between 22.0 GiB (with error correction) and 24.0 GiB. The figures
below are totals that the driver reported to programs: in messages of PyTorch ("has a total
capacity of") in GiB, in the logs of llama.cpp in MiB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qtool.errors import UsageError
from qtool.recipe.sizes import parse_size, shown_size
from qtool.registry import nearest

MIB, GIB = 1 << 20, 1 << 30
MOST_DEVICES = 1024
LARGEST = 1 << 50  # bytes of one device

PYTORCH = "capacity in a PyTorch message"
LLAMA_CPP = "total in a llama.cpp log"
DEVICE_QUERY = "total in a deviceQuery listing"
BY_PEERS = "98 % of the nominal size, as its peers have"

# Name -> GiB that the driver reports, and where the figure comes from.
CARDS: Mapping[str, tuple[float, str]] = {
    "rtx2080ti": (10.75, PYTORCH),
    "rtx3060": (11.75, PYTORCH),
    "rtx3060ti": (7.84, BY_PEERS),
    "rtx3070": (7.78, PYTORCH),
    "rtx3080": (9.78, PYTORCH),
    "rtx3080ti": (11.76, BY_PEERS),
    "rtx3090": (24117 / 1024, LLAMA_CPP),
    "rtx3090ti": (24563 / 1024, LLAMA_CPP),
    "rtx4060": (7.84, BY_PEERS),
    "rtx4060ti": (7.84, BY_PEERS),
    "rtx4060ti-16gb": (15.58, BY_PEERS),
    "rtx4070": (11.63, PYTORCH),
    "rtx4070ti": (11.63, PYTORCH),
    "rtx4070tisuper": (15942 / 1024, LLAMA_CPP),
    "rtx4080": (15.70, PYTORCH),
    "rtx4080super": (15.70, PYTORCH),
    "rtx4090": (24077 / 1024, LLAMA_CPP),
    "rtx5060ti-16gb": (15.48, PYTORCH),
    "rtx5070": (11.49, PYTORCH),
    "rtx5070ti": (15.46, PYTORCH),
    "rtx5080": (15.47, PYTORCH),
    "rtx5090": (31.36, PYTORCH),
    "rtxa4000": (15.68, BY_PEERS),
    "rtxa6000": (47.43, PYTORCH),
    "rtx6000ada": (47.40, PYTORCH),
    "rtxpro6000": (94.97, PYTORCH),
    "t4": (15110 / 1024, DEVICE_QUERY),
    "v100": (15.77, PYTORCH),
    "v100-32": (31.73, PYTORCH),
    "a10": (22.06, PYTORCH),
    "a30": (23.53, PYTORCH),
    "a40": (44.42, PYTORCH),
    "l4": (22.03, PYTORCH),
    "l40": (44.39, PYTORCH),
    "l40s": (44.39, PYTORCH),
    "a100-40": (40441 / 1024, DEVICE_QUERY),
    "a100-80": (79.14, PYTORCH),
    "h100": (79.10, PYTORCH),
    "h200": (139.80, PYTORCH),
    "b200": (178.35, PYTORCH),
    "mi210": (63.98, PYTORCH),
    "mi250x": (63.98, PYTORCH),  # each of its two halves is a device
    "mi300x": (191.69, PYTORCH),
    "rx7900xtx": (23.98, PYTORCH),
    "rx7900xt": (19.98, PYTORCH),
}
SYNONYMS = {
    "a100": "a100-80", "a10g": "a10", "h100-80": "h100", "v100-16": "v100", "a6000": "rtxa6000",
    "a4000": "rtxa4000", "7900xtx": "rx7900xtx", "7900xt": "rx7900xt", "2080ti": "rtx2080ti",
    "rtx3060-12": "rtx3060", "rtx4060ti-8": "rtx4060ti", "rtx5060ti": "rtx5060ti-16gb",
    "rtx4060ti-16": "rtx4060ti-16gb", "rtx5060ti-16": "rtx5060ti-16gb",
}  # fmt: skip
MAKERS = ("nvidia", "geforce", "tesla", "amd", "radeon", "instinct", "apple")
# Apple's graphics share the main memory and may take a part of it: Metal's recommended working
# set is two thirds in machines of up to 32 GB, three quarters above; newer systems give more.
APPLE = re.compile(r"m[1-9](?:pro|max|ultra)?-?(\d{1,3})(?:gb)?")
APPLE_SOURCE = "recommendedMaxWorkingSetSize in llama.cpp logs"
WAYS = "write --gpu rtx4090, 24GB, 24GiB, 2x24GB, 2xh100 or m3max-64gb"


@dataclass(frozen=True)
class Devices:
    """Graphics cards of one kind.

    Args:
        name: as people know it, such as `2 x rtx4090`.
        count: how many.
        n_bytes: that programs can allocate on each.
        source: where that figure comes from.
        unified: whether the main memory is meant.
    """

    name: str
    count: int
    n_bytes: int
    source: str
    unified: bool = False

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.count * self.n_bytes


def devices_named(text: str) -> Devices:
    """Return the cards that `rtx4090`, `24GB`, `2x24GiB` or `2xh100` stand for.

    Raises:
        UsageError: neither a card that is known nor a size.
    """
    given = text.strip().lower()
    counted = re.fullmatch(r"(\d{1,4})\s*[x*]\s*(.+)", given)
    count, rest = (int(counted[1]), counted[2]) if counted else (1, given)
    if not 0 < count <= MOST_DEVICES:
        raise UsageError(f"'{text}' is no number of graphics cards", WAYS)
    name, n_bytes, source, unified = _one(rest, text)
    if n_bytes > LARGEST:
        raise UsageError(f"no device has the memory that '{text}' says", WAYS)
    shown = name if count == 1 else f"{count} x {name}"
    return Devices(shown, count, n_bytes, source, unified)


def _one(rest: str, text: str) -> tuple[str, int, str, bool]:
    """Return name, bytes, source of the bytes, and whether it is main memory, of one device."""
    name = _card_name(rest)
    if name in CARDS:
        gibibytes, source = CARDS[name]
        return name, int(gibibytes * GIB), source, False
    apple = APPLE.fullmatch(name)
    if apple:
        memory = int(apple[1]) * GIB
        part = memory * 2 // 3 if memory <= 32 * GIB else memory * 3 // 4
        return name, part, APPLE_SOURCE, True
    try:
        n_bytes = parse_size(rest)
    except UsageError as error:
        if not re.match(r"\d", rest):
            raise UsageError(
                f"unknown graphics card '{text}'", f"{nearest(name, list(CARDS))}; or {WAYS}"
            ) from error
        raise UsageError(f"'{text}' is neither a graphics card nor a size", WAYS) from error
    if n_bytes < 1000**2:  # `--gpu 24` means gigabytes, and says nothing of the kind
        raise UsageError(f"'{text}' is {shown_size(n_bytes)}", WAYS)
    return rest.upper().replace("IB", "iB"), n_bytes, "as given", False


def _card_name(text: str) -> str:
    """Return a card's name as the table has it, however it was written."""
    words = [word for word in re.split(r"[\s_]+", text) if word not in MAKERS]
    name = "".join(words)
    for maker in MAKERS:
        name = name.removeprefix(maker)
    dashed = re.sub(r"^(rtx|gtx|rx)-", r"\1", name).replace("-super", "super").replace("-ti", "ti")
    for tried in (dashed, dashed.removesuffix("gb"), f"rtx{dashed}"):
        found = SYNONYMS.get(tried, tried)
        if found in CARDS:
            return found
    return re.sub(r"-?(\d+)gb$", r"-\1gb", dashed) if APPLE.fullmatch(dashed) else dashed
