"""Alias of fido_client.data.examples, for one release."""

from fido_client.data.examples import *  # noqa: F403
