"""Alias of fido_client.evaluation, for one release."""

from fido_client.evaluation import *  # noqa: F403
