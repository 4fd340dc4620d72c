"""Routing in torch: threshold, lists and ragged sums against what plain Python makes of their definition."""

import math
from fractions import Fraction

import pytest
import torch

from flowrl_kernels.chunked import bounded, routing
from flowrl_kernels.testing import rl_like_inputs

INF, NAN = math.inf, math.nan


def units(budget, pairs):
    bits = min(52, 62 - math.ceil(math.log2(max(pairs, 1))))
    exponent = math.frexp(budget)[1] - 1 if 0 < budget < INF else (-900 if budget == 0 else 900)
    scale = Fraction(2) ** (bits - 1 - min(max(exponent, -900), 900))
    return scale, 1 << bits, min(math.floor(Fraction(budget) * scale), (1 << bits) - 1) if budget < INF else None


def drop_by_sorting(cost, square, budget):
    """The same rule by a stable sort and exact integers: pairs go while the sums up to and with their key fit."""
    pairs = list(zip(cost.flatten().tolist(), square.flatten().tolist()))
    keys = routing.drop_keys(square.flatten(), budget[1]).tolist()
    scales, caps, limits = zip(*(units(float(b), len(pairs)) for b in budget))

    def amount(value, which):
        if not 0 <= value < INF:
            return caps[which]
        return min(math.ceil(Fraction(value) * scales[which]), caps[which])

    spent, threshold = [0, 0], routing.KEYS
    for key in sorted(set(keys)):
        members = [pair for pair, own in zip(pairs, keys) if own == key]
        after = [spent[i] + sum(amount(pair[i], i) for pair in members) for i in range(2)]
        if any(a > limit for a, limit in zip(after, limits)):
            threshold = key
            break
        spent = after
    active = torch.tensor([key >= threshold for key in keys]).view(cost.shape)
    return active, torch.tensor([float(Fraction(s) / scale) for s, scale in zip(spent, scales)], dtype=torch.float64)


def pairs_like(name, shape=(23, 37), seed=0):
    """cost, square, budget. Squares spread over many octaves, as those of softmax tiles do."""
    make = torch.Generator().manual_seed(seed)
    square = torch.randn(shape, generator=make, dtype=torch.float64).mul_(12.0).exp_()
    cost = square.sqrt() * (1.0 + 3.0 * torch.rand(shape, generator=make, dtype=torch.float64))
    tight = 0.01
    if name == "ties":
        square = 2.0 ** torch.randint(-3, 3, shape, generator=make).double()
        cost = square.clone()
    elif name == "zeros":
        square[:, ::3] = 0.0
        cost[:, ::3] = 0.0
    elif name == "all_zero":
        square, cost = torch.zeros_like(square), torch.zeros_like(cost)
    elif name == "broken":
        square[3], cost[3] = NAN, NAN
        square[5, 5], cost[5, 5] = INF, INF
        cost[6, 6] = NAN  # a nan in the sum alone
    elif name == "tiny":
        square *= 1e-250
        cost *= 1e-125
    budget = torch.stack([tight * cost.nan_to_num(0, 0).sum(), tight**2 * square.nan_to_num(0, 0).sum()])
    if name == "no_budget":
        budget.zero_()
    elif name == "everything_fits":
        budget = torch.stack([cost.sum(), square.sum()]) * 1.01
    elif name == "only_cost_binds":
        budget[1] = square.sum() * 2
    elif name == "only_square_binds":
        budget[0] = cost.sum() * 2
    return cost, square, budget


PAIRS = [
    "spread", "ties", "zeros", "all_zero", "broken", "tiny", "no_budget", "everything_fits", "only_cost_binds",
    "only_square_binds",
]  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_the_histograms_find_what_sorting_finds(name):
    for seed, shape in enumerate([(23, 37), (1, 1), (64, 3), (1, 200)]):
        if name == "broken" and shape != (23, 37):
            continue
        cost, square, budget = pairs_like(name, shape, seed)
        active, spent = routing.drop_lightest(cost, square, budget)
        expected_active, expected_spent = drop_by_sorting(cost, square, budget)
        assert torch.equal(active, expected_active)
        assert torch.equal(spent, expected_spent)
        dropped = ~active
        assert (cost[dropped].sum() <= spent[0]) or math.isclose(cost[dropped].sum(), spent[0], rel_tol=1e-12)
        assert (spent <= budget).all()
        if dropped.any() and active.any():
            assert square[dropped].max() < square[active].nan_to_num(INF).min() * (1 + 2**-14)


def test_special_cases_drop_all_or_nothing():
    active, spent = routing.drop_lightest(*pairs_like("everything_fits"))
    assert not active.any()
    assert (spent > 0).all()
    active, spent = routing.drop_lightest(*pairs_like("no_budget"))
    assert active.all()
    assert spent.tolist() == [0.0, 0.0]
    assert not routing.drop_lightest(*pairs_like("all_zero"))[0].any()  # what weighs nothing costs nothing
    active, _ = routing.drop_lightest(*pairs_like("broken"))
    assert active[3].all()
    assert active[5, 5]
    assert not active.all()
    empty = torch.zeros((0, 4), dtype=torch.float64)
    active, spent = routing.drop_lightest(empty, empty, torch.ones(2, dtype=torch.float64))
    assert active.shape == (0, 4)
    assert spent.tolist() == [0.0, 0.0]


