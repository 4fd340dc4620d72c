"""log Z: the masked mean of the prompt, the networks of the paper and of the authors, and where gradients go."""

import math

import pytest
import torch

from flowrl_kernels import LogPartition
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of, ragged_mask

B, P, H = 6, 8, 16


def make(seed=0, dtype=torch.float32):
    hidden = torch.randn(B, P, H, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return hidden, ragged_mask(B, P, seed=seed)


def trained(**settings):
    """A head whose last layer is not the zero it starts at."""
    torch.manual_seed(0)
    head = LogPartition(H, **settings)
    torch.nn.init.normal_(head.out.weight)
    torch.nn.init.normal_(head.out.bias)
    return head


def test_it_is_the_network_on_the_mean_of_the_tokens_that_count():
    head = trained().double()
    hidden, mask = make(dtype=torch.float64)
    got = head(hidden.masked_fill(~mask[..., None], math.nan), mask)
    linear = [module for module in head.body if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2
    for b in range(B):
        here = [hidden[b, t] for t in range(P) if mask[b, t]]
        x = sum(here) / len(here) if here else torch.zeros(H, dtype=torch.float64)
        for layer in linear:
            x = layer.weight @ x + layer.bias
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        wanted = head.out.weight[0] @ x + head.out.bias[0]
        assert float(got[b].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert got.shape == (B,)


def test_packed_equals_padded_with_holes():
    head = trained()
    hidden, mask = make()
    lengths = torch.where(mask.any(1), P - mask.flip(1).int().argmax(1), 0)
    inside = torch.arange(P) < lengths[:, None]
    padded = head(hidden, mask)
    packed = head(hidden[inside].masked_fill(~mask[inside][:, None], math.nan), mask[inside], cu_seqlens_of(lengths))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    whole = head(hidden.flatten(0, 1), cu_seqlens=torch.arange(B + 1, dtype=torch.int32) * P)
    torch.testing.assert_close(whole, head(hidden, torch.ones(B, P, dtype=torch.bool)), rtol=1e-5, atol=1e-6)


def test_an_empty_prompt_pools_to_zero_and_has_no_gradient():
    head = trained()
    hidden, mask = make()
    empty = ~mask.any(1)
    assert empty.any()
    x = hidden.clone().requires_grad_()
    out = head(x, mask)
    assert torch.equal(out[empty], head(torch.zeros_like(hidden), torch.ones_like(mask))[empty])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).any()


def test_it_starts_at_zero_and_learns():
    head = LogPartition(H)
    hidden, mask = make()
    assert (head(hidden, mask) == 0).all()
    optimiser = torch.optim.Adam(head.parameters(), lr=0.01)
    target = torch.arange(float(B))
    for _ in range(150):
        optimiser.zero_grad()
        loss = (head(hidden, mask) - target).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 0.01 * target.square().mean()


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_reaches_the_backbone_unless_detached(detach):
    head = trained(detach=detach)
    hidden, mask = make()
    x = hidden.clone().requires_grad_()
    head(x, mask).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in head.parameters())
    if detach:
        assert x.grad is None
    else:
        twin = trained().double()
        y = hidden.double().requires_grad_()
        twin(y, mask).sum().backward()
        assert_grad_close(x.grad, y.grad, rel=1e-5)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_is_float32_whatever_goes_in(weights, states, autocast):
    head = trained().to(weights)
    hidden, mask = make(dtype=states)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = head(hidden, mask)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert hidden.grad.dtype == states
    exact = trained().to(weights).float()(hidden.detach().float(), mask)
    torch.testing.assert_close(out, exact, rtol=0.03 if weights == torch.bfloat16 else 1e-6, atol=0.05)
    if weights == torch.float32:
        assert torch.equal(out, exact), "autocast must not reach it"
    else:
        assert not torch.equal(out, out.bfloat16().float()), "float32 digits, not bfloat16's"


def test_a_long_prompt_of_bfloat16_is_pooled_in_float32():
    head = trained()
    hidden = torch.randn(1, 5000, H, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.ones(1, 5000, dtype=torch.bool)
    torch.testing.assert_close(head(hidden, mask), head(hidden.double().mean(1, keepdim=True).float(), mask[:, :1]))


def test_as_released_has_layer_norm_and_dropout():
    torch.manual_seed(0)
    head = LogPartition.as_released(H)
    kinds = [type(module).__name__ for module in head.body]
    assert kinds == ["Linear", "GELU", "LayerNorm", "Dropout"] * 2
    assert all(module.p == 0.1 for module in head.body if isinstance(module, torch.nn.Dropout))
    hidden, mask = make()
    torch.nn.init.normal_(head.out.weight)
    assert not torch.equal(head(hidden, mask), head(hidden, mask))
    head.eval()
    assert torch.equal(head(hidden, mask), head(hidden, mask))
    size = 3584
    with torch.device("meta"):
        count = sum(p.numel() for p in LogPartition.as_released(size).parameters())
    assert count == 2 * (size * size + size + 2 * size) + size + 1  # 25.7 M, as the released block


def test_one_layer_is_linear():
    head = trained(layers=1)
    assert len(head.body) == 0
    hidden, mask = make()
    a, b = head(hidden, mask), head(2 * hidden, mask)
    torch.testing.assert_close(b - head.out.bias, 2 * (a - head.out.bias))
    with pytest.raises(ValueError, match="layers: .*at least 1"):
        LogPartition(H, layers=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3, H),), ValueError, "hidden: .*mask"),
        ((torch.zeros(2, 3, H), torch.ones(2, 4)), ValueError, r"mask: .*\(2, 3\).*\(2, 4\)"),
        ((torch.zeros(6, H), torch.ones(6)), ValueError, "hidden: .*cu_seqlens"),
        ((torch.zeros(6, H, dtype=torch.int64), torch.ones(6)), TypeError, "hidden: "),
        ((torch.zeros(6, H), None, torch.tensor([0.0, 6.0])), TypeError, "cu_seqlens: "),
        ((torch.zeros(6, H), None, torch.tensor([0, 5])), ValueError, "cu_seqlens: .*6"),
        ((torch.zeros(6, H), torch.ones(5), torch.tensor([0, 6])), ValueError, r"mask: .*\(6,\).*\(5,\)"),
        ((torch.zeros(6, H + 1), None, torch.tensor([0, 6])), ValueError, f"hidden: .*{H}.*{H + 1}"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LogPartition(H)(*arguments)
