"""What every peer's script shares: its command line, the clock and the one JSON line at its end.

Uses the standard library and numpy only, since it runs inside every peer's own environment. Import
it before the peer: the line is printed by the first exit function registered, which runs last, so
that nothing a peer says while it ends comes after it.
"""

import argparse
import atexit
import json
import os
import resource
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

_REPORT = {}


def arguments(description, *, methods=()):
    """Read `MODEL_DIR WINDOWS.npy OUT_DIR --bits --group-size --sym|--asym [--method]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="directory of the float model")
    parser.add_argument("windows", type=_windows, help=".npy of int64 token ids [windows, length]")
    parser.add_argument("out", type=Path, help="directory to write, absent or empty")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument("--sym", dest="symmetric", action="store_true", default=True)
    symmetry.add_argument("--asym", dest="symmetric", action="store_false")
    if methods:
        parser.add_argument("--method", choices=methods, required=True)
    chosen = parser.parse_args()
    if chosen.out.exists() and any(chosen.out.iterdir()):
        parser.error(f"{chosen.out} is not empty")
    return chosen


def _windows(path):
    windows = np.load(path)
    if windows.ndim != 2 or windows.dtype != np.int64:
        raise argparse.ArgumentTypeError(f"{path}: want int64 [windows, length]")
    return windows


class Measured:
    """Time what runs inside `with`: wall seconds, and CPU seconds of the process and its children.

    On success the report is printed when the process ends; after an exception nothing is.
    """

    def __init__(self, tool, distribution, out):
        self.tool, self.distribution, self.out = tool, distribution, out

    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), _cpu_seconds()
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            _REPORT.update(
                tool=self.tool,
                version=version(self.distribution),
                wall_seconds=round(time.perf_counter() - self.wall, 2),
                cpu_seconds=round(_cpu_seconds() - self.cpu, 2),
                out=str(self.out),
            )


def _cpu_seconds():
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@atexit.register
def _print_report():
    if not _REPORT:
        return
    # Only the largest child is known, and it shares pages with us, so the two do not add up.
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    _REPORT["cpu_seconds_total"] = round(_cpu_seconds(), 2)
    _REPORT["peak_rss_bytes"] = peak * 1024  # Linux counts in KiB
    print("\n" + json.dumps(_REPORT), flush=True)
