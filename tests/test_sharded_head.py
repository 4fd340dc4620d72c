"""DTensor heads give what one process gives: inside an FSDP2 forward, gathered, or by rows with vocab_parallel=."""

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from flowrl_kernels import linear_logprob
from flowrl_kernels.testing import assert_grad_close

B, T, H, V = 8, 7, 12, 203  # 203 rows: no two or four ranks have equal shards


class Tiny(nn.Module):
    """Embedding, one layer, head; the log-probs are taken in the root's forward."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, H)
        self.mix = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, target):
        return linear_logprob(2.0 * torch.tanh(self.mix(self.embed(ids))), self.head.weight, target, softcap=9.0).logp


def batch():
    make = torch.Generator().manual_seed(1)
    ids, target = (torch.randint(V, (B, T), generator=make) for _ in range(2))
    return ids, target, torch.randn(B, T, generator=make)


def alone(tied):
    """logp [B, T] and the gradients of sum(g logp) by every parameter, in one process."""
    ids, target, g = batch()
    model = Tiny(tied)
    logp = model(ids, target)
    (g * logp).sum().backward()
    return logp.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(logp, wanted, gradients, expected):
    torch.testing.assert_close(logp.detach(), wanted, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, grad in gradients.items():
        assert_grad_close(grad.full_tensor() if isinstance(grad, DTensor) else grad, expected[name], rel=1e-5)


def fsdp_worker(rank, world):
    mine = slice(rank * B // world, (rank + 1) * B // world)
    for tied in (False, True):
        wanted, expected = alone(tied)
        meshes = {"sharded": init_device_mesh("cpu", (world,))}
        if world == 4:
            meshes["replicated and sharded"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
        for mesh in meshes.values():
            for dim, reshard in ((0, True), (1, False)):
                model = Tiny(tied)
                fully_shard(
                    model, mesh=mesh, shard_placement_fn=lambda p, d=dim: Shard(min(d, p.dim() - 1)),
                    reshard_after_forward=reshard,
                )  # fmt: skip
                ids, target, g = (value[mine] for value in batch())
                logp = model(ids, target)
                (world * (g * logp).sum()).backward()  # FSDP takes the mean over the ranks
                assert_same(logp, wanted[mine], {n: p.grad for n, p in model.named_parameters()}, expected)
    model = Tiny(tied=False)
    fully_shard(model.head)  # a unit of its own, whose forward is not called
    fully_shard(model)
    with pytest.raises(TypeError, match=r"weight: .* DTensor.*forward of the FSDP unit.*Partial.*vocab_parallel"):
        model(*(value[mine] for value in batch()[:2]))


def gathered_worker(rank, world):
    """Every rank has its own data, and the weight is a DTensor sharded on either dimension."""
    mesh = init_device_mesh("cpu", (world,))
    mine = slice(rank * B // world, (rank + 1) * B // world)
    ids, target, g = (value[mine] for value in batch())
    for tied in (False, True):
        wanted, expected = alone(tied)
        for dim in (0, 1):
            model = Tiny(tied)
            leaves = {
                n: distribute_tensor(p.data, mesh, [Shard(min(dim, p.dim() - 1))]) for n, p in model.named_parameters()
            }
            leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
            whole = {name: leaf.full_tensor(grad_placements=[Partial()]) for name, leaf in leaves.items()}
            if tied:
                whole["head.weight"] = whole["embed.weight"]
            logp = torch.func.functional_call(model, whole, (ids, target))
            (g * logp).sum().backward()
            assert_same(logp, wanted[mine], {name: leaf.grad for name, leaf in leaves.items()}, expected)


def rows_worker(rank, world):
    """Tensor parallelism: the same data on every rank, the head split over its rows, tied to the embedding or not."""
    mesh = init_device_mesh("cpu", (world,))
    ids, target, g = batch()
    for tied in (False, True):
        wanted, expected = alone(tied)
        model = Tiny(tied)
        weight = distribute_tensor(model.head.weight.data, mesh, [Shard(0)]).requires_grad_()
        table = weight.full_tensor() if tied else model.embed.weight
        hidden = 2.0 * torch.tanh(model.mix(table[ids]))
        logp = linear_logprob(hidden, weight.to_local(), target, softcap=9.0, vocab_parallel=mesh.get_group()).logp
        (g * logp).sum().backward()
        gradients = {"mix.weight": model.mix.weight.grad, "mix.bias": model.mix.bias.grad}
        gradients |= {"embed.weight": weight.grad} if tied else {
            "embed.weight": model.embed.weight.grad, "head.weight": weight.grad
        }  # fmt: skip
        assert_same(logp, wanted, gradients, expected)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("worker", [fsdp_worker, gathered_worker, rows_worker])
def test_a_sharded_head_equals_one_process(worker, world):
    on_ranks(worker, world)
