"""Entry point of the `qtool` command."""

from __future__ import annotations

import os
import sys

# Threads that spin while they wait take the cores from whoever else needs them, and from our own
# small operations. Both settings must stand before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Activations are large and short-lived: with 4 KiB pages the kernel spends as long on mapping them
# as a core does on filling them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def main() -> None:
    """Run the command line and exit with the code of the contract."""
    from qtool.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
