"""Entry point of the `qtool` command."""

from __future__ import annotations

import os
import sys

# Threads that spin while they wait take the cores from whoever else needs them, and from our own
# small operations. Must stand before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command line and exit with the code of the contract."""
    from qtool.cli.requests_to_end import INTERRUPTED, Ending, heed_requests

    ending = Ending()
    try:
        heed_requests()
        from qtool.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before or after a command's own work
        code = INTERRUPTED
    ending.leave(code, _answer if code == INTERRUPTED else None)


def _answer() -> None:
    """Answer a request to end, in case no command did."""
    from qtool.cli.session import say_interrupted

    say_interrupted(sys.argv[1:])


if __name__ == "__main__":
    main()
