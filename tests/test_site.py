"""The site builds without a network or a warning, and its decoder says what the library says."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Final, NamedTuple, TypeAlias

import pytest

from docs.site import every_target
from kvmfault.contract.target import Target
from kvmfault.decode import FactText, describe_fault
from tests.conftest import ROOT

Told: TypeAlias = dict[str, tuple[bool, bool | str | None, str]]

BROWSER: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CASES: Final = 40
"""Random faults for each target."""


def build(folder: Path, config: Path) -> Path:
    """What `make site` runs, without a network; every warning is an error."""
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(config), "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_the_site(tmp_path: Path) -> None:
    """No page fetches from elsewhere; an id is of one element."""
    pages = list(build(tmp_path, ROOT / "mkdocs.yml").rglob("*.html"))
    assert len(pages) > 100
    for page in pages:
        text = page.read_text()
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?(https?:[^\"\s>]+)", text)
        assert not [f for f in fetched if not re.search(r"rel=\"?canonical", text)], page
        ids = Counter(re.findall(r"<\w+\b[^>]*?\sid=\"?([^\"\s>]+)", text))
        assert [name for name, count in ids.items() if count > 1] == [], page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder's page alone: building all takes long, and each process that runs tests here needs its own."""
    folder = tmp_path_factory.mktemp("site")
    alone = {
        "INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": str(ROOT / "docs"), "hooks": [str(ROOT / "docs" / "site.py")],
        "nav": ["decoder.md"], "exclude_docs": "*.py\n*.md\n*.json\n!decoder.md\n", "extra": {"reference": False},
    }  # fmt: skip
    config = folder / "mkdocs.yml"
    config.write_text(json.dumps(alone))
    return build(folder / "pages", config)


class Case(NamedTuple):
    """Registers of a fault on a target."""

    target: Target
    registers: Mapping[str, int]


def cases() -> Iterator[Case]:
    """Values of every kind: any bits, and those near what hardware reports; of each register or of some."""
    chance = random.Random(20250821)
    for target in every_target():
        registers = target.backend.registers[:-1]
        for _ in range(CASES):
            some = [r for r in registers if r.name == target.backend.code or chance.random() < 0.7]
            values = {r.name: chance.getrandbits(r.width) for r in some}
            for register in some:
                for field in register:
                    if field.meanings and chance.random() < 0.7:
                        value = chance.choice(list(field.meanings))
                        values[register.name] = values[register.name] & ~field.mask | value << field.lo
            yield Case(target, values)


CHECK: Final = """<!doctype html><meta charset="utf-8"><pre id="out"></pre>
<script src="decoder/definitions.js"></script><script src="decoder/decoder.js"></script><script>
const cases = %s;
document.getElementById("out").textContent = JSON.stringify(cases.map(([name, given]) => {
  const target = KVMFAULT.targets.find((t) => t.name === name);
  const values = Object.fromEntries(Object.entries(given).map(([register, value]) => [register, BigInt(value)]));
  const { facts, accessors, possible } = kvmfault.decode(KVMFAULT, target, values);
  return { facts, accessors, possible };
}));
</script>"""


def told(facts: tuple[FactText, ...]) -> Told:
    """What the library says, as the page does."""

    def word(answer: bool | int | None) -> bool | str | None:
        return answer if answer is None or isinstance(answer, bool) else hex(answer)

    return {f.name: (f.known, word(f.answer), f.why) for f in facts}


def test_the_decoder_says_what_the_library_says(site: Path) -> None:
    every = list(cases())
    asked = [(c.target.name, {name: hex(value) for name, value in c.registers.items()}) for c in every]
    page = site / "check.html"
    page.write_text(CHECK % json.dumps(asked))
    dom = browsed(site, page.name)
    answers = json.loads(unescape(dom.partition('id="out">')[2].partition("</pre>")[0]))
    assert len(answers) == len(every)
    for case, answer in zip(every, answers, strict=True):
        wanted = describe_fault(case.target, case.registers)
        for kind, facts in (("facts", wanted.facts), ("accessors", wanted.accessors)):
            got = {name: (f["known"], f["answer"], f["why"]) for name, f in answer[kind].items()}
            assert got == told(facts), case
        named = case.target.named(case.target.decode(**case.registers))
        assert answer["possible"] == case.target.backend.reachable.on(named), case


def test_the_page_shows_a_fault_that_its_address_names(site: Path) -> None:
    dom = browsed(site, "decoder.html#target=arm64%3A4k%407.4&ESR_EL2=0x9200008f&HPFAR_EL2=0x400120")
    assert dom.count("<table>") >= 4
    assert "0x40012000" in dom
    assert "S1PTW (bit 7) = 1" in dom
    heading = dom.partition("<h1")[2].partition("</h1>")[0]
    assert "<select" not in heading
    assert "<select" in dom.partition('<div id="fault-decoder">')[2]


def browsed(site: Path, page: str) -> str:
    """The document after its scripts ran; nothing complains."""
    if BROWSER is None:
        pytest.skip("chromium is not installed")
    with served(site) as address:
        command = [
            BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
            "--disable-background-networking", f"--user-data-dir={site / 'profile'}",
            "--virtual-time-budget=20000", f"{address}/{page}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


class Quiet(SimpleHTTPRequestHandler):
    """Says nothing about what is asked."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """Address of the site: searching does not work on pages that are read from disk."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
