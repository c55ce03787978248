"""Alias of fido_client.request, for one release."""

from fido_client.request import *  # noqa: F403
