"""A preset sets a whole row: what contradicts it is refused, what is a dial of the method may be turned."""

import dataclasses

import pytest
import torch

from flowrl_kernels import FlowRLLoss, flowrl_loss, residual_loss
from flowrl_kernels.presets import CLIPS, PRESETS, named, row_of

MAKE = torch.Generator().manual_seed(0)
LOGP, REF, OLD, SAMPLER = (-torch.rand(4, 5, generator=MAKE, dtype=torch.float64) for _ in range(4))
REWARD, LOG_Z = (torch.randn(4, generator=MAKE, dtype=torch.float64) for _ in range(2))
GROUPS = torch.tensor([0, 0, 1, 1])


def loss(log_z=..., **arguments):
    row = PRESETS.get(arguments.get("preset") or "paper", PRESETS["paper"])
    if log_z is ...:
        log_z = LOG_Z if row.log_z == "learned" else row.log_z
    ref = REF if arguments.get("anchor", row.anchor) == "ref" else None
    sampler = SAMPLER if arguments.get("tis", row.tis) else None
    return flowrl_loss(LOGP, ref, REWARD, log_z, logp_old=OLD, logp_sampler=sampler, groups=GROUPS, **arguments).loss


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_survives_the_trip_through_an_operator(name):
    row = PRESETS[name]
    assert dataclasses.replace(row_of(row.codes(), row.numbers()), source=row.source) == row
    assert len(row.source) > 10


def test_the_default_is_the_paper():
    assert loss() == loss(preset="paper")
    assert loss() == loss(
        beta=15.0, ratio="sum", clip="paper", length_normalize=True, anchor="ref", phi="square", tis=None
    )
    assert CLIPS == {"paper": (0.8, 1.2), "release": (None, 10.0), "unclipped": (None, None)}


@pytest.mark.parametrize("name", ["release", "unclipped"])
def test_the_named_clips_are_the_presets_clips(name):
    assert loss(clip=name) == loss(preset=name)
    assert loss(clip=name) == loss(clip=CLIPS[name])


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="preset: .*'release'.*'relaese'"):
        loss(preset="relaese", log_z=LOG_Z)
    with pytest.raises(ValueError, match="preset: .*PRESETS.*'zzz'"):
        named("zzz")


CONTRADICTIONS = {
    "clip": ("release", {"clip": "paper"}),
    "clip bounds": ("paper", {"clip": (0.8, 1.28)}),
    "ratio": ("paper", {"ratio": "mean"}),
    "ratio none": ("release", {"ratio": None}),
    "anchor": ("release_old_anchor", {"anchor": "ref"}),
    "phi": ("phi_exp", {"phi": "square"}),
    "tis": ("release_tis_token", {"tis": "sequence"}),
    "tis none": ("release_tis_token", {"tis": None}),
    "log_z": ("paper", {"log_z": "group"}),
    "log_z tensor": ("release_no_log_z", {"log_z": LOG_Z}),
    "log_z of the centre": ("agro", {"log_z": LOG_Z}),
    "log_z name": ("group", {"log_z": "through"}),
    "length_normalize": ("tb", {"length_normalize": True}),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_an_argument_that_contradicts_the_preset_is_refused_by_name(case):
    preset, arguments = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=f"^{case.split()[0]}: .*preset='{preset}'"):
        loss(preset=preset, **arguments)


def test_an_argument_that_agrees_with_the_preset_is_taken():
    assert loss(preset="release") == loss(preset="release", clip=(None, 10), ratio="sum", anchor="ref", tis=None)
    assert loss(preset="tb") == loss(preset="tb", length_normalize=False)
    assert loss(preset="group") == loss(preset="group", log_z="group")


def test_dials_of_a_method_may_be_turned():
    assert loss(preset="release", beta=3.0) == loss(clip="release", beta=3.0)
    assert loss(preset="paper", length_normalize=False) == loss(length_normalize=False)
    assert loss(preset="release_tis_sum", tis_cap=1.5) == loss(clip="release", tis="sequence", tis_cap=1.5)
    assert loss(preset="a_star_po", length_normalize=False) == loss(preset="a_star_po"), "its scale is a dial too"
    a, b = (
        residual_loss(LOGP, REWARD, anchor=REF, scale=s, preset=p).loss for s, p in ((0.5, "qrpo"), (0.5, "a_star_po"))
    )
    assert a == b


def test_a_learned_log_z_may_be_left_out_by_name_only():
    assert loss(preset="release", log_z=None) == loss(preset="release_no_log_z", log_z=None)
    with pytest.raises(ValueError, match="log_z: .*log_z=None to go without"):
        flowrl_loss(LOGP, REF, REWARD)


@pytest.mark.parametrize("name", ["release_clip_logp", "hard_cispo_drop", "tb_ppo_style"])
def test_rows_that_compare_with_the_behaviour_policy_want_it(name):
    with pytest.raises(ValueError, match=f"logp_old: .*preset='{name}'"):
        flowrl_loss(LOGP, REF, REWARD, LOG_Z, preset=name)


def test_the_door_of_the_family_wants_the_presets_anchor_and_centre():
    with pytest.raises(ValueError, match="anchor: .*old policy.*'rebel'"):
        residual_loss(LOGP, REWARD, groups=GROUPS, preset="rebel")
    with pytest.raises(ValueError, match="anchor: .*None.*'powerflow'"):
        residual_loss(LOGP, REWARD, anchor=REF, log_z=LOG_Z, preset="powerflow")
    with pytest.raises(ValueError, match="log_z: .*'group'.*preset='tba'"):
        residual_loss(LOGP, REWARD, anchor=REF, groups=GROUPS, center="through", preset="tba")
    with pytest.raises(ValueError, match="log_z: .*center='detached'"):
        residual_loss(LOGP, REWARD, groups=GROUPS, center="detached", log_z=LOG_Z)
    a = residual_loss(LOGP, REWARD, anchor=REF, groups=GROUPS, preset="tba").loss
    b = residual_loss(LOGP, REWARD / 0.014, anchor=REF, groups=GROUPS, scale=1.0, center="detached").loss
    torch.testing.assert_close(a, b)


def test_the_module_holds_the_settings():
    module = FlowRLLoss(preset="release", beta=3.0)
    out = module(LOGP, REF, REWARD, LOG_Z, logp_old=OLD)
    assert out.loss == loss(preset="release", beta=3.0)
    assert "preset='release'" in repr(module)
