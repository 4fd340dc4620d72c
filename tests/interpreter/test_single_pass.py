"""LinearFlowRLLoss(impl="triton") in one pass, under the interpreter: what two passes of the same kernels give."""

import pytest
import torch

from flowrl_kernels import LinearFlowRLLoss, linear_logprob
from flowrl_kernels.core import passes
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import Anchors, Chunks, Head, Needs, Sequences
from flowrl_kernels.reference.linear_logprob import linear_logprob as reference
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of, poisoned_memory
from flowrl_kernels.triton import linear_logprob as two_passes
from flowrl_kernels.triton import linear_residual as room
from flowrl_kernels.triton import matmul
from tests.test_single_pass import LENGTHS, batch, run

TRITON = {"impl": "triton"}


@pytest.fixture
def counted(monkeypatch):
    """The `bounds` of every call of the launcher, and what it returned."""
    calls = []
    whole = room.linear_residual_fwd

    def call(*given):
        out = whole(*given)
        calls.append((given[7].bounds, out))
        return out

    monkeypatch.setattr(room, "linear_residual_fwd", call)
    return calls


def head_of(vocab_size, num_tokens):
    make = torch.Generator().manual_seed(7)
    bias = torch.randn(vocab_size, generator=make).requires_grad_()
    temperature = torch.rand(num_tokens, generator=make) + 0.5
    return {"bias": bias, "temperature": temperature, "softcap": 30.0, "logit_scale": 1.1}


@pytest.mark.parametrize(
    ("tokens", "full"),
    [
        (14, True),
        (1000, False),
        pytest.param(14, False, marks=pytest.mark.nightly),
        pytest.param(1000, True, marks=pytest.mark.nightly),
    ],
)
def test_one_pass_equals_two_and_keeps_the_bits_of_logp(monkeypatch, counted, tokens, dtype, within, full):
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: tokens)
    monkeypatch.setattr(room, "BLOCK", 256)  # several steps along a row, each over logits already read
    data = batch(dtype)
    head = head_of(1300, len(data[0])) if full else {}
    with poisoned_memory():
        one, one_grads = run(True, data, settings=TRITON, head=head)
        two, two_grads = run(False, data, settings=TRITON, head=head)
    [(bounds, (logp, *_))] = counted
    assert len(bounds) == (2 if tokens == 1000 else 4)
    assert torch.equal(logp, linear_logprob(*data[:3], impl="triton", **head).logp)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.residual, two.residual)
    assert torch.equal(one.weight, two.weight)
    assert all(torch.equal(one.metrics[k], two.metrics[k]) for k in two.metrics)
    for got, expected in zip(one_grads, two_grads):
        assert got.dtype == expected.dtype
        assert_grad_close(got, expected, rel=2 * within, row=0.2)  # each is rounded by itself


def test_gradients_match_float64(monkeypatch, counted, dtype, within):
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: 14)
    data = batch(dtype)
    head = head_of(1300, len(data[0]))
    hidden, weight, target, ref, old, reward, log_z = data
    own = [t.clone().requires_grad_() for t in (hidden, weight, log_z)] + [head["bias"]]
    out = LinearFlowRLLoss(**TRITON)(
        own[0], own[1], target, ref, reward, own[2], logp_old=old, cu_seqlens=cu_seqlens_of(LENGTHS), **head
    )
    got = torch.autograd.grad(out.loss * 2**10, own)  # float16 outputs: compare what they can hold
    assert counted
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, log_z, head["bias"])]
    logp = reference(
        exact[0], exact[1], target, exact[3], head["temperature"].double(), head["logit_scale"], head["softcap"], -100,
        False,
    ).logp  # fmt: skip
    loss = torch.zeros((), dtype=torch.float64)
    for b, (low, high) in enumerate(zip(cu_seqlens_of(LENGTHS).tolist(), cu_seqlens_of(LENGTHS).tolist()[1:])):
        if high > low:
            d = exact[2][b] + (logp[low:high] - ref[low:high]).mean() - 15.0 * reward[b]
            w = (logp.detach() - old)[low:high].sum().exp().clamp(0.8, 1.2)
            loss = loss + w * d.square() / len(reward)
    for a, b in zip(got, torch.autograd.grad(loss * 2**10, exact)):
        assert_grad_close(a, b, rel=within, row=40 * within)


def test_the_weight_stays_exactly_one_on_the_first_minibatch(counted, dtype):
    data = list(batch(dtype))
    data[4] = linear_logprob(*data[:3], impl="triton").logp
    out, _ = run(True, data, settings=TRITON)
    assert counted
    assert torch.equal(out.weight, (LENGTHS > 0).float())


