"""How people ask for each relation: hand-written question templates.

``{c}`` is the country, ``{a}`` its people's adjective ("what do {a} people speak"). A template that starts with a
lower-case letter is a web query: the question is lower-cased, the name too. ``HELD_OUT`` templates are used for the
held-out countries and never in training; ``tests/training/corpus/test_corpus.py`` checks that the tables are disjoint.
"""

from __future__ import annotations

import re

from training.corpus.templates_facts import HELD_OUT_FACTS, TRAIN_FACTS
from training.corpus.templates_people import HELD_OUT_PEOPLE, TRAIN_PEOPLE

TRAIN: dict[str, tuple[str, ...]] = {**TRAIN_PEOPLE, **TRAIN_FACTS}
HELD_OUT: dict[str, tuple[str, ...]] = {**HELD_OUT_PEOPLE, **HELD_OUT_FACTS}

# For the label facts, which teach reading rather than ways of asking.
LABEL_FRAMES = (
    "What is the {r} of {c}?",
    "What is {c}'s {r}?",
    "{c}: {r}?",
    "Tell me the {r} of {c}.",
    "what is the {r} in {c}",
    "{r} {c}",
    "{r} of {c}",
    "{c} {r}",
)

# For the second held-out questions; never trained.
HELD_OUT_LABEL_FRAMES = (
    "For {c}, what is given as the {r}?",
    "Which {r} does {c} report?",
    "State {c}'s {r}, please.",
    "I need to know the {r} of {c}",
    "about {c}: what {r}?",
)

# Names that take an article in running text, beyond those that _ARTICLE finds.
_WITH_ARTICLE = frozenset({"Netherlands", "Philippines", "Maldives", "Gaza Strip", "West Bank", "Isle of Man"})
_ARTICLE = re.compile(r"(Republic|Islands|Emirates|States|Kingdom|Territory|Congo|Refuges|Lands|Union)\b")

# Common names of a country other than the Factbook's; used in training questions and by retrieval.
ALIASES: dict[str, tuple[str, ...]] = {
    "United States": ("us", "usa", "america", "united states of america", "u.s."),
    "United Kingdom": ("uk", "great britain", "britain"),
    "Czechia": ("czech republic",),
    "Burma": ("myanmar",),
    "Turkey": ("turkiye",),
    "Côte d'Ivoire": ("ivory coast", "cote d'ivoire"),
    "Eswatini": ("swaziland",),
    "Democratic Republic of the Congo": ("dr congo", "congo", "drc"),
    "Republic of the Congo": ("congo brazzaville", "congo"),
    "Vatican City": ("holy see", "vatican"),
    "Cabo Verde": ("cape verde",),
    "Timor-Leste": ("east timor",),
    "Netherlands": ("holland",),
    "North Macedonia": ("macedonia",),
    "The Bahamas": ("bahamas",),
    "The Gambia": ("gambia",),
    "United Arab Emirates": ("uae", "emirates"),
    "Federated States of Micronesia": ("micronesia",),
    "Central African Republic": ("car",),
    "Macau": ("macao",),
    "Dominican Republic": ("dominican",),
    "Bosnia and Herzegovina": ("bosnia",),
    "Trinidad and Tobago": ("trinidad",),
    "Falkland Islands": ("falklands", "malvinas"),
    "Saint Kitts and Nevis": ("st kitts",),
    "Saint Lucia": ("st lucia", "st. lucia"),
    "Saint Vincent and the Grenadines": ("st vincent",),
    "Gaza Strip": ("gaza",),
}


def is_web_query(template: str) -> bool:
    """Whether the question is written in lower case."""
    return template[0].islower() or template.startswith(("{c} ", "{a} "))


def with_article(country: str) -> str:
    """The name inside a sentence: "Netherlands" -> "the Netherlands"."""
    if country.startswith("The "):
        return "the " + country[4:]
    return f"the {country}" if country in _WITH_ARTICLE or _ARTICLE.search(country) else country


def ask(template: str, country: str, adjective: str | None = None, relation: str = "") -> str:
    """Fill in a template.

    Args:
        template: From ``TRAIN``, ``HELD_OUT`` or ``LABEL_FRAMES``.
        country: The name in the question.
        adjective: Needed by templates with ``{a}``.
        relation: Needed by templates with ``{r}``.

    Raises:
        ValueError: If the template needs an adjective and got none.
    """
    if "{a}" in template and not adjective:
        raise ValueError(f"template {template!r}: wanted an adjective for {country}, got none; choose one without {{a}}")
    question = template.format(c=country, a=adjective, r=relation)
    if is_web_query(template):
        return question.lower()
    return question[0].upper() + question[1:]
