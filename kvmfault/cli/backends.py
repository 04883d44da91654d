"""``kvmfault backend list`` and ``backend check``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmfault.cli.render import columns, to_json
from kvmfault.contract.target import backends

if TYPE_CHECKING:
    from kvmfault.testing import Report, Result

__all__ = ["check", "render", "run"]


def run(*, json: bool) -> int:
    """Print every installed backend; the default of each part first (format) or last (kernel)."""
    rows = [(b.name, list(b.formats), list(b.kernels), b.about) for b in backends().values()]
    if json:
        print(to_json([{"name": n, "formats": f, "kernels": k, "about": a} for n, f, k, a in rows]))
        return 0
    if not rows:
        print("no backend is installed (entry-point group kvmfault.backends)")
        return 1
    print(columns([("backend", "formats", "kernels", ""), *((n, " ".join(f), " ".join(k), a) for n, f, k, a in rows)]))
    return 0


def check(spelled: str, *, json: bool) -> int:
    """Check a backend and print how it conforms; status 1 if it does not."""
    from kvmfault.cli.progress import progress
    from kvmfault.testing import CHECKS, check_backend, load_backend

    loaded = load_backend(spelled)
    with progress({"checks": len(CHECKS)}) as report_done:
        count = 0

        def done(result: Result) -> None:
            nonlocal count
            count += 1
            report_done("checks", count)

        report = check_backend(loaded, done)
    print(to_json(_as_data(report)) if json else render(report))
    return 0 if report.conforms else 1


def render(report: Report) -> str:
    """A line for each check, findings below it, and what is missing."""
    rows: list[tuple[str, ...]] = [("step", "check", "", "")]
    for result in report.results:
        about = f"waits for {result.waits_for}" if result.waits_for else result.check.about.partition(". ")[0]
        held = f"{result.state.name.lower()} {result.cases or ''}".rstrip()
        rows.append((str(result.check.step.value), result.check.name, held, about.rstrip(".")))
    parts = [f"{report.backend.name}: {report.backend.about}", columns(rows)]
    if report.findings:
        parts.append("\n".join(f"  {f.check}, {f.on}: {f.what}\n    recipe: {f.step}" for f in report.findings))
    if report.missing:
        missing = [
            ("step", "missing", ""),
            *((str(m.step.value), m.what, f"{'needed: ' if m.required else ''}{m.costs}") for m in report.missing),
        ]
        parts.append(columns(missing))
    if report.conforms:
        parts.append(f"conforms: {sum(r.cases for r in report.results)} cases")
    else:
        needed = [m.what for m in report.missing if m.required]
        count = len(report.findings)
        found = f"{count} finding{'s' * (count > 1)}" if count else ""
        parts.append(f"does not conform: {', '.join(filter(None, (found, *(f'no {what}' for what in needed))))}")
    return "\n\n".join(parts)


def _as_data(report: Report) -> dict[str, object]:
    return {
        "backend": report.backend.name,
        "conforms": report.conforms,
        "checks": [
            {
                "name": r.check.name,
                "step": r.check.step.value,
                "about": r.check.about,
                "state": r.state,
                "cases": r.cases,
                "waits_for": r.waits_for or None,
            }
            for r in report.results
        ],
        "findings": [{"check": f.check, "on": f.on, "what": f.what, "step": f.step.value} for f in report.findings],
        "missing": [
            {"what": m.what, "costs": m.costs, "step": m.step.value, "required": m.required} for m in report.missing
        ],
    }
