"""Plots of a run's report as reproducible SVG without external resources.

In: `Row`s of the sweep, and the other files of a run as they are. Out: one `<svg>` a figure. FiD and FiDO keep their colours in
all of them; a hollow mark is a point that was not steady or had errors; thin bars are the least and the most of the rounds.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .page import significant
from .run_folder import NAMES, Row, Spread

COLOURS = {"fid": "#0072B2", "fido": "#D55E00"}  # Okabe and Ito's blue and vermilion: distinguishable with any colour vision
NEUTRAL = "#8A8A8A"
PARTS = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#B0B0B0", "#000000")  # their other colours, for the parts of a bar
STYLE = {
    "svg.fonttype": "none",  # text stays searchable and scales
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
WIDTH_INCHES = 10
LOG_RANGE = 15  # an axis is logarithmic if its maximum over its minimum exceeds this


def _tick(value: float, _position: int = 0) -> str:
    return f"{value:,.10g}" if abs(value) >= 1e-4 else f"{value:g}"


def _draw(name: str, paint: Callable[..., None], columns: int = 1, height_inches: float = 3.9, width_inches: float = WIDTH_INCHES) -> str:
    """An SVG of `columns` panels side by side, painted by a function that takes the panels."""
    # identifiers come from content and salt: the same in every run, different in each figure of a page
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
        paint(*figure.subplots(1, columns, squeeze=False)[0])
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # inside HTML neither namespaces nor the names of groups are needed, and a page may not have one name twice
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    return re.sub(r'<g id="[^"]*"', "<g", svg).strip()


def _log_where_wide(axes: Any, which: str, values: Sequence[float], always: bool = False) -> bool:
    """Make the axis `which` (x or y) logarithmic if the values span more than LOG_RANGE; return whether it is."""
    if not values or min(values) <= 0 or not (always or max(values) / min(values) > LOG_RANGE):
        return False
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) / min(values) < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_locator(NullLocator())
    return True


def _use_height(axes: Any, values: Sequence[float]) -> None:
    """Limits of y: from 0 where the values reach down to a third of the axis, else around them, so that curves use the height."""
    least, most = min(values, default=0.0), max(values, default=1.0)
    room = 0.15 * (most - least) or 0.15 * most or 1.0
    axes.set_ylim(0 if 0 <= least < most / 3 else least - room, most + room)


def _ticks_at(axes: Any, values: Sequence[float]) -> None:
    """Ticks at the measured values only."""
    places = sorted(set(values))
    axes.set_xticks(places, list(map(_tick, places)))


def _errors(spreads: Sequence[Spread]) -> list[list[float]]:
    """Distances from the median to minimum and maximum, in Matplotlib's form of error bars."""
    return [[each["median"] - each["min"] for each in spreads], [each["max"] - each["median"] for each in spreads]]


def _label(row: Row) -> str:
    return NAMES[row["reader"]] + (", streaming" if row.streams else "")


