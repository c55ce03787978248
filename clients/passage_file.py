"""Alias of fido_client.data.passages, for one release."""

from fido_client.data.passages import *  # noqa: F403
