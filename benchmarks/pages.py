"""The generated parts of docs/benchmarks/: one page a question, each with the answer first, from committed JSON."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import report, sampled_page
from benchmarks.plots import committed, pictures
from benchmarks.report import BEGIN, END

# what gives one log-prob a token, so that it could stand in our place; the others are in the tables
PER_TOKEN = (
    "ours-triton", "ours-chunked", "ours-triton-bounded", "ours-chunked-bounded", "eager", "eager-fp32-head",
    "torch.compile", "F.linear_cross_entropy", "F.linear_cross_entropy-chunked", "trl-chunked", "liger-scaled-ce",
    "cce", "cce-exact", "verl-triton", "verl-torch", "rl-kernel-triton", "rl-kernel-cuda",
    "rl-kernel-logp-triton", "rl-kernel-logp-cuda", "ours-triton-loss", "ours-chunked-loss",
    "ours-triton-loss-single-pass", "ours-chunked-loss-single-pass", "eager-loss",
)  # fmt: skip
NOTHING = "No results are committed yet."


def _documents(results: Path) -> dict[str, dict]:
    return dict(committed(results))


def _cases(document: dict, *groups: str) -> list[dict]:
    return [c for c in document.get("cases", []) if "error" not in c and c["group"].split("-")[0] in groups]


def _shape(case: dict) -> str:
    parts = [f"{name}={case[name.lower()]}" for name in "NHV" if case[name.lower()]]
    return ", ".join([*parts, case["dtype"]])


def _what(case: dict) -> str:
    words = {"linear_logprob": "log-probs from hidden states", "flowrl_loss": "the loss from hidden states"}
    text = words.get(case["op"], case["op"])
    text += ", entropy too" if case["entropy"] else ""
    text += "" if case["train_head"] else ", frozen head"
    if case["epsilon"]:
        text += f", synthetic RL-like batch, epsilon {case['epsilon']:g} where bounded"
    return text


def _where(document: dict) -> str:
    machine = document["machine"]
    return machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"


def _origin(stem: str, document: dict) -> str:
    return f"`{stem}.json`, {_where(document)}, {document['started'][:10]}, commit `{(document['commit'] or '?')[:12]}`"


def _chosen(case: dict) -> dict[str, dict]:
    done = {name: case["implementations"].get(name, {}) for name in PER_TOKEN}
    return {name: entry for name, entry in done.items() if entry.get("status") == "ok" and "step" in entry}


def _is_ours(name: str) -> bool:
    return name.startswith("ours")


def _ranked(results: Path, quantity: str, show, value) -> list[str]:
    """For each case, what ours and the others need, the least first; `value(entry)` orders them."""
    parts = []
    for stem, document in _documents(results).items():
        body = []
        for case in _cases(document, "contract", "shapes", "exact", "bounded_contract", "levels"):
            entries = {name: entry for name, entry in _chosen(case).items() if value(entry) is not None}
            if not any(map(_is_ours, entries)) or all(map(_is_ours, entries)):
                continue
            order = sorted(entries, key=lambda name: value(entries[name]))
            cells = "<br>".join(
                f"**{n}** {show(entries[n])}" if _is_ours(n) else f"{n} {show(entries[n])}" for n in order
            )
            body.append((f"`{case['name']}`: {_what(case)}; {_shape(case)}", cells))
        if body:
            parts += [
                report.filled(_origin(stem, document) + "."),
                report.markdown(("case", f"{quantity}, least first"), body),
            ]
    return parts


def _swept(results: Path, *groups: str) -> list[str]:
    parts = []
    for stem, document in _documents(results).items():
        grouped: dict[str, list[dict]] = {}
        for case in _cases(document, *groups):
            grouped.setdefault(case["group"], []).append(case)
        for cases in grouped.values():
            name = cases[0]["name"].rpartition("-")[0]
            parts += [
                '<details markdown="1">',
                f"<summary>{name}, from {stem}.json: the figures</summary>",
                "\n".join(report.sweep(cases)).strip(),
                "</details>",
            ]
    return parts


def _picture(results: Path, kind: str, words: str) -> list[str]:
    return [f"![{words}](../images/{name})" for name in pictures(results) if name.endswith(f"-{kind}.png")]


def _ratio(case: dict, mine: str, theirs: str, key) -> float | None:
    entries = case["implementations"]
    if any(entries.get(name, {}).get("status") != "ok" for name in (mine, theirs)):
        return None
    return key(entries[mine]) / key(entries[theirs])


def _answer(results: Path, verb: str, noun: str, key) -> list[str]:
    """One bullet a machine: the range of ours over eager at the shapes of a real head."""
    lines = []
    for document in _documents(results).values():
        cases = [c for c in _cases(document, "contract", "exact") if c["op"] == "linear_logprob"]
        for mine in ("ours-triton", "ours-chunked"):
            found = [ratio for case in cases if (ratio := _ratio(case, mine, "eager", key)) is not None]
            if found:
                low, high = f"{min(found):.2g}", f"{max(found):.2g}"
                span = low if low == high else f"{low} to {high}"
                line = f"- {_where(document)}, V={cases[0]['v']}, {len(found)} synthetic batches: "
                line += f"`{mine}` {verb} **{span}** of {noun}."
                lines.append(report.filled(line, "  "))
    return ["\n".join(lines)] if lines else []


def fastest(results: Path) -> list[str]:
    median = lambda entry: entry["step"]["median_s"]  # noqa: E731
    return [
        *_answer(results, "takes", "eager's time, forward and backward", median),
        *_picture(results, "time", "Time of forward and backward over the number of tokens"),
        "## By case",
        *_ranked(results, "forward + backward", lambda e: report.time_of(e["step"]), median),
        "## The bounded backward over epsilon",
        "Synthetic RL-like batches; what share of tiles real hidden states leave was not measured.",
        *_picture(results, "epsilon", "Time over the bound that was asked for"),
        *_swept(results, "bounded"),
    ]


def fits(results: Path) -> list[str]:
    extra = lambda entry: entry.get("memory", {}).get("extra")  # noqa: E731
    return [
        *_answer(results, "needs", "eager's extra memory", extra),
        *_picture(results, "memory", "Extra memory over the number of tokens"),
        "## By case",
        *_ranked(results, "extra memory", lambda entry: report.size(extra(entry)), extra),
        "## Over the number of tokens",
        *_swept(results, "scaling"),
    ]


def exact(results: Path) -> list[str]:
    error = lambda entry: entry.get("errors", {}).get("logp_max_abs")  # noqa: E731
    return [
        *_answer(results, "makes", "eager's error in the worst log-prob", error),
        *_picture(results, "error", "Error of log-probs over the largest logit"),
        "## By case",
        *_ranked(results, "largest error of a log-prob, nats", lambda e: f"{error(e):.2g}", error),
        "## Over the size of the logits",
        *_swept(results, "precision"),
    ]


def end_to_end(results: Path) -> list[str]:
    return [
        report.end_to_end_section(document, f"{stem}.json")
        for stem, document in _documents(results).items()
        if document.get("kind") == "end-to-end"
    ]


def sampled(results: Path) -> list[str]:
    return [
        sampled_page.section(document, f"{stem}.json")
        for stem, document in _documents(results).items()
        if document.get("kind") == "real-states"
    ]


def index(results: Path) -> list[str]:
    rows = [
        (
            f"`{stem}.json`",
            _where(document),
            document["started"][:10],
            f"`{(document['commit'] or 'unknown')[:12]}`{' with changes' if document['dirty'] else ''}",
            str(len(document.get("cases", [])) or len(document.get("heads", document.get("levels", {})))),
        )
        for stem, document in _documents(results).items()
    ]
    return [report.markdown(("file", "machine", "date", "commit", "cases"), rows)] if rows else []


def tables(results: Path) -> list[str]:
    parts = []
    for stem, document in _documents(results).items():
        if "cases" in document:
            head, body = report.section(document, f"{stem}.json").split("\n", 1)
            parts += [
                head,
                '<details markdown="1">',
                f"<summary>{stem}: every case</summary>",
                body.strip(),
                "</details>",
            ]
    return parts


PAGES = {
    "index.md": index, "fastest.md": fastest, "fits.md": fits, "exact.md": exact, "end_to_end.md": end_to_end,
    "tables.md": tables, "sampled.md": sampled,
}  # fmt: skip


def generate(results: Path, name: str) -> str:
    """The generated part of one page."""
    return "\n\n".join(PAGES[name](results)) or NOTHING


def write(results: Path, folder: Path) -> int:
    """Replace what stands between the two marks of every page. Returns an exit status."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    texts = {name: (folder / name).read_text() for name in PAGES}
    if lacking := [name for name, text in texts.items() if not pattern.search(text)]:
        print(f"{', '.join(lacking)}: the marks that hold the generated part are missing")
        return 1
    for name, text in texts.items():
        part = f"{BEGIN}\n\n{generate(results, name)}\n\n{END}"
        (folder / name).write_text(pattern.sub(lambda _, part=part: part, text))
    print(f"wrote {len(texts)} pages into {folder.name}/")
    return 0