def _curves(axes: Any, rows: Sequence[Row], across: tuple[str, ...], up: tuple[str, ...], concurrency: bool = False) -> None:
    """A curve for each model, in order of `across`; `concurrency` is written beside each point if wanted."""
    drawn: list[tuple[Spread, Spread]] = []
    heights = {(row["reader"], row["load"]): row.questions_per_s["median"] for row in rows}
    for model in sorted({row["model"] for row in rows}):
        mine = [(row, x, y) for row in rows if row["model"] == model and (x := row.over_rounds(*across)) and (y := row.over_rounds(*up))]
        if not mine:
            continue
        mine.sort(key=lambda each: each[0]["load"] if across[0] == "latency_ms" else each[1]["median"])
        first, colour = mine[0][0], COLOURS[mine[0][0]["reader"]]
        xs, ys = [x["median"] for _, x, _ in mine], [y["median"] for _, _, y in mine]
        bars = {"xerr": _errors([x for _, x, _ in mine]), "yerr": _errors([y for _, _, y in mine])}
        axes.errorbar(xs, ys, **bars, fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
        shape = "s" if first["reader"] == "fido" else "o"
        axes.plot(xs, ys, shape, color=colour, linestyle="--" if first.streams else "-", markersize=6, label=_label(first))
        hollow = [(x["median"], y["median"]) for row, x, y in mine if row.mark]
        axes.plot([x for x, _ in hollow], [y for _, y in hollow], shape, markersize=6, color=colour, markerfacecolor="white")
        for row, x, y in mine if concurrency else ():
            # above the upper curve and below the lower one, so that no label lies on the other reader's point
            other = heights.get(("fid" if row["reader"] == "fido" else "fido", row["load"]), 0.0)
            above = (y["median"], row["reader"]) > (other, "fid" if row["reader"] == "fido" else "fido")
            side, aligned, point = *(((-5, 6), "right") if above else ((5, -14), "left")), (x["median"], y["median"])
            axes.annotate(f"{row['load']:g}", point, side, textcoords="offset points", fontsize=9, color=colour, ha=aligned)
        drawn += [(x, y) for _, x, y in mine]
    axes.margins(x=0.08, y=0.12)
    if not _log_where_wide(axes, "x", [x["median"] for x, _ in drawn]):
        axes.set_xlim(left=0)
    heights_drawn = [end for _, y in drawn for end in (y["min"], y["max"])]
    if across[0] == "latency_ms" or not _log_where_wide(axes, "y", heights_drawn):
        _use_height(axes, heights_drawn)
    if across[0] == "passages":
        _ticks_at(axes, [x["median"] for x, _ in drawn])
    if any(row.mark for row in rows):
        _explain_hollow(axes)


def _legend_below(axes: Any, columns: int = 9) -> None:
    """One legend for all panels, outside the curves."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def _explain_hollow(axes: Any) -> None:
    axes.plot([], [], "o", markeredgecolor="#555555", markerfacecolor="white", label="not steady, or with errors")


def throughput_against_latency(name: str, rows: Sequence[Row]) -> str:
    """Closed loop: questions/s against p50 and p99, concurrency beside each point."""
    # the streaming models' points lie on the unary ones'; they have a table of their own
    drawn = [row for row in rows if not row.streams] or rows

    def paint(*panels: Any) -> None:
        for axes, percent in zip(panels, ("p50", "p99"), strict=True):
            _curves(axes, drawn, ("latency_ms", percent), ("questions_per_s",), concurrency=True)
            axes.set(xlabel=f"{percent} latency, ms", ylabel="questions/s")
        _legend_below(panels[0])

    return _draw(f"throughput {name}", paint, columns=2)


def latency_against_rate(name: str, rows: Sequence[Row]) -> str:
    """Open loop: p50 and p99 against the rate at which questions are sent."""

    def paint(*panels: Any) -> None:
        for axes, percent in zip(panels, ("p50", "p99"), strict=True):
            _curves(axes, rows, ("load",), ("latency_ms", percent))
            axes.set(xlabel="offered rate, questions/s", ylabel=f"{percent} latency, ms")
        _legend_below(panels[0])

    return _draw(f"rate {name}", paint, columns=2)


def ratio_against_new_tokens(groups: Mapping[str, Sequence[tuple[float, Spread, str]]]) -> str:
    """FiDO over FiD against the length of the answer: for each group of like workloads (new tokens, ratio, mark)."""

    def paint(axes: Any) -> None:
        for (label, points), shape, style in zip(
            groups.items(), "osD^v<>P" * len(groups), ("-", "--", "-.", ":") * len(groups), strict=False
        ):
            xs, ratios = [x for x, _, _ in points], [ratio for _, ratio, _ in points]
            axes.errorbar(
                xs, [each["median"] for each in ratios], yerr=_errors(ratios), color="#333333", linestyle=style, label=label, elinewidth=1
            )
            for x, ratio, mark in points:
                axes.annotate(
                    significant(ratio["median"]), (x, ratio["median"]), (0, 9), textcoords="offset points", fontsize=9, ha="center"
                )
                fill = "white" if mark else "#333333"
                axes.plot(x, ratio["median"], shape, markersize=6, markeredgecolor="#333333", markerfacecolor=fill, zorder=3)
        axes.axhline(1, color=COLOURS["fid"], linewidth=1, label="as fast as FiD")
        lengths = [x for points in groups.values() for x, _, _ in points]
        _log_where_wide(axes, "x", lengths)
        _ticks_at(axes, lengths)
        _use_height(axes, [1.0, *(end for points in groups.values() for _, ratio, _ in points for end in (ratio["min"], ratio["max"]))])
        axes.set(xlabel="new tokens an answer", ylabel="FiDO / FiD, questions/s")
        if any(mark for points in groups.values() for _, _, mark in points):
            _explain_hollow(axes)
        _legend_below(axes, columns=2)

    return _draw("ratio", paint, height_inches=3.6, width_inches=5)  # to be read on a phone


README_STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1c1c1c}.small{font-size:12px}.bold{font-weight:600}.page{fill:#fff}.grid{stroke:#e0e0e0}"
    ".line{stroke:#d55e00;fill:none;stroke-width:2.5}.dot{stroke:#d55e00;fill:#d55e00;stroke-width:2.5}.open{fill:#fff}"
    ".one{stroke:#0072b2;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e6e6}.page,.open{fill:#16191d}.grid{stroke:#3a3f45}"
    ".line,.dot{stroke:#ff8c42}.dot{fill:#ff8c42}.dot.open{fill:#16191d}.one{stroke:#56b4e9}}"
)


def readme_ratio(title: str, about: str, points: Sequence[tuple[float, Spread, str]]) -> str:
    """The ratio against new tokens as a small SVG file, written by hand: the same bytes whatever Matplotlib's version.

    It has its own ground in both colour schemes, so that it can be read on any page.
    """
    left, right, top, bottom = 50, 600, 70, 270
    most = math.ceil(max(ratio["max"] for _, ratio, _ in points)) + 0.5
    logs = [math.log(x) for x, _, _ in points]
    xs = [left + 40 + (right - left - 80) * (log - logs[0]) / ((logs[-1] - logs[0]) or 1) for log in logs]

    def y(ratio: float) -> float:
        return bottom - (bottom - top) * ratio / most

    parts = [
        f'<text class="bold" x="20" y="28">{html.escape(title)}</text><text class="small" x="20" y="48">{html.escape(about)}</text>',
        *(f'<path class="grid" d="M{left} {y(n):.1f}H{right}"/>' for n in range(int(most) + 1)),
        *(f'<text class="small" x="{left - 8}" y="{y(n) + 4:.1f}" text-anchor="end">{n}</text>' for n in range(int(most) + 1)),
        f'<path class="one" d="M{left} {y(1):.1f}H{right}"/>',
        f'<text class="small" x="{right}" y="{y(1) + 16:.1f}" text-anchor="end">as FiD</text>',
        '<path class="line" d="M'
        + "L".join(f"{x:.1f} {y(ratio['median']):.1f}" for x, (_, ratio, _) in zip(xs, points, strict=True))
        + '"/>',
    ]
    for x, (tokens, ratio, mark) in zip(xs, points, strict=True):
        height = y(ratio["median"])
        parts += [
            f'<circle class="dot{" open" if mark else ""}" cx="{x:.1f}" cy="{height:.1f}" r="5"/>',
            f'<text class="bold" x="{x:.1f}" y="{height - 12:.1f}" text-anchor="middle">{ratio["median"]:.1f}</text>',
            f'<text class="small" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tokens:g}</text>',
        ]
    hollow = "; hollow: not steady" if any(mark for _, _, mark in points) else ""
    parts.append(
        f'<text class="small" x="{(left + right) / 2:g}" y="{bottom + 38}" text-anchor="middle">new tokens an answer{hollow}</text>'
    )
    body = "\n".join(parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 320" role="img" aria-label="{html.escape(title)}">'
    return f'{head}\n<style>{README_STYLE}</style>\n<rect class="page" width="620" height="320" rx="8"/>\n{body}\n</svg>\n'


def cost_against_passages(name: str, rows: Sequence[Row], where: str) -> str:
    """Latency and throughput against a question's number of passages; `where` says at which concurrency."""

    def paint(latency: Any, rate: Any) -> None:
        _curves(latency, rows, ("passages",), ("latency_ms", "p50"))
        _curves(rate, rows, ("passages",), ("questions_per_s",))
        latency.set(xlabel="passages a question", ylabel="p50 latency, ms", title=where)
        rate.set(xlabel="passages a question", ylabel="questions/s", title=where)
        _legend_below(latency)

    return _draw(f"passages {name}", paint, columns=2)


def throughput_bars(workloads: Sequence[str], rows: Sequence[Row], where: str) -> str:
    """Questions/s of both readers, a pair of bars for each workload."""

    def paint(axes: Any) -> None:
        for offset, reader in ((-0.19, "fid"), (0.19, "fido")):
            mine = [row for row in rows if row["reader"] == reader]
            places = [workloads.index(row["workload"]) + offset for row in mine]
            rates = [row.questions_per_s for row in mine]
            fills = ["white" if row.mark else COLOURS[reader] for row in mine]
            bars = {"color": fills, "edgecolor": COLOURS[reader], "ecolor": "#333333", "capsize": 3}
            axes.bar(places, [rate["median"] for rate in rates], 0.36, yerr=_errors(rates), **bars)
            axes.bar([0], [0], color=COLOURS[reader], label=NAMES[reader])
        axes.set_xticks(range(len(workloads)), workloads)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.15)
        axes.set(ylabel="questions/s", title=where)
        axes.legend(ncols=2)

    return _draw("padding", paint, height_inches=3.2, width_inches=7)


