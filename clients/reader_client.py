"""Alias of fido_client.reader_client, for one release."""

from fido_client.reader_client import *  # noqa: F403
