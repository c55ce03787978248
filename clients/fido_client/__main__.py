"""`python -m fido_client`, the same as the command fido-client."""

import sys

from .commands.parser import main

if __name__ == "__main__":
    sys.exit(main())
