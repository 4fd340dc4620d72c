"""Several suites with one model: sampled, scored, written problem by problem, and taken up again where they stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from flowrl_kernels.trainer import config_file, export, fingerprint, report
from flowrl_kernels.trainer.config import Config, check, listed
from flowrl_kernels.trainer.evaluate import Response, Sample, chosen
from flowrl_kernels.trainer.measure import evaluation_sampling, make_sampler
from flowrl_kernels.trainer.parts import make_stops, make_text, stop_tokens
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.records import Text
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.suites import file, measures, table
from flowrl_kernels.trainer.suites.figures import Outcome, figures
from flowrl_kernels.trainer.tasks import Problem, Task, build_task
from flowrl_kernels.trainer.tasks.rows import files_of
from flowrl_kernels.trainer.terminal import Terminal

RESULTS = "results.json"
# settings that choose what is sampled and how it is scored
MADE_OF = (
    "task.",
    "eval.",
    "model.",
    "rollout.engine",
    "rollout.max_new_tokens",
    "rollout.batch",
    "rollout.stop",
    "parallel.dtype",
)
FREE = ("task.reward_workers", "model.name")  # the weights have a hash of their own


class Job(NamedTuple):
    """A suite that is ready to be sampled."""

    name: str
    suite: file.Suite
    config: Config
    task: Task
    problems: list[Problem]
    hashes: list[str]  # SHA-256 of each problem's prompt and answer
    measure: measures.Measure
    key: dict[str, Any]  # everything its samples depend on


def run_suites(source: str, path: str, out: str, args: list[str], overwrite: bool = False) -> dict[str, Any]:
    """Evaluates a model on every suite of a file and writes FOLDER/results.json and a JSONL file a suite.

    Args:
        source: a run folder, a Hugging Face folder, or a TOML file whose `model.name` is evaluated as it is.
        path: the suite file. out: folder of the results; what it holds of the same model and settings is not done
            again, a suite that was broken off goes on where it stopped.
        args: `--section.field value`, for every suite.
        overwrite: do again what the folder holds of another model or other settings, instead of refusing.

    Raises:
        ValueError, FileNotFoundError: naming what is missing or does not fit, before anything is sampled.
    """
    suites = file.load(path)
    base, newest = export.open_source(source, None)
    base = export.single(base)
    run = Path(source).expanduser() if newest is not None else None
    folder = Path(out).expanduser()
    configs = {name: file.config_of(suite, base, args) for name, suite in suites.suite.items()}
    opening = config_file.expand(config_file.override(base, args))
    # the policy is held in float32; another engine rounds what it is given to parallel.dtype
    opening = dataclasses.replace(opening, run=dataclasses.replace(opening.run, dir=str(folder)))
    plain = dataclasses.replace(opening, parallel=dataclasses.replace(opening.parallel, dtype="float32"))
    world = export.start(opening if opening.rollout.engine == "hf" else plain)
    tasks: dict[str, tuple[Task, list[Problem], measures.Measure]] = {}
    for name, config in configs.items():
        try:
            check(config)
            export.refuse_code_of(run, config)
            task, problems = ready(suites.suite[name], config)
            tasks[name] = task, problems, measures.ready(suites.suite[name], suites, config.task, len(problems))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"suite.{name}: {error}") from None
    actor, tokenizer = export.open_policy(dataclasses.replace(plain, run=base.run), newest, world)
    model = {
        "source": source, "checkpoint": None if newest is None else newest.name, "weights": report.weights_hash(actor),
        "tokenizer": fingerprint.of([tokenizer.get_vocab(), tokenizer.chat_template]),
    }  # fmt: skip
    jobs, texts = [], {}
    for name, (task, problems, measure) in tasks.items():
        texts[name] = make_text(configs[name], task, tokenizer)
        check_lengths(name, configs[name], problems, texts[name], actor)
        job = Job(name, suites.suite[name], configs[name], task, problems, [], measure, {})
        jobs.append(keyed(job, model))
    found = earlier(folder, jobs, overwrite)
    found |= {"model": model, "versions": report.versions()}
    engine = export.open_engine(opening, actor, world)
    terminal, cache = Terminal(), measures.Cache(suites)
    try:
        for job in jobs:
            if job.name not in found["suites"]:
                text = texts[job.name]
                stops = make_stops(job.config, text)
                sampling = evaluation_sampling(job.config, stop_tokens(actor, tokenizer), stops)
                sample = make_sampler(engine, text, sampling, world)
                found["suites"][job.name] = evaluate(job, sample, folder, terminal)
                report.save(folder / RESULTS, found)
            part = found["suites"][job.name]
            if part.get("measured") != job.measure.settings:
                part |= measured(job, folder, cache)
                report.save(folder / RESULTS, found)
    finally:
        engine.close()
    table.show(terminal, source, {job.name: found["suites"][job.name] for job in jobs})
    print(report.save(folder / RESULTS, found))
    return found


def ready(suite: file.Suite, config: Config) -> tuple[Task, list[Problem]]:
    """The task and the problems of a suite. Raises ValueError for another number than the file expects."""
    task = build_task(config.task)
    problems = chosen(task, suite.split, config.eval.problems)
    whole = len(task.problems(suite.split))
    if suite.expect and whole != suite.expect:
        raise ValueError(f"expect: wanted {suite.expect} problems in the {suite.split} split; got {whole}")
    Scorer(config.task, task).close()  # a reward that is not there is refused here
    return task, problems


def check_lengths(name: str, config: Config, problems: list[Problem], text: Text, actor: Policy) -> None:
    """Refuses a prompt that leaves no room for a response in the model's context."""
    context = getattr(actor.model.config.get_text_config(), "max_position_embeddings", None)
    for problem in problems:
        tokens = len(text.encode(problem))
        if context is not None and tokens + config.rollout.max_new_tokens > context:
            raise ValueError(
                f"suite.{name}.max_new_tokens: the prompt of problem {problem.id} ({tokens} tokens) and a response "
                f"({config.rollout.max_new_tokens}) exceed the model's context of {context}"
            )


