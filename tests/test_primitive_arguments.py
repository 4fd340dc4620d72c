"""The primitives' arguments: what is taken, what is refused by name, and where they are called from."""

import subprocess
import sys
import threading

import numpy
import pytest
import torch

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.testing import peaked_inputs

NARROW = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32]


def data(n=6, h=8, v=200, **settings):
    hidden, weight, target = peaked_inputs(n, h, v, **settings)
    return hidden, weight, target % 100


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_ids_in_narrow_integers_are_the_ids(dtype, impl):
    hidden, weight, target = data(v=70000)
    whole = linear_logprob(hidden, weight, target, impl=impl).logp
    assert torch.equal(linear_logprob(hidden, weight, target.to(dtype), impl=impl).logp, whole)
    logits = hidden @ weight[:300].T
    assert torch.equal(logprob(logits, target.to(dtype), impl=impl).logp, logprob(logits, target, impl=impl).logp)
    offsets = torch.arange(0, 19, 3)
    ids = torch.arange(18) * 5
    narrow = linear_logprob(hidden, weight, target.to(dtype), kept=(ids.to(dtype), offsets.to(dtype))).logp
    assert torch.equal(narrow, linear_logprob(hidden, weight, target, kept=(ids, offsets)).logp)


def test_an_id_that_a_narrow_integer_wraps_onto_the_ignored_one_counts():
    hidden, weight, target = data()
    target[:] = 156  # -100 in eight bits
    kept = (torch.arange(200).repeat(6), torch.arange(0, 1201, 200))
    for settings in ({}, {"kept": kept}):
        out = linear_logprob(hidden, weight, target.to(torch.uint8), **settings).logp
        assert torch.equal(out, linear_logprob(hidden, weight, target, **settings).logp)
        assert (out != 0).all()


@pytest.mark.parametrize("name", ["logit_scale", "softcap", "temperature", "epsilon"])
def test_numbers_come_in_any_kind_and_what_is_none_is_refused_by_name(name):
    hidden, weight, target = data()
    right = linear_logprob(hidden, weight, target, **{name: 0.5}).logp
    for value in (numpy.float64(0.5), numpy.float32(0.5), torch.tensor(0.5), numpy.float16(0.5)):
        assert torch.equal(linear_logprob(hidden, weight, target, **{name: value}).logp, right)
    for value in (float("inf"), float("nan"), True, "1", torch.nn.Parameter(torch.tensor(0.5)), torch.ones(3)):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: wanted"):
            linear_logprob(hidden, weight, target, **{name: value})


def test_flags_and_the_ignored_id_are_what_they_say():
    hidden, weight, target = data()
    for name, value in (("entropy", 1), ("ignore_index", -100.0), ("ignore_index", True)):
        with pytest.raises(TypeError, match=f"{name}: wanted"):
            linear_logprob(hidden, weight, target, **{name: value})
    target[2] = 7
    out = linear_logprob(hidden, weight, target, ignore_index=numpy.int64(7))
    assert out.logp[2] == 0


def test_what_no_backward_would_fill_is_refused_where_gradients_are_on():
    hidden, weight, target = data()
    trained, main, report = weight.clone().requires_grad_(), torch.ones(200, 8), torch.full((3,), 7.0)
    x = hidden.clone().requires_grad_()
    with pytest.raises(ValueError, match="main_grad: wanted a weight that requires a gradient"):
        linear_logprob(x, weight, target, main_grad=main)
    with pytest.raises(ValueError, match="report: wanted an input that requires a gradient"):
        linear_logprob(hidden, weight, target, report=report)
    with pytest.raises(RuntimeError, match="reference.*report"):
        linear_logprob(x, weight, target, report=report, impl="reference")
    with torch.no_grad():
        linear_logprob(x, trained, target, main_grad=main, report=report)
    assert (main == 1).all()
    assert (report == 7).all()
    linear_logprob(x, trained, target, report=report).logp.sum().backward()
    assert report.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("settings", [{}, {"epsilon": 0.1}, {"entropy": True}, {"softcap": 5.0}, {"kept": True}])
def test_no_tokens_give_nothing_and_zero_gradients(impl, shape, settings):
    if impl == "reference" and "epsilon" in settings:
        pytest.skip("the reference has no bounded backward")
    hidden, weight = torch.zeros(*shape, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    bias = torch.zeros(50, requires_grad=True)
    settings = dict(settings)
    if settings.pop("kept", False):
        settings["kept"] = (torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    target = torch.zeros(shape, dtype=torch.long)
    out = linear_logprob(hidden, weight, target, bias=bias, temperature=torch.ones(shape), impl=impl, **settings)
    assert out.logp.shape == shape
    for g in torch.autograd.grad(out.logp.sum(), (hidden, weight, bias)):
        assert (g == 0).all()
    logits = torch.zeros(*shape, 9, requires_grad=True)
    logprob(logits, target, entropy=True, impl=impl).logp.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"epsilon": 0.0}, {"epsilon": 0.1}, {"entropy": True}, {"kept": True}])
