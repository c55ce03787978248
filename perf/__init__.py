"""Measurements: what was run, on which machine, beside which peers; results/ keeps what was found."""

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
