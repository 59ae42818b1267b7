"""Entry point of the `qtool` command."""

from __future__ import annotations

import os
import sys
from functools import partial

# Threads that spin while they wait take the cores from whoever else needs them, and from our own
# small operations. Must stand before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command line and exit with the code of the contract."""
    from qtool.cli.requests_to_end import INTERRUPTED, Ending, heed_requests

    ending = Ending()
    code: int | None = None
    try:
        heed_requests()
        from qtool.cli.app import run

        code = INTERRUPTED
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before a command's own work, or one more after it
        pass
    if code in {None, INTERRUPTED}:
        ending.leave(INTERRUPTED, partial(_say_interrupted, early=code is None))
    ending.leave(code or 0)


def _say_interrupted(*, early: bool) -> None:
    """Answer a request to end that no command did."""
    from qtool.cli.session import begin_command, say_interrupted

    if early:
        begin_command()
    say_interrupted(sys.argv[1:])


if __name__ == "__main__":
    main()
