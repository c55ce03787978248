"""Reading short answers off Factbook values, by worked cases."""

from __future__ import annotations

import pytest

from training.corpus import answers


@pytest.mark.parametrize(
    ("extract", "value", "wanted"),
    [
        (answers.clause, "civil law system; Constitutional Court reviews", ["civil law system"]),
        (answers.clause, "metropolitan France: cool winters", []),
        (answers.measure, "42.7 years (2025 est.)", ["42.7 years", "42.7"]),
        (answers.measure, "$62,500 (2023 est.)", ["$62,500", "$62,500"]),
        (answers.share, "81.8% of total population (2023)", ["81.8%"]),
        (answers.items, "Italy 476 km; Spain 646 km", ["Italy", "Spain"]),
        (answers.items, "French (official) 100%, Breton, other 2%", ["French", "Breton"]),
        (answers.place, "Mont Blanc 4,810", ["Mont Blanc"]),
        (answers.place, "unnamed location 5 m", []),
        (answers.leader, "President Emmanuel MACRON (since 14 May 2017)", ["Emmanuel MACRON", "President Emmanuel MACRON"]),
        (answers.leader, "Ambassador (vacant)", []),
        (answers.titled_leader("prime minister"), "President Emmanuel MACRON", []),
        (
            answers.government,
            "federal parliamentary democracy under a constitutional monarchy",
            ["constitutional monarchy", "federal parliamentary democracy under a constitutional monarchy"],
        ),
        (answers.government, "formerly", []),
        (answers.currency, "euros (EUR) per US dollar -", ["euros", "EUR", "euro"]),
        (answers.largest_city, "11.208 million PARIS (capital), 1.761 million Lyon", ["PARIS"]),
        (answers.date, "15 August 1960 (from France)", ["15 August 1960"]),
        (answers.former_ruler, "15 August 1960 (from France)", ["France"]),
        (answers.holiday_date, "Independence Day, 4 October (1966)", ["4 October"]),
        (answers.anthem, '"La Marseillaise" (The Song of Marseille)', ["La Marseillaise"]),
        (answers.time_zone, "UTC+1 (6 hours ahead of Washington, DC)", ["UTC+1"]),
        (answers.river, "Rhin (Rhine) (shared with Germany) - 1,233 km", ["Rhin", "Rhine"]),
        (answers.code, ".de; note - also", [".de"]),
        (answers.region, "metropolitan France: Europe French Guiana: South America", ["Europe"]),
        (answers.comparison, "about 0.7 times the size of Washington, D.C.", ["about 0.7 times the size of Washington, D.C."]),
    ],
)
def test_extractors(extract, value, wanted):
    assert extract(value) == wanted
