"""PNG plots of one or several run folders, from metrics.jsonl alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowrl_kernels.trainer.log import read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

# Okabe and Ito's colours: distinct for most kinds of colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
SMOOTHING = 40  # a training curve is averaged over 1/40 of its steps


@dataclass
class Run:
    """What the plots need of one run folder."""

    label: str
    colour: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a training metric, without its gaps."""
        return _points(self.train, key)

    def evaluated(self, key: str) -> tuple[list[int], list[float]]:
        """The same of the split that was evaluated most often."""
        splits = [line.get("split") for line in self.evals if key in line]
        if not splits:
            return [], []
        most = max(set(splits), key=lambda split: (splits.count(split), split == "test"))
        return _points([line for line in self.evals if line.get("split") == most], key)

    def tested(self, key: str) -> tuple[list[int], list[float]]:
        """The same of the test split."""
        return _points([line for line in self.evals if line.get("split") == "test"], key)


def _points(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    by_step = {line["step"]: line[key] for line in lines if line.get(key) is not None}
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read run folders. Raises FileNotFoundError for one without metrics.jsonl, ValueError for one with no
    steps.
    """
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    runs = []
    for index, path in enumerate(paths):
        file = path / "metrics.jsonl"
        if not file.is_file():
            raise FileNotFoundError(f"{path} is no run folder: it has no metrics.jsonl")
        lines = read_lines(file)
        train = [line for line in lines if line.get("kind") == "train"]
        evals = [line for line in lines if line.get("kind") == "eval"]
        if not train and not evals:
            raise ValueError(f"{file} has no training step and no evaluation yet")
        label = names[index] if names.count(names[index]) == 1 else str(path)
        runs.append(Run(label, COLOURS[index % len(COLOURS)], train, evals))
    return runs


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over a centred window of `width` values, narrower at the ends."""
    half = width // 2
    return [
        sum(values[max(0, i - half) : i + half + 1]) / len(values[max(0, i - half) : i + half + 1])
        for i in range(len(values))
    ]


def _draw_curve(ax: Axes, run: Run, key: str) -> bool:
    steps, values = run.curve(key)
    if not steps:
        return False
    width = max(1, len(values) // SMOOTHING)
    if width > 1:
        ax.plot(steps, values, color=run.colour, alpha=0.2, linewidth=0.8)
    ax.plot(steps, smooth(values, width), color=run.colour, linewidth=1.6)
    return True


def _draw_evals(ax: Axes, run: Run, key: str, style: str = "-") -> bool:
    steps, values = run.evaluated(key)
    if steps:
        ax.plot(steps, values, style, color=run.colour, linewidth=1.6, marker="o", markersize=3)
    test_steps, test_values = run.tested(key)
    if test_steps and (test_steps, test_values) != (steps, values):
        ax.plot(test_steps, test_values, "*", color=run.colour, markersize=9)
    return bool(steps)


def _solve_rate(ax: Axes, runs: Sequence[Run]) -> bool:
    drawn = False
    ks: set[int] = set()
    for run in runs:
        exact = bool(run.evaluated("exact_accuracy")[0])
        drawn |= _draw_evals(ax, run, "exact_accuracy" if exact else "accuracy")
        k = max((int(key[5:]) for line in run.evals for key in line if key.startswith("pass@")), default=1)
        if k > 1:
            drawn |= _draw_evals(ax, run, f"pass@{k}", "--")
            ks.add(k)
        if not run.evals:
            drawn |= _draw_curve(ax, run, "accuracy")
    name = " / ".join(f"pass@{k}" for k in sorted(ks))
    ax.set_title("How often is an answer right?")
    ax.set_ylabel("one sample (solid)" + (f", {name} (dashed)" if name else ""))
    ax.set_ylim(-0.02, 1.02)
    return drawn


def _distinct(ax: Axes, runs: Sequence[Run]) -> bool:
    ax.set_title("How many different right answers come up?")
    ax.set_ylabel("per problem, in its samples")
    drawn = [_draw_evals(ax, run, "distinct") for run in runs]
    ax.set_ylim(bottom=0)
    return any(drawn)


def _modes(ax: Axes, runs: Sequence[Run]) -> bool:
    ax.set_title("What share of all right answers stays in use?")
    ax.set_ylabel("effective modes, exact")
    drawn = [_draw_evals(ax, run, "exact_modes_share") for run in runs]
    ax.set_ylim(-0.02, 1.02)
    return any(drawn)


def _log_scale(ax: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _curve_panel(key: str, title: str, unit: str, log: bool = False) -> Callable[[Axes, Sequence[Run]], bool]:
    def draw(ax: Axes, runs: Sequence[Run]) -> bool:
        drawn = [_draw_curve(ax, run, key) for run in runs]
        ax.set_title(title)
        ax.set_ylabel(unit)
        if log and any(value > 0 for run in runs for value in run.curve(key)[1]):
            _log_scale(ax)
        return any(drawn)

    return draw


def _log_z(ax: Axes, runs: Sequence[Run]) -> bool:
    drawn = False
    exact = False
    for run in runs:
        if not _draw_curve(ax, run, "log_z"):
            continue
        drawn = True
        steps, values = run.evaluated("log_z_exact")
        if steps:
            exact = True
            ax.axhline(values[-1], color=run.colour, linestyle=":", linewidth=1.4)
    ax.set_title("Does log Z find its value?")
    ax.set_ylabel("nats per token" + (" (dotted: exact)" if exact else ""))
    return drawn


def _kl(ax: Axes, runs: Sequence[Run]) -> bool:
    drawn = [_draw_evals(ax, run, "exact_kl") for run in runs]
    ax.set_title("How far is the policy from the optimum?")
    ax.set_ylabel("KL, exact, nats per response")
    values = [v for run in runs for v in run.evaluated("exact_kl")[1]]
    if values and min(values) > 0 and max(values) / min(values) > 20:
        _log_scale(ax)
    return any(drawn)


def _pass_at_k(ax: Axes, runs: Sequence[Run]) -> bool:
    """Of each run's last evaluation, on the split that it was judged on."""
    drawn = False
    for run in runs:
        lines = [line for line in run.evals if any(key.startswith("pass@") for key in line)]
        if not lines:
            continue
        points = {int(key[5:]): value for key, value in lines[-1].items() if key.startswith("pass@")}
        ks = sorted(k for k, value in points.items() if value is not None)
        ax.plot(ks, [points[k] for k in ks], "-", color=run.colour, linewidth=1.6, marker="o", markersize=3)
        drawn |= len(ks) > 1
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_title("What do more samples find?")
    ax.set_xlabel("k")
    ax.set_ylabel("pass@k, last evaluation")
    ax.set_ylim(-0.02, 1.02)
    return drawn


def _clipped(ax: Axes, runs: Sequence[Run]) -> bool:
    drawn = False
    for run in runs:
        for key, style in (("clipped", "-"), ("clip_low", ":"), ("clip_high", "--")):
            steps, values = run.curve(key)
            if steps and (any(values) or key == "clipped"):
                drawn = True
                width = max(1, len(values) // SMOOTHING)
                ax.plot(steps, smooth(values, width), style, color=run.colour, linewidth=1.6)
    ax.set_title("How much is clipped?")
    ax.set_ylabel("share (below dotted, above dashed)")
    return drawn


PANELS: dict[str, Callable[[Axes, Sequence[Run]], bool]] = {
    "solve_rate": _solve_rate,
    "distinct": _distinct,
    "modes": _modes,
    "reward": _curve_panel("reward", "Does the reward rise?", "mean over the batch"),
    "entropy": _curve_panel("entropy", "Does the policy keep exploring?", "entropy, nats per token"),
    "residual": _curve_panel("residual_abs", "How far is the flow from balance?", "mean |residual|", log=True),
    "log_z": _log_z,
    "kl": _kl,
    "pass_at_k": _pass_at_k,
    "length": _curve_panel("length", "How long are the responses?", "tokens"),
    "truncated": _curve_panel("truncated", "How many do not end?", "share at the budget"),
    "kl_ref": _curve_panel("kl_ref", "How far is the policy from its start?", "KL, nats per token"),
    "grad_norm": _curve_panel("grad_norm", "How large is the gradient?", "norm before clipping", log=True),
    "clipped": _clipped,
}


def canvas() -> tuple[type[FigureCanvasAgg], type[Figure]]:
    """matplotlib's canvas and figure. Raises ValueError where it is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"plots need matplotlib (pip install matplotlib): {error}") from error
    return FigureCanvasAgg, Figure


def plot_runs(runs: Sequence[str | Path], out: str | Path | None = None) -> list[Path]:
    """Draw every panel that has data, one PNG each and overview.png with all; several runs are overlaid.

    runs: run folders. out: folder of the PNGs; `plots` in the first run's folder if not given. A star is the
    test split where another split was evaluated along the way. Returns the files written. Raises
    FileNotFoundError or ValueError for a folder without metrics, ValueError where matplotlib is missing.
    """
    if not runs:
        raise ValueError("runs must name at least one run folder, got none")
    read = read_runs(runs)
    make_canvas, make_figure = canvas()
    folder = Path(out) if out is not None else Path(runs[0]) / "plots"
    folder.mkdir(parents=True, exist_ok=True)

    def save(figure: Figure, name: str) -> Path:
        make_canvas(figure)  # no global state, no display
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130)
        return path

    written, shown = [], []
    for name, draw in PANELS.items():
        figure = make_figure(figsize=(7, 4.2), layout="constrained")
        ax = figure.add_subplot()
        if draw(ax, read):
            _finish(ax, read)
            _legend(figure, read)
            written.append(save(figure, name))
            shown.append(draw)
    if shown:
        columns = min(2, len(shown)) if len(shown) <= 4 else min(4, math.ceil(len(shown) / 2))
        rows = math.ceil(len(shown) / columns)
        figure = make_figure(figsize=(4.6 * columns, 3.3 * rows + 0.5), layout="constrained")
        for index, draw in enumerate(shown):
            ax = figure.add_subplot(rows, columns, index + 1)
            draw(ax, read)
            _finish(ax, read, small=True)
        _legend(figure, read)
        written.append(save(figure, "overview"))
    return written


def _labels(ax: Axes, runs: Sequence[Run]) -> None:
    """The runs' names at the ends of their lines, pushed apart where they would cover each other."""
    ends: dict[str, tuple[float, float]] = {}
    for line in ax.get_lines():
        xs, ys = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        if line.get_linestyle() == "-" and line.get_alpha() is None and len(xs) > 1:
            ends[str(line.get_color())] = (float(xs[-1]), float(ys[-1]))
    names = {run.colour: run.label for run in runs}
    placed: list[float] = []
    ax.get_xlim(), ax.get_ylim()  # the limits are made when asked for, and the transforms do not ask
    to_axes = ax.transData.transform
    inverse = ax.transAxes.inverted().transform
    for colour, end in sorted(ends.items(), key=lambda item: item[1][1]):
        if colour not in names:
            continue
        height = float(inverse(to_axes(end))[1])
        height = max([height, *(other + 0.07 for other in placed)])
        placed.append(height)
        ax.annotate(names[colour], (1.01, height), xycoords="axes fraction", color=colour, fontsize=8, va="center")


def _finish(ax: Axes, runs: Sequence[Run], small: bool = False) -> None:
    ax.set_xlabel(ax.get_xlabel() or "RL step")
    ax.grid(True, alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.02)
    if 1 < len(runs) <= 5:  # one needs no name, many would hide each other
        _labels(ax, runs)
    if small:
        ax.title.set_fontsize(10)


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    from matplotlib.lines import Line2D

    named = len(runs) == 1 or len(runs) > 5  # between these the lines carry their names
    handles = [Line2D([], [], color=run.colour, linewidth=2, label=run.label) for run in runs if named]
    if any(len({line.get("split") for line in run.evals}) > 1 for run in runs):
        handles.append(Line2D([], [], color="#666666", marker="*", linestyle="", markersize=9, label="test split"))
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=min(5, len(handles)), frameon=False)
