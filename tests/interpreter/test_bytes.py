"""What the row kernels read and write, counted in the interpreter, against the model in benchmarks/cases.py."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from benchmarks.cases import Case
from flowrl_kernels import logprob
from flowrl_kernels.losses import flowrl_loss
from flowrl_kernels.triton import linear_residual
from flowrl_kernels.triton.bounded_kernels import combine_kernel


@pytest.fixture
def moved(monkeypatch):
    """run -> (bytes read, bytes written, what it returned), by all programs of all kernels"""
    read, written = [], []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers):
        return pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self, pointers, mask, *rest, **named):
        read.append(int(np.asarray(mask.data).sum()) * size(pointers))
        return load(self, pointers, mask, *rest, **named)

    def counting_store(self, pointers, value, mask, *rest, **named):
        written.append(int(np.asarray(mask.data).sum()) * size(pointers))
        return store(self, pointers, value, mask, *rest, **named)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)

    def of(run):
        read.clear()
        written.clear()
        out = run()
        return sum(read), sum(written), out

    return of


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("entropy", [False, True])
def test_logprob_reads_the_logits_once_forward_and_reads_and_writes_them_once_backward(moved, dtype, entropy):
    case = Case("tiny", "logprob", "cuda", 8, 0, 5003, dtype=dtype, entropy=entropy)
    logits = torch.randn(8, 5003).to(case.torch_dtype).requires_grad_()
    target = torch.randint(5003, (8,))
    read, written, out = moved(lambda: logprob(logits, target, entropy=entropy, impl="triton"))
    assert read + written == pytest.approx(case.bytes()["forward"], rel=0.05)
    total = out.logp.sum() + (out.entropy.sum() if entropy else 0.0)
    back_read, back_written, _ = moved(lambda: torch.autograd.grad(total, logits))
    assert back_read == pytest.approx(case.logits_bytes(), rel=0.05)
    assert back_written == pytest.approx(case.logits_bytes(), rel=0.05)
    step = read + written + back_read + back_written
    assert step == pytest.approx(case.bytes()["step"], rel=0.05)


def test_residual_reads_its_tokens_once_and_writes_the_gradient_once(moved):
    case = Case("tiny", "residual", "cuda", 4 * 2048, 0, 0, sequences=4)
    logp = (-torch.rand(4, 2048)).requires_grad_()
    ref, old, mask = logp.detach() - 0.1, logp.detach().clone(), torch.ones(4, 2048, dtype=torch.bool)
    each = torch.ones(4)
    read, written, out = moved(lambda: flowrl_loss(logp, ref, each, each, logp_old=old, mask=mask, impl="triton"))
    back_read, back_written, _ = moved(lambda: torch.autograd.grad(out.loss, logp))
    assert read + written + back_read + back_written <= 1.05 * case.bytes()["step"]


def test_the_single_pass_turns_logits_into_dz_at_a_read_and_a_write(moved, dtype):
    n, v = 6, 9000
    logits = torch.randn(n, 9088)
    rows, zeros = torch.arange(n), torch.zeros(n)
    read, written, _ = moved(
        lambda: linear_residual.dlogits_in_place_kernel[(n,)](
            logits, logits.view(dtype), rows, torch.tensor([n]), rows, torch.ones(1), torch.zeros(2, n),
            zeros + 0.5, zeros + 1.0, None,
            n, v, logits.stride(0), logits.view(dtype).stride(0), 0, 1.0, None, BLOCK=1024,
        )
    )  # fmt: skip
    assert read == pytest.approx(4 * n * v, rel=0.05)
    assert written == pytest.approx(dtype.itemsize * n * v, rel=0.05)


def test_combining_pairs_reads_each_product_once_and_writes_each_row_once(moved):
    n, h, pairs = 9, 2048, 3  # pairs of each row
    part, mass = torch.randn(n * pairs, h), torch.rand(n * pairs, 8)
    begin = torch.arange(n) * pairs
    tile = torch.arange(pairs, dtype=torch.int32).repeat(n)
    slot = torch.arange(n * pairs, dtype=torch.int32).view(pairs, n).T.reshape(-1)
    out, total = torch.empty(n, h), torch.empty(n)
    read, written, _ = moved(
        lambda: combine_kernel[(n * 2,)](
            part, mass, begin, begin + pairs, tile, slot.contiguous(), torch.zeros(pairs, dtype=torch.int64),
            out, total, 0, pairs * 1024, h, ADD=False, COLUMNS=1024, TILE=128, BLOCK=1024,
        )
    )  # fmt: skip
    first, second, third = part[slot.view(n, pairs).long()].unbind(1)
    assert torch.equal(out, (first + second) + third)  # in the list's order
    assert torch.allclose(total, mass[slot.view(n, pairs).long()].sum((1, 2)))
    assert read == pytest.approx(4 * h * pairs * n, rel=0.05)
    assert written == pytest.approx(4 * h * n, rel=0.05)
