"""cp_group=: sequences whose tokens lie on several ranks give the loss, metrics and gradients of one process."""

import os

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from residual_oracle import SPECS
from test_residual import call, make

from flowrl_kernels import LinearFlowRLLoss, LogPartition, flowrl_loss, residual_loss
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of, peaked_inputs, ragged_mask

IMPLS = ["reference", "chunked"]
# one row for each thing a row can do with a sum; two ranks take them all
KINDS = (
    "paper", "no_is", "tb_ppo_style", "clip_geo_tis_geo", "release_tis_token", "hard_gspo_select", "hard_cispo_drop",
    "token_log_z_beta30", "group", "gvpo",
)  # fmt: skip
COLUMNS = {2: [0, 4, 11], 4: [0, 3, 3, 10, 11]}  # of a padded batch; on four ranks the second has none


def whole(own, where, like):
    """The ranks' own gradients [..own tokens] at their places, summed."""
    out = torch.zeros_like(like)
    out[where] = own.reshape(-1)
    dist.all_reduce(out)
    return out


def summed(own):
    out = own.clone()
    dist.all_reduce(out)
    return out


def layouts(data, rank, world):
    """(name, the rank's tokens [B, T] bool, its batch, cu_seqlens): whole columns, and tokens dealt at random."""
    columns = torch.zeros_like(data["mask"])
    first, last = COLUMNS[world][rank : rank + 2]
    columns[:, first:last] = True
    padded = {k: v[:, first:last] if v.shape == columns.shape else v for k, v in data.items()}
    yield "padded", columns, padded, None
    owner = torch.randint(world, columns.shape, generator=torch.Generator().manual_seed(5))
    owner[3] = world - 1  # all tokens of a sequence on one rank
    mine = owner == rank
    packed = {k: v[mine] if v.shape == mine.shape else v for k, v in data.items()}
    yield "packed", mine, packed, cu_seqlens_of(mine.sum(1))


def gradients(name, data, **arguments):
    leaves = {k: data[k].clone().requires_grad_() for k in ("logp", "log_z")}
    out = call(name, {**data, **leaves}, **arguments)
    return out, *torch.autograd.grad(out.loss, tuple(leaves.values()), allow_unused=True)


def rows_worker(rank, world):
    data = make(dtype=torch.float32)
    for name, spec in ((name, SPECS[name]) for name in (SPECS if world == 2 else KINDS)):
        extra = {"normalizer": (13.0, 57.0)} if name == "tb_ppo_style" else {}
        single, dlogp, dlog_z = gradients(name, data, **extra)
        for layout, where, own, cu_seqlens in layouts(data, rank, world):
            for impl in IMPLS:
                split = gradients(name, own, cu_seqlens=cu_seqlens, cp_group=dist.group.WORLD, impl=impl, **extra)
                context = f"{name} {layout} {impl}"
                for got, want in zip(split[0][:3], single[:3]):
                    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=lambda m, c=context: f"{c}: {m}")
                for metric, value in single.metrics.items():
                    torch.testing.assert_close(split[0].metrics[metric], value, rtol=1e-6, atol=1e-6)
                assert_grad_close(whole(split[1], where, dlogp), dlogp, rel=1e-5)
                assert (split[2] is None) == (dlog_z is None) == (spec.z != "learned"), context
                if dlog_z is not None:  # every rank has log Z: the ranks' shares add up to its gradient, once
                    assert_grad_close(summed(split[2]), dlog_z, rel=1e-5)
                parts = [torch.empty_like(split[0].loss) for _ in range(world)]
                dist.all_gather(parts, split[0].loss.detach())
                assert all(torch.equal(part, parts[0]) for part in parts), context


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_every_row_split_over_ranks_equals_one_process(world):
    on_ranks(rows_worker, world)


def modules_worker(rank, world):
    """From hidden states, prompts split as well; then what is refused."""
    group = dist.group.WORLD
    b, t, p, h, v = 6, 11, 9, 16, 53
    hidden, weight, target = peaked_inputs(b * t, h, v, peak=8.0)
    hidden, target = hidden.view(b, t, h), target.view(b, t)
    mask, prompt_mask = ragged_mask(b, t, seed=2), ragged_mask(b, p, seed=3)
    draw = torch.Generator().manual_seed(1)
    prompt = torch.randn(b, p, h, generator=draw)
    ref, old = (-torch.rand(b, t, generator=draw) * 2 for _ in range(2))
    reward = torch.randn(b, generator=draw)
    torch.manual_seed(0)
    net = LogPartition(h)
    torch.nn.init.normal_(net.out.weight)
    names = ["hidden", "weight", "prompt", *(name for name, _ in net.named_parameters())]

    def run(at, prompt_at, group=None, packed=False):
        x, w, q = (tensor.clone().requires_grad_() for tensor in (hidden[:, at], weight, prompt[:, prompt_at]))
        log_z = net(q, prompt_mask[:, prompt_at], cp_group=group)
        tokens = {"target": target[:, at], "logp_ref": ref[:, at], "logp_old": old[:, at], "mask": mask[:, at]}
        states = x
        if packed:
            edges = torch.arange(b + 1) * x.shape[1]
            states, tokens = x.reshape(-1, h), {k: value.reshape(-1) for k, value in tokens.items()}
            tokens["cu_seqlens"] = edges
        loss = LinearFlowRLLoss(beta=2.0, clip="release", ratio="mean")
        out = loss(states, w, reward=reward, log_z=log_z, cp_group=group, **tokens)
        return out, torch.autograd.grad(out.loss, (x, w, q, *net.parameters()))

    single, wanted = run(slice(0, t), slice(0, p))
    at = slice(*COLUMNS[world][rank : rank + 2])
    prompt_at = slice(rank * p // world, (rank + 1) * p // world)
    for packed in (False, True):
        out, got = run(at, prompt_at, group, packed)
        torch.testing.assert_close(out.loss, single.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.residual, single.residual, rtol=1e-6, atol=1e-6)
        for name, mine, want in zip(names, got, wanted):
            if name in ("hidden", "prompt"):
                share = torch.zeros_like(want)
                share[:, at if name == "hidden" else prompt_at] = mine
                mine = share
            assert_grad_close(summed(mine), want, rel=1e-5)
    data = make(dtype=torch.float32)
    first, last = COLUMNS[world][rank : rank + 2]
    arguments = (data["logp"][:, first:last], data["reward"])
    centred = {"center": "through", "groups": data["groups"], "scale": 0.3}
    got = residual_loss(*arguments, mask=data["mask"][:, first:last], cp_group=group, **centred)
    want = residual_loss(data["logp"], data["reward"], mask=data["mask"], **centred)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"impl='triton' .* no triton implementation of context_parallel"):
        residual_loss(*arguments, cp_group=group, impl="triton")
    os.environ["FLOWRL_CHECK"] = "1"
    with pytest.raises(ValueError, match="reward: wanted the same sequences on every rank"):
        residual_loss(arguments[0], data["reward"] + rank, cp_group=group)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_from_hidden_states_every_parameter_gets_its_gradient_once(world):
    on_ranks(modules_worker, world)


def test_what_is_no_process_group_is_refused():
    data = make(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"cp_group: wanted a torch.distributed.ProcessGroup .* got str"):
        flowrl_loss(data["logp"], data["ref"], data["reward"], None, mask=data["mask"], cp_group="cp")
    with pytest.raises(TypeError, match="cp_group"):
        LogPartition(4)(torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), cp_group=1)
