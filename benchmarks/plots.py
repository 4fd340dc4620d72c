"""PNG plots of one run: time and memory over N, error over the largest logit, time over epsilon."""

from __future__ import annotations

from pathlib import Path


def _series(cases: list[dict], x, y) -> dict[str, list[tuple[float, float]]]:
    made: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for name, entry in case["implementations"].items():
            if entry["status"] == "ok" and (value := y(entry)) is not None:
                made.setdefault(name, []).append((x(case), value))
    return {name: sorted(points) for name, points in made.items() if len(points) > 1}


def _draw(path: Path, series: dict, labels: tuple[str, str], title: str, logs: tuple[bool, bool]) -> Path | None:
    if not series:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 4.5))
    for i, (name, points) in enumerate(series.items()):
        style = {"linewidth": 2.4} if name.startswith("ours") else {"linewidth": 1.2, "linestyle": "--"}
        # twenty colours, the strong ones first
        axes.plot(
            *zip(*points), marker="o", markersize=4, color=plt.cm.tab20((2 * i + i // 10) % 20), label=name, **style
        )
    if logs[0]:
        axes.set_xscale("log", base=2)
    if logs[1]:
        axes.set_yscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _median(entry: dict) -> float | None:
    return entry["step"]["median_s"] * 1e3 if "step" in entry else None


def _extra(entry: dict) -> float | None:
    value = entry.get("memory", {}).get("extra")
    return max(value, 1e5) / 1e6 if value is not None else None


def draw(document: dict, folder: Path, name: str) -> list[Path]:
    """Draw what the run has points for; returns the files made."""
    cases = [case for case in document["cases"] if "error" not in case]
    made: list[Path | None] = []
    for group in sorted({c["group"] for c in cases if c["group"].startswith("scaling")}):
        own = [c for c in cases if c["group"] == group]
        shape = f"{own[0]['dtype']}, H={own[0]['h']}, V={own[0]['v']}, forward + backward"
        stem = f"{name}-{group}"
        x = lambda case: case["n"]  # noqa: E731
        time = _series(own, x, _median)
        made.append(_draw(folder / f"{stem}-time.png", time, ("tokens N", "ms"), shape, (True, True)))
        memory = _series(own, x, _extra)
        made.append(_draw(folder / f"{stem}-memory.png", memory, ("tokens N", "extra memory, MB"), shape, (True, True)))
    own = [c for c in cases if c["group"] == "precision"]
    if own:
        errors = _series(own, lambda case: case["peak"], lambda entry: entry["errors"].get("logp_max_abs"))
        title = f"{own[0]['dtype']} inputs, error of logp against float64"
        labels = ("largest |z|", "max |error|, nats")
        made.append(_draw(folder / f"{name}-error.png", errors, labels, title, (False, True)))
    own = [c for c in cases if c["group"] == "bounded"]
    if own:
        times = _series(own, lambda case: case["epsilon"], _median)
        title = f"{own[0]['dtype']}, N={own[0]['n']}, H={own[0]['h']}, V={own[0]['v']}, RL-like batch"
        labels = ("epsilon", "forward + backward, ms")
        made.append(_draw(folder / f"{name}-epsilon.png", times, labels, title, (False, False)))
    return [path for path in made if path is not None]
