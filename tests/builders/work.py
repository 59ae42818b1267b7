"""How much work a command or a call is, in numbers that are the same on every machine."""

import subprocess
import sys

from builders.command_line import ROOT

# Says on the last line of stderr how many modules a command had imported, and which heavy ones.
IMPORTED = """
import sys
from qtool.cli.app import run
code = run(sys.argv[1:])
heavy = {"torch", "transformers", "datasets", "gguf", "numpy"} & set(sys.modules)
print(len(sys.modules), *sorted(heavy), file=sys.stderr)
sys.exit(code)
"""


def imported_by(*arguments):
    """Return a completed command's exit code, its number of modules and the heavy ones."""
    completed = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    number, *heavy = completed.stderr.splitlines()[-1].split()
    return completed.returncode, int(number), heavy


def calls_of(function, *arguments):
    """Return how many functions, Python's and C's, were called meanwhile."""
    made = 0

    def count(_frame, event, _argument):
        nonlocal made
        made += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return made
