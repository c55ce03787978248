"""Extractors of short answers from Factbook values.

In: the text of one labelled value. Out: the answers in it, the trained one first, or [] if it has no short answer.
``relations.py`` assigns extractors to relations.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Extract = Callable[[str], list[str]]


def clause(value: str) -> list[str]:
    """Up to the first bracket, semicolon or comma: "civil law system; ..." -> "civil law system"."""
    # A comma inside a number ("1,233 km") does not end a clause; a leading quotation mark is not part of the answer.
    head = re.split(r"\s*[(;\[]|,(?!\d{3})|\s-$|:\s", value)[0]
    if re.match(r"[^(;,]*:\s", value):  # "metropolitan France: ..." qualifies the whole value
        return []
    return [head.strip(' "“”.')]


def code(value: str) -> list[str]:
    """A code without white space: ".de; note - ..." -> ".de"."""
    found = re.match(r"[.\w-]*\w", value)
    return [found.group(0)] if found and value.lower() != "none" else []


# The regions of the Factbook's maps; the longest first, since "Southeast Asia" contains "Asia".
_REGIONS = (
    "Central America and the Caribbean|Southeast Asia|North America|South America|Middle East|Arctic Region|"
    "Antarctic Region|Africa|Antarctica|Asia|Europe|Oceania"
)


def region(value: str) -> list[str]:
    """A region of the maps, of the mainland if overseas parts are listed too."""
    found = re.match(rf"(?:metropolitan France: )?({_REGIONS})\b", value)
    return [found.group(1)] if found else []


def comparison(value: str) -> list[str]:
    """A comparison of sizes: "slightly smaller than Pennsylvania"; commas belong to "Washington, DC"."""
    head = re.split(r"\s*[(;]|\. ", value)[0].strip(" ,")
    return [] if ":" in head else [head]


def measure(value: str) -> list[str]:
    """A number with its unit, without the year: "42.7 years (2025 est.)" -> "42.7 years", also "42.7"."""
    head = re.split(r"\s*[(;]", value)[0].strip()
    number = re.match(r"-?\$?[\d.,]+( (million|billion|trillion))?%?", head)
    return [head, number.group(0).rstrip(",.")] if number else []


def number(value: str) -> list[str]:
    """A bare number at the start: "3 (2 cultural, 1 natural)" -> "3"."""
    found = re.match(r"\d[\d,.]*", value)
    return [found.group(0).rstrip(",.")] if found else []


def share(value: str) -> list[str]:
    """A percentage: "81.8% of total population (2023)" -> "81.8%"; EM drops the sign, so "81.8" counts too."""
    found = re.match(r"[\d.]+%", value)
    return [found.group(0)] if found else []


def items(value: str) -> list[str]:
    """The items of a list, without shares and remarks: "Italy 476 km; Spain 646 km" -> "Italy", "Spain"."""
    if re.match(r"[^(;,]*:\s", value):
        return []
    found = []
    depth = 0
    item = ""
    for character in value + ";":
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character in ";," and depth <= 0:
            head = re.split(r"\s*[(\[]|\s[<>]?-?\d|\s(?:approximately|less than|about|est\.)\s", item)[0].strip(' ."')
            if re.fullmatch(r"\D{2,60}", head) and not re.match(r"(other|none|unspecified|and|note|no)\b", head, re.I):
                found.append(head)
            item = ""
        else:
            item += character
    return list(dict.fromkeys(found))


def first_item(value: str) -> list[str]:
    """Only the first item of a list that is ordered by size."""
    return items(value)[:1]


def place(value: str) -> list[str]:
    """A place before its height: "Mont Blanc 4,810 m" -> "Mont Blanc"."""
    head = re.split(r"\s*[(;]|\s-?\d", value)[0].strip(" ,")
    return [] if head.lower().startswith(("unnamed", "none", "an unnamed")) or ":" in head else [head]


_TITLE = re.compile(
    r"(?:(?:interim|transitional|transition|acting|caretaker|first|vice|deputy|chief|prime|grand|crown|supreme)\s+)*"
    r"(?:president|minister|king|queen|sultan|amir|emir|duke|prince|princess|pope|chancellor|premier|taoiseach|"
    r"executive|administrator|governor(?:[- ]general)?|commissioner|leader|general|gen\.|col\.|capt\.|lt\.|dr\.|sir|"
    r"dame|sheikh|co-prince|monarch|emperor|captain|bailiff|deputy|senator)(?=\s)",
    re.I,
)


def leader(value: str) -> list[str]:
    """A person: "President Emmanuel MACRON (since 14 May 2017)" -> "Emmanuel MACRON", also with the title."""
    titled = re.split(r"\s*[(;,]", value)[0].strip()
    name = titled
    while match := _TITLE.match(name):
        name = name[match.end() :].strip()
    # Without a leading title, or with words that no name has, the value is a sentence about an office.
    if name == titled or re.search(r"\b(of|the|for|vacant|and|council)\b", name, re.I) or len(name.split()) > 6:
        return []
    if not re.search(r"[A-Z]{2}", name):  # the Factbook writes the family name in capitals
        return []
    return [name, titled]


def titled_leader(*titles: str) -> Extract:
    """``leader`` for the offices in ``titles`` only: "who is the king of" applies to kingdoms."""

    def extract(value: str) -> list[str]:
        return leader(value) if re.match(rf"(?:interim |transitional )?(?:{'|'.join(titles)})\s", value, re.I) else []

    return extract


# Common names of forms of government, the most specific first. A value contains longer descriptions
# ("federal parliamentary democracy under a constitutional monarchy"), accepted as well.
_GOVERNMENTS = (
    "constitutional monarchy",
    "absolute monarchy",
    "federation of monarchies",
    "communist state",
    "communist party-led state",
    "military regime",
    "military junta",
    "theocratic republic",
    "presidential republic",
    "parliamentary republic",
    "federal republic",
    "parliamentary democracy",
    "presidential democracy",
)


def government(value: str) -> list[str]:
    """The usual name of a form of government, also the clause that contains it."""
    whole = clause(value)
    if not whole or not whole[0]:
        return []
    named = [name for name in _GOVERNMENTS if re.search(rf"(?<![\w-]){name}", value)]
    if not named:
        return whole if len(whole[0].split()) > 1 else []  # "theocratic", "formerly": half a sentence
    return [named[0], *whole]


def currency(value: str) -> list[str]:
    """The currency's name: "euros (EUR) per US dollar -" -> "euros", also its code and its singular."""
    name = re.split(r"\s*\(| per US|,|;", value)[0].strip()
    code = re.search(r"\(([A-Z]{3})\)", value)
    return [name, *([code.group(1)] if code else []), *([name[:-1]] if name.endswith("s") else [])]