def stage_bars(readers: Mapping[str, Mapping[str, Spread]]) -> str:
    """Where one question's time goes: a bar for each reader, split into the parts that were measured, in ms."""
    names = list(dict.fromkeys(part for parts in readers.values() for part in parts))
    longest = max(sum(part["median"] for part in parts.values()) for parts in readers.values())

    def paint(axes: Any) -> None:
        starts = dict.fromkeys(readers, 0.0)
        for number, part in enumerate(names):
            colour = PARTS[number % len(PARTS)]
            for place, (reader, parts) in enumerate(readers.items()):
                width = parts.get(part, {"median": 0.0})["median"]
                axes.barh(
                    place, width, 0.6, left=starts[reader], color=colour, edgecolor="white", label=None if place else part.replace("_", " ")
                )
                if width > 0.05 * longest:
                    axes.text(starts[reader] + width / 2, place, significant(width), ha="center", va="center", fontsize=9)
                starts[reader] += width
        for place, total in enumerate(starts.values()):
            axes.text(total, place, f"  {significant(total)} ms", ha="left", va="center", fontsize=9, fontweight="bold")
        axes.set_yticks(range(len(readers)), [NAMES[reader] for reader in readers])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, longest * 1.12)
        axes.set_xlabel("ms a question, medians")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=len(names))

    return _draw("stages", paint, height_inches=2.7)


