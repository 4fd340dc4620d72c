"""What a run writes: two JSONL files always, TensorBoard and W&B where asked for; what it shows goes to a `Terminal`.

Rank 0 alone writes and prints. Every line of the two files is one JSON object with a "step"; a resumed run
drops the lines past its checkpoint's step and goes on. A run that starts again because it had no checkpoint keeps
them, and writes a line of kind "restart" between: readers start behind the last one.
"""

from __future__ import annotations

import html
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from flowrl_kernels.trainer import packages
from flowrl_kernels.trainer.config import LogConfig
from flowrl_kernels.trainer.terminal import Cell, Terminal


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


def _open(path: Path) -> TextIO:
    """A log to append to, on a line of its own; line buffered: a kill loses at most the line being written."""
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    file = path.open("a", buffering=1, encoding="utf-8")
    if torn:
        file.write("\n")
    return file


class Log:
    """The run's only way to write or print.

    run_dir: the run folder. main: False makes every call a no-op (all ranks but 0). total: RL steps of the run.
    restart: it starts again behind a log that stays. config: the resolved configuration, shown to W&B.

    Raises:
        ValueError: TensorBoard or W&B is asked for and not installed.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        cfg: LogConfig,
        *,
        main: bool = True,
        total: int = 0,
        restart: bool = False,
        config: Mapping[str, Any] | None = None,
    ):
        self.main, self.cfg, self.total = main, cfg, total
        self.terminal = Terminal(cfg.progress)
        self._board: Any = None
        self._wandb: Any = None
        if not main:
            return
        self.folder = folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = _open(folder / "metrics.jsonl")
        self._samples = _open(folder / "samples.jsonl")
        if restart:
            self._metrics.write(json.dumps({"step": 0, "kind": "restart"}) + "\n")
        if cfg.tensorboard:
            self._board = self._open_board(folder)
        if cfg.wandb:
            self._wandb = packages.require("log.wandb").init(
                name=folder.name, dir=str(folder), config=dict(config or {}),
                id=_wandb_id(folder), resume="allow",
            )  # fmt: skip

    def _open_board(self, folder: Path) -> Any:
        """TensorBoard's writer; the events of a resumed run are written anew from the log, each step once."""
        for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()
        board = self._board = packages.require("log.tensorboard").SummaryWriter(str(folder / "tensorboard"))
        for line in read_lines(folder / "metrics.jsonl"):
            prefix = {"train": "train", "eval": line.get("split")}.get(str(line.get("kind")))
            if prefix:
                figures = {k: v for k, v in line.items() if k not in ("step", "kind", "split", "nonfinite")}
                self._publish(line["step"], prefix, {k: math.nan if v is None else v for k, v in figures.items()})
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in read_lines(folder / "samples.jsonl"):
            by_step.setdefault(row.pop("step"), []).append(row)
        for step, rows in by_step.items():
            self._publish_samples(step, rows)
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

    def evaluating(self, split: str, done: int, total: int) -> None:
        """`done` of `total` problems of an evaluation are answered."""
        if self.main:
            self.terminal.evaluating(split, done, total)

    def warm(self, step: int, total: int, loss: float) -> None:
        """A supervised step, 1..total, and its loss in nats per token; written with step <= 0."""
        if not self.main:
            return
        self._write(step - total, "warm", {"loss": loss})
        self.terminal.advance("warm start", step, total, f"loss {loss:.3f}")

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
        self.terminal.advance("train", step, self.total, "  ".join(shown))

    def evaluation(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """The figures of an evaluation after `step` RL steps."""
        if not self.main:
            return
        self._write(step, "eval", metrics, split=split)
        self._publish(step, split, metrics)
        shown = ("accuracy", "exact_accuracy", "distinct", "exact_modes_share", "exact_kl")
        last_pass = [key for key in metrics if key.startswith("pass@")][-1:]
        text = "  ".join(f"{key} {metrics[key]:.3f}" for key in (*shown[:2], *last_pass, *shown[2:]) if key in metrics)
        self.terminal.say(f"step {step}  {split}: {text}")

    def final(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures the run is judged by."""
        if self.main:
            self._write(step, "final", metrics)

    def ending(self, title: str, figures: Mapping[str, float]) -> None:
        """The final figures beside those of the start, and where the steps' time went."""
        if not self.main:
            return
        lines = read_lines(self.folder / "metrics.jsonl")
        start = next((line for line in lines if line["kind"] == "eval" and line["step"] == 0), {})
        self.table(title, [{"figure": key, "start": start.get(key), "end": value} for key, value in figures.items()])
        spent = [line for line in lines if line["kind"] == "train"]
        phases = [key for key in (spent[-1] if spent else {}) if key.startswith("time/")]
        seconds = {key.removeprefix("time/"): sum(line[key] for line in spent) for key in phases}
        whole = seconds.get("step") or 1.0
        if seconds:
            table = [{"phase": key, "seconds": s, "share": s / whole} for key, s in seconds.items()]
            self.table("where the steps' time went", table)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Responses to read: rows of prompt, response, reward (None: unscorable), to samples.jsonl."""
        if not self.main:
            return
        for row in rows:
            self._samples.write(json.dumps({"step": step, **row}, ensure_ascii=False, default=str) + "\n")
        self._publish_samples(step, rows)

    def _publish_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """As a table: a text of TensorBoard's, a Table of W&B's."""
        if not rows:
            return
        columns = list(rows[0])
        if self._board is not None:
            lines = ["| " + " | ".join(map(_cell, cells)) + " |" for cells in (columns, *(r.values() for r in rows))]
            self._board.add_text("samples", "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]]), step)
        if self._wandb is not None:
            data = [[v if isinstance(v, int | float | None) else _text(v) for v in row.values()] for row in rows]
            table = packages.require("log.wandb").Table(columns=columns, data=data)
            self._wandb.log({"samples": table}, step=max(0, step))

    def note(self, text: str, step: int = 0) -> None:
        """An event by name, on the console and in metrics.jsonl."""
        if not self.main:
            return
        self._metrics.write(json.dumps({"step": step, "kind": "note", "text": text}) + "\n")
        self.terminal.say(text)

    def table(self, title: str, rows: Mapping[str, Cell] | Sequence[Mapping[str, Cell]]) -> None:
        """See `Terminal.table`."""
        if self.main:
            self.terminal.table(title, rows)

    def close(self) -> None:
        """Close every file and sink; the log takes no more calls."""
        if not self.main:
            return
        self.terminal.close()
        self._metrics.close()
        self._samples.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cell(value: Any) -> str:
    """Of a Markdown table, where a response's own signs mean nothing."""
    return html.escape(_text(value)).replace("|", "&#124;").replace("\n", "<br>")


def _wandb_id(folder: Path) -> str:
    """The run's own W&B id, the same after every resume."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
