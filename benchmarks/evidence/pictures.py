"""The three pictures and the tables of docs/evidence.md, from the JSON files alone."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.evidence import numbers, sweep, tasks
from benchmarks.evidence.numbers import NAMES, PAGE, done, front, of

IMAGES = Path(__file__).parents[2] / "docs" / "images"
OURS, GREY, LIGHT, INK = "#c2410c", "#9a9a9a", "#d6d6d6", "#333333"
# method -> its label, the dial it stands at, and how far from there in points
LABELS = {
    "tb": ("trajectory balance, and on it\nRLOO with KL in the reward", 5.0, (8, -6)),
    "rloo_kl_in_reward": ("", 0.2, (0, 0)),
    "paper": ("FlowRL, raw rewards", 1.0, (-114, -24)),
    "paper_normalised": ("FlowRL as published", 0.5, (-24, 8)),
    "grpo": ("GRPO, k3 in the loss", 0.3, (-112, -8)),
    "dapo": ("DAPO with an entropy bonus", 0.3, (8, -4)),
    "mara": ("MARA", 5.0, (6, 6)),
    "distinct_shapley": ("credit for distinct answers", 0.1, (-142, -4)),
    "rloo_entropy_in_reward": ("entropy in the reward", 0.2, (-112, 16)),
}


def make() -> None:
    made = sweep.made_so_far(sweep.FRONTIER)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, draw in (("frontier", frontier), ("targets", targets), ("lengths", lengths)):
        figure = draw(made)
        figure.savefig(IMAGES / f"evidence-{name}.png", dpi=130, facecolor="white")
    PAGE.write_text(numbers.with_tables(PAGE.read_text(), made))


def _axes(width: float, height: float, question: str, panels: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for each in axes:
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
        for side in ("bottom", "left"):
            each.spines[side].set_color("#bbbbbb")
        each.tick_params(colors=INK, labelsize=9, length=0)
    figure.suptitle(question, x=0.01, ha="left", fontsize=12, color=INK)
    return figure, axes


def frontier(made: dict):
    """Accuracy over coverage: each seed a dot, each method's means a line along its dial, the front on top."""
    figure, (axes,) = _axes(8.6, 5.2, "Which method keeps more right answers at the same accuracy? (Sums, 5 problems)")
    every = done(made, part="frontier", task="sums")
    for point, cells in every.items():
        ours = point.method.startswith("paper")
        axes.plot(
            [c["coverage"] for c in cells], [c["accuracy"] for c in cells], ".", markersize=3.5,
            color="#e9b79d" if ours else LIGHT, zorder=1,
        )  # fmt: skip
    for method, (label, dial, shift) in LABELS.items():
        line = {
            p.dial: (of(c, "coverage").mean, of(c, "accuracy").mean) for p, c in every.items() if p.method == method
        }
        if not line:  # not run yet
            continue
        ours = method.startswith("paper")
        axes.plot(*zip(*(line[d] for d in sorted(line))), "-o", markersize=3, linewidth=2.2 if ours else 1.1,
                  color=OURS if ours else GREY, zorder=3 if ours else 2)  # fmt: skip
        near = min(line, key=lambda known, dial=dial: abs(known - dial))
        axes.annotate(label, line[near], xytext=shift, textcoords="offset points", fontsize=8.5,
                      color=OURS if ours else "#666666", fontweight="bold" if ours else "normal")  # fmt: skip
    best = front(every)
    axes.plot([of(every[p], "coverage").mean for p in best], [of(every[p], "accuracy").mean for p in best], "--",
              color=INK, linewidth=1, zorder=4)  # fmt: skip
    axes.set_xlabel("coverage: exp(entropy over right answers) / their number", fontsize=9, color=INK)
    axes.set_ylabel("accuracy", fontsize=9, color=INK)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0.84, 1.006)
    return figure


