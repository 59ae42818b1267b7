"""Try a GGUF file in a process of its own before llama.cpp runs it in ours.

llama.cpp ends the process where it meets what its authors thought impossible, and a file from a
stranger may well contain that. Whatever would end it at loading or at the first token, or drive it
out of memory, ends the trial instead and becomes an error with a name.

    python -m qtool.evaluation.llama_trial FILE.gguf TOKENS
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import qtool
from qtool.checkpoint.untrusted import printable, shown_path
from qtool.errors import DamagedError, QtoolError, UnsupportedError
from qtool.evaluation.llama_cpp import LlamaModel, check_installed, to_stderr

PASSED, REFUSED, UNABLE = 0, 3, 4  # exit codes of the trial


def check_runs(path: Path, context: int) -> None:
    """Check that llama.cpp loads a file and computes the first token, without risk for us.

    Args:
        path: of the file, or of the first of its parts.
        context: most tokens of a window; 0 tries the tokenizer only.

    Raises:
        DamagedError: llama.cpp refuses the file, or falls over it.
        UnsupportedError: llama.cpp is absent, or the model is none that continues text.
    """
    check_installed()
    root = str(Path(qtool.__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "GGML_NO_BACKTRACE": "1",  # which would attach a debugger
    }
    command = [sys.executable, "-P", "-m", __name__, str(path), str(context)]
    done = run_trial(command, environment)
    if done.returncode == PASSED:
        return
    reason = _reason(done.stderr.decode(errors="replace"), first=done.returncode == REFUSED)
    if done.returncode == UNABLE:
        raise UnsupportedError(
            f"llama.cpp cannot run {shown_path(path)}: {reason}",
            "perplexity is defined for decoder-only language models",
        )
    if done.returncode == REFUSED:
        raise DamagedError(
            f"llama.cpp refuses {shown_path(path)}: {reason}",
            "get the file again; if it is whole, this llama.cpp does not know the architecture",
        )
    raise DamagedError(
        f"llama.cpp fell over {shown_path(path)} (exit {done.returncode}): {reason}",
        "get the file again, or make it again with qtool quantize",
    )


def _reason(written: str, *, first: bool) -> str:
    """Return the line that says why: the first of a refusal, the last of a fall."""
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    if not lines:
        return "it ended without a word"
    return printable(lines[0 if first else -1].rpartition("error loading model: ")[2])


def run_trial(
    command: list[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end with what it writes kept, and nothing to read."""
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )


def main(path: str, context: int) -> int:
    """Load the file and compute one token; return the exit code that tells how it went."""
    try:
        with LlamaModel(Path(path), context=context, log=to_stderr) as model:
            ids = model.tokenize("a") or [0]
            if context:
                model.logits(ids[:context])
    except DamagedError:
        return REFUSED  # llama.cpp has said why
    except QtoolError as error:
        to_stderr(f"\n{error.message}\n")
        return UNABLE
    return PASSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
