import itertools
import math
import random

import pytest
import torch

from flowrl_kernels.trainer.config import EvalConfig, TaskConfig
from flowrl_kernels.trainer.evaluate import Response, exact, log_partition, pass_at_k, sampled, summarize
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.tasks.countdown import Countdown
from flowrl_kernels.trainer.tasks.sums import Sums


@pytest.fixture(scope="module")
def sums():
    return Sums()


def uniform(problems, texts):
    return torch.full((len(texts),), -math.log(1000.0), dtype=torch.float64)


def tilted(sums, beta, length=6):
    """The optimum against the uniform reference, as a log-probability function."""

    def logp(problems, texts):
        reward = torch.tensor([sums.verify(p, t) for p, t in zip(problems, texts)], dtype=torch.float64)
        return torch.log_softmax(length * beta * reward, 0)

    return logp


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, right, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if right > n or k > n:
            continue
        subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="k=5"):
        pass_at_k(4, 1, 5)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    p, n, k = 0.2, 6, 4
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_figures_of_known_samples(sums):
    problems = [p for p in sums.problems("test") if p.answer in (4, 5)]
    texts = [["4+0+0", "4+0+0", "0+4+0", "9+9+9"], ["5+0+0", "x", "y", "z"]]
    answers = [[Response(t, 6, t != "z") for t in row] for row in texts]
    rewards = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, None]
    got = summarize(sums, problems, answers, rewards, [1, 2, 4])
    assert got["accuracy"] == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert got["pass@1"] == pytest.approx(got["accuracy"])
    assert got["pass@2"] == pytest.approx((1 + (1 - 1 / 3)) / 2)
    assert "pass@4" not in got  # one problem has three scored samples
    assert got["accuracy_se"] == pytest.approx(abs(3 / 4 - 1 / 3) / 2)
    assert got["distinct"] == pytest.approx(1.5)
    two = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert got["effective_modes"] == pytest.approx((two + 1) / 2)
    assert got["effective_modes_share"] == pytest.approx((two / 15 + 1 / 21) / 2)
    assert got["reward"] == pytest.approx(4 / 7)
    assert got["truncated"] == got["unscorable"] == pytest.approx(1 / 8)


def test_evaluation_asks_for_the_problems_and_samples_it_was_told(sums):
    asked = []

    def sample(problems, n, seed, first):
        asked.append((len(problems), n, seed))
        rng = random.Random(seed)
        return [[Response(rng.choice(sums.responses(p)), 6, True) for _ in range(n)] for p in problems]

    cfg = EvalConfig(problems=7, samples=8, seed=3)
    first = sampled(sums, "test", sample, Scorer(TaskConfig(), sums), cfg).figures
    again = sampled(sums, "test", sample, Scorer(TaskConfig(), sums), cfg).figures
    assert asked == [(7, 8, 3)] * 2
    assert first == again
    assert {"pass@1", "pass@2", "pass@4", "pass@8"} <= first.keys()
    assert first["problems"] == 7


def test_the_optimum_has_no_distance_from_itself_and_every_other_policy_has_some(sums):
    cfg = EvalConfig()
    beta = 2.0
    at = exact(sums, "test", tilted(sums, beta), uniform, beta=beta, cfg=cfg)
    assert at["exact_kl"] == pytest.approx(0, abs=1e-8)
    assert at["exact_modes_share"] == pytest.approx(1)
    off = exact(sums, "test", tilted(sums, 1.5), uniform, beta=beta, cfg=cfg)
    start = exact(sums, "test", uniform, uniform, beta=beta, cfg=cfg)
    assert 0 < off["exact_kl"] < start["exact_kl"]
    assert start["exact_accuracy"] == pytest.approx(sum(len(sums.solutions(p)) for p in sums.problems("test")) / 20_000)


def test_log_z_and_its_error_are_those_of_the_closed_form(sums):
    beta = 1.0
    closed = [
        math.log((1000 - n + n * math.exp(6 * beta)) / 1000) / 6
        for n in (len(sums.solutions(p)) for p in sums.problems("test"))
    ]
    got = exact(sums, "test", uniform, uniform, lambda p: torch.tensor(closed) + 0.25, beta=beta, cfg=EvalConfig())
    assert got["log_z_exact"] == pytest.approx(sum(closed) / 20)
    assert got["log_z_error"] == pytest.approx(0.25, abs=1e-6)


def test_a_collapsed_policy_is_accurate_with_one_mode(sums):
    def collapsed(problems, texts):
        best = sums.solutions(problems[0])[0]
        return torch.tensor([0.0 if t == best else -1e9 for t in texts], dtype=torch.float64)

    got = exact(sums, "test", collapsed, uniform, beta=2.0, cfg=EvalConfig())
    assert got["exact_accuracy"] == pytest.approx(1)
    assert got["exact_modes"] == pytest.approx(1)
    assert got["exact_kl"] > 1  # of 15 to 75 equally good answers it keeps one


def test_mass_outside_the_listed_answers_counts(sums):
    def leaky(problems, texts):
        return tilted(sums, 2.0)(problems, texts) + math.log(0.5)

    got = exact(sums, "test", leaky, uniform, beta=2.0, cfg=EvalConfig())
    assert got["exact_accuracy"] < 0.5
    assert got["exact_kl"] > 5


@pytest.mark.parametrize("normalized", [True, False])
def test_the_partition_makes_the_optimum_add_up_to_one_with_mixed_lengths(normalized):
    torch.manual_seed(0)
    log_ref = torch.log_softmax(torch.randn(50, dtype=torch.float64) * 3, 0)
    length = torch.randint(2, 40, (50,)).double()
    reward = torch.randn(50, dtype=torch.float64)
    z = log_partition(log_ref, length, reward, 1.5, normalized)
    scale = length if normalized else torch.ones_like(length)
    weight = length * (1.5 * reward - z) if normalized else 1.5 * reward - z
    assert float((log_ref + weight).exp().sum()) == pytest.approx(1, abs=1e-6)
    assert scale.min() > 0


def test_unnormalised_targets_differ_from_normalised_ones(sums):
    got = exact(sums, "test", tilted(sums, 2.0, length=1), uniform, beta=2.0, cfg=EvalConfig(), length_normalize=False)
    assert got["exact_kl"] == pytest.approx(0, abs=1e-8)


def test_countdown_has_exact_accuracy_without_a_listed_space():
    task = Countdown(held_out=10)

    def logp(problems, texts):
        return torch.full((len(texts),), math.log(0.01), dtype=torch.float64)

    got = exact(task, "test", logp, uniform, beta=2.0, cfg=EvalConfig())
    expected = sum(len(task.correct_texts(p)) for p in task.problems("test")) / 1000
    assert got["exact_accuracy"] == pytest.approx(expected)
    assert "exact_kl" not in got
    assert 0 < got["exact_modes_share"] <= 1


def test_an_empty_split_is_named(tmp_path):
    from flowrl_kernels.trainer.tasks import build_task

    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": 1}')
    task = build_task(TaskConfig(name="file", train=str(tmp_path / "a.jsonl")))
    with pytest.raises(ValueError, match="the test split of task 'file' has no problems"):
        sampled(task, "test", lambda *a: [], Scorer(TaskConfig(), task), EvalConfig())
