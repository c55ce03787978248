"""Alias of fido_client.async_reader_client, for one release."""

from fido_client.async_reader_client import *  # noqa: F403
