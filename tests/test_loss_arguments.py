"""Bad input to the losses gets a message with the argument's name, what was wanted and what came."""

import math

import numpy as np
import pytest
import torch

from flowrl_kernels import advantages, flowrl_loss, policy_gradient_loss, residual_loss, value_loss

X, ROW = torch.zeros(3, 4), torch.zeros(3)
FLAT, CU = torch.zeros(12), torch.tensor([0, 4, 4, 12])
IDS = torch.tensor([0, 0, 1])


class DTensor(torch.Tensor):
    """Called as the distributed one, which is what the check looks at."""


def meta(tensor):
    return torch.empty_like(tensor, device="meta")


FLOW = {
    "logp as a list": ({"logp": [[0.0]]}, TypeError, "logp: .*list"),
    "logp of integers": ({"logp": X.long()}, TypeError, "logp: .*int64"),
    "logp of three dimensions": ({"logp": X[None], "logp_ref": X[None]}, ValueError, r"logp: .*\(1, 3, 4\)"),
    "logp as a DTensor": ({"logp": X.as_subclass(DTensor)}, TypeError, "logp: .*DTensor"),
    "logp_ref of another shape": ({"logp_ref": X[:, :3]}, ValueError, r"logp_ref: .*\(3, 4\).*\(3, 3\)"),
    "logp_ref elsewhere": ({"logp_ref": meta(X)}, ValueError, "logp_ref: .*meta"),
    "no reference": ({"logp_ref": None}, ValueError, "logp_ref: .*anchor='ref'"),
    "logp_old of another shape": ({"logp_old": X[:2]}, ValueError, "logp_old: "),
    "reward of another length": ({"reward": ROW[:2]}, ValueError, r"reward: .*\(3,\).*\(2,\)"),
    "reward per token": ({"reward": X}, ValueError, "reward: wanted 1 dimensions"),
    "reward of integers": ({"reward": IDS}, TypeError, "reward: .*int64"),
    "reward elsewhere": ({"reward": meta(ROW)}, ValueError, "reward: .*meta"),
    "log_z of another length": ({"log_z": ROW[:2]}, ValueError, r"log_z: .*\(3,\).*\(2,\)"),
    "log_z of two dimensions": ({"log_z": ROW[:, None]}, ValueError, "log_z: wanted 1 dimensions"),
    "log_z elsewhere": ({"log_z": meta(ROW)}, ValueError, "log_z: .*meta"),
    "log_z unknown": ({"log_z": "mean"}, ValueError, "log_z: .*'group'.*'mean'"),
    "log_z forgotten": ({"log_z": ...}, ValueError, "log_z: .*log_z=None"),
    "log_z of groups without them": ({"log_z": "group"}, ValueError, "groups: .*log_z='group'"),
    "groups of another length": ({"log_z": "group", "groups": IDS[:2]}, ValueError, "groups: "),
    "groups of floats": ({"log_z": "group", "groups": ROW}, TypeError, "groups: "),
    "mask of another shape": ({"mask": X[:, :3].bool()}, ValueError, r"mask: .*\(3, 4\).*\(3, 3\)"),
    "mask as a list": ({"mask": [[1]]}, TypeError, "mask: .*list"),
    "mask of fractions": ({"mask": X + 0.5}, ValueError, "mask: .*0"),
    "a 2-d batch with cu_seqlens": ({"cu_seqlens": CU}, ValueError, r"logp: .*cu_seqlens.*\(3, 4\)"),
    "beta infinite": ({"beta": math.inf}, ValueError, "beta: "),
    "ratio unknown": ({"ratio": "max"}, ValueError, "ratio: .*'sum'.*'max'"),
    "anchor unknown": ({"anchor": "base"}, ValueError, "anchor: .*'ref'.*'base'"),
    "phi unknown": ({"phi": "cube"}, ValueError, "phi: .*'square'.*'cube'"),
    "clip unknown": ({"clip": "papers"}, ValueError, "clip: .*'paper'.*'papers'"),
    "clip of one number": ({"clip": 0.2}, ValueError, "clip: .*low, high.*0.2"),
    "clip of three": ({"clip": (0, 1, 2)}, ValueError, "clip: "),
    "clip reversed": ({"clip": (1.2, 0.8)}, ValueError, "clip: .*low <= high"),
    "clip negative": ({"clip": (-0.2, 0.2)}, ValueError, "clip: .*0 <= low"),
    "clip of NaN": ({"clip": (math.nan, 1.0)}, ValueError, "clip: "),
    "tis unknown": ({"tis": "seq"}, ValueError, "tis: .*'seq'"),
    "a clip without the older policy": ({"clip": (0.5, 2.0)}, ValueError, r"logp_old: .*clip=\(0.5, 2.0\)"),
    "a ratio without the older policy": ({"ratio": "mean"}, ValueError, "logp_old: .*ratio='mean'"),
    "a clip without a ratio": ({"ratio": None, "clip": "release", "logp_old": X}, ValueError, "clip: .*ratio=None"),
    "a cap without tis": ({"tis_cap": 3.0, "logp_old": X}, ValueError, "tis_cap: .*tis=None"),
    "a sampler without tis": ({"logp_sampler": X, "logp_old": X}, ValueError, "tis: .*logp_sampler"),
    "a reference without its anchor": ({"anchor": None}, ValueError, "logp_ref: .*anchor=None"),
    "a reference beside another anchor": ({"anchor": "old", "logp_old": X}, ValueError, "logp_ref: .*anchor='old'"),
    "beta as text": ({"beta": "3"}, TypeError, "beta: wanted a number; got '3'"),
    "beta that is learned": ({"beta": torch.ones((), requires_grad=True)}, ValueError, "beta: .*item"),
    "length_normalize as a list": (
        {"length_normalize": [1.0]},
        TypeError,
        r"length_normalize: .*True or False.*\[1.0\]",
    ),
    "phi as a list": ({"phi": ["exp"]}, ValueError, r"phi: wanted .* or one of .*\['exp'\]"),
    "ratio as an array": ({"ratio": np.ones(3)}, ValueError, "ratio: wanted one of .*array"),
    "log_z as an array": ({"log_z": np.ones(2)}, ValueError, "log_z: wanted a tensor.*array"),
    "preset as a list": ({"preset": ["paper"]}, ValueError, r"preset: wanted one of .*\['paper'\]"),
    "impl as an array": ({"impl": np.ones(2)}, TypeError, "impl: wanted one of .*array"),
    "groups that nothing reads, as an array": ({"groups": np.ones(3)}, TypeError, "groups: .*ndarray"),
    "normalizer that is complex": ({"normalizer": torch.ones(1) * 1j}, TypeError, "normalizer: .*complex64"),
    "beta that is complex": ({"beta": torch.tensor(1j)}, TypeError, "beta: .*complex64"),
    "length_normalize as text": ({"length_normalize": "no"}, TypeError, "length_normalize: "),
    "a length per token": (
        {"length_normalize": True, "preset": "token_log_z_beta30"},
        ValueError,
        "length_normalize: .*per token",
    ),
    "tis without the sampler": ({"tis": "mean", "logp_old": X}, ValueError, "logp_sampler: .*tis='mean'"),
    "tis_cap 0": ({"tis_cap": 0.0, "tis": "mean", "logp_old": X, "logp_sampler": X}, ValueError, "tis_cap: "),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer: .*above 0"),
    "normalizer negative": ({"normalizer": -3.0}, ValueError, "normalizer: "),
    "normalizer NaN": ({"normalizer": math.nan}, ValueError, "normalizer: "),
    "normalizer of a negative tensor": ({"normalizer": torch.tensor(-3.0)}, ValueError, "normalizer: .*at least 0"),
    "normalizer of a NaN tensor": ({"normalizer": torch.tensor([3.0, math.nan])}, ValueError, "normalizer: "),
    "normalizer of three": ({"normalizer": torch.ones(3)}, ValueError, r"normalizer: .*\(3,\)"),
    "normalizer of three numbers": ({"normalizer": (1, 2, 3)}, ValueError, "normalizer: "),
    "normalizer with a 0": ({"normalizer": (4, 0)}, ValueError, "normalizer: .*above 0"),
    "impl unknown": ({"impl": "fast"}, ValueError, "impl: .*'chunked'.*'fast'"),
    "a backend that is not there": ({"impl": "cuda"}, ValueError, "impl: .*'cuda'.*holds no operator"),
}


