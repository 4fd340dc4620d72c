"""The modules give what the functions give."""

import math

import pytest
import torch

from flowrl_kernels import FlowRLLoss, LinearFlowRLLoss, flowrl_loss, linear_logprob
from flowrl_kernels.presets import PRESETS
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of, peaked_inputs, ragged_mask

B, T, H, V = 5, 7, 16, 200


def make(seed=0, dtype=torch.float64):
    hidden, weight, target = peaked_inputs(B * T, H, V, dtype=dtype, peak=8.0, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    logp = linear_logprob(hidden, weight, target).logp.view(B, T)
    ref, old, sampler = (logp + 0.1 * torch.randn(B, T, generator=draw, dtype=logp.dtype) for _ in range(3))
    reward, log_z = torch.randn(2, B, generator=draw, dtype=logp.dtype)
    return {
        "hidden": hidden.view(B, T, H), "weight": weight, "target": target.view(B, T), "ref": ref, "old": old,
        "sampler": sampler, "reward": reward, "log_z": log_z, "mask": ragged_mask(B, T, seed=seed),
        "groups": torch.tensor([0, 1, 0, 1, 4]),
    }  # fmt: skip


def flat(data):
    lengths = torch.where(data["mask"].any(1), T - data["mask"].flip(1).int().argmax(1), 0)
    inside = torch.arange(T) < lengths[:, None]
    tensors = {k: v for k, v in data.items() if k != "z"}
    return {k: v[inside] if v.shape[:2] == (B, T) else v for k, v in tensors.items()}, cu_seqlens_of(lengths), inside


def anchored(data, settings):
    return data["ref"] if PRESETS[settings.get("preset", "paper")].anchor == "ref" else None


def second(data, settings):
    return data["sampler"] if PRESETS[settings.get("preset", "paper")].tis else None


def two_steps(data, settings, head, impl):
    logp = linear_logprob(
        data["hidden"], data["weight"], data["target"].masked_fill(~data["mask"], -100), impl=impl, **head
    ).logp
    return flowrl_loss(
        logp, anchored(data, settings), data["reward"], data["z"], logp_old=data["old"],
        logp_sampler=second(data, settings), mask=data["mask"], groups=data["groups"], normalizer=(4.0, 20.0),
        **settings,
    )  # fmt: skip


def one_step(data, settings, head, impl, cu_seqlens=None, **options):
    module = LinearFlowRLLoss(impl=impl, **settings, **options)
    return module(
        data["hidden"], data["weight"], data["target"], anchored(data, settings), data["reward"], data["z"],
        logp_old=data["old"], logp_sampler=second(data, settings), mask=data["mask"], cu_seqlens=cu_seqlens,
        groups=data["groups"], normalizer=(4.0, 20.0), **head,
    )  # fmt: skip


def gradients(function, data, *arguments, **options):
    leaves = [data[k].clone().requires_grad_() for k in ("hidden", "weight")]
    log_z = data["log_z"].clone().requires_grad_() if isinstance(data["z"], torch.Tensor) else None
    own = {**data, "hidden": leaves[0], "weight": leaves[1], "z": data["z"] if log_z is None else log_z}
    out = function(own, *arguments, **options)
    return out, torch.autograd.grad(out.loss, leaves + ([] if log_z is None else [log_z]))


CASES = {
    "paper": ({}, {}),
    "release with the head's settings": ({"preset": "release"}, {"softcap": 20.0, "logit_scale": 1.1}),
    "second weight": ({"preset": "release_tis_sum"}, {"temperature": 0.7}),
    "group": ({"preset": "group"}, {}),
    "through": ({"preset": "agro"}, {}),
    "joint": ({"preset": "tb_ppo_style"}, {}),
    "token": ({"preset": "token_log_z_beta30"}, {}),
    "no log Z": ({"preset": "release_no_anchor_no_log_z"}, {}),
}


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_from_hidden_states_is_log_probs_then_loss(case, impl):
    settings, head = CASES[case]
    data = make()
    data["z"] = {"group": "group", "through": "through", "no log Z": None}.get(case, data["log_z"])
    wanted, expected = gradients(two_steps, data, settings, head, "reference")
    packed, cu_seqlens, inside = flat(data)
    for batch, layout in ((data, None), ({**packed, "z": data["z"]}, cu_seqlens)):
        for single in (True, False):
            out, got = gradients(one_step, batch, settings, head, impl, cu_seqlens=layout, single_pass=single)
            torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(out.residual, wanted.residual, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(out.weight, wanted.weight, rtol=1e-10, atol=1e-12)
            for name in wanted.metrics:
                torch.testing.assert_close(out.metrics[name], wanted.metrics[name], rtol=1e-9, atol=1e-11)
            assert_grad_close(got[0], expected[0] if layout is None else expected[0][inside], rel=1e-10)
            for a, b in zip(got[1:], expected[1:]):
                assert_grad_close(a, b, rel=1e-10)


def test_gradients_reach_head_and_states_in_float32():
    exact, data = make(), make(dtype=torch.float32)
    data = {k: data[k].float() if v.is_floating_point() else v for k, v in exact.items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    exact["z"], data["z"] = exact["log_z"], data["log_z"]
    _, wanted = gradients(two_steps, exact, {}, {}, "reference")
    _, got = gradients(one_step, data, {}, {}, "auto")
    for a, b in zip(got, wanted):
        assert_grad_close(a, b, rel=1e-4)


@pytest.mark.parametrize("single", [True, False])
def test_masked_positions_are_not_looked_at(single):
    data = make(dtype=torch.float32)
    data["z"] = data["log_z"]
    clean, grads = gradients(one_step, data, {}, {}, "auto", single_pass=single)
    dirty = {k: v.clone() for k, v in data.items()}
    dirty["target"][~data["mask"]] = 10**6  # a padding id out of the vocabulary
    for key in ("ref", "old", "sampler"):
        dirty[key][~data["mask"]] = math.nan
    out, got = gradients(one_step, dirty, {}, {}, "auto", single_pass=single)
    assert torch.equal(out.loss, clean.loss)
    assert all(torch.equal(a, b) for a, b in zip(got, grads))
    assert (got[0][~data["mask"]] == 0).all()


def test_the_weight_is_exactly_one_after_the_same_primitive():
    data = make(dtype=torch.float32)
    old = linear_logprob(data["hidden"], data["weight"], data["target"]).logp
    out = LinearFlowRLLoss()(
        data["hidden"], data["weight"], data["target"], data["ref"], data["reward"], data["log_z"], logp_old=old,
        mask=data["mask"],
    )  # fmt: skip
    assert (out.weight[data["mask"].any(1)] == 1.0).all()


def test_a_temperature_of_the_constructor_yields_to_one_of_the_call():
    data = make(dtype=torch.float32)
    arguments = [data[k] for k in ("hidden", "weight", "target", "ref", "reward", "log_z")]
    held, given = LinearFlowRLLoss(temperature=0.6), LinearFlowRLLoss()
    assert held(*arguments).loss == given(*arguments, temperature=0.6).loss
    assert held(*arguments, temperature=1.0).loss == given(*arguments).loss
    assert held(*arguments).loss != given(*arguments).loss


def test_a_bounded_backward_stays_near_and_reports_its_bound():
    data = make(dtype=torch.float32)
    data["z"] = data["log_z"]
    report = torch.zeros(3)
    _, exact = gradients(one_step, data, {}, {}, "chunked")
    _, got = gradients(one_step, data, {}, {"report": report}, "chunked", epsilon=0.01)
    assert_grad_close(got[0], exact[0], rel=0.015)
    assert 0 <= float(report[0]) <= 0.01


def test_the_module_equals_the_function():
    data = make()
    module = FlowRLLoss(clip="release", beta=4.0)
    arguments = (data["ref"] + 0.1, data["ref"], data["reward"], data["log_z"])
    keywords = {"logp_old": data["old"], "mask": data["mask"], "normalizer": 3.0}
    a, b = module(*arguments, **keywords), flowrl_loss(*arguments, **keywords, clip="release", beta=4.0)
    assert a.loss == b.loss
    assert all(torch.equal(a.metrics[k], b.metrics[k]) for k in b.metrics)
    assert "clip='release', beta=4.0" in repr(module)
    assert "temperature=0.5" in repr(LinearFlowRLLoss(temperature=0.5))
    assert not list(module.parameters())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": torch.ones(B, T - 1)}, ValueError, "mask: "),
        ({"target": torch.zeros(B, T)}, TypeError, "target: "),
        ({"target": torch.zeros(B, T - 1, dtype=torch.int64)}, ValueError, "target: "),
        ({"target": torch.full((B, T), V)}, ValueError, "target: "),
        ({"hidden": torch.zeros(B, T, H + 1)}, ValueError, "hidden: "),
        ({"logp_ref": torch.zeros(B, T + 1)}, ValueError, "logp_ref: "),
        ({"reward": torch.zeros(B + 1)}, ValueError, "reward: "),
        ({"temperature": 0.0}, ValueError, "temperature: "),
    ],
)
@pytest.mark.parametrize("single", [True, False])
def test_bad_input_is_refused(changes, error, message, single):
    data = make(dtype=torch.float32)
    arguments = {
        "hidden": data["hidden"].requires_grad_(), "weight": data["weight"], "target": data["target"],
        "logp_ref": data["ref"], "reward": data["reward"], "log_z": data["log_z"], **changes,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        LinearFlowRLLoss(single_pass=single)(**arguments)
