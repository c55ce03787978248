"""Alias of fido_client.answer, for one release."""

from fido_client.answer import *  # noqa: F403
