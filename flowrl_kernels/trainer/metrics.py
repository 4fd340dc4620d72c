"""What a run writes and shows: two JSONL files always, a progress bar, tables, TensorBoard, W&B.

Rank 0 alone writes and prints. Every line of the two files is one JSON object with a "step"; a resumed run
drops the lines past its checkpoint's step and goes on. A run that starts again because it had no checkpoint keeps
them, and writes a line of kind "restart" between: readers start behind the last one.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl_kernels.trainer.config import LogConfig

QUIET_SECONDS = 10.0  # between progress lines where there is no terminal to draw a bar on,
QUIET_LINES = 20  # and at least this share of the time so far: a long run's log stays short


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Ints and floats only; a value that is not finite becomes null and is named under "nonfinite"."""
    line: dict[str, Any] = {}
    bad = []
    for key, value in metrics.items():
        number = value if isinstance(value, (bool, int)) else float(value)
        line[key] = number if math.isfinite(number) else None
        if line[key] is None:
            bad.append(key)
    if bad:
        line["nonfinite"] = bad
    return line


SINKS = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


def sink(name: str) -> Any:
    """The module of "tensorboard" or "wandb". Raises ValueError where it is not installed."""
    import importlib

    module, extra = SINKS[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"log.{name} is on, but {extra!r} cannot be imported ({error}): pip install 'flowrl-kernels[{extra}]'"
        ) from error


def check_sinks(cfg: LogConfig) -> None:
    """Refuses a log that could not be written, before anything is. Raises ValueError naming the switch."""
    for name in SINKS:
        if getattr(cfg, name):
            sink(name)
    if cfg.plots:
        from flowrl_kernels.trainer.plot import canvas

        canvas()


