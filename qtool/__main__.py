"""Entry point of the `qtool` command."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

# Threads that spin while they wait take the cores from whoever else needs them, and from our own
# small operations. Must stand before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with the code of the contract."""
    try:
        _end_cleanly_on_request()
        from qtool.cli.app import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # before or after a command's own work
        sys.exit(INTERRUPTED)


def _end_cleanly_on_request() -> None:
    """Have a request to end (kill, a terminal that closes) unwind like Ctrl-C.

    What a run has begun to write is then removed; without this the process would just stop.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # there is no SIGHUP on Windows
        # Whoever started us under nohup wants that signal ignored.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
