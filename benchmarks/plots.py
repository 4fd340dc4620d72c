"""PNG plots: a question for a title, ours in one colour, the others in grey, each line with its name at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

OURS, LIGHT, GREY, INK = "#c2410c", "#f4a582", "#9a9a9a", "#333333"
# what gives a log-prob for every token, and whose lines are not another's to the pixel; the rest is in the tables
SHOWN = (
    "ours-triton", "ours-chunked", "ours-triton-bounded", "ours-chunked-bounded", "eager", "torch.compile", "cce-exact",
    "verl-triton", "verl-torch", "trl-chunked", "liger-scaled-ce", "F.linear_cross_entropy-chunked",
)  # fmt: skip
NAMES = {
    "ours-triton": "flowrl_kernels",
    "ours-chunked": "flowrl_kernels",
    "ours-triton-bounded": "flowrl_kernels, bounded",
    "ours-chunked-bounded": "flowrl_kernels, bounded",
    "eager": "eager PyTorch",
    "eager-fp32-head": "eager, head in fp32",
    "cce-exact": "Cut Cross-Entropy",
    "verl-triton": "verl",
    "verl-torch": "verl (torch)",
    "trl-chunked": "TRL",
    "liger-scaled-ce": "Liger",
    "F.linear_cross_entropy-chunked": "torch core, chunked",
}
Series = dict[str, list[tuple[float, float]]]


def _series(cases: list[dict], x: str, y: Callable[[dict], float | None], shown: tuple[str, ...] = SHOWN) -> Series:
    made: Series = {}
    for name in shown:
        entries = [(case[x], case["implementations"].get(name, {})) for case in cases]
        points = [(at, value) for at, e in entries if e.get("status") == "ok" and (value := y(e)) is not None]
        if len(points) > 1:
            made[name] = sorted(points)
    return made


def _seconds(entry: dict) -> float | None:
    return entry["step"]["median_s"] if "step" in entry else None


def _extra(entry: dict) -> float | None:
    value = entry.get("memory", {}).get("extra")
    return max(value, 1e5) if value is not None else None


def _error(entry: dict) -> float | None:
    return entry.get("errors", {}).get("logp_max_abs")


def _value(kind: str, value: float, tick: bool = False) -> str:
    if kind == "error":
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if kind == "time" else (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, scale = next(((u, s) for u, s in units if value >= s), units[-1])
    return f"{value / scale:{'' if tick else '#'}.3g}".removesuffix(".") + f" {unit}"


def _apart(wanted: list[float], gap: float) -> list[float]:
    """Heights for labels, in the given rising order, at least `gap` apart and as near as that allows."""
    placed: list[list[float]] = []  # runs of labels that touch: the sum of (wanted - offset), how many
    for height in wanted:
        placed.append([height, 1])
        while len(placed) > 1 and placed[-1][0] / placed[-1][1] < placed[-2][0] / placed[-2][1] + placed[-2][1] * gap:
            total, count = placed.pop()
            before = placed[-1]
            before[0] += total - count * before[1] * gap
            before[1] += count
    return [total / count + i * gap for total, count in placed for i in range(int(count))]


def _panel(axes, series: Series, kind: str, question: str, across: str, log_x: bool, log_y: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    for name, points in series.items():
        ours = name.startswith("ours")
        colour = (OURS if "bounded" in name or not _has_bounded(series) else LIGHT) if ours else GREY
        axes.plot(*zip(*points), color=colour, linewidth=2.6 if ours else 1.2, zorder=3 if ours else 2)
        axes.plot(*points[-1], "o", markersize=4, color=colour, zorder=4 if ours else 2)
    if not log_y:
        axes.set_ylim(bottom=0, top=1.08 * max(y for points in series.values() for _, y in points))
    axes.figure.canvas.draw()
    box, transform = axes.get_window_extent(), axes.transData.transform
    ends = sorted((transform(points[-1])[1], name) for name, points in series.items())
    heights = _apart([height for height, _ in ends], 12.5 * axes.figure.dpi / 72)
    for (_, name), height in zip(ends, heights):
        ours, exact = name.startswith("ours"), _has_bounded(series) and "bounded" not in name
        axes.annotate(
            f"{NAMES.get(name, name)}{', exact' if ours and exact else ''}  {_value(kind, series[name][-1][1])}",
            xy=(1.015, (height - box.y0) / box.height), xycoords="axes fraction", va="center", fontsize=9,
            color=OURS if ours else "#666666", fontweight="bold" if ours else "normal", annotation_clip=False,
        )  # fmt: skip
    axes.set_title(question, loc="left", fontsize=12, color=INK, pad=10)
    axes.set_xlabel(across, color=INK, fontsize=9)
    if log_y and kind == "time":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _value(kind, value, tick=True) if value else "0"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    at = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(at, [f"{x:g}" for x in at])
    axes.minorticks_off()
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def _has_bounded(series: Series) -> bool:
    return any("bounded" in name for name in series)


def _draw(path: Path, panels: list[tuple], caption: str) -> Path | None:
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(panels), figsize=(7.6 * len(panels), 4.4), dpi=110, squeeze=False)
    figure.subplots_adjust(
        left=0.1 / len(panels), right=1 - 0.34 / len(panels), bottom=0.24, top=0.88, wspace=0.65, hspace=0
    )
    for axes, panel in zip(grid[0], panels):
        _panel(axes, *panel)
    figure.text(0.1 / len(panels), 0.02, caption, fontsize=8, color="#777777", ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # the same bytes from the same JSON: no date and no version inside
    figure.savefig(path, metadata={"Software": None}, facecolor="white")
    plt.close(figure)
    return path


def _caption(document: dict, case: dict, *facts: str) -> str:
    machine = document["machine"]
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    shape = ", ".join(f"{key}={case[key.lower()]}" for key in "HV")
    return ", ".join([f"{shape}, {case['dtype']}", *facts]) + f"\n{name}, {document['started'][:10]}"


def _plan(document: dict) -> dict[str, tuple[list[tuple], str]]:
    """For each kind of picture that the document has points for: its panels and its caption."""
    cases = [case for case in document.get("cases", []) if "error" not in case]
    plan: dict[str, tuple[list[tuple], str]] = {}
    for group in sorted({case["group"] for case in cases if case["group"].startswith("scaling")}):
        own, suffix = [case for case in cases if case["group"] == group], group.removeprefix("scaling")
        caption = _caption(document, own[0], "log-probs of every token, forward and backward, synthetic batch")
        time = (_series(own, "n", _seconds), "time", "How long does it take?", "tokens N", True, True)
        extra = _series(own, "n", _extra)
        memory = (extra, "memory", "How much memory beside inputs and gradients?", "tokens N", True, True)
        plan[f"time{suffix}"] = [time], caption
        plan[f"memory{suffix}"] = [memory], caption
        plan.setdefault("cost", ([memory, time], caption))
    own = [case for case in cases if case["group"] == "precision"]
    if own:
        shown = ("ours-triton", "ours-chunked", "eager", "eager-fp32-head", "trl-chunked", "cce-exact", "verl-triton")
        errors = _series(own, "peak", _error, shown)
        question = "How far is the worst log-prob from float64, in nats?"
        panel = (errors, "error", question, "largest |z| of the batch", False, True)
        plan["error"] = [panel], _caption(document, own[0], "synthetic logits of a given size", f"N={own[0]['n']}")
    own = [case for case in cases if case["group"] == "bounded" and case["epsilon"]]
    if own:
        shown = tuple(name for name in SHOWN if name not in ("F.linear_cross_entropy-chunked", "liger-scaled-ce"))
        times = _series(own, "epsilon", _seconds, shown)
        question = "What does a bounded backward save?"
        panel = (times, "time", question, "epsilon, the bound asked for", True, False)
        caption = _caption(document, own[0], "synthetic RL-like batch", f"N={own[0]['n']}, forward and backward")
        plan["epsilon"] = [panel], caption
    return plan


def draw(document: dict, folder: Path, name: str) -> list[Path]:
    """Draw what the run has points for; returns the files made."""
    made = [_draw(folder / f"{name}-{kind}.png", *what) for kind, what in _plan(document).items()]
    return [path for path in made if path is not None]


def committed(results: Path) -> list[tuple[str, dict]]:
    """The documents of the folder's JSON files by their stems, in name order."""
    return [(path.stem, json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]


def pictures(results: Path) -> list[str]:
    """The names of the pictures that the committed JSON makes, without drawing them."""
    plans = [(stem, _plan(document)) for stem, document in committed(results)]
    return [
        f"{stem}-{kind}.png"
        for stem, plan in plans
        for kind, (panels, _) in plan.items()
        if kind != "cost" and panels[0][0]
    ]


def draw_committed(results: Path, folder: Path) -> list[Path]:
    """Every picture of the documentation; cost.png is the README's, of a GPU where one was measured."""
    made = []
    documents = committed(results)
    for stem, document in documents:
        plan = _plan(document)
        made += [_draw(folder / f"{stem}-{kind}.png", *what) for kind, what in plan.items() if kind != "cost"]
    costs = [(document["machine"]["gpu"] is None, _plan(document).get("cost")) for _, document in documents]
    if found := sorted((pair for pair in costs if pair[1]), key=lambda pair: pair[0]):
        made.append(_draw(folder / "cost.png", *found[0][1]))
    return [path for path in made if path is not None]
