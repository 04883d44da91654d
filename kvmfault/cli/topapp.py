"""The application of ``kvmfault trace top``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import ClassVar, Final

from rich.text import Text
from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Static

from kvmfault.cli.top import TITLES, by_rate, number, place, shown_sorts, sparkline
from kvmfault.contract.tracepoints import Sort
from kvmfault.errors import KvmfaultError
from kvmfault.live.stopping import Stop
from kvmfault.live.watch import HISTORY, Count, Process, Shot

__all__ = ["Grid", "Help", "Top"]

_LEAST_TREND: Final = 8
_WIDE: Final = 140
"""Columns of a terminal where the lower tables stand side by side."""
_HELP: Final = """\
[b]Processes[/b] with a VM, or whose work reached one; the two tables below are about the one that is marked.

[b]faults[/b]    guest faults, by an event of their own
[b]handled[/b]   faults that came as far as asking for an entry: what counts where faults have no event
[b]entries[/b]   entries of the second-stage table that were set or changed
[b]MMIO[/b]      accesses to devices
[b]invalid.[/b]  what the host did to a range of the process's memory: unmapped, aged
[b]exits[/b]     the guest stopped
[b]to user[/b]   KVM_RUN returned
[b]walks[/b]     KVM walked the guest's own tables

The trend shows faults per second, each process to its own scale.

[b]up down[/b]  which process       [b]s[/b]  sort by the next column
[b]space[/b]    pause and go on     [b]t[/b]  per second, or totals since the start
[b]tab[/b]      next table          [b]q[/b]  quit

