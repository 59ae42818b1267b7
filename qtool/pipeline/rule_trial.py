"""Try regular expressions that others wrote where they can be stopped.

Some patterns take longer than the age of the universe to say that a name does not match, and
Python's matcher cannot be interrupted from within.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from qtool.checkpoint.untrusted import printable
from qtool.errors import UsageError

EXPRESSION = "re:"
MAX_SECONDS = 5.0
LONGEST_PLAIN = 200  # characters of a glob that cannot take long
PROGRAM = (
    "import fnmatch, json, re, sys\n"
    "patterns, names = json.load(sys.stdin)\n"
    "for pattern in patterns:\n"
    "    print(len(pattern), flush=True)\n"
    "    glob = not pattern.startswith('re:')\n"
    "    match = re.compile(fnmatch.translate(pattern) if glob else pattern[3:]).match\n"
    "    for name in names: match(name)\n"
)


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that every pattern of a recipe says in reasonable time which names it matches.

    Raises:
        UsageError: one does not.
    """
    if (slow := slow_pattern(patterns, names)) is not None:
        raise UsageError(
            f"rule '{printable(slow)}' takes more than {MAX_SECONDS:g} seconds to "
            "match the names of the model",
            "write it without repetitions inside repetitions",
        )


def slow_pattern(patterns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first pattern that takes longer than MAX_SECONDS to match all names.

    What is no expression at all ends the trial; whoever matches with it will say so.

    Args:
        patterns: globs and, after `re:`, regular expressions, as rules have them.
        names: of modules.
    """
    if not any(map(_may_take_long, patterns)):
        return None
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        child.communicate(json.dumps([list(patterns), list(names)]).encode(), timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        begun = child.communicate()[0].count(b"\n")
        return patterns[max(begun, 1) - 1]
    return None


def _may_take_long(pattern: str) -> bool:
    """Tell whether a pattern is worth a process: an expression, or more than a name with stars."""
    return pattern.startswith(EXPRESSION) or len(pattern) > LONGEST_PLAIN