def targets(made: dict):
    """KL to the stated target and to the method's own optimum, both tasks."""
    figure, axes = _axes(
        9.0, 4.2, "How far is each from pi_ref exp(5 r) / Z (filled), and from its own optimum (open)?", 2
    )
    methods: list[str] = []
    for panel, (task, title) in zip(
        axes, (("sums", "Sums: all of one length"), ("sums_of_any_length", "2 to 5 terms"))
    ):
        every = {point.method: cells for point, cells in done(made, part="match", task=task).items()}
        methods = methods or sorted(every, key=lambda m: -of(every[m], "kl_stated").mean)
        for i, method in enumerate(methods):
            if method not in every:
                continue
            ours = method.startswith("paper")
            for figure_name, filled in (("kl_stated", True), ("kl_own", False)):
                if every[method][0][figure_name] is None:
                    continue
                values = [cell[figure_name] for cell in every[method]]
                colour = OURS if ours else "#777777"
                panel.plot(sum(values) / len(values), i, "o", markersize=9 if filled else 5, color=colour,
                           markerfacecolor=colour if filled else "white", zorder=3)  # fmt: skip
                panel.plot(values, [i] * len(values), "|", markersize=7, color=colour, alpha=0.5, zorder=2)
        panel.set_xscale("log")
        panel.set_xlim(0.012, 2.6)
        panel.set_xticks([0.02, 0.1, 0.5, 2.0], [".02", ".1", ".5", "2"])
        panel.minorticks_off()
        panel.set_title(title, loc="left", fontsize=10, color=INK)
        panel.grid(axis="y", color="#eeeeee")
        panel.set_xlabel("KL, nats", fontsize=9, color=INK)
    axes[0].set_yticks(range(len(methods)), [NAMES[method] for method in methods])
    for text, method in zip(axes[0].get_yticklabels(), methods):
        text.set_color(OURS if method.startswith("paper") else "#666666")
    return figure


def lengths(made: dict):
    """Answers that the target keeps where rewards are graded, over the length that the responses would have."""
    figure, (axes,) = _axes(8.0, 4.2, "How many answers does the target keep as responses get longer? (graded rewards)")
    task = tasks.modes()
    refs = [tasks.log_probs(task.tree, task.reference(seed)) for seed in made["test"]]
    where = [10 ** (i / 16) for i in range(49)]
    for beta, shade in ((1.0, "#e0a98c"), (5.0, "#d9804f"), (15.0, OURS)):
        kept = [[kept_answers(task, ref, beta * n) for n in where] for ref in refs]
        mean = [sum(column) / len(column) for column in zip(*kept)]
        axes.plot(where, mean, color=shade, linewidth=2.4 if beta == 15.0 else 1.4)
        near = min(range(len(where)), key=lambda i, mean=mean, beta=beta: abs(mean[i] - (30.0 if beta < 15 else 2.5)))
        axes.annotate(f"FlowRL, beta {beta:g}", (where[near], mean[near]), xytext=(6, 4), textcoords="offset points",
                      fontsize=8.5, color=shade, fontweight="bold" if beta == 15.0 else "normal")  # fmt: skip
    stated = sum(kept_answers(task, ref, task.beta) for ref in refs) / len(refs)
    axes.axhline(stated, color=GREY, linewidth=1.4)
    axes.annotate(f"pi_ref exp(10 r) / Z, at every length: {stated:.0f}", (1000, stated), xytext=(0, 4), ha="right",
                  textcoords="offset points", fontsize=8.5, color="#666666")  # fmt: skip
    for point, cells in done(made, part="graded", method="paper").items():
        kept = [cell["coverage"] * float(task.right.sum()) for cell in cells]
        axes.plot([5] * len(kept), kept, "o", color=INK, markersize=3, zorder=5)
        axes.annotate(f"{point.dial:g}", (5, max(kept)), xytext=(5, -2), textcoords="offset points", fontsize=7.5)
    axes.set_xscale("log")
    axes.set_xticks([1, 5, 10, 100, 1000], ["1", "5", "10", "100", "1,000"])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a response (dots: trained here, 5 tokens, by beta)", fontsize=9, color=INK)
    axes.set_ylabel(f"effective number of right answers, of {int(task.right.sum())}", fontsize=9, color=INK)
    return figure


def kept_answers(task: tasks.Task, log_ref: torch.Tensor, beta: float) -> float:
    """exp(entropy over right answers) of pi_ref exp(beta r) / Z."""
    target = tasks.tilted(log_ref, task.reward, beta)
    return tasks.figures(task, target, target, None)["coverage"] * float(task.right.sum())