Any key closes this."""


class Grid(DataTable[Text]):
    """A table that is filled anew each time, and keeps its place."""

    def fill(
        self,
        heads: list[str],
        rows: list[list[str]],
        *,
        left: int,
        keep: Collection[int],
        trends: Sequence[Sequence[float]] | None = None,
        keys: list[str] | None = None,
    ) -> None:
        """All but the first *left* columns to the right. What has no room is left out, from the end, but for *keep*;
        what is left of the room shows the *trends*.
        """
        at, cursor = self.scroll_offset, self.cursor_row
        self.clear(columns=True)
        widths = {i: max([len(head), *(len(row[i]) for row in rows)]) for i, head in enumerate(heads)}
        room = self.size.width - 2
        for i in reversed(range(len(heads))):
            if i not in keep and sum(size + 2 for size in widths.values()) > room:
                del widths[i]
        for i, size in widths.items():
            self.add_column(Text(heads[i], justify="left" if i < left else "right"), width=size)
        trend = min(room - sum(size + 2 for size in widths.values()) - 2, HISTORY)
        if trends is not None and trend >= _LEAST_TREND:
            self.add_column(Text("trend", justify="right"), width=trend)
        for n, row in enumerate(rows):
            cells = [Text(row[i], justify="left" if i < left else "right") for i in widths]
            if trends is not None and trend >= _LEAST_TREND:
                cells.append(Text(sparkline(trends[n], trend)))
            self.add_row(*cells, key=keys[n] if keys else None)
        if rows:
            self.move_cursor(row=min(cursor, len(rows) - 1), scroll=False)
        self.scroll_to(y=at.y, animate=False)


class Help(ModalScreen[None]):
    """What the columns and keys mean."""

    def compose(self) -> ComposeResult:
        """Its one box."""
        yield Static(_HELP, id="help")

    def on_key(self) -> None:
        """Any key closes it."""
        self.dismiss()


class Top(App[None]):
    """Shows intervals as they come. *stop* is asked when the user quits, and ends the application when others ask."""

    CSS: ClassVar[str] = """
    #head { height: 1; background: $primary-background; padding: 0 1; }
    #processes { height: auto; max-height: 40%; min-height: 4; }
    #parts { layout: vertical; height: 1fr; }
    #kinds, #ranges { height: 1fr; border-top: solid $primary; border-title-color: $text; }
    .-wide #parts { layout: horizontal; }
    .-wide #kinds { width: 3fr; }
    .-wide #ranges { width: 2fr; }
    Help { align: center middle; }
    #help { width: 84; max-width: 100%; height: auto; max-height: 100%; padding: 1 2; background: $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", "Quit"),
        Binding("space,p", "pause", "Pause"),
        Binding("s", "sort", "Sort"),
        Binding("t", "totals", "Rates/totals"),
        Binding("question_mark,h", "help", "Help"),
    ]
    ENABLE_COMMAND_PALETTE: ClassVar[bool] = False

    def __init__(self, shots: Iterator[Shot], title: str, stop: Stop) -> None:
        super().__init__()
        self.HORIZONTAL_BREAKPOINTS: list[tuple[int, str]] | None = [(0, "-narrow"), (_WIDE, "-wide")]
        self._shots, self._title, self._stop = shots, title, stop
        self._shot: Shot | None = None
        self._paused = False
        self._totals = False
        self._sort_at = 0
        self._chosen: Process = None
        self._status = Static(id="head", markup=False)
        self._processes = Grid(id="processes", cursor_type="row", zebra_stripes=True)
        self._kinds = Grid(id="kinds", cursor_type="none")
        self._ranges = Grid(id="ranges", cursor_type="none")
        self.error: KvmfaultError | None = None
        """What ended it, if it was that."""

    class Arrived(Message):
        """There is another interval; None: there will be no more."""

        def __init__(self, shot: Shot | None) -> None:
            super().__init__()
            self.shot = shot

    def compose(self) -> ComposeResult:
        """See App."""
        yield self._status
        yield self._processes
        with Container(id="parts"):
            yield self._kinds
            yield self._ranges
        yield Footer()

    def on_mount(self) -> None:
        """Begin to read."""
        self._head("waiting for the first interval")
        self.run_worker(self._read, thread=True)

    def _read(self) -> None:
        # in a thread of its own: the kernel's buffers do not wait for a screen
        try:
            for shot in self._shots:
                self.post_message(self.Arrived(shot))
        except KvmfaultError as e:
            self.error = e
        self.post_message(self.Arrived(None))

    def on_top_arrived(self, message: Arrived) -> None:
        """Show it, unless paused."""
        if message.shot is None:
            self.exit()
        elif not self._paused:
            self._shot = message.shot
            self._draw()

    async def action_quit(self) -> None:
        """End it."""
        self._stop.asked = True
        self.exit()

    def action_pause(self) -> None:
        """Keep what is shown; counting goes on."""
        self._paused = not self._paused
        self._draw()

    def action_sort(self) -> None:
        """Sort by the next column."""
        self._sort_at += 1
        self._draw()

    def action_totals(self) -> None:
        """Rates or totals."""
        self._totals = not self._totals
        self._draw()

    def action_help(self) -> None:
        """What all this means."""
        self.push_screen(Help())

    def on_resize(self) -> None:
        """Draw it anew, once everything has its new size."""
        self.call_after_refresh(self._draw)

    @on(DataTable.RowHighlighted, "#processes")
    def _chose(self, event: DataTable.RowHighlighted) -> None:
        process = _process(event.row_key.value)
        if process != self._chosen:
            self._chosen = process
            self._draw_parts()

    def _head(self, text: str) -> None:
        self._status.update(f"{text}; {self._title}")

    def _draw(self) -> None:
        shot = self._shot
        if shot is None:
            return
        lost = f"{shot.lost_total:,} events lost" if shot.lost_total else "no event lost"
        idle = "" if shot.seen[0].counts else "; nothing has happened: is a VM running?"
        self._head(f"{'PAUSED, ' if self._paused else ''}{'totals' if self._totals else 'per second'}; {lost}{idle}")
        self._draw_processes(shot)
        self._draw_parts()

    def _draw_processes(self, shot: Shot) -> None:
        sorts = shown_sorts(shot)
        by = self._sort_at % len(sorts)
        rest = sorted(shot.seen[1:], key=lambda seen: self._order(seen.counts, sorts[by]))
        shown = [shot.seen[0], *rest]
        rows = [
            [str(s.process or ""), s.name, *(self._value(s.counts, sort) for sort in sorts), str(s.threads)]
            for s in shown
        ]
        keys = [str(s.process) for s in shown]
        with self.prevent(DataTable.RowHighlighted):
            self._processes.fill(
                ["process", "", *(TITLES[s] + (" ▼" if n == by else "") for n, s in enumerate(sorts)), "threads"],
                rows,
                left=2,
                trends=[s.counts[shot.faults].rates if shot.faults in s.counts else () for s in shown],
                keep=(0, 1, 2, by + 2),
                keys=keys,
            )
            chosen = str(self._chosen)
            self._processes.move_cursor(row=keys.index(chosen) if chosen in keys else 0)

    def _draw_parts(self) -> None:
        shot = self._shot
        if shot is None:
            return
        seen = next((s for s in shot.seen if s.process == self._chosen), shot.seen[0])
        whose = "all processes" if seen.process is None else f"{seen.name} {seen.process}"
        self._kinds.border_title = Text(f"kinds: {whose}")
        self._ranges.border_title = Text(f"guest addresses: {whose}")
        found = by_rate(seen)
        rows = [[TITLES[k.sort], str(k), number(c.rate), number(c.total)] for k, c in found]
        trends = [c.rates for _, c in found]
        self._kinds.fill(["what", "kind", "per s", "total"], rows, left=2, trends=trends, keep=(0, 1, 2))
        where = [s for s in shown_sorts(shot) if any(s in r.counts for r in seen.ranges)] or [shot.faults]
        rows = [[place(r), *(self._value(r.counts, s) for s in where)] for r in seen.ranges]
        self._ranges.fill(["from", *(TITLES[s] for s in where)], rows, left=1, keep=(0, 1))

    def _value(self, counts: Mapping[Sort, Count], sort: Sort) -> str:
        if sort not in counts:
            return "0"
        return number(counts[sort].total if self._totals else counts[sort].rate)

    def _order(self, counts: Mapping[Sort, Count], by: Sort) -> tuple[float, int]:
        count = counts.get(by)
        return (-count.total if self._totals else -count.rate, -count.total) if count else (0, 0)


def _process(key: str | None) -> Process:
    return None if key in (None, "None") else int(key)
