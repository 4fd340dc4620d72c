"""Groups that teach nothing are asked anew with other prompts, at a price that is counted; several files are mixed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from flowrl_kernels.trainer import config_file, dynamic, loop, measure
from flowrl_kernels.trainer.config import Config, TaskConfig
from flowrl_kernels.trainer.prompts import Mixture, mixture_of, prompt_numbers
from flowrl_kernels.trainer.records import Rollouts
from flowrl_kernels.trainer.rollout import Kept
from flowrl_kernels.trainer.tasks import Problem, build_task
from flowrl_kernels.trainer.tasks.sums import Sums


def rollouts(name, slots, rewards, lengths, parts=None):
    """Two responses to each slot; token t of response i is 10 i + t, and it was drawn from that token alone."""
    count = len(rewards)
    tokens = [np.arange(n) + 10 * i for i, n in enumerate(lengths)]
    flat = torch.from_numpy(np.concatenate(tokens)).int()
    return Rollouts(
        problems=[Problem(i // 2, f"{name}{i // 2}", "") for i in range(count)],
        numbers=[2 * slot + j for slot in slots for j in range(2)],
        prompts=[np.asarray([i]) for i in range(count)],
        responses=tokens,
        logp=torch.tensor([[-1.0] * n + [0.0] * (max(lengths) - n) for n in lengths]),
        finished=torch.ones(count, dtype=torch.bool),
        texts=[f"{name}{i}" for i in range(count)],
        kept=Kept(flat, torch.arange(len(flat) + 1)),
        reward=rewards,
        parts=parts or {},
    )


def refill(most, first, others):
    run = SimpleNamespace(
        config=tiny.config(rollout={"samples": 2, "prompts": 3, "dynamic": most}), world=tiny.ALONE, task=Sums()
    )
    asked = []

    def sample(slots, extra):
        asked.append((slots, extra))
        return others[extra - 1]

    return *dynamic.refill(run, first, sample), asked


FIRST = ("a", [4, 7, 9], [1.0, 1.0, 0.0, 1.0, 0.0, None], [2, 1, 3, 1, 1, 1])


def test_poor_groups_are_replaced_one_round_after_the_other_and_the_price_is_counted():
    second = rollouts("b", [4, 9], [0.0, 1.0, 0.0, 0.0], [4, 1, 2, 2])
    third = rollouts("c", [9], [1.0, 0.0], [1, 1])
    got, figures, asked = refill(5, rollouts(*FIRST), [second, third])
    assert asked == [([4, 9], 1), ([9], 2)]  # and no third: nothing is poor
    assert got.texts == ["b0", "b1", "a2", "a3", "c0", "c1"]
    assert got.reward == [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert got.numbers == [8, 9, 14, 15, 18, 19]
    assert [p.prompt for p in got.problems] == ["b0", "b0", "a1", "a1", "c0", "c0"]
    assert [r.tolist() for r in got.responses] == [[0, 1, 2, 3], [10], [20, 21, 22], [30], [0], [10]]
    assert got.kept.ids.tolist() == [token for r in got.responses for token in r]
    assert got.kept.offsets.tolist() == list(range(12))
    assert (got.logp != 0).sum(-1).tolist() == [4, 1, 3, 1, 1, 1]
    assert figures == {
        "extra_rounds": 2.0,
        "extra_prompts": 3.0,
        "thrown_away": 1 - 11 / (9 + 9 + 2),
        "groups_poor": 0.0,
        "reward_asked": 3 / 5,  # of the first round, without what could not be scored
        "accuracy_asked": 3 / 5,
    }


def test_what_no_round_found_better_for_stays_as_it_was():
    second = rollouts("b", [4, 9], [0.0, 0.0, 0.0, 1.0], [4, 1, 2, 2])
    got, figures, asked = refill(1, rollouts(*FIRST), [second])
    assert len(asked) == 1
    assert got.texts == ["a0", "a1", "a2", "a3", "b2", "b3"]
    assert figures["groups_poor"] == 1 / 3
    assert figures["extra_rounds"] == 1.0


def test_of_several_rewards_the_first_says_what_is_poor():
    first = rollouts(*FIRST[:2], [1.0, 0.9, 0.1, 1.0, 0.2, 0.3], FIRST[3], {"right": FIRST[2], "short": [0.5] * 6})
    other = rollouts("b", [4, 9], [0.5] * 4, [1] * 4, {"right": [0.0, 1.0, 1.0, 0.0], "short": [0.25] * 4})
    got, _, _ = refill(2, first, [other])
    assert got.parts == {"right": [0.0, 1.0, 0.0, 1.0, 1.0, 0.0], "short": [0.25, 0.25, 0.5, 0.5, 0.25, 0.25]}


SMALL = [*tiny.SMALL, "--task.reward", "rewards_for_tests:odd", "--task.reward_workers", "0", "--rollout.samples", "2"]


def train(folder, *args):
    flags = [*SMALL, "--run.dir", str(folder), "--run.cache", str(folder.parent / "cache")]
    return loop.train(config_file.override(Config(), [*flags, *args]))


def numbers(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] in ("train", "eval", "final")]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s"))} for row in rows]


def test_a_run_with_dynamic_sampling_learns_from_more_groups_and_resumes_to_the_bit(tmp_path):
    more = ["--rollout.dynamic", "6", "--algorithm.name", "grpo"]
    want = train(tmp_path / "whole", "--run.steps", "3", *more)
    train(tmp_path / "parts", "--run.steps", "2", *more)
    assert train(tmp_path / "parts", "--run.steps", "3", "--run.resume", "True", *more) == want
    rows = numbers(tmp_path / "whole")
    assert numbers(tmp_path / "parts") == rows
    rows = [row for row in rows if row["kind"] == "train"]
    for row in rows:
        assert row["groups_mixed"] == 1 - row["groups_poor"]
        assert (row["extra_prompts"] > 0) == (row["thrown_away"] > 0)
    assert sum(row["extra_prompts"] for row in rows) > 0
    assert np.mean([row["groups_mixed"] for row in rows]) > 0.8  # about half without


@pytest.mark.distributed
@pytest.mark.nightly
def test_two_ranks_ask_the_same_prompts_anew_as_one(tmp_path):
    more = ["--rollout.dynamic", "2", "--run.steps", "2", "--algorithm.name", "grpo"]
    train(tmp_path / "one", *more)
    (tmp_path / "a.toml").write_text("")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flowrl_kernels.trainer", "train", str(tmp_path / "a.toml"), *SMALL, *more]
    command += ["--run.dir", str(tmp_path / "two"), "--run.cache", str(tmp_path / "cache")]
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (numbers(tmp_path / name)[0] for name in ("one", "two"))
    assert one["extra_prompts"] > 0
    for key in ("extra_rounds", "extra_prompts", "groups_poor", "reward_asked", "reward", "length"):
        assert two[key] == pytest.approx(one[key], abs=1e-12), key
    assert two["thrown_away"] >= one["thrown_away"]  # a rank whose groups are good samples one more, to keep in step


# ------------------------------------------------------------------------------------------------ several files


def test_an_epoch_asks_each_source_its_share_in_orders_of_its_own():
    mixture, total = Mixture((12, 4), (8, 8)), 16
    asked = [i for step in range(1, 25) for i in prompt_numbers(3, step, 4, total, mixture)]
    for epoch in range(6):  # of 16 prompts each
        part = asked[epoch * 16 : (epoch + 1) * 16]
        assert sum(i < 12 for i in part) == 8
        small = [i for i in part if i >= 12]
        assert sorted(small) == sorted([12, 13, 14, 15] * 2)  # twice through the small one
    large = [i for i in asked if i < 12]
    assert sorted(large) == sorted([*range(12)] * 4)  # 48 of the large one: each problem four times
    assert asked != [i for step in range(1, 25) for i in prompt_numbers(4, step, 4, total, mixture)]
    assert prompt_numbers(3, 7, 4, total, mixture) == asked[24:28]  # no state


def test_an_extra_round_asks_in_another_order_and_the_first_as_ever():
    plain = prompt_numbers(3, 2, 8, 20)
    assert plain == np.random.default_rng((3, 1, 0)).permutation(20)[8:16].tolist()
    assert plain != prompt_numbers(3, 2, 8, 20, extra=1) != prompt_numbers(3, 2, 8, 20, extra=2)


def files(folder, *counts):
    for number, count in enumerate(counts):
        rows = [json.dumps({"prompt": f"{number}.{i}", "answer": i}) for i in range(count)]
        (folder / f"{number}.jsonl").write_text("\n".join(rows))
    return tuple(str(folder / f"{number}.jsonl") for number in range(len(counts)))


def test_several_files_are_one_task_and_weights_mix_what_is_left_of_them(tmp_path):
    cfg = TaskConfig(name="file", train=files(tmp_path, 10, 5), train_weights=(1.0, 3.0))
    task = build_task(cfg)
    problems = task.problems("train")
    assert [p.id for p in problems] == list(range(15))
    assert [p.prompt for p in problems[8:12]] == ["0.8", "0.9", "1.0", "1.1"]
    assert mixture_of(cfg, task, problems) == Mixture((10, 5), (4, 11))
    assert mixture_of(cfg, task, problems[4:]) == Mixture((6, 5), (3, 8))  # four prompts were too long
    assert mixture_of(TaskConfig(name="file", train=cfg.train), task, problems) is None


@pytest.mark.parametrize(
    ("weights", "left", "message"),
    [
        ((1.0,), 0, "wanted one for each of 2 files; got 1"),
        ((1.0, 0.0), 0, "wanted numbers above 0"),
        ((1.0, float("nan")), 0, "wanted numbers above 0"),
        ((1.0, 1e-6), 0, "1e-06 gives file 2 of task.train none of an epoch's 15 prompts"),
        ((1.0, 1.0), 10, "no prompt of file 1 of task.train is left"),
    ],
)
def test_weights_that_mix_nothing_are_refused(tmp_path, weights, left, message):
    cfg = TaskConfig(name="file", train=files(tmp_path, 10, 5), train_weights=weights)
    task = build_task(cfg)
    with pytest.raises(ValueError, match=f"task.train_weights: .*{message}"):
        mixture_of(cfg, task, task.problems("train")[left:])
    with pytest.raises(ValueError, match="wanted one for each of 1 files; got 2"):
        mixture_of(TaskConfig(train_weights=(1.0, 1.0)), Sums(), Sums().problems("train"))


# ------------------------------------------------------------------------------------------------ KL to the start


def test_the_kl_to_the_reference_is_the_mean_of_schulmans_third_estimator():
    token = {"ref": torch.tensor([-1.0, -2.0]), "sampler": torch.tensor([-1.5, -1.9])}
    batch = SimpleNamespace(live=True, per_token=token)
    total, count = measure.kl_to_reference([batch, SimpleNamespace(live=False, per_token=token)])["kl_ref"]
    want = sum(np.exp(r) - 1 - r for r in (0.5, -0.1))
    assert (total, count) == (pytest.approx(want, rel=1e-6), 2.0)
    old = {**token, "old": torch.tensor([-1.0, -2.0])}
    assert measure.kl_to_reference([SimpleNamespace(live=True, per_token=old)])["kl_ref"][0] == 0.0
    assert measure.kl_to_reference([SimpleNamespace(live=True, per_token={"sampler": token["ref"]})]) == {}


def test_the_kl_shows_at_weight_0_where_asked_for_and_changes_nothing_else(tmp_path):
    more = ["--run.steps", "3", "--algorithm.name", "grpo", "--optim.lr", "1e-2"]
    train(tmp_path / "plain", *more)
    train(tmp_path / "shown", *more, "--log.kl", "True")
    plain, shown = (numbers(tmp_path / name) for name in ("plain", "shown"))
    assert [{k: v for k, v in row.items() if k != "kl_ref"} for row in shown] == plain
    kl = [row["kl_ref"] for row in shown if row["kind"] == "train"]
    assert abs(kl[0]) < 1e-9  # the policy is its start
    assert kl[2] > 1e-5
