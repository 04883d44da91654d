"""The plots of a summary as Vega-Lite: what was where and when, rates, and times from exit to entry."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from json import dumps
from typing import Final

import altair as alt

from kvmfault.contract.format import size_text
from kvmfault.summary.figures import Histogram, Summary
from kvmfault.summary.words import text

__all__ = ["OTHER", "PALETTE", "Plot", "bars", "histograms", "legend", "overlays", "plots"]

PALETTE: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1")
"""Told apart by people who do not see all colours (Okabe and Ito), readable on light and on dark ground."""
OTHER: Final = "all others"
_OTHER_COLOUR: Final = "#8a8a8a"
_ROWS: Final = 96
_STEPS: Final = 128
_ROW: Final = 5
_TALL: Final = (140, 520)
_HISTOGRAMS: Final = 9


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot with what it says, for those who do not see it."""

    key: str
    title: str
    about: str
    spec: Mapping[str, object]


def plots(summary: Summary) -> list[Plot]:
    """Those that the recording has something for."""
    colours = _colours(summary)
    made = [_map(summary, colours)] if summary.map else []
    made += [_rate(summary, colours)] if summary.rate else []
    return made


def histograms(summary: Summary) -> list[Plot]:
    """One for each kind of exit."""
    colours = _colours(summary)
    return [_histogram(n, h, colours, ticks=summary.ticks) for n, h in enumerate(summary.histograms[:_HISTOGRAMS])]


def _colours(summary: Summary) -> dict[str, str]:
    counts = Counter[str]()
    for _, kind, n in summary.rate:
        counts[kind] += n
    ranked = [kind for kind, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0]))]
    chosen = ranked if len(ranked) <= len(PALETTE) else ranked[: len(PALETTE) - 1]
    colours = dict(zip(chosen, PALETTE, strict=False))
    return colours | ({OTHER: _OTHER_COLOUR} if len(chosen) < len(ranked) else {})


def legend(summary: Summary) -> Mapping[str, str]:
    """Colours by kind. Not in the plots: their own legends do not wrap."""
    return _colours(summary)


def _colour(colours: Mapping[str, str]) -> alt.Color:
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color("kind:N", scale=scale, legend=None)


def _times(summary: Summary) -> tuple[float, alt.X]:
    # The axis of time, as long as the recording; and its unit.
    unit, name = _time_scale(summary)
    steps = max((s for s, _, _ in summary.rate), default=0) + 1
    length = summary.about["duration"]
    end = max(length if isinstance(length, (int, float)) else 0, steps * summary.step) / unit
    scale = alt.Scale(domain=[0, end], nice=False)
    axis = alt.Axis(tickCount=10, grid=False)
    return unit, alt.X("x:Q", title=f"time from the first event, {name}", scale=scale, axis=axis)


