"""What the site has beside the pages of this folder: one for each module, one for each file that a page names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from kvmfault.contract.target import Target, backend, backends
from kvmfault.emit.definitions import definitions

ROOT: Final = Path(__file__).resolve().parents[1]
LINK: Final = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)]*)?\)")
LARGE: Final = 100_000
"""Bytes of a file above which it is copied as it is, without a page that shows it."""
LANGUAGES: Final = {
    ".py": "python",
    ".toml": "toml",
    ".json": "json",
    ".yml": "yaml",
    ".out": "text",
    ".md": "markdown",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Modules join the navigation, each package a group; `extra: {reference: false}` leaves them out."""
    if not config.extra.get("reference", True):
        return config
    groups: dict[str, list[dict[str, str]]] = {}
    for name in modules():
        groups.setdefault(".".join(name.split(".")[:2]), []).append({name: f"reference/{name}.md"})
    assert config.nav is not None
    reference: list[object] = ["reference/index.md"]
    config.nav.append({"Reference": reference + [{group: pages} for group, pages in sorted(groups.items())]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages of modules, and of files of the repository that pages link to."""
    names = modules() if config.extra.get("reference", True) else []
    lines = "".join(f"- [`{name}`]({name}.md)\n" for name in names)
    files.append(
        File.generated(config, "reference/index.md", content=f"# Reference\n\nEvery public module.\n\n{lines}")
    )
    for name in names:
        files.append(File.generated(config, f"reference/{name}.md", content=f"::: {name}\n"))
    described = json.dumps(definitions(every_target()))
    files.append(File.generated(config, "decoder/definitions.js", content=f"window.KVMFAULT = {described};\n"))
    for path in sorted({path for page in files.documentation_pages() for path, _, _ in outside(page)}):
        files.append(_file(path, config))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their pages."""
    for path, whole, anchor in outside(page.file):
        there = os.path.relpath(_place(path), Path(page.file.src_uri).parent)
        markdown = markdown.replace(whole, f"]({there}{anchor})")
    return markdown


def every_target() -> Iterator[Target]:
    """Each backend with each of its formats and kernels, the usual ones first."""
    for name, source in backends().items():
        usual = backend(name)
        yield usual
        for fmt, kernel in product(source.formats, source.facts):
            if (other := backend(f"{name}:{fmt}@{kernel}")).name != usual.name:
                yield other


def modules() -> list[str]:
    """Importable names of the public modules, the package itself first."""
    found = []
    for path in sorted((ROOT / "kvmfault").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if "cli" not in parts and not any(part.startswith("_") for part in parts):
            found.append(".".join(parts))
    return found


def outside(page: File) -> Iterator[tuple[Path, str, str]]:
    """Files outside docs/ that *page* links to: where each is, the link as written, its anchor."""
    if page.generated_by is not None:
        return
    source = Path(page.abs_src_path or "")
    for link in LINK.finditer(source.read_text()):
        path = Path(os.path.normpath(source.parent / link[1]))
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs"):
            yield path.relative_to(ROOT), link[0], link[2] or ""


def _place(path: Path) -> str:
    if (ROOT / path).is_dir():
        return f"source/{path}.md"
    return f"source/{path}" if (ROOT / path).stat().st_size > LARGE else f"source/{path}.md"


def _file(path: Path, config: MkDocsConfig) -> File:
    whole = ROOT / path
    if whole.is_dir():
        listed = "\n".join(sorted(p.name + "/" * p.is_dir() for p in whole.iterdir() if p.name[0] not in "._"))
        return File.generated(config, _place(path), content=f"# {path}\n\n```text\n{listed}\n```\n")
    if whole.stat().st_size > LARGE:
        return File.generated(config, _place(path), abs_src_path=str(whole))
    language = LANGUAGES.get(path.suffix, "text")
    text = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n~~~~{language}\n{whole.read_text()}\n~~~~\n"
    return File.generated(config, _place(path), content=text)
