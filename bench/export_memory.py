"""Peak memory and speed of `qtool export`, beside its imports alone and a plain write of its bytes.

    python bench/export_memory.py MODEL [MODEL ...] [--types Q8_0 Q4_K_M]

Peak resident memory is the operating system's, of a process of its own; this script imports
nothing heavy, since a child starts with its parent's pages. The plain write is of as many bytes to
the same directory, synchronised like qtool's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = "import qtool.pipeline.export, qtool.cli.export_report"


def measured(arguments: list[str]) -> tuple[float, float, float]:
    """Run a program; return its peak megabytes, wall and CPU seconds."""
    started = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"failed: {' '.join(arguments)}")
    seconds = time.perf_counter() - started
    return usage.ru_maxrss / 1e3, seconds, usage.ru_utime + usage.ru_stime


def plain_write(directory: Path, n_bytes: int) -> float:
    """Return the seconds that writing and synchronising zeros takes."""
    piece = bytes(4 << 20)
    started = time.perf_counter()
    with (directory / "plain").open("wb", buffering=0) as file:
        for start in range(0, n_bytes, len(piece)):
            file.write(piece[: n_bytes - start])
        os.fsync(file.fileno())
    return time.perf_counter() - started


def main() -> None:
    """Print one row for each model and type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M"])
    options = parser.parse_args()
    imports, _, start_up = measured(["-c", IMPORTS])
    print(f"imports alone: {imports:.0f} MB, {start_up:.1f} CPU s")
    print("| model | type | MB | peak MB above imports | wall s | CPU s | plain write s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=".") as place:
        for model in options.models:
            for kind in options.types:
                out = Path(place) / f"{kind}.gguf"
                command = ["export", str(model), "-f", f"gguf:{kind}", "-o", str(out), "-q"]
                peak, wall, cpu = measured(["-m", "qtool", *command, "--overwrite", "--json"])
                size = out.stat().st_size
                plain = plain_write(Path(place), size)
                print(
                    f"| {model.name} | {kind} | {size / 1e6:.0f} | {peak - imports:.0f} | "
                    f"{wall:.1f} | {cpu:.1f} | {plain:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
