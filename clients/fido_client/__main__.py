"""The command fido-client, and `python -m fido_client`."""

from __future__ import annotations

import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # gRPC logs each failed connection, which the error explains; it reads the variable when it is imported
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from .commands.parser import main as run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
