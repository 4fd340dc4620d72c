"""The terminal and its one owner: a bar that keeps its line, what is said above it, and tables."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

QUIET_SECONDS = 10.0  # between progress lines where there is no terminal to draw a bar on,
QUIET_LINES = 20  # and at least this share of the time so far: a long run's log stays short

Cell = float | str | None


class Terminal:
    """What a process prints. progress: False shows no bars and no progress lines."""

    def __init__(self, progress: bool = True):
        self.progress = progress
        self.bar: tqdm | None = None
        self._label = ""
        self._begun = time.monotonic()
        self._quiet_until = 0.0
        self._evaluation = ""
        self._evaluation_quiet_until = 0.0

    def say(self, text: str) -> None:
        """A line on stdout, above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def advance(self, label: str, step: int, total: int, shown: str = "", *, leave: bool = True) -> None:
        """A bar on a terminal, one line for as long as `label` stays; elsewhere a line every so often."""
        if not self.progress:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            if self.bar is None or self._label != label:
                self.close()
                # from here on: the steps before, of a run that was resumed say, do not count in the rate
                unit = "step" if leave else "problem"
                self.bar = tqdm(total=total, desc=label, initial=step, unit=unit, leave=leave, **_width())
                self._label = label
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(step - self.bar.n)
            if step >= total:
                self.bar.refresh()
        elif step == total or time.monotonic() >= self._quiet_until:
            now = time.monotonic()
            self._quiet_until = now + max(QUIET_SECONDS, (now - self._begun) / QUIET_LINES)
            self.say(f"{label} {step}/{total}  {shown}")

    def evaluating(self, split: str, done: int, total: int) -> None:
        """`done` of `total` problems are answered: on the bar of training where there is one, else on its own, which
        goes away; without a terminal a line on stderr every ten seconds.
        """
        if not self.progress:
            return
        label = f"evaluation ({split})"
        if not sys.stderr.isatty():
            now = time.monotonic()
            if self._evaluation != label:
                self._evaluation, self._evaluation_quiet_until = label, now + QUIET_SECONDS
            elif now >= self._evaluation_quiet_until:
                self._evaluation_quiet_until = now + QUIET_SECONDS
                print(f"{label}: {done}/{total} problems", file=sys.stderr, flush=True)
            if done >= total:
                self._evaluation = ""
        elif self.bar is not None and self._label == "train":
            self.bar.set_postfix_str(f"{label} {done}/{total}" if done < total else "", refresh=True)
        else:
            self.advance(label, done, total, leave=False)
            if done >= total:
                self.close()

    def table(self, title: str, rows: Mapping[str, Cell] | Sequence[Mapping[str, Cell]]) -> None:
        """Two columns from a mapping, else one row per mapping with its keys as columns; missing and NaN are a dash."""
        from rich.console import Console
        from rich.table import Table

        self.close()
        if isinstance(rows, Mapping):
            rows = [{"figure": key, "value": value} for key, value in rows.items()]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        console = Console()
        if not console.is_terminal:  # a pipe or a log file has no width to wrap to
            console = Console(width=160)
        console.print(table)

    def close(self) -> None:
        """Leaves the bar's line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _width() -> dict[str, int | bool]:
    """tqdm's options for the terminal's width: it follows it, and 80 columns where the terminal says it has none."""
    try:
        wide = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        wide = 0
    return {"dynamic_ncols": True} if wide else {"ncols": 80}


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return "–" if value is None else str(value)