def test_the_order_of_the_pairs_changes_no_bit():
    cost, square, budget = pairs_like("spread")
    active, spent = routing.drop_lightest(cost.flatten(), square.flatten(), budget)
    shuffle = torch.randperm(cost.numel(), generator=torch.Generator().manual_seed(1))
    other_active, other_spent = routing.drop_lightest(cost.flatten()[shuffle], square.flatten()[shuffle], budget)
    assert torch.equal(spent, other_spent)
    assert torch.equal(active[shuffle], other_active)


def plan_inputs(n, h, v, zipf):
    hidden, weight, target, grad = rl_like_inputs(n, h, v, zipf=zipf)
    logp = torch.log_softmax(hidden @ weight.T, -1)
    runs = torch.nn.functional.pad(logp, (0, -v % 128), value=-INF).view(n, -1, 128).logsumexp(-1)
    tile_lse = (runs + 4e-3).half().T.contiguous()  # more than the rounding: an upper bound
    return grad.abs(), torch.zeros(n), tile_lse, target, logp.gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize(("zipf", "epsilon"), [(1.0, 0.01), (1.2, 0.01), (1.0, 0.001)])
def test_it_spends_the_budget_as_well_as_an_exact_sort(zipf, epsilon):
    gradient, lse, tile_lse, target, target_logp = plan_inputs(256, 48, 20000, zipf)
    cost, square = routing.tile_costs(tile_lse, lse, target, target_logp, gradient, 8)
    norm = 2.0 * (gradient * -torch.expm1(target_logp)).double().sum()
    square_norm = (gradient * torch.expm1(target_logp)).double().square().sum()
    budget = torch.stack([epsilon * norm, (0.3 * epsilon) ** 2 * square_norm])
    active, _ = routing.drop_lightest(cost, square, budget)
    index = square.flatten().argsort(stable=True)
    fits = (cost.flatten()[index].cumsum(0) <= budget[0]) & (square.flatten()[index].cumsum(0) <= budget[1])
    by_sorting = torch.ones_like(fits).index_put_((index,), ~fits).view(active.shape)
    assert 0 < by_sorting.sum() < by_sorting.numel()
    assert (by_sorting != active).sum() <= 1  # at most the pair at the edge
    plan = bounded.make_plan(gradient, lse, tile_lse, target, target_logp, epsilon)
    assert 0 < plan.share < 1


def random_active(blocks, tiles, share, seed=0):
    make = torch.Generator().manual_seed(seed)
    active = torch.rand((blocks, tiles), generator=make) < share
    if blocks > 2 and tiles > 2:
        active[1], active[:, 2] = True, False  # a full row, and a column with nothing in it
    return active


SHAPES = [(1, 1), (7, 5), (40, 129), (33, 64), (300, 2), (2, 700), (0, 4), (4, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_lists_name_every_active_pair_once_and_in_order(shape, share):
    active = random_active(*shape, share)
    lists = routing.block_lists(active)
    pairs = [tuple(pair) for pair in active.nonzero().tolist()]
    total = len(pairs)
    assert lists.block_tiles[:total].tolist() == [tile for _, tile in pairs]
    by_tile = sorted(range(total), key=lambda slot: pairs[slot][::-1])
    assert lists.tile_blocks[:total].tolist() == [pairs[slot][0] for slot in by_tile]
    assert lists.tile_slots[:total].tolist() == by_tile
    assert lists.block_offsets.tolist() == [0, *active.sum(1).cumsum(0).tolist()]
    assert lists.tile_offsets.tolist() == [0, *active.sum(0).cumsum(0).tolist()]
    for unused in (lists.block_tiles, lists.tile_blocks, lists.tile_slots):
        assert unused.dtype == torch.int32
        assert unused.numel() == active.numel()
        assert (unused[total:] == -1).all()


def test_segment_sums_are_exact_to_float64_and_depend_on_the_sequence_alone():
    lengths = [0, 1, 255, 256, 257, 1000, 0, 3, 513]
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0)) * 100
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    sums = routing.segment_sums(values, edges, max(lengths))
    for i, length in enumerate(lengths):
        own = values[edges[i] : edges[i + 1]]
        assert sums[i].item() == pytest.approx(math.fsum(own.tolist()), rel=1e-13, abs=1e-11)
        alone = routing.segment_sums(own, torch.tensor([0, length]), length)
        assert torch.equal(alone[0], sums[i])
    assert torch.equal(routing.segment_sums(values, edges, 5000), sums)  # a longer bound adds zeros
    values[0] = NAN
    assert routing.segment_sums(values, edges, 1000).isnan().nonzero()[:, 0].tolist() == [1]