@pytest.mark.parametrize("case", FLOW)
def test_flowrl_loss_refuses(case):
    changes, error, message = FLOW[case]
    arguments = {"logp": X, "logp_ref": X, "reward": ROW, "log_z": ROW, **changes}
    with pytest.raises(error, match=message):
        flowrl_loss(**arguments)


PACKED = {
    "no boundaries": ({"cu_seqlens": None}, ValueError, r"logp: .*cu_seqlens.*\(12,\)"),
    "boundaries of another number": ({"cu_seqlens": CU[:3]}, ValueError, r"cu_seqlens: .*\(4,\).*\(3,\)"),
    "boundaries that fall": ({"cu_seqlens": torch.tensor([0, 8, 4, 12])}, ValueError, "cu_seqlens: .*rising"),
    "boundaries that start late": ({"cu_seqlens": CU + 1}, ValueError, "cu_seqlens: .*from 0 to 12"),
    "boundaries that end early": ({"cu_seqlens": torch.tensor([0, 4, 4, 11])}, ValueError, "cu_seqlens: .*12"),
    "boundaries of floats": ({"cu_seqlens": CU.float()}, TypeError, "cu_seqlens: .*integer"),
    "boundaries as a list": ({"cu_seqlens": CU.tolist()}, TypeError, "cu_seqlens: .*list"),
    "boundaries elsewhere": ({"cu_seqlens": meta(CU)}, ValueError, "cu_seqlens: .*meta"),
    "a mask per sequence": ({"mask": ROW.bool()}, ValueError, r"mask: .*\(12,\).*\(3,\)"),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_input_is_refused(case):
    changes, error, message = PACKED[case]
    with pytest.raises(error, match=message):
        flowrl_loss(FLAT, FLAT, ROW, ROW, **{"cu_seqlens": CU, **changes})


FAMILY = {
    "target of two dimensions": ({"target": X}, ValueError, "target: wanted 1"),
    "center unknown": ({"center": "mean"}, ValueError, "center: .*'detached'.*'mean'"),
    "center without groups": ({"center": "through"}, ValueError, "groups: "),
    "level unknown": ({"level": "turn"}, ValueError, "level: .*'token'.*'turn'"),
    "a centre per token": ({"center": "detached", "groups": IDS, "level": "token"}, ValueError, "token level"),
    "scale infinite": ({"scale": math.inf}, ValueError, "scale: "),
    "anchor of another shape": ({"anchor": X[:2]}, ValueError, "anchor: "),
}


@pytest.mark.parametrize("case", FAMILY)
def test_residual_loss_refuses(case):
    changes, error, message = FAMILY[case]
    arguments = {"target": ROW, **changes}
    with pytest.raises(error, match=message):
        residual_loss(X, **arguments)


GRADIENT = {
    "advantage of another length": ({"advantage": ROW[:2]}, ValueError, r"advantage: .*\(3,\).*\(2,\)"),
    "advantage of another shape": ({"advantage": X[:, :3]}, ValueError, r"advantage: .*\(3, 4\).*\(3, 3\)"),
    "advantage of no dimension": ({"advantage": torch.tensor(1.0)}, ValueError, "advantage: "),
    "advantage elsewhere": ({"advantage": meta(ROW)}, ValueError, "advantage: .*meta"),
    "logp_old as a list": ({"logp_old": [0.0]}, TypeError, "logp_old: .*list"),
    "a reference without kl": ({"logp_ref": X}, ValueError, "kl: .*logp_ref"),
    "a kind of KL without kl": ({"kl_kind": "k1"}, ValueError, "kl: .*kl_kind"),
    "a bound of the KL without kl": ({"kl_bound": 10.0}, ValueError, "kl: .*kl_bound"),
    "a bound of k1": ({"kl": 1.0, "logp_ref": X, "kl_kind": "k1", "kl_bound": 9.0}, ValueError, "kl_bound: .*'k1'"),
    "a bound of 0": ({"kl": 1.0, "logp_ref": X, "kl_bound": 0.0}, ValueError, "kl_bound: .*above 0"),
    "a clip without a ratio": ({"ratio": "none", "clip": (0.8, 1.2)}, ValueError, "clip: .*'none'"),
    "dual_clip of CISPO": ({"ratio": "detached", "dual_clip": 3.0}, ValueError, "dual_clip: .*'detached'"),
    "a horizon that nothing divides by": ({"horizon": 9}, ValueError, "horizon: .*'token-mean'"),
    "logp_old of another shape": ({"logp_old": X[:2]}, ValueError, "logp_old: "),
    "clip reversed": ({"clip": (1.2, 0.8)}, ValueError, "clip: "),
    "dual_clip below 1": ({"dual_clip": 0.5}, ValueError, "dual_clip: .*above 1.*0.5"),
    "ratio unknown": ({"ratio": "sum"}, ValueError, "ratio: .*'token'.*'sum'"),
    "kl without the reference": ({"kl": 0.1}, ValueError, "logp_ref: .*kl"),
    "kl NaN": ({"kl": math.nan, "logp_ref": X}, ValueError, "kl: "),
    "kl_kind unknown": ({"kl": 0.1, "logp_ref": X, "kl_kind": "k4"}, ValueError, "kl_kind: .*'k3'.*'k4'"),
    "aggregate unknown": ({"aggregate": "mean"}, ValueError, "aggregate: .*'token-mean'.*'mean'"),
    "horizon 0": ({"aggregate": "seq-mean-token-sum-norm", "horizon": 0}, ValueError, "horizon: "),
    "normalizer 0": ({"normalizer": 0.0}, ValueError, "normalizer: "),
    "normalizer of two": ({"normalizer": (3.0, 12.0)}, ValueError, "normalizer: "),
}


@pytest.mark.parametrize("case", GRADIENT)
def test_policy_gradient_loss_refuses(case):
    changes, error, message = GRADIENT[case]
    arguments = {"logp": X, "logp_old": X, "advantage": ROW, **changes}
    with pytest.raises(error, match=message):
        policy_gradient_loss(**arguments)


def test_packed_tokens_have_no_length_to_divide_by():
    with pytest.raises(ValueError, match="horizon: .*packed"):
        policy_gradient_loss(FLAT, FLAT, ROW, cu_seqlens=CU, aggregate="seq-mean-token-sum-norm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"returns": X[:2]}, "returns: "),
        ({"clip": 0.5}, "old_value: .*clip"),
        ({"old_value": X}, "clip: .*old_value"),
        ({"clip": -1.0, "old_value": X}, "clip: .*above 0"),
        ({"value": FLAT, "returns": FLAT}, r"value: .*cu_seqlens.*\(12,\)"),
        ({"aggregate": "mean"}, "aggregate: "),
    ],
)
def test_value_loss_refuses(changes, message):
    arguments = {"value": X, "returns": X, **changes}
    with pytest.raises(ValueError, match=message):
        value_loss(**arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        ("group_normalize", (X, IDS), ValueError, "reward: wanted 1"),
        ("group_normalize", (ROW, IDS[:2]), ValueError, r"groups: .*\(3,\).*\(2,\)"),
        ("group_normalize", (ROW, ROW), TypeError, "groups: .*integer"),
        ("leave_one_out", ([0.0], IDS), TypeError, "reward: .*list"),
        ("reinforce_rej", (IDS, IDS), TypeError, "reward: .*int64"),
        ("unlikeliness_reward", (ROW, ROW[:2], IDS), ValueError, "logp_old_mean: "),
        ("whiten", (X, X[:, :2]), ValueError, "mask: "),
        ("gae", (ROW, X[:, :2], X), ValueError, "value: "),
        ("gae", (ROW[:2], X, X), ValueError, "reward: "),
        ("gae", (ROW, FLAT, FLAT), ValueError, "mask: .*cu_seqlens"),
        ("reinforce_pp_advantage", (ROW[:2], X), ValueError, r"reward: .*\(3,\).*\(2,\)"),
    ],
)
def test_advantages_refuse(function, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(advantages, function)(*arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_packed_boundaries_of_advantages_are_checked(packed):
    wrong = CU if not packed else CU[:3]
    with pytest.raises(ValueError, match="cu_seqlens: |mask: "):
        advantages.gae(ROW, FLAT if packed else X, FLAT if packed else X, cu_seqlens=wrong)
