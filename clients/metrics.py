"""Alias of fido_client.metrics, for one release."""

from fido_client.metrics import *  # noqa: F403
