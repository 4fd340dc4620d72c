"""The kernels over kept sets against float64 masks, under the interpreter; and what they read and multiply."""

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from flowrl_kernels import linear_logprob
from flowrl_kernels.chunked import tiles
from flowrl_kernels.testing import peaked_inputs
from tests.interpreter.test_bytes import moved  # noqa: F401
from tests.test_kept_sets import errors, masked, of_a_head_of_those_rows, ours, ragged, rows_of, upstream

N, H, V = 10, 40, 420
SCALED = {"temperature": 0.7, "softcap": 20.0, "logit_scale": 1.2}


def counts_stay_on_the_device(monkeypatch):
    """Lists as they are on a GPU: the host knows no number of entries."""
    monkeypatch.setattr(tiles, "host_knows", lambda tensor: False)


@pytest.mark.parametrize("settings", [{}, SCALED])
def test_any_number_of_ids_is_as_exact_as_the_exact_path(dtype, settings):
    hidden, weight, target = peaked_inputs(N, H, V, dtype=dtype)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(2)).to(dtype)
    (g, ge), sets = upstream(N), ragged(N, V)
    given = {**settings, "bias": bias}
    expected = masked(hidden, weight, target, sets, g, ge, **given)
    error = errors(ours(hidden, weight, target, rows_of(sets), g, ge, impl="triton", **given), expected)
    allowed = errors(of_a_head_of_those_rows(hidden, weight, target, sets, g, ge, **given), expected)
    # ten rows' largest errors are few numbers: beside them half a last place of a logit, and what tanh may be off
    slack = 1e-6 + 1e-7 * settings.get("softcap", 0.0) / settings.get("temperature", 1.0)
    for i, (mine, exact) in enumerate(zip(error, allowed)):
        assert 0 < mine <= 1.5 * exact + (slack if i < 2 else 0.0), (i, error, allowed)


def test_rows_and_runs_keep_their_bits_whatever_is_repeated_poisoned_or_counted_by_whom(dtype, monkeypatch):
    hidden, weight, target = peaked_inputs(N, H, V, dtype=dtype)
    target[3] = -100
    sets, (g, ge) = ragged(N, V, most=90), upstream(N)
    first = ours(hidden, weight, target, rows_of([s.unique() for s in sets]), g, ge, impl="triton")
    order = torch.tensor([8, 2, 3, 5])
    moved_rows = ours(
        hidden[order], weight, target[order], rows_of([sets[i] for i in order]), g[order], ge[order], impl="triton"
    )
    assert all(torch.equal(a, b[order]) for a, b in zip(moved_rows[:3], first[:3]))
    listed = torch.zeros(V, dtype=torch.bool)
    listed[torch.cat([*(s for i, s in enumerate(sets) if i != 3), target[target >= 0]])] = True
    assert not listed.all()
    hidden[3], g[3], ge[3] = torch.nan, torch.nan, torch.nan
    weight = torch.where(listed[:, None], weight, torch.nan)
    counts_stay_on_the_device(monkeypatch)
    again = ours(hidden, weight, target, rows_of([s.flip(0) for s in sets]), g, ge, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(again, first))


def test_main_grad_is_added_to_where_there_is_something_to_add(dtype):
    hidden, weight, target = peaked_inputs(N, H, V)
    sets = ragged(N, V, most=20)
    x, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(linear_logprob(x, w, target, kept=rows_of(sets)).logp.sum(), w)
    main = torch.ones(V, H)
    linear_logprob(x, w, target, kept=rows_of(sets), main_grad=main, impl="triton").logp.sum().backward()
    assert w.grad is None
    assert float((main - 1 - expected).norm() / expected.norm()) < 2.5e-3
    assert (main[expected.float().abs().sum(1) == 0] == 1).all()


@pytest.fixture
def multiplied(monkeypatch):
    """run -> (FLOP of its multiply-adds and products, masked lanes too; what it returned)"""
    made = []
    create_dot, create_fma = InterpreterBuilder.create_dot, InterpreterBuilder.create_fma

    def dot(self, a, b, *rest):
        (m, k), (_, n) = a.data.shape, b.data.shape
        made.append(2 * m * n * k)
        return create_dot(self, a, b, *rest)

    def fma(self, a, *rest):
        made.append(2 * a.data.size)
        return create_fma(self, a, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)

    def of(run):
        made.clear()
        out = run()
        return sum(made), out

    return of


def test_twenty_ids_a_row_cost_a_tenth_of_a_dense_forward_at_most_forward_and_backward_apart(moved, multiplied):  # noqa: F811
    n, h, v, size, some = 32, 128, 151936, 2, 4096
    make = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, h, generator=make).bfloat16() for rows in (n, v))
    lengths = torch.linspace(1, 39, n).round().long()
    assert float(lengths.float().mean()) == 20
    kept = rows_of([torch.randint(v, (int(k),), generator=make) for k in lengths])
    target, g = torch.randint(v, (n,), generator=make), upstream(n)[0]

    def dense(columns, rows):  # FLOP and bytes of the dense forward's products with blocks of that many rows
        return 2 * n * h * columns, n * h * columns * size * (1 / rows + 1 / 256)

    read, _, (flop, _) = moved(
        lambda: multiplied(lambda: linear_logprob(hidden, weight[:some], target % some, impl="triton"))
    )
    assert flop == pytest.approx(dense(some, 32)[0], rel=0.1)
    assert read == pytest.approx(dense(some, 32)[1], rel=0.1)
    most_flop, most_read = (0.1 * count for count in dense(v, 128))  # as on sm_80 and later: a quarter of the reads
    x, w = hidden.requires_grad_(), weight.requires_grad_()

    def check(run):
        read, written, (flop, out) = moved(lambda: multiplied(run))
        assert 0 < flop <= most_flop
        assert 0 < read <= most_read
        return written, out

    _, out = check(lambda: linear_logprob(x, w, target, kept=kept, entropy=True, impl="triton"))
    written, _ = check(lambda: torch.autograd.grad(out.logp, (x, w), g))
    assert written < n * h * 4 + (len(kept[0]) + n) * (h * size + 20)  # nothing of the rows that nobody kept
