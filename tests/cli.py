"""The command line in this process: what it prints and how it ends."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from kvmfault.cli.main import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401  whatever the command prints
        """Its output as JSON."""
        return json.loads(self.out)

    def refused(self, *says: str) -> None:
        """Status 2, nothing printed but one line that says all of this."""
        assert self.status == 2, self
        assert self.err.startswith("kvmfault: "), self
        assert self.err.count("\n") == 1, self
        assert self.err.endswith("\n")
        assert len(self.err) < 2100
        for text in says:
            assert text in self.err, self
        assert not self.out


class Cli:
    """Runs commands."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._patch = patch

    def __call__(self, *words: str, stdin: bytes | str = b"") -> Done:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, out, err)
