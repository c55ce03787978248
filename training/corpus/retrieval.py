"""BM25 over the Factbook's passages.

In: passages. Out: for a question, the best passages with scores. A hand-written table expands question words
that the Factbook does not use, at query time only; nothing is learned here.
"""

from __future__ import annotations

import collections
import functools
import re
import unicodedata
from collections.abc import Sequence

import bm25s
import numpy as np

from training.corpus.relations import Passage
from training.corpus.templates import ALIASES

TITLE_WEIGHT = 3  # the title names country and field, so it counts three times
TEXT_CHARS = 200  # the start of a long field; the rest dilutes the score

STOP_WORDS = frozenset(
    "a an and are as at be by can did do does for from have has how i in is it its me much my of on one or should tell that the "
    "their there these they this to use used was were what when where which who whom whose will with you your s many name called "
    "call kind type sort form today now current currently present right long high people person average speak speaks spoken "
    "residency requirement naturalization naturalized year bicameral unicameral continent world".split()
)

# Question words -> words of the Factbook's field names and labels. A key of several words applies if all of them are
# in the question; it then suppresses keys of a subset of its words: "capital city" does not ask about cities.
# Derived from the questions people ask (the training part of WebQuestions) and our own question templates.
EXPANSIONS: dict[str, str] = {
    "capital": "capital",
    "capital city": "capital",
    "where capital": "capital",
    "capital map": "capital",
    "money": "exchange rates currency",
    "currency": "exchange rates",
    "speak": "languages",
    "speaks": "languages",
    "spoken": "languages",
    "language": "languages",
    "dialects": "languages",
    "faith": "religions",
    "religious": "religions",
    "ethnicity": "ethnic groups",
    "race": "ethnic groups",
    "president": "executive branch chief state",
    "king": "executive branch chief state",
    "queen": "executive branch chief state",
    "monarch": "executive branch chief state",
    "ruler": "executive branch chief state",
    "head state": "executive branch chief state",
    "chief state": "executive branch",
    "prime minister": "executive branch head government",
    "head government": "executive branch",
    "leader": "executive branch head government",
    "leads": "executive branch head government",
    "heads": "executive branch head government",
    "runs": "executive branch head government",
    "governs": "executive branch head government",
    "charge government": "executive branch head government",
    "political system": "government type",
    "system government": "government type",
    "government": "government type",
    "parliament": "legislative branch legislature",
    "legislature": "legislative branch",
    "legislative": "legislative branch",
    "unicameral": "legislative branch legislature structure",
    "bicameral": "legislative branch legislature structure",
    "court": "judicial branch highest court",
    "law": "legal system",
    "vote": "suffrage",
    "voting": "suffrage",
    "citizen": "citizenship",
    "citizenship": "citizenship",
    "naturalization": "citizenship",
    "naturalized": "citizenship",
    "independent": "independence",
    "ruled before": "independence",
    "national day": "national holiday",
    "animal": "national symbol",
    "symbol": "national symbols",
    "color": "national colors",
    "colour": "national colors",
    "song": "national anthem",
    "located": "map references location",
    "location": "map references",
    "where": "map references location",
    "continent": "map references location",
    "part world": "map references location",
    "region": "map references location",
    "map": "map references",
    "latitude": "geographic coordinates",
    "border": "land boundaries border countries",
    "borders": "land boundaries border countries",
    "neighbor": "land boundaries border countries",
    "neighbour": "land boundaries border countries",
    "around": "land boundaries border countries",
    "surround": "land boundaries border countries",
    "surrounds": "land boundaries border countries",
    "beside": "land boundaries border countries",
    "touches": "land boundaries border countries",
    "next": "land boundaries border countries",
    "high average": "mean elevation",
    "size": "area total",
    "mountain": "elevation highest point",
    "peak": "elevation highest point",
    "highest": "elevation",
    "lowest": "elevation",
    "altitude": "mean elevation",
    "above sea level": "mean elevation",
    "coast": "coastline",
    "big": "area total",
    "large": "area total",
    "square": "area total",
    "compared": "area comparative",
    "comparable": "area comparative",
    "compare": "area comparative",
    "territorial": "maritime claims sea",
    "river": "major rivers length",
    "weather": "climate",
    "disaster": "natural hazards",
    "hazard": "natural hazards",
    "resource": "natural resources",
    "live": "population",
    "inhabitant": "population total",
    "many people": "population total",
    "people language": "languages",
    "people speak": "languages",
    "people religion": "religions",
    "people faith": "religions",
    "people ethnicity": "ethnic groups",
    "people race": "ethnic groups",
    "people old": "median age",
    "people obese": "obesity adult prevalence",
    "people electricity": "access electrification",
    "people internet": "internet users",
    "people online": "internet users percent",
    "people vote": "suffrage",
    "people city": "urbanization urban population",
    "most people city": "major urban areas population",
    "most people live": "major urban areas population",
    "people deaths": "death rate",
    "people births": "birth rate",
    "people local": "country name local short",
    "people country": "country name local short",
    "locals": "country name local short",
    "money people": "exchange rates currency",
    "city": "major urban areas population",
    "live cities": "urbanization urban population",
    "urban": "urbanization",
    "urbanized": "urbanization urban population",
    "towns": "urbanization urban population",
    "people from called": "nationality adjective",
    "people called": "nationality adjective",
    "person called": "nationality adjective",
    "call people": "nationality adjective",
    "people": "population",
    "nationality": "adjective",
    "adjective": "nationality",
    "demonym": "nationality adjective",
    "someone": "nationality adjective",
    "old": "median age",
    "children": "total fertility rate",
    "woman": "female",
    "women": "female",
    "men": "male",
    "man": "male",
    "births": "birth rate",
    "deaths": "death rate",
    "infants": "infant mortality rate",
    "mothers": "maternal mortality ratio",
    "name": "country name",
    "language called": "country name local",
    "live average": "life expectancy birth",
    "people live long": "life expectancy birth",
    "obese": "obesity adult prevalence",
    "heritage": "national heritage world sites",
    "time zone": "capital time difference",
    "time": "capital time difference",
    "utc": "capital time difference",
    "economy grow": "real gdp growth rate",
    "economic growth": "real gdp growth rate",
    "prices": "inflation consumer",
    "unemployed": "unemployment rate",
    "military": "expenditures",
    "export": "exports partners commodities",
    "import": "imports partners commodities",
    "buys exports": "partners",
    "goods": "commodities",
    "commodity": "commodities",
    "partner": "partners",
    "country export": "partners",
    "countries export": "partners",
    "countries import": "partners",
    "crop": "agricultural products",
    "farm": "agricultural products",
    "farmer": "agricultural products",
    "farms": "agricultural products",
    "grow": "agricultural products growth rate",
    "grown": "agricultural products",
    "rail": "railways total",
    "railway": "railways total",
    "electricity": "access electrification",
    "electrification": "electricity access",
    "online": "internet users percent",
    "domain": "internet country code",
    "internet code": "internet country code",
    "level domain": "internet country code",
    "aircraft": "civil aircraft registration",
    "plane": "civil aircraft registration country code prefix",
    "co2": "carbon dioxide emissions",
}


