"""LinearFlowRLLoss in one pass: the same loss, bits and gradients as in two."""

import pytest
import torch

from flowrl_kernels import LinearFlowRLLoss, linear_logprob
from flowrl_kernels.chunked import linear_residual as room
from flowrl_kernels.core import passes
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of, peaked_inputs, ragged_mask

LENGTHS = torch.tensor([7, 0, 12, 3, 9, 1])


def batch(dtype=torch.float32, seed=0):
    n = int(LENGTHS.sum())
    hidden, weight, target = peaked_inputs(n, 24, 1300, dtype=dtype, peak=12.0, seed=seed)
    make = torch.Generator().manual_seed(seed + 1)
    logp = linear_logprob(hidden, weight, target).logp
    old, ref = (logp + 0.05 * torch.randn(n, generator=make) for _ in range(2))
    reward, log_z = torch.randn(6, generator=make), torch.randn(6, generator=make)
    return hidden, weight, target, ref, old, reward, log_z


def run(single_pass, data, *, padded=False, log_z=..., settings=None, head=None, **tensors):
    hidden, weight, target, ref, old, reward, z = data
    x, w, z = (t.detach().clone().requires_grad_() for t in (hidden, weight, z))
    module = LinearFlowRLLoss(single_pass=single_pass, **(settings or {}))
    tensors.setdefault("logp_old", old)
    out = module(
        x, w, target, ref, reward, z if log_z is ... else log_z, cu_seqlens=cu_seqlens_of(LENGTHS), **tensors,
        **(head or {}),
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss * 1.7, (x, w, z), allow_unused=True)
    return out, grads


@pytest.fixture
def counted(monkeypatch):
    calls = []
    whole = room.linear_residual_fwd
    monkeypatch.setattr(room, "linear_residual_fwd", lambda *a, **k: calls.append(a[7].bounds) or whole(*a, **k))
    return calls


@pytest.mark.parametrize("tokens", [14, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_equals_two(monkeypatch, counted, tokens, dtype):
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: tokens)
    data = batch(dtype)
    head = {"temperature": 0.8, "softcap": 30.0, "logit_scale": 1.1}
    one, one_grads = run(True, data, head=head)
    assert len(counted) == 1
    assert len(counted[0]) == (2 if tokens == 1000 else 4)
    two, two_grads = run(False, data, head=head)
    assert len(counted) == 1
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.residual, two.residual)
    assert torch.equal(one.weight, two.weight)
    assert all(torch.equal(one.metrics[k], two.metrics[k]) for k in two.metrics)
    for got, expected in zip(one_grads, two_grads):
        assert_grad_close(got, expected, rel=1e-5 if dtype == torch.float32 else 4e-3, row=0.2)


def test_the_weight_stays_exactly_one_on_the_first_minibatch(counted):
    data = list(batch())
    data[4] = linear_logprob(*data[:3]).logp
    out, _ = run(True, data)
    assert counted
    assert torch.equal(out.weight, (LENGTHS > 0).float())


@pytest.mark.parametrize("preset", ["group", "tb_ppo_style", "token_log_z_beta30"])
def test_rows_whose_sequences_depend_on_each_other_need_one_chunk(monkeypatch, counted, preset):
    data = batch()
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    arguments = {"settings": {"preset": preset}, "groups": groups, "log_z": "group" if preset == "group" else ...}
    one, one_grads = run(True, data, **arguments)
    assert len(counted) == 1
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: 14)
    two, two_grads = run(True, data, **arguments)
    assert len(counted) == 1, "a batch that does not fit must take two passes"
    assert torch.equal(one.loss, two.loss)
    for got, expected in zip(one_grads, two_grads):
        if expected is not None:
            assert_grad_close(got, expected, rel=1e-5)


def test_a_sequence_longer_than_the_buffer_makes_its_own_logits_twice_and_no_others(monkeypatch, counted):
    again = []
    whole = room.linear_logprob_bwd
    monkeypatch.setattr(room, "linear_logprob_bwd", lambda *a: again.append(len(a[0].logp)) or whole(*a))
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: 11)
    head = {"bias": torch.linspace(-1, 1, 1300).requires_grad_(), "temperature": torch.linspace(0.5, 2, 32)}
    one, one_grads = run(True, batch(), head=head)
    assert counted == [[0, 2, 3, 4, 6]]
    assert again == [12]
    two, two_grads = run(False, batch(), head=head)
    assert torch.equal(one.loss, two.loss)
    assert all(torch.equal(one.metrics[k], two.metrics[k]) for k in two.metrics)
    for got, expected in zip(one_grads, two_grads):
        assert_grad_close(got, expected, rel=1e-5)


