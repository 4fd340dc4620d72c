"""What can be known before step 1 from settings, data and tokenizer: refused by name, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowrl_kernels.trainer import algorithms, mismatch, objective, packages
from flowrl_kernels.trainer.batches import SHORT_ROW, plan
from flowrl_kernels.trainer.config import Config, LoraConfig, RolloutConfig
from flowrl_kernels.trainer.evaluate import chosen
from flowrl_kernels.trainer.policy import named
from flowrl_kernels.trainer.rollout import nccl
from flowrl_kernels.trainer.rollout.http import check_address
from flowrl_kernels.trainer.tasks import Problem, Task

# settings of `rollout` that not every engine reads (what "server" does not read itself, `rollout.serve` does)
READ_BY = {
    "tensor_parallel": ("vllm", "server"), "kv_cache": ("vllm", "server"), "probe_limit": ("vllm", "server"),
    "head": ("vllm", "server"),
    "servers": ("server",), "timeout": ("server",), "retries": ("server",),
    "push": ("server",),
}  # fmt: skip
NO_OVERLAP = {
    "hf": "samples from the live weights, which training changes",
    "vllm": "runs in the trainer's own process, where one waits for the other",
}


def check_algorithm(config: Config) -> None:
    """Refuses an algorithm with settings that it would ignore, or under which it has no gradient.

    Settings that choose between tasks or describe another algorithm as a whole (preset, beta, log_z, reward; [log_z],
    [critic], [warm], task.*) are left alone: one file serves several algorithms in `flowrl compare`.

    Raises:
        ValueError: naming the key, what was wanted and what came.
    """
    a, samples, algorithm = config.algorithm, config.rollout.samples, algorithms.of(config)
    for name, default in algorithms.OWN.items():
        value = getattr(a, name)
        if value != default and name not in algorithm.reads:
            raise ValueError(f"algorithm.{name}: wanted {default!r}, {a.name} does not use it; got {value!r}")
    if a.clip is not None and algorithm.ratio == "none":
        raise ValueError(f"algorithm.clip: wanted none, {a.name} has no ratio to clip; got {a.clip!r}")
    if a.clip is not None and not a.clip[0] < a.clip[1]:
        raise ValueError(f"algorithm.clip: wanted a range [low, high] with low < high; got {list(a.clip)!r}")
    if a.overlong_buffer > config.rollout.max_new_tokens:
        most = config.rollout.max_new_tokens
        raise ValueError(
            f"algorithm.overlong_buffer: wanted at most rollout.max_new_tokens = {most}; got {a.overlong_buffer}"
        )
    mismatch.check_correction(config)
    if algorithm.residual:
        objective.log_z_kind(config)  # the preset's name, and what goes with it
        why = f"algorithm.reward = {a.reward!r}" if a.reward != "raw" else ""
        why = f"log Z by the group's mean ({a.preset})" if objective.log_z_kind(config) in ("group", "through") else why
    else:
        why = a.name if algorithm.compares else ""
    if a.filter_groups or a.unlikeliness > 0:
        why = why or ("algorithm.filter_groups" if a.filter_groups else "algorithm.unlikeliness")
    why = why or ("rollout.dynamic" if config.rollout.dynamic else "")
    if samples < 2 and why:
        raise ValueError(f"rollout.samples: wanted at least 2, {why} compares a group's responses; got {samples}")


def check_lora(config: Config) -> None:
    """Refuses adapters over weights that they could not be added to, and settings that none would read.

    Raises:
        ValueError: naming the key, what was wanted and what came.
    """
    c, default = config.lora, LoraConfig()
    if not c.rank:
        for name in ("alpha", "targets"):
            if getattr(c, name) != getattr(default, name):
                raise ValueError(f"lora.{name}: wanted nothing beside lora.rank = 0; got {getattr(c, name)!r}")
        return
    if not c.targets or ("all-linear" in c.targets and len(c.targets) > 1):
        raise ValueError(f"lora.targets: wanted names of layers, or 'all-linear' alone; got {list(c.targets)!r}")
    if config.parallel.offload_reference:
        raise ValueError(
            "parallel.offload_reference: wanted false beside lora.rank, the reference is the policy without its "
            "adapters; got True"
        )
    kind = getattr(shape_of(config), "quantization_config", None) if config.model.name else None
    if kind is not None:
        method = kind.get("quant_method") if isinstance(kind, dict) else getattr(kind, "quant_method", kind)
        raise ValueError(
            f"lora.rank: wanted 0 for {config.model.name!r}, whose weights are quantised ({method}): adapters "
            f"could not be added to them for an engine or an export; got {c.rank}"
        )


def check_packages(config: Config) -> None:
    """Refuses what needs a package that is not installed."""
    for field in packages.PACKAGES:
        section, name = field.split(".")
        value = getattr(getattr(config, section), name)
        if value and value == packages.VALUE.get(field, value):
            packages.require(field)


def check_engine(config: Config, ranks: int) -> None:
    """Refuses settings of another engine, and addresses and ranks that it cannot use.

    Raises:
        ValueError: naming the key, what was wanted and what came.
    """
    r, default, updates = config.rollout, RolloutConfig(), config.updates_a_step
    if r.overlap and r.engine in NO_OVERLAP:
        why = f"engine = {r.engine!r} {NO_OVERLAP[r.engine]}"
        raise ValueError(f"rollout.overlap: wanted 0, {why} (engine = 'server' can); got {r.overlap}")
    if r.overlap and r.dynamic:
        why = "its extra rounds need the engine that samples ahead"
        raise ValueError(f"rollout.overlap: wanted 0 with rollout.dynamic ({why}); got {r.overlap}")
    if r.overlap > updates:
        raise ValueError(
            f"rollout.overlap: wanted at most {updates}, the updates of a step: one batch is sampled while one trains, "
            f"and further behind it would only be older; got {r.overlap}"
        )
    for name, engines in READ_BY.items():
        value, unset = getattr(r, name), getattr(default, name)
        if r.engine not in engines and value != unset:
            raise ValueError(f"rollout.{name}: wanted {unset!r}, engine = {r.engine!r} does not use it; got {value!r}")
    if r.engine == "server":
        if not r.servers:
            raise ValueError("rollout.servers: wanted at least one address, engine = 'server' asks them; got none")
        for address in r.servers:
            check_address(address, "rollout.servers")
        if r.timeout <= 0:
            raise ValueError(f"rollout.timeout: wanted more than 0 seconds; got {r.timeout}")
        why = nccl.missing(config.run.device) if r.push == "nccl" else ""
        if why:
            raise ValueError(f"rollout.push: wanted 'folder', {why}; got {r.push!r}")
    if r.engine != "hf":
        if r.kv_cache <= 0:
            raise ValueError(f"rollout.kv_cache: wanted more than 0 GiB; got {r.kv_cache}")
        if r.head == "trainer" and r.tensor_parallel > 1:
            why = f"rollout.tensor_parallel = {r.tensor_parallel} splits the head"
            raise ValueError(f"rollout.head: wanted 'engine', {why}; got {r.head!r}")
        if r.engine == "vllm" and ranks % r.tensor_parallel:
            raise ValueError(f"rollout.tensor_parallel: wanted a divisor of {ranks} ranks; got {r.tensor_parallel}")


def check_splits(config: Config, task: Task) -> None:
    """Refuses evaluations of a split that holds nothing."""
    if config.eval.every and config.eval.every < config.run.steps and not len(task.problems("valid")):
        raise ValueError(
            f"eval.every: wanted a valid split to evaluate on (task.valid), or 0; got {config.eval.every} and none"
        )


def check_stop(config: Config, task: Task) -> None:
    """Refuses stop texts beside figures over every listed answer, which end with the end token."""
    if not (config.rollout.stop and config.eval.exact):
        return
    held = next((problems for split in ("test", "valid", "train") if len(problems := task.problems(split))), [])
    if held and task.correct_texts(held[0]) is not None:
        raise ValueError(
            f"eval.exact: wanted false beside rollout.stop = {list(config.rollout.stop)!r}: {task.name}'s listed "
            "answers end with the end token; got True"
        )


def context_of(config: Config) -> int | None:
    """The longest sequence of the model in the config, tokens; None where it has no limit."""
    if not config.model.name:
        return config.model.context
    return getattr(shape_of(config).get_text_config(), "max_position_embeddings", None)


def shape_of(config: Config) -> Any:
    """The configuration of the model that `model.name` names."""
    from transformers import AutoConfig

    with named(config.model.name):
        return AutoConfig.from_pretrained(config.model.name, trust_remote_code=config.model.trust_remote_code)


def prompt_limit(config: Config, context: int | None) -> int | None:
    """The longest prompt that leaves room for a whole response: `rollout.max_prompt_tokens`, within the context.

    Raises:
        ValueError: the two together exceed the context, or a response alone does.
    """
    r = config.rollout
    left = None if context is None else context - r.max_new_tokens
    if left is not None and max(r.max_prompt_tokens, 1) > left:
        raise ValueError(
            f"rollout.max_new_tokens: prompt ({max(r.max_prompt_tokens, 1)}) and response ({r.max_new_tokens}) exceed "
            f"the model's context of {context}"
        )
    return r.max_prompt_tokens or left


def check_evaluated(config: Config, task: Task, encode: Callable[[Problem], list[int]], context: int | None) -> None:
    """Refuses prompts of an evaluation that leave no room for a response in the model's context."""
    splits = ["test", "valid"] if config.eval.every else ["test"]
    if not len(task.problems("test")):
        splits = ["valid"]
    for split in splits:
        for problem in chosen(task, split, config.eval.problems) if len(task.problems(split)) else ():
            tokens = len(encode(problem))
            if context is not None and tokens + config.rollout.max_new_tokens > context:
                raise ValueError(
                    f"task.{split}: the prompt of problem {problem.id} ({tokens} tokens) and a response "
                    f"({config.rollout.max_new_tokens}) exceed the model's context of {context}"
                )