def _stem(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and len(word) > 3 and not word.endswith("ss") else word


@functools.lru_cache(maxsize=1 << 16)
def _words(text: str) -> tuple[str, ...]:
    folded = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return tuple(re.findall(r"[a-z0-9]+", folded.replace("'s ", " ")))


def terms(text: str) -> list[str]:
    """Index terms: lower case, without accents, stop words and plural s."""
    return [_stem(word) for word in _words(text) if word not in STOP_WORDS]


_EXPANSION_TERMS = [(frozenset(map(_stem, key.split())), terms(value)) for key, value in EXPANSIONS.items()]


class PassageIndex:
    """BM25 (k1 0.9, b 0.4) over title and start of text.

    A question may name a country by an alias ("usa") or by its people's adjective ("french"): the country's name
    then replaces that word in the query.
    """

    def __init__(self, passages: Sequence[Passage]):
        """Index the passages; ``search`` returns positions in ``passages``."""
        self._bm25 = bm25s.BM25(k1=0.9, b=0.4)
        documents = [terms(f"{passage.title} " * TITLE_WEIGHT + passage.text[:TEXT_CHARS]) for passage in passages]
        self._bm25.index(documents, show_progress=False)
        self._vocabulary = self._bm25.vocab_dict
        adjectives = adjectives_of(passages)
        countries = dict.fromkeys(passage.country for passage in passages)
        self._full_names = sorted((" ".join(_words(country)) for country in countries), key=len, reverse=True)
        self._names: list[tuple[str, list[str]]] = []
        # "French" is the adjective of France and of five territories; it names the one with the most passages.
        sizes = collections.Counter(passage.country for passage in passages)
        owners = {adjectives[country]: country for country in sorted(adjectives, key=lambda country: sizes[country])}
        for country in countries:
            spoken = [*ALIASES.get(country, ()), *(adjective for adjective, owner in owners.items() if owner == country)]
            self._names += [(" ".join(_words(name)), terms(country)) for name in spoken]

    def query_terms(self, question: str) -> list[str]:
        """The question's terms with their expansions, each once."""
        words = _words(question)
        spaced = f" {' '.join(words)} "
        found = terms(question)
        stems = {_stem(word) for word in words}
        matched = [(key, expansion) for key, expansion in _EXPANSION_TERMS if key <= stems]
        for key, expansion in matched:
            if not any(key < other for other, _ in matched):
                found += expansion
        # "French Polynesia" and "Republic of the Congo" name one country each; remove them before looking for aliases.
        for name in self._full_names:
            spaced = spaced.replace(f" {name} ", " ")
        for spoken, country in self._names:
            if f" {spoken} " in spaced:
                # The word means the country only: "french people" does not match French Polynesia.
                found = [term for term in found if term not in terms(spoken)] + country
        return list(dict.fromkeys(found))

    def search(self, question: str, n_passages: int) -> list[tuple[int, float]]:
        """The best passages, best first, as (position, score); ties by position."""
        known = [term for term in self.query_terms(question) if term in self._vocabulary]
        if not known:
            return [(position, 0.0) for position in range(n_passages)]
        scores = self._bm25.get_scores(known)
        best = np.argpartition(-scores, n_passages)[:n_passages]
        best = best[np.lexsort((best, -scores[best]))]
        return [(int(position), float(scores[position])) for position in best]


def adjectives_of(passages: Sequence[Passage]) -> dict[str, str]:
    """Country -> its people's adjective ("France" -> "French"), if it is one or two plain words."""
    found = {}
    for passage in passages:
        if passage.field == "Nationality":
            for leaf in passage.leaves:
                adjective = re.split(r"\s*[(,;]| or ", leaf.value)[0]
                if leaf.path[-1] == "adjective" and re.fullmatch(r"[^\W\d]+(?: [^\W\d]+)?", adjective) and adjective != "none":
                    found[passage.country] = adjective
    return found