def test_a_backward_inside_autocast_has_the_bits_of_one_outside(dtype, settings):
    make = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(32, 32, generator=make)).to(dtype).requires_grad_()
    weight = torch.randn(3000, 32, generator=make).to(dtype).requires_grad_()
    target = torch.randint(3000, (32,), generator=make)
    settings = dict(settings)
    if settings.pop("kept", False):
        settings["kept"] = (torch.arange(320) * 7, torch.arange(0, 321, 10))

    def gradients(inside):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_logprob(hidden, weight, target, **settings).logp.mean()
            if inside:
                return torch.autograd.grad(loss, (hidden, weight))
        return torch.autograd.grad(loss, (hidden, weight))

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False)))


def test_inference_mode_and_a_scaled_loss_change_no_bit():
    hidden, weight, target = data()
    x = hidden.clone().requires_grad_()
    out = linear_logprob(x, weight, target, entropy=True)
    with torch.inference_mode():
        again = linear_logprob(hidden, weight, target, entropy=True)
    assert torch.equal(out.logp, again.logp)
    assert torch.equal(out.entropy, again.entropy)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    (scaled,) = torch.autograd.grad(scaler.scale(out.logp.sum()), x, retain_graph=True)
    assert torch.equal(scaled / 65536.0, torch.autograd.grad(out.logp.sum(), x)[0])


@pytest.mark.parametrize("before", ["tf32", "none"])
def test_the_process_keeps_its_switches_whatever_threads_work_and_fail(before):
    rooms = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    was = [room.fp32_precision for room in rooms]
    hidden, weight, target = data(64, 64, 3000)
    errors = []

    def work(bad):
        try:
            for _ in range(4):
                linear_logprob(hidden, weight, target, bias=torch.zeros(3000), impl="chunked")
                if bad:
                    from flowrl_kernels.chunked.tiles import exact_products

                    with pytest.raises(ZeroDivisionError), exact_products():
                        1 / 0  # noqa: B018
        except Exception as error:
            errors.append(error)

    try:
        for room in rooms:
            room.fp32_precision = before
        threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert [room.fp32_precision for room in rooms] == [before, before]
    finally:
        for room, precision in zip(rooms, was):
            room.fp32_precision = precision


def test_a_first_forward_and_backward_import_no_compiler():
    code = (
        "import sys, torch; from flowrl_kernels import linear_logprob;"
        "h = torch.randn(4, 8, requires_grad=True);"
        "linear_logprob(h, torch.randn(20, 8), torch.zeros(4, dtype=torch.long)).logp.sum().backward();"
        "sys.exit(str([m for m in ('sympy', 'triton', 'torch._dynamo') if m in sys.modules] or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_float16_gradients_are_those_of_float32_to_its_last_digits_under_a_scaled_loss(monkeypatch):
    from flowrl_kernels.chunked import tiles
    from flowrl_kernels.testing import assert_grad_close, oracle

    hidden, weight, target = peaked_inputs(80, 32, 1500, dtype=torch.float16, peak=12.0)
    grad = torch.randn(80, generator=torch.Generator().manual_seed(3)) / 80
    # as on a GPU: operands and dz stay in 16 bits, products are summed in float32
    monkeypatch.setattr(tiles, "operand", lambda tensor: tensor)
    monkeypatch.setattr(tiles, "product", lambda a, b: a.float() @ b.float())
    for scale in (1.0, 2.0**-14, 65536.0 / 64):
        _, _, dx, dw = oracle(hidden, weight, target, grad * scale)
        x, main = hidden.clone().requires_grad_(), torch.zeros(1500, 32)
        w = weight.clone().requires_grad_()
        linear_logprob(x, w, target, main_grad=main, impl="chunked").logp.backward(grad * scale)
        assert_grad_close(main, dw, rel=1e-3, row=2e-2)
        if scale >= 1.0:
            assert_grad_close(x.grad, dx, rel=1e-3, row=1e-2)


@pytest.mark.parametrize("name", ["temperature", "softcap", "logit_scale"])
@pytest.mark.parametrize("value", [1e39, 1e-46])
def test_a_number_that_float32_has_no_place_for_is_refused_beside_it_and_taken_in_float64(name, value):
    hidden, weight, target = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 6])
    with pytest.raises(ValueError, match=name):
        linear_logprob(hidden, weight, target, impl="chunked", **{name: value})
    out = linear_logprob(hidden.double(), weight.double(), target, impl="chunked", **{name: value})
    assert not out.logp.isnan().any()
    if name == "temperature":
        each = torch.full((3,), value, dtype=torch.float64)
        with pytest.raises(ValueError, match=name):
            linear_logprob(hidden, weight, target, impl="chunked", temperature=each)
