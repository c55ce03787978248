"""Alias of fido_client.errors, for one release."""

from fido_client.errors import *  # noqa: F403
