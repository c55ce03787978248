"""`python -m clients`: alias of the command fido-client, for one release."""

import sys

from fido_client.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