def largest_city(value: str) -> list[str]:
    """The first, largest city: "11.208 million PARIS (capital), 1.761 million Lyon" -> "PARIS"."""
    found = re.match(r"[\d.,]+(?: million)? ([^(,;\d]+)", value)
    return [found.group(1).strip()] if found else []


def short_items(value: str) -> list[str]:
    """The items of at most four words, none if the first is longer, since a description is not a short answer."""
    found = items(value)
    if not found or len(found[0].split()) > 4:
        return []
    return [item for item in found if len(item.split()) <= 4 and ":" not in item]


def short_clause(value: str) -> list[str]:
    """A clause of at most five words."""
    return [head for head in clause(value) if len(head.split()) <= 5]


def date(value: str) -> list[str]:
    """A date or a year at the start: "15 August 1960 (from France)"."""
    found = re.match(r"\d{1,2} [A-Z][a-z]+ \d{4}|\d{4}(?=\s|;|$)", value)
    return [found.group(0)] if found else []


def holiday_date(value: str) -> list[str]:
    """The day of a holiday: "Independence Day, 4 October (1966)" -> "4 October"."""
    found = re.search(r", (\d{1,2} [A-Z][a-z]+)", value)
    return [found.group(1)] if found else []


def former_ruler(value: str) -> list[str]:
    """Who a country became independent from: "15 August 1960 (from France)" -> "France"."""
    found = re.match(r"[^(]*\(from (?:the )?([^();,]+)[);,]", value)
    return [found.group(1).strip()] if found else []


def anthem(value: str) -> list[str]:
    """The title between quotation marks."""
    found = re.match(r"[\"“]([^\"”]+)[\"”]", value)
    return [found.group(1).strip(" .,")] if found else []


def local_name(value: str) -> list[str]:
    """The first local name: "Komori (Comorian)/Les Comores (French)" -> "Komori"."""
    return [re.split(r"\s*[(/;,]", value)[0].strip()]


def coordinates(value: str) -> list[str]:
    """Latitude and longitude."""
    found = re.match(r"\d+ \d+ [NS], ?\d+ \d+ [EW]", value)
    return [found.group(0)] if found else []


def time_zone(value: str) -> list[str]:
    """The offset: "UTC+1 (6 hours ahead of Washington, DC)" -> "UTC+1"."""
    found = re.match(r"UTC\s?[+-]?\s?[\d:.]+", value)
    return [found.group(0).strip()] if found else []


def river(value: str) -> list[str]:
    """The first, longest river: "Rhin (Rhine) (shared with ...) - 1,233 km" -> "Rhin", also "Rhine"."""
    head = re.split(r"\s*\(| river| - ", value)[0].strip()
    other = re.match(r"[^(;]*?\(([A-Z][^();,]*)\)", value)
    return [head, *([other.group(1)] if other else [])]