def read_lines(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl since its last restart, of one kind if given; torn lines are left out."""
    lines: list[dict[str, Any]] = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not isinstance(line, dict):
            continue
        if line.get("kind") == "restart":
            lines = []
        lines.append(line)
    return [line for line in lines if kind is None or line.get("kind") == kind]


def _open(path: Path) -> Any:
    """A log to append to, on a line of its own; line buffered: a kill loses at most the line being written."""
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", buffering=1, encoding="utf-8")
    if torn:
        file.write("\n")
    return file


class Log:
    """The run's only way to write or print.

    run_dir: the run folder. main: False makes every call a no-op (all ranks but 0). total: RL steps of the
    run; start: the step it resumes from; restart: it starts again behind a log that stays. config: the resolved
    configuration, shown to W&B. Raises ValueError where TensorBoard or W&B is asked for and not installed,
    OSError where the folder cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        cfg: LogConfig,
        *,
        main: bool = True,
        total: int = 0,
        start: int = 0,
        restart: bool = False,
        config: Mapping[str, Any] | None = None,
    ):
        self.main, self.cfg, self.total = main, cfg, total
        self._bar: Any = None
        self._board: Any = None
        self._wandb: Any = None
        self._label = ""
        self._begun = time.monotonic()
        self._quiet_until = 0.0
        if not main:
            return
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = _open(folder / "metrics.jsonl")
        self._samples = _open(folder / "samples.jsonl")
        if restart:
            self._metrics.write(json.dumps({"step": 0, "kind": "restart"}) + "\n")
        if cfg.tensorboard:
            self._board = self._open_board(folder)
        if cfg.wandb:
            self._wandb = sink("wandb").init(
                project=cfg.wandb_project, name=folder.name, dir=str(folder), config=dict(config or {}),
                id=_wandb_id(folder), resume="allow",
            )  # fmt: skip
        self._terminal = cfg.progress and sys.stderr.isatty()
        self._start = start

    def _open_board(self, folder: Path) -> Any:
        """TensorBoard's writer; the events of a resumed run are written anew from the log, each step once."""
        for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()
        board = self._board = sink("tensorboard").SummaryWriter(str(folder / "tensorboard"))
        for line in read_lines(folder / "metrics.jsonl"):
            prefix = {"train": "train", "eval": line.get("split")}.get(str(line.get("kind")))
            if prefix:
                figures = {k: v for k, v in line.items() if k not in ("step", "kind", "split", "nonfinite")}
                self._publish(line["step"], prefix, {k: math.nan if v is None else v for k, v in figures.items()})
        return board

    def _write(self, step: int, kind: str, metrics: Mapping[str, Any], **labels: Any) -> None:
        line = {"step": step, "kind": kind, **labels, **plain(metrics)}
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")

    def _publish(self, step: int, prefix: str, metrics: Mapping[str, Any]) -> None:
        if self._board is not None:
            for key, value in metrics.items():
                self._board.add_scalar(f"{prefix}/{key}", float(value), step)
        if self._wandb is not None:
            self._wandb.log({f"{prefix}/{key}": float(value) for key, value in metrics.items()}, step=max(0, step))

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def _progress(self, label: str, step: int, total: int, shown: str, *, leave: bool = True) -> None:
        """A bar on a terminal, one line for as long as `label` stays; elsewhere a line every so often."""
        if not self.cfg.progress:
            return
        if self._terminal:
            from tqdm import tqdm

            if self._bar is None or self._label != label:
                self._close_bar()
                # from here on: the steps before, of a run that was resumed say, do not count in the rate
                unit = "step" if leave else "problem"
                self._bar = tqdm(total=total, desc=label, initial=step, unit=unit, leave=leave, **_width())
                self._label = label
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            if step >= total:
                self._bar.refresh()
        elif step == total or time.monotonic() >= self._quiet_until:
            now = time.monotonic()
            self._quiet_until = now + max(QUIET_SECONDS, (now - self._begun) / QUIET_LINES)
            self._say(f"{label} {step}/{total}  {shown}")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def evaluating(self, split: str, done: int, total: int) -> None:
        """`done` of `total` problems of an evaluation are answered; beside the bar of training, or in its own."""
        if not self.main or not self.cfg.progress:
            return
        label = f"evaluation ({split})"
        if self._terminal and self._bar is not None and self._label == "train":
            shown = f"{label} {done}/{total}" if done < total else ""
            self._bar.set_postfix_str(shown, refresh=True)
        elif self._terminal or done < total:
            self._progress(label, done, total, "", leave=False)
            if done >= total:
                self._close_bar()

    def warm(self, step: int, total: int, loss: float) -> None:
        """A supervised step, 1..total, and its loss in nats per token; written with step <= 0."""
        if not self.main:
            return
        self._write(step - total, "warm", {"loss": loss})
        self._progress("warm start", step, total, f"loss {loss:.3f}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one RL step."""
        if not self.main:
            return
        self._write(step, "train", metrics)
        self._publish(step, "train", metrics)
        shown = [
            f"{name} {metrics[key]:{form}}"
            for key, name, form in (
                ("reward", "reward", ".3f"),
                ("entropy", "entropy", ".2f"),
                ("tokens_per_s", "tokens/s", ",.0f"),
            )
            if key in metrics and math.isfinite(metrics[key])
        ]
        self._progress("train", step, self.total, "  ".join(shown))

    def evaluation(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """The figures of an evaluation after `step` RL steps."""
        if not self.main:
            return
        self._write(step, "eval", metrics, split=split)
        self._publish(step, split, metrics)
        shown = ("accuracy", "exact_accuracy", "distinct", "exact_modes_share", "exact_kl")
        last_pass = [key for key in metrics if key.startswith("pass@")][-1:]
        text = "  ".join(f"{key} {metrics[key]:.3f}" for key in (*shown[:2], *last_pass, *shown[2:]) if key in metrics)
        self._say(f"step {step}  {split}: {text}")

    def final(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures the run is judged by."""
        if self.main:
            self._write(step, "final", metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Responses to read: rows of prompt, response, reward (None: unscorable), to samples.jsonl."""
        if not self.main:
            return
        for row in rows:
            self._samples.write(json.dumps({"step": step, **row}, ensure_ascii=False, default=str) + "\n")

    def note(self, text: str, step: int = 0) -> None:
        """An event by name, on the console and in metrics.jsonl."""
        if not self.main:
            return
        self._metrics.write(json.dumps({"step": step, "kind": "note", "text": text}) + "\n")
        self._say(text)

    def table(self, title: str, rows: Mapping[str, float] | Sequence[Mapping[str, Any]]) -> None:
        """Print a table: two columns from a mapping, else one row per mapping with its keys as columns."""
        if self.main:
            self._close_bar()
            print_table(title, rows)

    def close(self) -> None:
        """Close every file and sink; the log takes no more calls."""
        if not self.main:
            return
        self._close_bar()
        self._metrics.close()
        self._samples.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _width() -> dict[str, Any]:
    """tqdm's options for the terminal's width: it follows it, and 80 columns where the terminal says it has none."""
    try:
        wide = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        wide = 0
    return {"dynamic_ncols": True} if wide else {"ncols": 80}


def _wandb_id(folder: Path) -> str:
    """The run's own W&B id, the same after every resume."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return "–" if value is None else str(value)


def print_table(title: str, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print a rich table to stdout; a missing or NaN cell is a dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    if isinstance(rows, Mapping):
        table.add_column("figure")
        table.add_column("value", justify="right")
        for key, value in rows.items():
            table.add_row(key, _cell(value))
    else:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
    console = Console()
    if not console.is_terminal:  # a pipe or a log file has no width to wrap to
        console = Console(width=160)
    console.print(table)