def keyed(job: Job, model: dict[str, Any]) -> Job:
    """The job with the hashes of its problems and of all that its samples depend on."""
    config, task = job.config, job.config.task
    hashes = [fingerprint.of([problem.prompt, problem.answer]) for problem in job.problems]
    settings = {
        key: value for key, value in config_file.flat(config).items() if key.startswith(MADE_OF) and key not in FREE
    }
    sources = listed(getattr(task, job.suite.split)) if task.name in ("file", "maths") else ()
    read = [path for source in sources for path in files_of(source)]
    key = {
        "weights": model["weights"], "tokenizer": model["tokenizer"], "split": job.suite.split, "settings": settings,
        "problems": fingerprint.of(hashes), "files": {str(f): fingerprint.of_file(f) for f in read},
        "code": fingerprint.of_code(job.task, (task.name, *listed(task.reward))), "versions": report.versions(),
    }  # fmt: skip
    return job._replace(hashes=hashes, key=json.loads(json.dumps(key, default=repr)))


# ------------------------------------------------------------------------------------------------ what was done before


def earlier(folder: Path, jobs: list[Job], overwrite: bool) -> dict[str, Any]:
    """The finished results in a folder that belong to these jobs; suites of other settings are dropped or refused."""
    found: dict[str, Any] = {"suites": {}}
    if (folder / RESULTS).is_file():
        found = read(folder)
    names = {job.name for job in jobs}
    for name in [name for name in found["suites"] if name not in names]:  # of another file: kept where it is this model
        if found["suites"][name]["key"]["weights"] != jobs[0].key["weights"]:
            if not overwrite:
                raise ValueError(f"--out: {folder} holds suite {name!r} of another model; name another, or --overwrite")
            found["suites"].pop(name)
    for job in jobs:
        done, begun = found["suites"].get(job.name), header(partial(folder, job.name))
        for key in (done and done["key"], begun):
            if key and key != job.key and not overwrite:
                raise ValueError(
                    f"--out: {folder} holds suite {job.name!r} of another evaluation ({differs(key, job.key)}); "
                    "name another folder, or --overwrite"
                )
        lines = folder / f"{job.name}.jsonl"
        if done and (done["key"] != job.key or not lines.is_file() or fingerprint.of_file(lines) != done["sha256"]):
            found["suites"].pop(job.name)
    return found


def read(folder: Path) -> dict[str, Any]:
    """A folder's results. Raises ValueError where they cannot be read."""
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        if not isinstance(found["suites"], dict):
            raise TypeError
        return found
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder / RESULTS}: no results of `flowrl eval --suite` ({error!r:.80})") from None


