"""temporary"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import polars as pl

from kvmfault.algebra.columns import pred_column, word_column
from kvmfault.contract.accessors import stand_in
from kvmfault.contract.target import backend
from kvmfault.contract.tracepoints import Role
from kvmfault.summary.meaning import registers


class Faults:
    def __init__(self, backends):
        self.backends = backends
        self.carry = {}
        self.unclaimed = 0

    def of(self, frames):
        out = []
        names = {n for b in self.backends.values() for n, p in b.tracepoints.items() if p.role is Role.FAULT}
        ex = frames.get("kvm_exit")
        for n in names:
            fr = frames.get(n)
            if fr is None:
                continue
            done = np.zeros(fr.height, bool)
            idx = None
            if ex is not None:
                j = fr.select("place", "pid").join_asof(
                    ex.select("place", "pid", pl.int_range(pl.len()).alias("ix")),
                    on="place",
                    by="pid",
                    check_sortedness=False,
                )
                idx = j["ix"].to_numpy()
            for b in self.backends.values():
                p = b.tracepoints.get(n)
                if p is None or p.role is not Role.FAULT:
                    continue
                ok = ~done
                if p.when is not None:
                    if idx is None:
                        continue
                    if not set(p.when.reads) <= set(ex.columns):
                        continue
                    w = pred_column(p.when, registers(ex, p.when.reads))
                    has = ~np.isnan(idx.astype(float))
                    ok &= has
                    ii = np.where(has, idx, 0).astype(int)
                    ok &= w[ii]
                if not ok.any():
                    continue
                done |= ok
                sub = fr.filter(pl.Series(ok))
                reads = {r for w in p.registers.values() for r in w.reads}
                have = registers(sub, reads)
                regs = {
                    k: word_column(w, have) if w.reads else np.full(sub.height, w.const, np.uint64)
                    for k, w in p.registers.items()
                }
                t = backend(b.name)
                for r in b.registers:
                    regs.setdefault(r.name, np.full(sub.height, b.defaults.get(r.name, 0), np.uint64))
                syn = b.registers[-1]
                for reg, field in b.given.items():
                    if reg in p.registers:
                        regs[syn.name] = regs[syn.name] | np.uint64(syn[field].mask)
                d = t.definition if hasattr(t, "definition") else t.facts
                cols = {}
                for f in fields(d):
                    m = getattr(d, f.name)
                    if f.name in ("gpa_page", "granule_bytes"):
                        cols[f.name] = word_column(m, regs)
                    elif f.name in ("gpa_valid", "granule_valid") or f.name.startswith("is_"):
                        cols[f.name] = pred_column(stand_in(m), regs)
                tried = [("read", cols["is_read"]), ("write", cols["is_write"]), ("fetch", cols["is_exec"])]
                code = sum((c.astype(np.uint16) << i) for i, (_, c) in enumerate(tried))
                code |= cols["is_table_walk"].astype(np.uint16) << 3
                cause = np.full(sub.height, 0, np.uint16)
                names_ = ["other", "missing", "permission", "access flag", "reserved", "address size", "external"]
                for i, k in enumerate(
                    (
                        "is_translation",
                        "is_permission",
                        "is_access_flag",
                        "is_reserved",
                        "is_address_size",
                        "is_external_abort",
                    ),
                    1,
                ):
                    cause[cols[k]] = i
                code |= cause << 4
                u = {
                    int(c): ("+".join(w for i, (w, _) in enumerate(tried) if c >> i & 1) or "access")
                    + (" on walk" if c >> 3 & 1 else "")
                    + ", "
                    + names_[c >> 4]
                    for c in np.unique(code)
                }
                out.append(
                    sub.select(
                        "place",
                        "time",
                        "cpu",
                        "pid",
                        (pl.col("vcpu_id") if "vcpu_id" in sub.columns else pl.col("pid"))
                        .cast(pl.String)
                        .alias("vcpu"),
                        target=pl.lit(b.name),
                    ).with_columns(
                        pl.Series("kind", code).replace_strict(u, return_dtype=pl.String),
                        *(pl.Series(k, v) for k, v in cols.items()),
                    )
                )
            self.unclaimed += int((~done).sum())
        return pl.concat(out).sort("place") if out else None
