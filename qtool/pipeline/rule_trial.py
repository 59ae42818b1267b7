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
PROGRAM = (
    "import json, re, sys\n"
    "patterns, names = json.load(sys.stdin)\n"
    "for pattern in patterns:\n"
    "    print(len(pattern), flush=True)\n"
    "    for name in names: re.match(pattern, name)\n"
)


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that every `re:` pattern of a recipe says in reasonable time which names it matches.

    Raises:
        UsageError: one does not.
    """
    expressions = [p.removeprefix(EXPRESSION) for p in patterns if p.startswith(EXPRESSION)]
    if (slow := slow_expression(expressions, names)) is not None:
        raise UsageError(
            f"rule '{EXPRESSION}{printable(slow)}' takes more than {MAX_SECONDS:g} seconds to "
            "match the names of the model",
            "write it without repetitions inside repetitions",
        )


def slow_expression(expressions: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first expression that takes longer than MAX_SECONDS to match all names.

    What is no expression at all ends the trial; whoever matches with it will say so.
    """
    if not expressions:
        return None
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        child.communicate(json.dumps([expressions, list(names)]).encode(), timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        begun = child.communicate()[0].count(b"\n")
        return expressions[max(begun, 1) - 1]
    return None
