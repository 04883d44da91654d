"""`make demo`: what it needs, what it shows, and one line where the recordings are missing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

import pytest

from kvmfault.cli.demo import RECORDINGS, WIDTH, demo, main, shows
from kvmfault.contract.target import backend
from kvmfault.errors import UsageError
from tests.conftest import ROOT

SMALL: Final = 150 << 10
"""Bytes of the largest recording that the repository takes."""


def test_the_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "250")
    assert demo(RECORDINGS) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    shown = shows(RECORDINGS)
    assert [line.removeprefix("== ") for line in out.splitlines() if line.startswith("== ")] == [s.title for s in shown]
    for show in shown:
        for target in show.targets:
            assert backend(target).name in out
    assert re.findall(r"^unexplained +(\d+) ", out, re.MULTILINE) == ["0"] * len(shown)
    assert out.count("\noutcome  ") == 2 * len(shown)  # of the replay, and of the fault that is explained


def test_it_shows_two_architectures_each_on_both() -> None:
    shown = [[backend(t).backend.name.partition("-")[0] for t in s.targets] for s in shows(RECORDINGS)]
    assert len(shown) == 2
    assert shown[0] == shown[1][::-1]
    assert len({*shown[0]}) == 2


def test_a_narrow_terminal_is_kept_to(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "70")
    demo(RECORDINGS)
    lines = capsys.readouterr().out.splitlines()
    assert [x for x in lines if len(x) > 70 and not x.startswith(("$ ", "    --"))] == []


def test_a_contradiction_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(RECORDINGS, tmp_path / "r")
    manifest = tmp_path / "r" / "demo.toml"
    lines = [line for line in manifest.read_text().splitlines() if not line.startswith("slots")]
    nowhere = "[[slot]]\nid = 0\ngpa = 0\nsize = 0x1000\n"
    (tmp_path / "r" / "nowhere.toml").write_text(nowhere)
    manifest.write_text("\n".join(x + '\nslots = "nowhere.toml"' if x.startswith("file") else x for x in lines))
    assert demo(tmp_path / "r") == 1
    assert "the model has a device access, the recording shows none" in capsys.readouterr().out


def test_missing_recordings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="the demo needs the recordings of a checkout"):
        shows(tmp_path)
    monkeypatch.setattr("kvmfault.cli.demo.RECORDINGS", tmp_path)
    assert main() == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"kvmfault: the demo needs .*demo\.toml\n", shown.err)


def test_the_recordings_are_small_and_their_provenance_is_told() -> None:
    files = sorted(p for p in RECORDINGS.iterdir() if p.suffix == ".gz")
    listed = re.findall(r"^\| `([^`]+\.gz)`", (RECORDINGS / "PROVENANCE.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [p.name for p in files]
    assert [p.name for p in files if p.stat().st_size > SMALL] == []
