"""Try a GGUF file in a process of its own before llama.cpp runs it in ours.

llama.cpp ends the process where it meets what its authors thought impossible, and a file from a
stranger may well contain that. Whatever would end it at loading or at the first token, or drive it
out of memory, ends the trial instead and becomes an error with a name.

The trial has limits that no model of its size comes near: of memory, so that the system does not
end somebody else's process for it, and of time. What it writes is bounded, too.

    python -m qtool.evaluation.llama_trial FILE.gguf TOKENS BYTES
"""

from __future__ import annotations

import contextlib
import glob
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import qtool
from qtool.checkpoint.gguf_split import model_stem
from qtool.checkpoint.untrusted import printable, shown_path
from qtool.errors import CapacityError, DamagedError, QtoolError, UnsupportedError
from qtool.evaluation.llama_cpp import LlamaModel, check_installed, to_stderr
from qtool.recipe.sizes import shown_size

PASSED, REFUSED, UNABLE = 0, 3, 4  # exit codes of the trial
# Address space: Python, llama.cpp and its buffers; the file mapped, read and repacked for this
# processor; keys, values and scores of a token (the widest known need 5 MB for each).
FIXED_BYTES, COPIES, BYTES_PER_TOKEN = 8 << 30, 3, 8 << 20
# A small file on a busy machine; and the slowest disk that anybody would keep a model on, since
# every tensor is read.
FIXED_SECONDS, BYTES_PER_SECOND = 300.0, 10 << 20
MOST_WRITTEN = 4 << 20
OUT_OF_MEMORY = (
    "bad_alloc",
    "bad alloc",
    "cannot allocate",
    "unable to allocate",
    "failed to allocate",
    "memoryerror",
    "not enough memory",
    "resource temporarily unavailable",  # no room for the stack of a thread
)


def check_runs(path: Path, context: int) -> None:
    """Check that llama.cpp loads a file and computes the first token, without risk for us.

    Args:
        path: of the file, or of the first of its parts.
        context: most tokens of a window; 0 tries the tokenizer only.

    Raises:
        DamagedError: llama.cpp refuses the file, falls over it, or comes to no end.
        CapacityError: it wants more memory than any model of that size needs, or than there is.
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
    size = _size(path)
    most = FIXED_BYTES + COPIES * size + BYTES_PER_TOKEN * context
    seconds = FIXED_SECONDS + size / BYTES_PER_SECOND
    command = [sys.executable, "-P", "-m", __name__, str(path), str(context), str(most)]
    try:
        done = run_trial(command, environment, seconds)
    except subprocess.TimeoutExpired as error:
        raise DamagedError(
            f"llama.cpp takes more than {seconds:.0f} seconds to load {shown_path(path)} and "
            "compute one token",
            "get the file again, or make it again with qtool quantize",
        ) from error
    if done.returncode == PASSED:
        return
    written = done.stderr.decode(errors="replace")
    if any(words in written.lower() for words in OUT_OF_MEMORY):
        raise CapacityError(
            f"llama.cpp gets too little memory for {shown_path(path)} and {context} tokens: "
            f"{_reason(written, first=False)}",
            f"use a smaller --ctx; {shown_size(most)} is all that a file of that size may want",
        )
    reason = _reason(written, first=done.returncode == REFUSED)
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


def _size(path: Path) -> int:
    """Return the bytes of a file and of all parts that go with it."""
    found = 0
    for part in {path, *path.parent.glob(f"{glob.escape(model_stem(path.name))}-*.gguf")}:
        with contextlib.suppress(OSError):
            found += part.stat().st_size
    return found


def run_trial(
    command: list[str], environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[bytes]:
    """Run a command with nothing to read; the end of what it writes to stderr is kept.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was ended.
    """
    with tempfile.TemporaryFile() as written:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=written,
            timeout=seconds,
            check=False,
        )
        written.seek(0)
        return subprocess.CompletedProcess(
            command, done.returncode, b"", written.read(MOST_WRITTEN)
        )


def limit(most: int) -> None:
    """Bound this process's memory and the files that it writes, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_WRITTEN, MOST_WRITTEN))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError, OverflowError):
        return  # no such limits, or one of the user's own that is tighter


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
    limit(int(sys.argv[3]))
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
