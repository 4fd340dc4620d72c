"""FlowRL's engine in verl: the real FSDP2 classes of verl on two gloo ranks (verl_cpu.py), never on a GPU."""

import ast
import inspect
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed here: `make test-integrations` has it")
sys.path.insert(0, str(Path(__file__).parent.parent))
import verl_cpu
from ranks import on_ranks

pytestmark = pytest.mark.distributed


def run(worker, path, folder):
    on_ranks(partial(worker, path, str(folder)), 2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def seen(tiny_model, tmp_path_factory):
    return run(verl_cpu.everything, tiny_model, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def varied(tiny_model, tmp_path_factory):
    return run(verl_cpu.variants, tiny_model, tmp_path_factory.mktemp("variants"))


def test_the_vendor_selects_the_engine(seen):
    assert seen[0]["class"] == ["FlowRLEngine", "FSDPEngineWithLMHead"]


def test_log_probs_and_entropies_are_those_of_verl_s_own_engine(seen):
    for rank in seen:
        assert rank["logp_error"] < 1e-5
        assert rank["entropy_error"] < 1e-5


def test_micro_batches_on_two_ranks_have_the_gradient_of_one_process(seen):
    assert sum(rank["loss"][0] for rank in seen) / 2 == pytest.approx(seen[0]["loss"][1], rel=1e-5)
    for rank in seen:
        assert rank["model_gradient"] < 1e-5
        assert rank["log_z_gradient"] < 1e-5
        assert "actor/flowrl_log_z_mean" in rank["metrics"]


def test_log_z_is_a_unit_and_a_group_of_its_own(seen):
    assert seen[0]["units"] == ["FSDPLogPartition", "FSDPLinear"]
    (_, rate, decay), (count, own_rate, own_decay) = seen[0]["groups"]
    assert (rate, decay) == (3e-3, 0.1)
    assert (count, own_rate, own_decay) == (6, 0.02, 0.0)


def test_no_export_and_no_weight_sync_contains_log_z(seen):
    assert seen[0]["exported"] == seen[0]["sharded_export"]
    assert "lm_head.weight" in seen[0]["exported"]
    assert not [name for name in seen[0]["exported"] if "log_z" in name or "body" in name or "out." in name]


def test_a_loss_without_log_z_gives_the_weights_of_verl_s_own_engine(seen):
    for rank in seen:
        assert rank["vanilla"][0] == pytest.approx(rank["vanilla"][1], abs=1e-5)
        assert rank["vanilla_weights"] < 1e-5
        assert rank["unused_log_z"] == 0.0


def test_training_lowers_the_loss_and_moves_log_z(seen):
    first, last = (sum(rank["losses"][i] for rank in seen) for i in (0, -1))
    assert last < 0.7 * first
    assert seen[0]["log_z"] > 0.01


def test_a_checkpoint_resumes_weights_optimiser_and_log_z_to_the_bit(seen):
    for rank in seen:
        assert rank["after"] == rank["resumed"]
        assert rank["resumed_weights"] == rank["resumed_log_z"] == 0.0
    files = seen[0]["saved"]
    assert [name for name in files if name.startswith("log_z")] == [
        "log_z_world_size_2_rank_0.pt",
        "log_z_world_size_2_rank_1.pt",
    ]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("log_z", "log_z_world_size_2_rank_0.pt: wanted this rank's learned log Z"),
        ("ulysses", "ulysses_sequence_parallel_size: wanted 1"),
        ("padding", "use_remove_padding: wanted true"),
        ("fp16", "mixed_precision.param_dtype: wanted bf16 or fp32"),
        ("topk", "distillation_use_topk: wanted false"),
        ("engine", "log_z: wanted in the model's output, for loss_mode=flowrl_learned"),
    ],
)
def test_what_cannot_work_says_what_to_do(seen, what, message):
    assert message in seen[0]["refusals"][what]


def test_lora_trains_adapters_and_log_z_and_exports_the_adapters_alone(varied):
    for rank in varied:
        assert rank["start"] < 1e-5
        assert rank["off"] < 1e-5 < rank["moved"]
    assert sum(rank["losses"][-1] for rank in varied) < sum(rank["losses"][0] for rank in varied)
    assert varied[0]["rank_of_lora"] == 4
    assert varied[0]["exported"]
    assert all("lora_" in name for name in varied[0]["exported"])
    assert "lm_head: wanted a plain linear layer" in varied[0]["refusal"]


def test_verl_s_usual_bf16_with_checkpointing_and_padding_trains_and_leaves_log_z_in_fp32(varied):
    for rank in varied:
        assert 0 < rank["bf16_error"] < 0.2
        assert rank["padded_error"] < 1e-5
        assert rank["dtypes"] == ["torch.float32"]
    assert sum(rank["bf16_losses"][-1] for rank in varied) < sum(rank["bf16_losses"][0] for rank in varied)


def test_a_reference_worker_s_engine_has_neither_log_z_nor_an_optimiser(varied):
    assert varied[0]["reference"] == [True, True]
    assert varied[0]["reference_error"] < 1e-5


def test_each_method_takes_what_verl_s_takes():
    from flowrl_kernels.integrations.verl.engine import FlowRLEngine

    theirs = FlowRLEngine.__mro__[1]
    own = {name for name, value in vars(FlowRLEngine).items() if inspect.isfunction(value)}
    new = {name for name in own if not hasattr(theirs, name)}
    assert new == {"_log_z_file"}
    for name in own - new:
        ours, base = (inspect.signature(getattr(cls, name)) for cls in (FlowRLEngine, theirs))
        names = [p.name for p in base.parameters.values() if p.kind is not p.VAR_KEYWORD]
        ours.bind(*names)  # by position
        ours.bind(names[0], **dict.fromkeys(names[1:]))  # and by name


def test_every_attribute_of_verl_s_that_is_used_is_in_its_source():
    """What runs on ranks above runs on a CPU; this also covers the lines that only a GPU's worker reaches."""
    from flowrl_kernels.integrations.verl import engine

    bases = engine.FlowRLEngine.__mro__[1:-1]
    source = "\n".join(inspect.getsource(base) for base in bases)
    tree = ast.parse(inspect.getsource(engine.FlowRLEngine))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    unknown = {name for name in used if f"self.{name}" not in source and f"def {name}" not in source}
    assert unknown == {"log_z", "_log_z_file"}


def test_a_model_that_lets_packed_sequences_see_each_other_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "hf")
    from tiny_models import tiny

    from flowrl_kernels.integrations.verl import engine

    monkeypatch.setattr(engine, "get_device_id", lambda: "cpu")
    for kind, leaks in (("qwen2", False), ("jamba", True)):
        model = tiny(kind)
        engine._score_in_forward(model)
        if not leaks:
            engine._refuse_leaks(model, torch.float32)
            continue
        with pytest.raises(ValueError, match=r"model\.path: JambaForCausalLM gives packed sequences other log-probs"):
            engine._refuse_leaks(model, torch.float32)
