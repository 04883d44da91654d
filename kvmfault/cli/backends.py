"""``kvmfault backend list``."""

from __future__ import annotations

from kvmfault.cli.render import columns, to_json
from kvmfault.contract.target import backends


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
