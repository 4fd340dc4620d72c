"""What the launched programs multiply, counted in the interpreter: every tl.dot, and the products of torch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.interpreter import InterpreterBuilder

from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import TILE, Anchors, Chunks, Head, Needs, Sequences
from flowrl_kernels.presets import named
from flowrl_kernels.testing import rl_like_inputs
from flowrl_kernels.triton import bounded, linear_logprob, linear_residual
from tests.test_flops import IN_PLACE, ONE, backward, check_two_passes, forward

N, H, V = 128, 256, 8192  # whole blocks: 32 rows, 256 columns, 256 of H
NHV = N * H * V
BLOCK = 32


@pytest.fixture
def data():
    return rl_like_inputs(N, H, V, zipf=1.2)


@pytest.fixture
def count(monkeypatch):
    """run -> (FLOP of its products in units of NHV, what it returned)"""
    made, create_dot = [], InterpreterBuilder.create_dot

    def counting(self, a, b, *rest):
        (m, k), (_, n) = a.data.shape, b.data.shape
        made.append(2 * m * n * k)
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)

    def of(run):
        made.clear()
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            out = run()
        return (sum(made) + counter.get_total_flops()) / NHV, out

    return of


def test_two_passes_do_eight_and_a_frozen_part_six(data, count):
    check_two_passes(linear_logprob, data, count)


def test_a_bounded_backward_does_six_times_its_blocks_and_no_more(data, count, monkeypatch):
    blocks, read_plan = [], bounded.read_plan

    def spy(*arguments):
        blocks.append(read_plan(*arguments))
        return blocks[-1]

    monkeypatch.setattr(bounded, "read_plan", spy)
    monkeypatch.setattr(bounded, "FALL_BACK", 1.0)
    report = torch.zeros(3)
    ahead, kept = count(lambda: forward(linear_logprob, data, True))
    back, _ = count(lambda: backward(linear_logprob, data, kept, 0.01, report))
    [(pays, edges)] = blocks
    assert pays
    share = edges[-1] * BLOCK * bounded.COLUMNS / (N * V)  # rows rounded up to blocks
    assert 0 < report[1] <= share < 0.8
    # Beside it: log-probs of the targets (64 columns a row), their part of dweight (each run of columns its own rows,
    # rounded up) and the tail correction, twice. Nearly all of it is gone at V = 152064.
    rows = torch.bincount(data[2] // TILE).add(BLOCK - 1).div(BLOCK, rounding_mode="floor").sum() * BLOCK
    more = 2 * (64 + int(rows) / N * TILE) / V + 2 * 2 / TILE
    assert ahead + back - more == pytest.approx(2 + 6 * share, rel=0.01)


@pytest.mark.parametrize(("needs", "expected"), [((True, True), 6), ((True, False), 4)])
def test_one_pass_does_six_and_four_for_a_frozen_head(data, count, needs, expected):
    hidden, weight, target, _ = data
    logp, each = torch.zeros(N), torch.ones(4)
    edges = torch.arange(0, N + 1, N // 4)
    done, _ = count(
        lambda: linear_residual.linear_residual_fwd(
            named("paper"), hidden, target, Head(weight, None, ONE), Anchors(logp, logp, None),
            Sequences(each, each, None, torch.full((), 4.0)), Segments(torch.ones(N, dtype=torch.bool), edges),
            Chunks(N, [0, N // 2, N], [0, 2, 4]), Needs(*needs, False),
        )
    )  # fmt: skip
    assert done == pytest.approx(expected, rel=0.05)
