"""Try a tokenizer.json where it can do no harm: a child process with limits.

The library that runs it is compiled code that ends the process where its authors saw no way on,
and a file of a few lines can ask it for terabytes: normalizers that double the text, forty times.
Most of what is wrong with a tokenizer is found here, long before transformers is imported.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from qtool.checkpoint.untrusted import GET_AGAIN, printable, shown_path
from qtool.errors import DamagedError

TOKENIZER_FILE = "tokenizer.json"
MAX_SECONDS = 20  # of the processor
PATIENCE = 3 * MAX_SECONDS  # by the clock: a busy machine is no fault of the tokenizer
PROGRAM = Path(__file__).with_name("tokenizer_child.py")


def check_tokenizer(directory: Path, rows: int | None) -> None:
    """Check that a directory's tokenizer.json loads, tokenizes, and gives ids of the model.

    Args:
        directory: of the model; one without tokenizer.json passes.
        rows: of the embedding; None if they are not known.

    Raises:
        DamagedError: it does not; names the file and why.
    """
    path = directory / TOKENIZER_FILE
    if not path.exists():
        return
    found = _tried(path)
    if rows is not None and found["largest"] >= rows:
        raise DamagedError(
            f"{shown_path(path)} makes the token {found['largest']}, but the embedding has only "
            f"{rows} rows",
            "the tokenizer files belong to another model; get both from one place",
        )


def _tried(path: Path) -> dict[str, Any]:
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(PROGRAM), str(path), str(MAX_SECONDS)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        found: dict[str, Any] = json.loads(child.stdout)
    except subprocess.TimeoutExpired as error:
        raise _unusable(
            path, f"it takes more than {MAX_SECONDS} seconds for a few words"
        ) from error
    except ValueError as error:  # ended by a limit, or by itself
        if child.returncode == -getattr(signal, "SIGXCPU", 0):
            raise _unusable(
                path, f"it takes more than {MAX_SECONDS} seconds for a few words"
            ) from error
        said = child.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"it ends its process (exit code {child.returncode})"
        raise _unusable(path, why) from error
    if "reason" in found:
        raise _unusable(path, str(found["reason"]))
    return found


def _unusable(path: Path, reason: str) -> DamagedError:
    return DamagedError(
        f"{shown_path(path)} is no usable tokenizer: {printable(reason)}", GET_AGAIN
    )
