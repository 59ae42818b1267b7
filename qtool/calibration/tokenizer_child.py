"""The program of the tokenizer trial: load a tokenizer.json, tokenize a few words, say what came.

    python tokenizer_child.py FILE SECONDS

It runs in a process of its own with limits, so it imports nothing of qtool, and only `tokenizers`
beyond the standard library.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MAX_MEMORY = 3 << 30  # bytes of address space of the child; the largest tokenizers take 1 GB
MOST_IDS_PER_BYTE = 16
# Scripts, digits, spaces and repetitions, as texts have them.
SAMPLE = (
    "The quick brown fox, 3.14159 and 2,718.\n\n\tdef f(x):\n        return x**2  # \u00e9\u00df\n"
    "\u0416\u0443\u043a \u6f22\u5b57\u304b\u306a \ud55c\uae00 \u0627\u0644\u0639\u0631\u0628\u064a"
    " \U0001f600 " + "a" * 64 + " " + "0" * 64 + " " * 64 + "-" * 64 + "\n" * 16
)


def _limit(seconds: int) -> None:
    """Bound this process's memory and time where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # no such limits: the parent's clock remains
        return


def _answer(path: str) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(SAMPLE, add_special_tokens=False).ids
    size = len(SAMPLE.encode())
    if len(ids) > MOST_IDS_PER_BYTE * size:
        return {"reason": f"it makes {len(ids)} tokens of {size} bytes"}
    if not ids:
        return {"reason": "it makes no tokens of any text"}
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return {"largest": max(vocabulary.values(), default=-1)}


if __name__ == "__main__":
    _limit(int(sys.argv[2]))
    json.dump(_answer(sys.argv[1]), sys.stdout)
