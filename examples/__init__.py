"""A first example: both demo readers answer three questions."""

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