def roofline(points: Sequence[Mapping[str, Any]], copy_tb_per_s: float, peak_tflops: float) -> str:
    """Achieved TFLOP/s against operations per byte, numbered as in the table, under the roof of the measured rates."""
    at = [(point["flops"] / point["bytes"], point["flops"] / point["seconds"] / 1e12) for point in points]
    ridge = peak_tflops / copy_tb_per_s
    left, right = min([x for x, _ in at] + [ridge]) / 3, max([x for x, _ in at] + [ridge]) * 3

    def paint(axes: Any) -> None:
        roof = [min(copy_tb_per_s * x, peak_tflops) for x in (left, ridge, right)]
        axes.plot([left, ridge, right], roof, color="#333333", label="roof: measured copy and matrix rates")
        for number, (point, (x, y)) in enumerate(zip(points, at, strict=True), 1):
            colour, shape = COLOURS[point["reader"]], "s" if point["reader"] == "fido" else "o"
            axes.vlines(x, y, min(copy_tb_per_s * x, peak_tflops), color=colour, linewidth=0.8, linestyle=":")
            axes.plot(x, y, shape, color=colour, markersize=6)
            # FiD's on the left and FiDO's on the right, as their encoders are one point; the largest batch lies next to the roof
            last = number == len(points) or points[number]["reader"] != point["reader"]
            on_left = point["reader"] == "fid" and not last
            side, aligned = (-6 if on_left else 7, -3 if last else -9), "right" if on_left else "left"
            axes.annotate(str(number), (x, y), side, textcoords="offset points", fontsize=9, color=colour, ha=aligned)
        for reader in sorted({point["reader"] for point in points}):
            axes.plot([], [], "s" if reader == "fido" else "o", color=COLOURS[reader], label=NAMES[reader])
        _log_where_wide(axes, "x", [left, right], always=True)
        _log_where_wide(axes, "y", [min(y for _, y in at), peak_tflops], always=True)
        axes.set(xlabel="operations per byte", ylabel="TFLOP/s")
        axes.legend(loc="lower right")

    return _draw("roofline", paint, height_inches=4.4, width_inches=8)


def ablation_bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """Time of a decoder step for each variant, a panel for the smallest and the largest batch, its bound as a tick."""
    batches = sorted({batch for row in rows for batch in (*(row["step_ms"] or {}), *row["bound_ms"])}, key=int)
    batches = list(dict.fromkeys([batches[0], batches[-1]]))

    def paint(*panels: Any) -> None:
        for axes, batch in zip(panels, batches, strict=True):
            for place, row in enumerate(rows):
                colour = COLOURS.get(row["name"].lower(), NEUTRAL)
                if step := (row["step_ms"] or {}).get(batch):
                    axes.barh(place, step["median"], 0.6, color=colour, xerr=_errors([step]), ecolor="#333333")
                if bound := row["bound_ms"].get(batch):
                    axes.vlines(bound, place - 0.38, place + 0.38, color="black", linewidth=2.2)
            axes.barh([0], [0], color=NEUTRAL, label="measured")
            axes.vlines([], 0, 0, color="black", linewidth=2.2, label="bound")
            axes.set_yticks(range(len(rows)), [row["name"] for row in rows] if axes is panels[0] else [""] * len(rows))
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_xlim(left=0)
            axes.set(title=f"batch {batch}", xlabel="ms a decoder step")
        panels[-1].legend(loc="lower right")

    return _draw("ablation", paint, columns=len(batches), height_inches=1.3 + 0.38 * len(rows))
