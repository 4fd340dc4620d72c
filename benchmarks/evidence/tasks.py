"""Tasks whose every response is listed: strings as paths in one tree, a reward each, a reference, exact figures.

A policy on such a task is a table: one row of logits for each place in the tree (and prompt). Whatever it gives a
string is a sum over the string's path, so every figure here is exact, none is sampled.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

END = -1  # of a path: no token here


class Tree(NamedTuple):
    """All strings as paths of choices from place 0. S places, A choices at most, R strings of at most T tokens.

    A token without an alternative is no choice: those are all at the last place, whose one choice is certain. They
    count in a string's length and nowhere else.
    """

    child: Tensor  # [S, A] int64: the place that a choice leads to, or -1 - (the string that it completes)
    allowed: Tensor  # [S, A] bool
    place: Tensor  # [R, T] int64: where each token is chosen; 0 after the end
    token: Tensor  # [R, T] int64: which of its place's choices it is; END after the end
    length: Tensor  # [R] int64: tokens, end token included
    depth: int  # most choices of a string


class Task(NamedTuple):
    """P prompts that share one tree."""

    name: str
    tree: Tree
    texts: list[str]  # [R]
    reward: Tensor  # [P, R] float64
    right: Tensor  # [P, R] bool
    beta: float  # of the stated target pi_ref exp(beta r) / Z
    spread: float  # deviation of the reference's logits

    def reference(self, seed: int) -> Tensor:
        """Seeded normal logits: right answers differ in what the reference gives them, as a model's do. [S, A]"""
        draw = torch.Generator().manual_seed(1000 + seed)
        return self.spread * torch.randn(self.tree.child.shape, generator=draw, dtype=torch.float64)


def tree_of(texts: Sequence[str]) -> Tree:
    """The tree of prefixes of `texts`, whose letters are the tokens; an end token closes each."""
    end = "\n"
    following: dict[str, list[str]] = {}  # of each prefix: the letters that come next
    for text in texts:
        for i, letter in enumerate(text + end):
            known = following.setdefault(text[:i], [])
            if letter not in known:
                known.append(letter)
    number = {prefix: i for i, prefix in enumerate(p for p, letters in following.items() if len(letters) > 1)}
    forced = len(number)
    paths = [
        [
            (number[text[:i]], following[text[:i]].index(letter)) if text[:i] in number else (forced, 0)
            for i, letter in enumerate(text + end)
        ]
        for text in texts
    ]
    width = max(map(len, paths))
    child = torch.zeros(forced + 1, max(map(len, following.values())), dtype=torch.int64)
    allowed = torch.zeros(child.shape, dtype=torch.bool)
    allowed[forced, 0] = True
    for which, path in enumerate(paths):
        choices = [step for step in path if step[0] != forced]
        for (at, choice), to in zip(choices, [at for at, _ in choices[1:]] + [-1 - which]):
            child[at, choice], allowed[at, choice] = to, True
    place = torch.tensor([[at for at, _ in path] + [0] * (width - len(path)) for path in paths])
    token = torch.tensor([[choice for _, choice in path] + [END] * (width - len(path)) for path in paths])
    depth = int(((place != forced) & (token != END)).sum(-1).max())
    return Tree(child, allowed, place, token, torch.tensor([len(path) for path in paths]), depth)


def log_table(tree: Tree, logits: Tensor) -> Tensor:
    """Log-probabilities of each token at each place. [..., S, A]"""
    return logits.masked_fill(~tree.allowed, -torch.inf).log_softmax(-1)


def of_tokens(table: Tensor, place: Tensor, token: Tensor) -> Tensor:
    """The entries of log-probabilities [..., S, A] along paths, 0 after their end; the paths' shape."""
    return table[..., place, token.clamp_min(0)].masked_fill(token == END, 0.0)


def log_probs(tree: Tree, logits: Tensor) -> Tensor:
    """Log-probability of every string. [..., S, A] -> [..., R]"""
    return of_tokens(log_table(tree, logits), tree.place, tree.token).sum(-1)


def table_of(tree: Tree, log_p: Tensor) -> Tensor:
    """The logits whose strings have the probabilities exp(log_p) [R]: the log of what passes through each choice."""
    passes = torch.zeros(tree.child.shape, dtype=torch.float64)
    inside = tree.token != END
    weight = log_p.exp()[:, None].expand_as(tree.token)[inside]
    passes.index_put_((tree.place[inside], tree.token[inside]), weight, accumulate=True)
    return passes.log()


