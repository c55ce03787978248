"""Prometheus text -> samples. Pure."""

from __future__ import annotations

import re

# name -> model -> value, summed over the other labels; a metric without a model is under ""
Samples = dict[str, dict[str, float]]

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_MODEL = re.compile(r'(?:^|,)model="([^"]*)"')


def parse(text: str) -> Samples:
    """Every sample of an exposition; comments and what is no sample are passed over."""
    samples: Samples = {}
    for line in text.splitlines():
        if line.startswith("#") or not (match := _LINE.match(line)):
            continue
        model = _MODEL.search(match["labels"] or "")
        by_model = samples.setdefault(match["name"], {})
        name = model[1] if model else ""
        by_model[name] = by_model.get(name, 0.0) + float(match["value"])
    return samples
