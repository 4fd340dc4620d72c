"""Rewards that change the target (MARA) and credit for different right answers; held to enumeration."""

import itertools
import math

import pytest
import torch

from flowrl_kernels import advantages

D = torch.float64


def test_mara_gives_every_right_answer_of_a_group_the_mass_of_its_likeliest():
    reward = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 1.0], dtype=D)
    ref = torch.tensor([-3.0, -1.0, -2.0, -5.0, -1.0, -2.0, -4.0], dtype=D)
    groups = torch.tensor([4, 4, 4, 9, 9, 4, 9])
    got = advantages.mara_reward(reward, ref, groups, beta=2.0)
    wanted = [1 + (-2 + 3) / 2, 0.0, 1.0, 1 + (-4 + 5) / 2, 0.0, 0.5, 1.0]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=D), rtol=0, atol=1e-12)
    mass = ref + 2.0 * got
    assert float(mass[0]) == pytest.approx(float(mass[2]))
    assert float(mass[3]) == pytest.approx(float(mass[6]))
    everything = advantages.mara_reward(reward, ref, groups, beta=2.0, threshold=0.5)
    assert float(everything[5]) == pytest.approx(1.0), "as likely as the likeliest right one, whose reward it takes"


def test_mara_leaves_a_group_without_a_right_answer_alone():
    reward, groups = torch.tensor([0.0, 0.25, 0.0]), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(advantages.mara_reward(reward, -torch.rand(3), groups, beta=1.0), reward)


def credits(right, classes, kind):
    """Credit and baseline of each member of one group, by counting."""
    out = []
    for i in range(len(right)):
        rest = [j for j in range(len(right)) if j != i]

        def credit(j, among):
            same = [m for m in among if right[m] and classes[m] == classes[j]]
            if not right[j]:
                return 0.0
            return 1 / len(same) if kind == "shapley" else float(len(same) == 1)

        others = sum(credit(j, rest) for j in rest) / max(len(rest), 1)
        out.append(credit(i, range(len(right))) - others)
    return out


@pytest.mark.parametrize("kind", ["shapley", "alone"])
def test_credit_and_its_baseline_are_what_counting_gives(kind):
    draw = torch.Generator().manual_seed(3)
    reward = torch.randint(0, 2, (24,), generator=draw).to(D)
    classes, groups = (torch.randint(0, 4, (24,), generator=draw) * 7 - 3 for _ in range(2))
    got = advantages.distinct_advantage(reward, classes, groups, credit=kind)
    for g in groups.unique():
        own = (groups == g).nonzero().squeeze(-1)
        wanted = credits(reward[own].bool().tolist(), classes[own].tolist(), kind)
        torch.testing.assert_close(got[own], torch.tensor(wanted, dtype=D), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["shapley", "alone"])
def test_the_expected_gradient_is_that_of_how_many_different_right_answers_are_found(kind):
    """Every group of three from five answers: right are 0 and 1 (one class), and 2 (another)."""
    size, classes, right = 3, torch.tensor([0, 0, 1, 2, 3]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=D)
    logits = torch.tensor([0.3, -0.4, 0.1, 0.9, -1.0], dtype=D, requires_grad=True)
    logp = logits.log_softmax(0)
    policy = torch.zeros(5, dtype=D)
    for group in itertools.product(range(5), repeat=size):
        a = advantages.distinct_advantage(
            right[list(group)], classes[list(group)], torch.zeros(size, dtype=torch.int64), credit=kind
        )
        chance = float(logp.detach()[list(group)].sum().exp())
        for i, answer in enumerate(group):
            policy[answer] += chance * float(a[i])
    (got,) = torch.autograd.grad((policy * logp).sum(), logits, retain_graph=True)
    p = logp.exp()
    found = [sum(1 - (1 - m) ** k for m in (p[0] + p[1], p[2])) for k in range(1, size + 1)]
    aim = found[-1] if kind == "alone" else sum(f / k for k, f in enumerate(found, 1))
    (wanted,) = torch.autograd.grad(aim, logits)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert float(wanted.norm()) > 0.05


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda r, g: advantages.mara_reward(r, r[:2], g, beta=1.0), ValueError, r"logp_ref: .*\(3,\)"),
        (lambda r, g: advantages.mara_reward(r, r, g, beta=0.0), ValueError, "beta: .*0"),
        (lambda r, g: advantages.mara_reward(r, r, g, beta=math.nan), ValueError, "beta: .*nan"),
        (lambda r, g: advantages.distinct_advantage(r, r, g), TypeError, "classes: "),
        (lambda r, g: advantages.distinct_advantage(r, g, g, credit="all"), ValueError, "credit: .*'all'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
