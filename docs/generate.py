"""The parts of these pages that repeat declarations are written from them: ``python -m docs.generate``.

A page marks such a part with a line ``<!-- generated: NAME -->`` and one ``<!-- end -->``; between them stands what
``BLOCKS[NAME]`` gives. With ``--check`` nothing is written, and status 1 names the pages that are not current.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from docs import api, declared, interleavings, kernel_map, scenario_reference, shapes_measured
from kvmfault.cli.run import schema_text

DOCS: Final = Path(__file__).parent
PARTS: Final = (declared, api, kernel_map, scenario_reference, interleavings, shapes_measured)
BLOCKS: Final = {name: write for part in PARTS for name, write in part.BLOCKS.items()}
BLOCK: Final = re.compile(r"(?<=^<!-- generated: )(\w+)( -->\n)(.*?)(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)
HOW: Final = "run: python -m docs.generate"


def current(page: str) -> str:
    """The page with its generated parts as they should be. KeyError for a part that nothing writes."""
    return BLOCK.sub(lambda found: f"{found[1]}{found[2]}{BLOCKS[found[1]]()}\n", page)


def pages() -> list[Path]:
    """Every page with a generated part."""
    return [path for path in sorted(DOCS.glob("*.md")) if BLOCK.search(path.read_text(encoding="utf-8"))]


def wanted() -> dict[Path, str]:
    """Every generated file as it should be: pages with generated parts, and the schema of scenario files."""
    files = {path: current(path.read_text(encoding="utf-8")) for path in pages()}
    return files | {DOCS / "scenario.schema.json": schema_text()}


def main(check: bool) -> int:
    """Write the files, or with *check* say which are not current."""
    files = wanted()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not check:
            path.write_text(files[path], encoding="utf-8")
        sys.stdout.write(f"docs/{path.name}: {'not current, ' + HOW if check else 'written'}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