def _data(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> alt.InlineData:
    # as text: a third of what a list of objects takes
    lines = ["\t".join(columns), *("\t".join(str(cell) for cell in row) for row in rows)]
    parse = {c: "string" if c in {"kind", "where", "all", "when", "range"} else "number" for c in columns}
    return alt.InlineData(values="\n".join(lines), format=alt.CsvDataFormat(type="tsv", parse=parse))


def _tip(field: str, title: str) -> alt.Tooltip:
    return alt.Tooltip(field, title=title)


def _when(summary: Summary, steps: int) -> str:
    return text(steps * summary.step, "time", ticks=summary.ticks)


def _time_scale(summary: Summary) -> tuple[float, str]:
    # one unit for the axis of time: what the whole length is told in
    if summary.ticks:
        return 1, "ticks"
    length = summary.about["duration"]
    length = length if isinstance(length, (int, float)) else 0
    return next(((size, name) for size, name in ((1e9, "s"), (1e6, "ms"), (1e3, "us")) if length >= size), (1, "ns"))


def _map(summary: Summary, colours: Mapping[str, str]) -> Plot:
    cells, size, factor = _coarse(summary)
    places = sorted({place for _, place in cells})
    row, labels, gaps = _rows(places, size)
    unit, axis = _times(summary)
    step = summary.step * factor

    def line(at: tuple[int, int]) -> tuple[object, ...]:
        kinds = Counter[str]()
        for kind, n in cells[at].items():
            kinds[kind if kind in colours else OTHER] += n
        when, place = at
        return (
            f"{when * step / unit:.6g}",
            f"{(when + 1) * step / unit:.6g}",
            row[place],
            row[place] + 1,
            kinds.most_common(1)[0][0],
            kinds.total(),
            f"{place * size:#x} + {size_text(size)}",
            ", ".join(f"{n} {k}" for k, n in cells[at].most_common(4)),
        )

    data = _data(("x", "x2", "y", "y2", "kind", "n", "where", "all"), (line(at) for at in sorted(cells)))
    rects = _cells(data, colours, axis, labels, max(row.values()) + 1, _time_scale(summary)[1])
    holes = (
        alt.Chart(_data(("y", "range"), gaps))
        .mark_rule(strokeDash=[2, 3], opacity=0.6)
        .encode(y="y:Q", tooltip=[_tip("range:N", "no faults in")])
    )
    chart = alt.layer(holes, rects) if gaps else rects
    tall = min(max((max(row.values()) + 1) * _ROW, _TALL[0]), _TALL[1])
    about = (
        f"Each cell is {size_text(size)} of guest memory for {_when(summary, factor)}, in the colour of the kind that "
        "is most frequent there, stronger for more faults. Memory without faults is left out: a dashed line stands "
        "for it."
    )
    return Plot("map", "Faults by address and time", about, _spec(chart, tall))


def _cells(
    data: alt.InlineData, colours: Mapping[str, str], axis: alt.X, labels: Mapping[int, str], top: int, time: str
) -> alt.Chart:
    chart: alt.Chart = (
        alt.Chart(data)
        .mark_rect(strokeWidth=0)
        .encode(
            x=axis,
            x2="x2:Q",
            y=alt.Y(
                "y:Q",
                title=None,
                scale=alt.Scale(domain=[0, top], nice=False),
                axis=alt.Axis(
                    values=[*labels],
                    labelExpr=f"{dumps(labels)}[datum.value]",
                    labelOverlap="greedy",
                    grid=False,
                    labelLimit=140,
                ),
            ),
            y2="y2:Q",
            color=_colour(colours),
            opacity=alt.Opacity("n:Q", scale=alt.Scale(type="log", range=[0.6, 1]), legend=None),
            tooltip=[
                _tip("where:N", "guest memory"),
                _tip("x:Q", f"from, {time}"),
                _tip("n:Q", "faults"),
                _tip("all:N", "of these"),
            ],
        )
    )
    return chart


def _coarse(summary: Summary) -> tuple[dict[tuple[int, int], Counter[str]], int, int]:
    # Cells by (step, place), few enough to draw; bytes of a place; steps of the summary in one.
    size, drop = summary.place_step, 0
    places = {address // size for _, address, _, _ in summary.map}
    while len(places) > _ROWS:
        size *= 2
        places = {place // 2 for place in places}
    while max(s for s, *_ in summary.map) >> drop >= _STEPS:
        drop += 1
    cells: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for step, address, kind, n in summary.map:
        cells[step >> drop, address // size][kind] += n
    return cells, size, 1 << drop


def _rows(places: Sequence[int], size: int) -> tuple[dict[int, int], dict[int, str], list[tuple[float, str]]]:
    # Row of each place, labels by row, and the holes between: one row each, however large.
    row, labels, gaps = {places[0]: 0}, {0: f"{places[0] * size:#x}"}, list[tuple[float, str]]()
    for before, place in pairwise(places):
        row[place] = row[before] + 1
        if place - before > 1:
            gaps.append((row[before] + 1.5, f"{(before + 1) * size:#x} to {place * size - 1:#x}"))
            row[place] += 1
            labels[row[place]] = f"{place * size:#x}"
    return row, labels, gaps


def _rate(summary: Summary, colours: Mapping[str, str]) -> Plot:
    name = _time_scale(summary)[1]
    unit, axis = _times(summary)
    counts: dict[tuple[int, str], int] = defaultdict(int)
    for step, kind, n in summary.rate:
        counts[step, kind if kind in colours else OTHER] += n
    order = {kind: i for i, kind in enumerate(colours)}
    rows, below = [], Counter[int]()
    for (s, k), n in sorted(counts.items(), key=lambda c: (c[0][0], order[c[0][1]])):
        rows.append(
            (f"{s * summary.step / unit:.6g}", f"{(s + 1) * summary.step / unit:.6g}", below[s], below[s] + n, k, n)
        )
        below[s] += n
    chart = (
        alt.Chart(_data(("x", "x2", "y", "y2", "kind", "n"), rows))
        .mark_rect(strokeWidth=0)
        .encode(
            x=axis,
            x2="x2:Q",
            y=alt.Y("y:Q", title=f"faults in {_when(summary, 1)}", axis=alt.Axis(tickMinStep=1)),
            y2="y2:Q",
            color=_colour(colours),
            tooltip=[alt.Tooltip("kind:N"), _tip("x:Q", f"from, {name}"), _tip("n:Q", "faults")],
        )
    )
    return Plot(
        "rate", "Faults over time", f"Faults in each {_when(summary, 1)} of the recording, by kind.", _spec(chart, 200)
    )


def bars(key: str, title: str, about: str, unit: str, rows: Sequence[tuple[str, str, float]]) -> Plot:
    """A group of bars for each first word of *rows*, one in it for each second; the third is its length."""
    colours = dict(zip(dict.fromkeys(kind for _, kind, _ in rows), PALETTE, strict=False))
    groups = list(dict.fromkeys(where for where, _, _ in rows))
    chart = (
        alt.Chart(_data(("where", "kind", "n"), rows))
        .mark_bar()
        .encode(
            x=alt.X("where:N", title=None, sort=groups, axis=alt.Axis(labelAngle=-30, labelOverlap=False)),
            xOffset=alt.XOffset("kind:N", sort=list(colours)),
            y=alt.Y("n:Q", title=unit),
            color=_colour(colours),
            tooltip=[_tip("where:N", "target"), _tip("kind:N", "shape"), _tip("n:Q", unit)],
        )
    )
    return Plot(key, title, about, _spec(chart, 240))


def overlays(before: Summary, after: Summary) -> list[Plot]:
    """For each kind of exit that both or one of them have: before and after."""
    found: dict[str, list[Histogram | None]] = {h.name: [h, None] for h in before.histograms}
    for h in after.histograms:
        found.setdefault(h.name, [None, None])[1] = h
    colours = {"before": PALETTE[0], "after": PALETTE[1]}
    made = []
    for number, (name, sides) in enumerate([*found.items()][:_HISTOGRAMS]):
        parts = {which: h.steps for which, h in zip(colours, sides, strict=True) if h is not None}
        made.append(_took(number, name, parts, colours, ticks=before.ticks))
    return made


def _histogram(number: int, histogram: Histogram, colours: Mapping[str, str], *, ticks: bool) -> Plot:
    colour = colours.get(histogram.name, _OTHER_COLOUR)
    return _took(number, histogram.name, {"exits": histogram.steps}, {"exits": colour}, ticks=ticks)


def _took(
    number: int,
    name: str,
    parts: Mapping[str, Sequence[tuple[int, int, int]]],
    colours: Mapping[str, str],
    *,
    ticks: bool,
) -> Plot:
    unit, unit_name = (1, "ticks") if ticks else (1000, "us")
    rows = []
    for which, steps in parts.items():
        total = sum(n for *_, n in steps)
        for (low, high), n in sorted(_quarters(steps).items()):
            rows.append((f"{low / unit:.6g}", f"{high / unit:.6g}", n, f"{100 * n / total:.4g}", which))
    several = len(colours) > 1
    # twice as wide as what there is at least: one step is no plot
    domain = [min(float(row[0]) for row in rows) / 1.5, max(float(row[1]) for row in rows) * 1.5]
    figure = "share" if several else "n"
    data = _data(("x", "x2", "n", "share", "kind"), rows)
    chart = (
        alt.Chart(data)
        .mark_rect(strokeWidth=0, opacity=0.6 if several else 1)
        .encode(
            x=alt.X(
                "x:Q",
                title=f"{unit_name} from exit to entry",
                scale=alt.Scale(type="log", nice=False, domain=domain),
                axis=alt.Axis(tickCount=5, grid=False, format="~s"),
            ),
            x2="x2:Q",
            y=alt.Y(f"{figure}:Q", title="%" if several else None, axis=alt.Axis(tickCount=4)),
            y2=alt.datum(0),
            color=_colour(colours) if several else alt.value(colours["exits"]),
            tooltip=[
                _tip("x:Q", f"from, {unit_name}"),
                _tip("x2:Q", "below"),
                _tip("n:Q", "exits"),
                _tip("share:Q", "%"),
            ],
        )
    )
    totals = [f"{sum(n for *_, n in steps):,}" + f" {which}" * several for which, steps in parts.items()]
    about = f"Exits by the time that they took: {', '.join(totals)}."
    return Plot(f"took{number}", name, about, _spec(chart, 130))


def _quarters(steps: Iterable[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    # Four steps for each doubling are enough to look at.
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for low, _, n in steps:
        start = max(low, 1)
        top = 1 << (start.bit_length() - 1)
        quarter = max(top // 4, 1)
        start -= (start - top) % quarter
        counts[start, start + quarter] += n
    return counts


def _spec(chart: alt.TopLevelMixin, height: int) -> Mapping[str, object]:
    spec: dict[str, object] = chart.properties(width="container", height=height).to_dict()
    spec.pop("config", None)  # the page has one for light and one for dark
    return spec