def differs(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first few things that two keys do not share."""
    names = []
    for name in new:
        before, after = old.get(name), new[name]
        if isinstance(before, dict) and isinstance(after, dict):
            names += [key for key in sorted(before | after) if before.get(key) != after.get(key)]
        elif before != after:
            names.append(name)
    return "different " + ", ".join(names[:4])


def partial(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl.partial"


def header(path: Path) -> dict[str, Any] | None:
    """The key that a broken-off suite was begun with."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as lines:
        try:
            return json.loads(lines.readline())["key"]
        except (ValueError, KeyError, TypeError):
            return None


# ------------------------------------------------------------------------------------------------ sampling


def evaluate(job: Job, sample: Sample, folder: Path, terminal: Terminal) -> dict[str, Any]:
    """Samples and scores what is not yet done; returns the suite's part of results.json.

    Problems are done in parts of as many as the engine decodes at once, each written whole. A response is drawn by
    seed, number of its problem and place, and a part is the same after a break, so a break changes nothing.
    """
    config, path = job.config, partial(folder, job.name)
    step = max(1, config.rollout.batch // config.eval.samples)
    folder.mkdir(parents=True, exist_ok=True)
    lines, reasons = begun(path, job, step)
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"key": job.key}, *lines]), encoding="utf-8")
    rows = [line for line in lines if "id" in line]
    scorer, started = Scorer(config.task, job.task).first, time.monotonic()
    before = sum(line["seconds"] for line in lines if "seconds" in line)
    try:
        with path.open("a", encoding="utf-8") as out:
            for first in range(len(rows), len(job.problems), step):
                part = job.problems[first : first + step]
                answers = sample(part, config.eval.samples, config.eval.seed, first)
                scored = score(job, scorer, part, answers, first)
                now = time.monotonic()
                note = {"reasons": dict(scorer.reasons), "seconds": now - started}
                started = now
                out.write("".join(json.dumps(line) + "\n" for line in [*scored, note]))
                out.flush()
                rows += scored
                reasons += scorer.reasons
                before += note["seconds"]
                terminal.evaluating(job.name, len(rows), len(job.problems))
    finally:
        scorer.close()
    finished = folder / f"{job.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(path, finished)
    outcomes = [Outcome.read(row) for row in rows]
    return {
        "figures": figures(outcomes, config.eval.samples), "key": job.key, "outcomes": finished.name,
        "sha256": fingerprint.of_file(finished), "unscorable_reasons": dict(reasons), "seconds": before,
    }  # fmt: skip


def score(
    job: Job, scorer: Scorer, part: list[Problem], answers: list[list[Response]], first: int
) -> list[dict[str, Any]]:
    """A line for each problem of a part."""
    texts = [response.text for row in answers for response in row]
    rewards = iter(scorer.score([problem for problem, row in zip(part, answers) for _ in row], texts))
    lines = []
    for i, (problem, row) in enumerate(zip(part, answers)):
        got = [next(rewards) for _ in row]
        plain = isinstance(problem.answer, str | int | float)
        lines.append(
            {
                "id": problem.id, "problem": job.hashes[first + i], "prompt": problem.prompt,
                "answer": problem.answer if plain else None, "rewards": got,
                "correct": [None if reward is None else bool(job.task.correct(reward)) for reward in got],
                "tokens": [response.tokens for response in row], "finished": [response.finished for response in row],
                "responses": [response.text for response in row],
            }
        )  # fmt: skip
    return lines


def begun(path: Path, job: Job, step: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The whole parts of a suite that was broken off under the same key."""
    if header(path) != job.key:
        return [], Counter()
    lines: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        next(file)
        for text in file:
            try:
                lines.append(json.loads(text))
            except ValueError:  # the line that was being written
                break
    ends = [i for i, line in enumerate(lines) if "seconds" in line]
    kept = lines[: ends[-1] + 1] if ends else []
    reasons: Counter[str] = Counter()
    for i in ends:
        reasons.update(lines[i]["reasons"])
    return kept, reasons


def measured(job: Job, folder: Path, cache: measures.Cache) -> dict[str, Any]:
    """What is measured on a finished suite; each response's labels by form go into SUITE.forms.json."""
    rows = (folder / f"{job.name}.jsonl").read_text(encoding="utf-8").splitlines()
    outcomes = [Outcome.read(json.loads(row)) for row in rows]
    found, labels = measures.take(job.measure, job.suite, job.task, job.problems, outcomes, cache)
    report.save(folder / f"{job.name}.forms.json", {"problems": [o.id for o in outcomes if o.scored], **labels})
    return {"diversity": None, "judge": None, "rating": None, **found, "measured": job.measure.settings}
