"""Measurements: what was run, on which machine, beside which peers; results/ keeps what was found."""