def fitting(
    config: Config, task: Task, encode: Callable[[Problem], list[int]], limit: int | None
) -> tuple[list[Problem], list[str]]:
    """The training problems whose prompts fit, and what the log should say of those that do not.

    Raises:
        ValueError: there are none.
    """
    problems = list(task.problems("train"))
    kept = [p for p in problems if limit is None or len(encode(p)) <= limit]
    if not kept:
        r = config.rollout
        why = ""
        if not r.max_prompt_tokens and limit is not None:
            context = limit + r.max_new_tokens
            why = f"; with a response of {r.max_new_tokens} they exceed the model's context of {context}"
        raise ValueError(f"task: no training problem (of {len(problems)}) with a prompt of at most {limit} tokens{why}")
    left = len(problems) - len(kept)
    return kept, [f"{left} of {len(problems)} prompts are longer than {limit} tokens: left out"] if left else []


def check_answer(config: Config, task: Task) -> None:
    """Refuses responses that cannot hold the task's longest answer."""
    budget = config.rollout.max_new_tokens
    answer = task.max_response_tokens if not config.model.name else None
    if answer is not None and answer > budget:
        raise ValueError(f"rollout.max_new_tokens: {task.name}'s longest answer has {answer} tokens; got {budget}")


def check_budgets(config: Config, longest: int) -> None:
    """Refuses budgets that the longest prompt with the longest response, or such a group, does not fit into.

    Args:
        longest: tokens of the longest training prompt.
    """
    p, r = config.parallel, config.rollout
    length = longest + r.max_new_tokens - 1  # the last token predicts nothing
    for name, budget in (("max_tokens", p.max_tokens), ("row_tokens", p.row_tokens or p.max_tokens)):
        if length > budget:
            raise ValueError(
                f"parallel.{name}: wanted at least {length}, for a prompt of {longest} and a response of "
                f"{r.max_new_tokens} tokens; got {budget}"
            )
    if objective.whole_groups(config):
        row = p.row_tokens or max(min(SHORT_ROW, p.max_tokens), length)
        if len(plan([length] * r.samples, max_tokens=p.max_tokens, row_tokens=row)) > 1:
            raise ValueError(
                f"parallel.max_tokens: preset {config.algorithm.preset!r} wants a group in one micro-batch, up to "
                f"{r.samples} x {length} tokens; got {p.max_tokens}"
            )
