"""Entry point of the `qtool` command."""

from __future__ import annotations

import os
import sys

# Threads that spin while they wait take the cores from whoever else needs them, and from our own
# small operations; must be set before PyTorch loads its OpenMP library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command line and exit with the code of the contract."""
    from qtool.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
