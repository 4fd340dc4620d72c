"""Kept sets on a GPU: 16-bit inputs at real hidden sizes, lists that arrive from the host, no wait for the device."""

import pytest
import torch
from gpu_waits import host_waits
from test_kept_sets import errors, masked, ours, ragged, rows_of, upstream

from flowrl_kernels import linear_logprob
from flowrl_kernels.testing import peaked_inputs, poisoned_memory

pytestmark = pytest.mark.gpu
SHAPE = (300, 1536, 8192)


def batch(dtype, most, n=SHAPE[0]):
    hidden, weight, target = peaked_inputs(*SHAPE, dtype=dtype)
    sets = ragged(n, SHAPE[2], most=most)
    return [t[:n].cuda() if t is not weight else t.cuda() for t in (hidden, weight, target)], sets


def run(data, kept, n, **settings):
    return ours(*data, kept, *(g.cuda() for g in upstream(n)), impl="triton", **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "softcap": 20.0, "logit_scale": 1.2}])
def test_any_number_of_ids_is_as_exact_as_the_exact_kernels(dtype, settings):
    data, sets = batch(dtype, SHAPE[2])
    on_cpu = [t.cpu() for t in data]
    g, ge = upstream(SHAPE[0])
    error = errors([t.cpu() for t in run(data, rows_of(sets), SHAPE[0], **settings)],
                   masked(*on_cpu, sets, g, ge, **settings))  # fmt: skip
    allowed = errors([t.cpu() for t in run(data, None, SHAPE[0], **settings)],
                     masked(*on_cpu, [None] * SHAPE[0], g, ge, **settings))  # fmt: skip
    assert all(0 < mine <= 1.2 * exact for mine, exact in zip(error, allowed)), (error, allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_and_runs_keep_their_bits_wherever_the_lists_lie(dtype):
    data, sets = batch(dtype, 500)
    first, again = (run(data, rows_of(sets), SHAPE[0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    with poisoned_memory():
        poisoned = run(data, tuple(part.cuda() for part in rows_of([s.flip(0) for s in sets])), SHAPE[0])
    assert all(torch.equal(a, b) for a, b in zip(first, poisoned))
    for size in (1, 2, 31, 129):
        some, _ = batch(dtype, 500, size)
        out = linear_logprob(*some, kept=rows_of(sets[:size]), entropy=True, impl="triton")
        assert torch.equal(out.logp, first[0][:size])
        assert torch.equal(out.entropy, first[1][:size])


def test_narrow_lists_from_the_host_never_make_it_wait():
    data, sets = batch(torch.bfloat16, 500)
    kept = rows_of(sets)
    run(data, kept, SHAPE[0])  # compiles
    g, ge = (t.cuda() for t in upstream(SHAPE[0]))
    x, w = (t.clone().requires_grad_() for t in data[:2])
    with host_waits() as waits:
        out = linear_logprob(x, w, data[2], kept=kept, entropy=True, impl="triton")
        torch.autograd.grad((out.logp, out.entropy), (x, w), (g, ge))
    assert waits == []


@pytest.mark.sanitize
def test_every_access_is_inside():
    data, sets = batch(torch.bfloat16, SHAPE[2], 5)
    assert all(t.isfinite().all() for t in run(data, rows_of(sets), 5))