def test_a_long_sequence_in_float16_takes_two_passes_and_the_log_says_so(monkeypatch, counted, caplog):
    passes._say_why.cache_clear()
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: 11)
    with caplog.at_level("INFO", logger="flowrl_kernels"):
        run(True, batch(torch.float16))
    assert not counted
    assert "two passes" in caplog.text


def test_padded_input_gives_what_packed_input_gives(counted):
    hidden, weight, target, ref, old, reward, log_z = batch()
    mask = torch.arange(12) < LENGTHS[:, None]
    padded = []
    for t in (hidden, target, ref, old):
        out = torch.zeros(6, 12, *t.shape[1:], dtype=t.dtype)
        out[mask] = t
        padded.append(out)
    x = padded[0].requires_grad_()
    w = weight.clone().requires_grad_()
    out = LinearFlowRLLoss()(x, w, padded[1], padded[2], reward, log_z, logp_old=padded[3], mask=mask)
    packed, (dx, dw, _) = run(True, (hidden, weight, target, ref, old, reward, log_z))
    torch.testing.assert_close(out.loss, packed.loss)
    got = torch.autograd.grad(out.loss * 1.7, (x, w))
    assert_grad_close(got[0][mask], dx, rel=1e-5)
    assert_grad_close(got[1], dw, rel=1e-5)
    assert (got[0][~mask] == 0).all()
    assert len(counted) == 2


def test_frozen_parts_and_no_grad_skip_their_work(counted):
    hidden, weight, target, ref, _, reward, log_z = batch()
    module = LinearFlowRLLoss()
    arguments = (target, ref, reward, log_z)
    with torch.no_grad():
        module(hidden.requires_grad_(), weight, *arguments, cu_seqlens=cu_seqlens_of(LENGTHS))
    assert not counted
    x = hidden.detach().requires_grad_()
    module(x, weight, *arguments, cu_seqlens=cu_seqlens_of(LENGTHS)).loss.backward()
    assert counted
    assert x.grad.abs().sum() > 0


def test_the_operator_keeps_the_contract_and_compiles():
    hidden, weight, target, ref, _, reward, log_z = batch()
    mask = ragged_mask(4, 8)
    x = hidden[:32].view(4, 8, -1).requires_grad_()
    ids, r = target[:32].view(4, 8), ref[:32].view(4, 8)

    def loss(h, w):
        return LinearFlowRLLoss()(h, w, ids, r, reward[:4], log_z[:4], mask=mask).loss

    w = weight.requires_grad_()
    eager = torch.autograd.grad(loss(x, w), (x, w))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w), (x, w))
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_later_backward_leaves_earlier_gradients_alone(dtype):
    hidden, weight, target, ref, old, reward, log_z = batch(dtype)
    x, w, z = (t.requires_grad_() for t in (hidden, weight, log_z))
    out = LinearFlowRLLoss()(x, w, target, ref, reward, z, logp_old=old, cu_seqlens=cu_seqlens_of(LENGTHS))
    first = torch.autograd.grad(out.loss, (x, w, z), retain_graph=True)
    kept = [g.clone() for g in first]
    thrice = torch.autograd.grad(3.0 * out.loss, (x, w, z), retain_graph=True)
    for g in first:
        g.add_(1.0)  # an optimiser may write into what it was given
    for scale, want in ((2.0, 2.0), (1.0, 3.0), (1.0, 4.0)):
        (scale * out.loss).backward(retain_graph=True)
        for leaf, one, three in zip((x, w, z), kept, thrice):
            assert_grad_close(three, 3.0 * one.float(), rel=1e-3)
            assert_grad_close(leaf.grad, want * one.float(), rel=1e-3)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


def test_the_last_backward_makes_no_copy_of_the_weights_gradient():
    hidden, weight, target, ref, old, reward, log_z = batch()
    w = weight.requires_grad_()
    out = LinearFlowRLLoss()(hidden, w, target, ref, reward, log_z, logp_old=old, cu_seqlens=cu_seqlens_of(LENGTHS))
    made = next(t for t in out.loss.grad_fn.saved_tensors if t.shape == w.shape)
    (g,) = torch.autograd.grad(3.0 * out.loss, w, retain_graph=True)
    assert g.data_ptr() != made.data_ptr()
    (g,) = torch.autograd.grad(3.0 * out.loss, w)
    assert g.data_ptr() == made.data_ptr()


def test_chunks_end_at_whole_row_blocks_where_the_sequences_allow():
    assert passes.chunk_bounds(list(range(0, 1025, 64)), 441, True) == [0, 4, 8, 12, 16]
    assert passes.chunk_bounds([0, 300, 400, 500], 441, True) == [0, 1, 3]
    assert passes.chunk_bounds([0, 442], 441, True) is None
    assert passes.chunk_bounds([0, 200, 400], 441, False) == [0, 2]
    assert passes.chunk_bounds([0, 9, 9, 451, 460], 441, True, alone=True) == [0, 2, 3, 4]