@pytest.mark.parametrize("tokens", [14, pytest.param(1000, marks=pytest.mark.nightly)])
def test_masked_tokens_are_skipped_and_never_read(monkeypatch, counted, tokens, dtype, within):
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: tokens)
    data = list(batch(dtype))
    mask = torch.rand(len(data[0]), generator=torch.Generator().manual_seed(2)) < 0.6
    mask[19:22] = False  # a whole sequence
    _, clean_grads = run(True, data, settings=TRITON, mask=mask)
    data[0] = torch.where(mask[:, None], data[0], float("nan"))
    with poisoned_memory():
        out, grads = run(True, data, settings=TRITON, mask=mask)
    two, two_grads = run(False, data, settings=TRITON, mask=mask)
    assert len(counted) == 2
    assert torch.equal(out.loss, two.loss)
    assert (grads[0][~mask] == 0).all()
    for got, same, expected in zip(grads, clean_grads, two_grads):
        assert torch.equal(got, same)
        assert_grad_close(got, expected, rel=2 * within, row=0.2)  # each is rounded by itself


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [("group", torch.float32), ("tb_ppo_style", torch.float16), ("token_log_z_beta30", torch.bfloat16)],
)
def test_rows_whose_sequences_depend_on_each_other_need_one_chunk(monkeypatch, counted, preset, dtype, within):
    data = batch(dtype)
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    arguments = {"settings": {"preset": preset, **TRITON}, "groups": groups}
    arguments["log_z"] = "group" if preset == "group" else ...
    one, one_grads = run(True, data, **arguments)
    assert len(counted) == 1
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: 14)
    two, two_grads = run(True, data, **arguments)
    assert len(counted) == 1, "a batch that does not fit must take two passes"
    assert torch.equal(one.loss, two.loss)
    for got, expected in zip(one_grads, two_grads):
        if expected is not None:
            assert_grad_close(got, expected, rel=2 * within, row=100 * within)


def test_a_sequence_longer_than_the_buffer_makes_its_own_logits_twice(monkeypatch, counted):
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: 11)
    head = head_of(1300, 32)
    one, one_grads = run(True, batch(), settings=TRITON, head=head)
    [(bounds, out)] = counted
    assert bounds == [0, 2, 3, 4, 6]
    two, two_grads = run(False, batch(), settings=TRITON, head=head)
    assert_grad_close(one.loss.detach().view(1), two.loss.detach().view(1), rel=1e-6)
    for got, expected in zip(one_grads, two_grads):
        assert_grad_close(got, expected, rel=1e-5)
    assert out.dbias.norm() > 0


def test_frozen_parts_run_no_product(monkeypatch, counted, dtype):
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: 14)
    hidden, weight, target, ref, old, reward, log_z = batch(dtype)
    shapes = []
    product = matmul.matmul_into

    def count_shapes(out, *given, **named):
        shapes.append(tuple(out.shape))
        product(out, *given, **named)

    for module in (room, two_passes):
        monkeypatch.setattr(module, "matmul_into", count_shapes)
    found = {}
    for frozen in ("none", "weight", "hidden"):
        x, w = hidden.clone().requires_grad_(frozen != "hidden"), weight.clone().requires_grad_(frozen != "weight")
        shapes.clear()
        module = LinearFlowRLLoss(**TRITON)
        out = module(x, w, target, ref, reward, log_z, logp_old=old, cu_seqlens=cu_seqlens_of(LENGTHS))
        out.loss.backward()
        found[frozen] = (list(shapes), x.grad, w.grad)
    rows = [(7, 24), (12, 24), (13, 24)]
    assert found["weight"][0] == rows
    assert found["hidden"][0] == [(1300, 24)] * 3
    assert len(found["none"][0]) == 6
    assert torch.equal(found["weight"][1], found["none"][1])
    assert torch.equal(found["hidden"][2], found["none"][2])
    assert found["weight"][2] is None
    assert found["hidden"][1] is None


def test_two_runs_give_the_same_bits(dtype):
    data = batch(dtype)
    first, second = (run(True, data, settings=TRITON)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_wrong_target_is_nan_in_the_loss_and_its_sequences_gradient(dtype):
    """As in two passes, where looking at the targets would cost a sync; here the launcher is called by itself."""
    hidden, weight, target, ref, old, reward, log_z = batch(dtype)
    clean = target.clone()
    clean[3] = 1300
    from flowrl_kernels.presets import PRESETS

    mask = torch.ones(len(target), dtype=torch.bool)
    cu_seqlens = cu_seqlens_of(LENGTHS).long()
    out = room.linear_residual_fwd(
        PRESETS["paper"], hidden, clean, Head(weight, None, torch.ones(1)), Anchors(ref, old, None),
        Sequences(reward, log_z, None, torch.tensor(6.0, dtype=torch.float64)), Segments(mask, cu_seqlens),
        Chunks(99, [0, len(target)], [0, 6]), Needs(True, True, False),
    )  # fmt: skip
    assert out.logp[3].isnan()
    assert out.dhidden[:7].isnan().all()
    assert out.dhidden[7:].isfinite().all()


def test_a_batch_without_tokens_gets_zeros(dtype):
    hidden, weight, target, *_ = batch(dtype)
    x, w = hidden[:0].clone().requires_grad_(), weight.clone().requires_grad_()
    nothing = torch.zeros(0)
    module = LinearFlowRLLoss(**TRITON)
    out = module(x, w, target[:0], nothing, torch.ones(2), torch.ones(2), cu_seqlens=torch.zeros(3, dtype=torch.int32))
    out.loss.backward()
    assert out.loss == 0
    assert (w.grad == 0).all()
    assert x.grad.shape == (0, 24)


def test_the_operator_satisfies_opcheck():
    hidden, weight, target, ref, old, reward, log_z = batch()
    from flowrl_kernels.presets import PRESETS

    arguments = (
        hidden.requires_grad_(), weight.requires_grad_(), None, log_z.requires_grad_(), target, torch.ones(1), 1.0,
        None, ref, old, None, reward, torch.ones(len(target), dtype=torch.bool), cu_seqlens_of(LENGTHS).long(), None,
        99, [0, 22, 32], [0, 4, 6], torch.tensor(6.0, dtype=torch.float64), PRESETS["paper"].codes(),
        PRESETS["paper"].packed_numbers(), [True, True, False], "triton",
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.flowrl.linear_residual.default, arguments, test_utils=tests)
