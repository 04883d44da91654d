"""The page of a summary, opened in a real browser: the plots are there, nothing complains, names do no harm."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from html import escape
from typing import Final, NamedTuple

import pytest
from markupsafe import escape as markup

from kvmfault.summary.compare import compare
from kvmfault.summary.figures import Summary
from kvmfault.summary.given import Source
from kvmfault.summary.page import comparison, page
from kvmfault.summary.run import summarise
from kvmfault.summary.telling import tell
from kvmfault.trace.recording import Meta
from tests.conftest import ROOT, recording
from tests.summaries import READING, Made, entry, exit_, fault, gathered, handled, stretches

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EXAMPLE = ROOT / "examples" / "recordings" / "x86-npt-longmode2.trace.txt.gz"
WILD = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&\u2028'\""


def made_up(events: list[Made], **names: str) -> Summary:
    meta = Meta(kind=names.get("kind", "test"), comms={1: names.get("comm", "vcpu")})
    source = Source(names.get("path", "made up"), meta, {names.get("event", "kvm_exit"): 1})
    return tell(gathered(stretches(events)), READING, source)


@cache
def pages() -> dict[str, tuple[str, int]]:
    """Pages by name, each with the width that it is looked at in."""
    example = page(summarise(str(EXAMPLE)))
    tiny = {"none": [entry()], "fault": [fault(3)], "zero": [exit_(), entry(after=0)], "top": handled((1 << 52) - 1)}
    a, b = made_up(handled(1) * 3), made_up([exit_(), fault(2), entry(after=90_000)] * 5)
    wild = made_up(handled(1) + handled(900), path=WILD, comm=WILD, event=WILD, kind=WILD)
    return {
        "wide": (example, 1600),
        "narrow": (example, 400),
        **{name: (page(made_up(events)), 800) for name, events in tiny.items()},
        "comparison": (comparison(compare(a, b)), 800),
        "wild": (page(wild), 800),
    }


class Browsed(NamedTuple):
    """What came of the pages."""

    frames: Mapping[str, str]
    """The document of each after its scripts ran: data-drawn, data-wide, data-title and data-theme are of the page."""
    console: list[str]


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> Browsed:
    """All pages in one start of the browser, which takes longer than all else. The narrow one is switched to dark."""
    if BROWSER is None:
        pytest.skip("chromium is not installed")
    folder = tmp_path_factory.mktemp("browser")
    # a frame can be narrower than a window, and one with its own text may be looked into
    frames = "".join(
        f'<iframe id="{name}" style="width:{width}px;height:4000px;border:0" srcdoc="{escape(html)}"></iframe>'
        for name, (html, width) in pages().items()
    )
    outer = folder / "outer.html"
    outer.write_text(f'<meta charset="utf-8"><body>{frames}<script>{_LOOK}</script>', encoding="utf-8")
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        "--disable-background-networking", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=30000",
        outer.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    parts = re.split(r'<div class="page" id="copy-(\w+)"', done.stdout)
    return Browsed(
        dict(zip(parts[1::2], parts[2::2], strict=True)), [x for x in done.stderr.splitlines() if "CONSOLE" in x]
    )


_LOOK: Final = """
const look = (frame, ready) => {
  const d = frame.contentDocument;
  if (!d || !d.body || !d.body.dataset.drawn || !ready(d)) { setTimeout(look, 50, frame, ready); return; }
  const out = document.createElement("div");
  out.className = "page"; out.id = "copy-" + frame.id;
  Object.assign(out.dataset, { drawn: d.body.dataset.drawn, wide: d.documentElement.scrollWidth, title: d.title });
  out.dataset.theme = d.documentElement.dataset.theme || "";
  out.innerHTML = d.body.innerHTML;
  frame.remove(); document.body.append(out);
};
for (const frame of [...document.querySelectorAll("iframe")]) {
  if (frame.id !== "narrow") { look(frame, () => true); continue; }
  let clicked = false;
  look(frame, (d) => {
    if (!clicked) { clicked = true; delete d.body.dataset.drawn; d.getElementById("theme").click(); return false; }
    return true;
  });
}
"""


def test_the_plots_are_drawn_and_nothing_complains(browsed: Browsed) -> None:
    assert browsed.console == []
    assert browsed.frames.keys() == pages().keys()
    for name in ("wide", "narrow"):
        dom = browsed.frames[name]
        plots = dom.split('role="graphics-document"')[1:]
        assert len(plots) == int(told(dom, "drawn")) > 4
        marks = [part.count("<path ") for part in plots]
        assert all(n >= 2 for n in marks)
        assert marks[0] > 50  # the map


def test_a_narrow_page_scrolls_no_way_but_down(browsed: Browsed) -> None:
    # tables scroll inside their own box
    assert int(told(browsed.frames["narrow"], "wide")) <= 400
    assert int(told(browsed.frames["wide"], "wide")) <= 1600


def test_the_switch_turns_the_page_dark(browsed: Browsed) -> None:
    assert told(browsed.frames["narrow"], "theme") == "dark"
    assert 'aria-pressed="true"' in browsed.frames["narrow"]
    assert 'aria-pressed="false"' in browsed.frames["wide"]


@pytest.mark.parametrize(("name", "plots"), [("none", 0), ("fault", 0), ("zero", 1), ("top", 3), ("comparison", 1)])
def test_tiny_recordings_and_comparisons_have_a_page(name: str, plots: int, browsed: Browsed) -> None:
    assert told(browsed.frames[name], "drawn") == str(plots)


def test_names_of_a_recording_do_no_harm(browsed: Browsed) -> None:
    html = pages()["wild"][0]
    assert WILD not in html
    assert html.count(str(markup(WILD))) >= 4
    assert told(browsed.frames["wild"], "title") != "owned"
    assert told(browsed.frames["wild"], "drawn") == "3"


def told(dom: str, name: str) -> str:
    """The page's data-*name*."""
    found = re.search(rf'data-{name}="([^"]*)"', dom)
    assert found is not None, name
    return found[1]


def test_the_page_is_one_small_file_that_asks_for_nothing() -> None:
    html = page(summarise(str(EXAMPLE)))
    assert len(html) < 1_500_000
    own = html.partition('<script type="application/json"')[0]
    assert not re.search(r'(src|href)="(?!#)', own)
    assert "default-src 'none'" in own
    assert own.count("<caption>") == own.count("<table>")


def test_a_large_recording_gives_a_small_page() -> None:
    html = page(summarise(str(recording("arm64/vm2-linux_guest_thp_dirty/trace.dat"))))
    assert len(html) < 1_500_000