def sums_of(name: str, digits: str, terms: Sequence[int], totals: Sequence[int], beta: float) -> Task:
    texts = ["+".join(ds) for n in terms for ds in itertools.product(digits, repeat=n)]
    sums = torch.tensor([sum(map(int, text.split("+"))) for text in texts])
    right = torch.stack([sums == total for total in totals])
    return Task(name, tree_of(texts), texts, right.double(), right, beta, 0.5)


@functools.cache
def sums() -> Task:
    """Three digits that add up to 9, 13 or 16: 1,000 strings, all of six tokens."""
    return sums_of("sums", "0123456789", (3,), (9, 13, 16), 5.0)


@functools.cache
def sums_of_any_length() -> Task:
    """Two to five digits of 1 to 5 that add up to 8, 10 or 12: 3,900 strings of 4 to 10 tokens."""
    return sums_of("sums of any length", "12345", (2, 3, 4, 5), (8, 10, 12), 5.0)


@functools.cache
def modes() -> Task:
    """Strings of four letters of six; reward peaks of heights 1, .8, .6 and .4, three letters wide: graded rewards.

    The setting of the paper's first figure in kind: a distribution with several modes of unequal height. A response
    counts as right from .4 on.
    """
    letters = "abcdef"
    texts = ["".join(t) for t in itertools.product(letters, repeat=4)]
    peaks = {"aaaa": 1.0, "cfcf": 0.8, "fbdb": 0.6, "debe": 0.4}
    near = [
        max(height * max(0.0, 1 - sum(a != b for a, b in zip(text, peak)) / 3) for peak, height in peaks.items())
        for text in texts
    ]
    reward = torch.tensor([near], dtype=torch.float64)
    return Task("modes", tree_of(texts), texts, reward, reward >= 0.4, 10.0, 0.5)


TASKS = {"sums": sums, "sums_of_any_length": sums_of_any_length, "modes": modes}


def tilted(log_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log of pi_ref exp(beta r) / Z. [..., R]"""
    return (log_ref + beta * reward).log_softmax(-1)


def log_z_by_length(log_ref: Tensor, reward: Tensor, length: Tensor, beta: float) -> Tensor:
    """The log Z [P] that makes pi_ref exp(|y| (beta r - log Z)) add up to one."""
    from flowrl_kernels.trainer.evaluate import log_partition

    rows = [log_partition(ref, length, r, beta) for ref, r in zip(log_ref.expand_as(reward), reward)]
    return torch.tensor(rows, dtype=torch.float64)


def tilted_by_length(log_ref: Tensor, reward: Tensor, length: Tensor, beta: float) -> Tensor:
    """log of pi_ref exp(|y| (beta r - log Z)): the zero of the paper's residual. [P, R]"""
    partition = log_z_by_length(log_ref, reward, length, beta)
    return (log_ref + length * (beta * reward - partition[:, None])).log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, nats. [..., R] -> [...]"""
    return (p.exp() * (p - q)).nan_to_num(0.0).sum(-1)


def figures(task: Task, log_policy: Tensor, log_target: Tensor, log_own: Tensor | None) -> dict[str, float]:
    """Means over prompts: accuracy, coverage of the right answers, distances to the stated and to the own optimum.

    log_policy, log_target, log_own: [P, R]. coverage is exp(entropy of the mass on right answers) over their number;
    at_k the expected share of right answers found in 128 samples.
    """
    mass = log_policy.exp() * task.right
    accuracy = mass.sum(-1)
    within = mass / accuracy[:, None].clamp_min(1e-300)
    effective = torch.exp(-torch.special.xlogy(within, within).sum(-1))
    count = task.right.sum(-1)
    found = ((1 - (1 - mass) ** 128) * task.right).sum(-1)
    out = {
        "accuracy": accuracy,
        "coverage": effective / count,
        "found_in_128": found / count,
        "kl_stated": kl(log_policy, log_target),
        "tv_stated": 0.5 * (log_policy.exp() - log_target.exp()).abs().sum(-1),
        "length": (log_policy.exp() * task.tree.length).sum(-1),
    }
    if log_own is not None:
        out["kl_own"] = kl(log_policy, log_own)
    return {name: float(value.mean()) for name, value in out.items()}
