"""One page that needs nothing else: the plots, the tables and the script that draws."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from json import dumps

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from vl_convert import javascript_bundle

from kvmfault.summary.charts import PALETTE, Plot, histograms, legend, overlays, plots
from kvmfault.summary.compare import Comparison
from kvmfault.summary.figures import Column, Section, Summary
from kvmfault.summary.words import text

__all__ = ["comparison", "page", "tables"]


def page(summary: Summary) -> str:
    """*summary* as HTML. All text of the recording is escaped; nothing is fetched from anywhere."""
    events = Section(
        "events", "All events of the file", (Column("event", "text"), Column("count")), tuple(summary.events.items())
    )
    return _render(
        f"Faults of {summary.path}",
        summary.path,
        [("", _abouts(summary))],
        plots(summary),
        histograms(summary),
        legend(summary),
        (*summary.sections, events),
        ("What this recording does not tell", summary.unsaid),
        ticks=summary.ticks,
    )


def comparison(found: Comparison) -> str:
    """*found* as HTML, see `page`."""
    before, after = found.before, found.after
    both = f"{before.path} and {after.path}"
    return _render(
        f"Faults of {both}",
        both,
        [("before", _abouts(before)), ("after", _abouts(after))],
        [],
        overlays(before, after),
        {"before": PALETTE[0], "after": PALETTE[1]},
        found.sections,
        ("Why figures may not be comparable", found.cautions),
        ticks=before.ticks or after.ticks,
    )


def tables(
    title: str,
    about: Mapping[str, str],
    drawn: Sequence[Plot],
    colours: Mapping[str, str],
    sections: Sequence[Section],
    remarks: tuple[str, Sequence[str]],
) -> str:
    """Any tables as such a page."""
    return _render(title, title, [("", [*about.items()])], drawn, [], colours, sections, remarks, ticks=False)


def _render(
    heading: str,
    title: str,
    about: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    drawn: Sequence[Plot],
    times: Sequence[Plot],
    colours: Mapping[str, str],
    sections: Sequence[Section],
    remarks: tuple[str, Sequence[str]],
    *,
    ticks: bool,
) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("kvmfault.summary") / "page.html.j2").read_text("utf-8"))
    return template.render(
        heading=heading,
        title=title,
        about=about,
        plots=drawn,
        histograms=times,
        colours=colours,
        sections=sections,
        remarks=remarks,
        text=lambda value, unit: text(value, unit, ticks=ticks),
        specs=_script_data({plot.key: plot.spec for plot in (*drawn, *times)}),
        script=_script(javascript_bundle()),  # type: ignore[call-arg]  # its stub forgets a default
    )


def _abouts(summary: Summary) -> list[tuple[str, str]]:
    told = ((name, value) for name, value in summary.about.items() if value not in (None, False))
    return [(name.replace("_", " "), _about(name, summary)) for name, _ in told]


def _about(name: str, summary: Summary) -> str:
    value = summary.about[name]
    if name in {"first", "last"} and not summary.ticks and isinstance(value, int):
        return f"{value / 1e9:,.6f} s"
    unit = {"duration": "time", "page_size": "bytes", "faults_per_second": "rate"}.get(
        name, "text" if isinstance(value, str) else "count"
    )
    return text(value, unit, ticks=summary.ticks)


def _script_data(value: object) -> Markup:
    # inside a script element only "<" can end it; the two separators are line ends to old scripts
    data = (
        dumps(value, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    return Markup(data)  # nothing of it can end the element


def _script(source: str) -> Markup:
    return Markup(re.sub(r"<(?=/script|!--|script)", r"\\x3c", source, flags=re.IGNORECASE))  # as above
