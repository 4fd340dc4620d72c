"""LoRA: adapters alone are trained and kept, the reference is the model without them, what leaves is merged."""

import json

import pytest
import test_parallel
import tiny
import torch
import torch.distributed.checkpoint as dcp

from flowrl_kernels.trainer import checks, config_file, loop, lora, policy
from flowrl_kernels.trainer.config import Config

peft = pytest.importorskip("peft")
TABLE = {"rank": 2, "alpha": 8.0}
ADAPTERS = tiny.flags("lora.rank 2  lora.alpha 8  optim.lr 2e-2")
IDS = torch.tensor([[3, 4, 13, 5, 6]])


def adapted(seed=0, **more):
    """A policy whose adapters have moved."""
    config = tiny.config(lora={**TABLE, **more}, run={"seed": seed})
    actor = policy.make_policy(config, tiny.ALONE, tiny.model(config), adapters=True, packing="positions")
    with torch.no_grad():
        for name, parameter in actor.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return config, actor


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_adapters_alone_need_a_gradient_and_start_as_the_model_they_are_put_into():
    config = tiny.config(lora=TABLE)
    plain = tiny.model(config)
    actor = policy.make_policy(config, tiny.ALONE, tiny.model(config), adapters=True, packing="positions")
    trained = [name for name, p in actor.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in each of two
    assert all("lora_" in name for name in trained)
    assert torch.equal(logits(actor.model), logits(plain.eval()))
    (group,) = actor.groups(config)
    assert {id(p) for p in group["params"]} == {id(p) for p in actor.parameters() if p.requires_grad}


def test_what_an_engine_is_given_is_the_model_with_its_adapters_added():
    config, actor = adapted()
    fresh = tiny.model(config).eval()
    before = logits(fresh)
    weights = dict(policy.named_weights(actor))
    assert weights.keys() == fresh.state_dict().keys()
    # by hand: W + 8/2 * B A
    layer = actor.model.model.layers[1].mlp.up_proj
    want = layer.base_layer.weight + 4.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(weights["model.layers.1.mlp.up_proj.weight"], want, rtol=1e-6, atol=1e-7)
    fresh.load_state_dict(weights)
    torch.testing.assert_close(logits(fresh), logits(actor.model), rtol=1e-4, atol=1e-5)
    assert (logits(fresh) - before).abs().max() > 0.1


def test_a_turned_weight_gets_a_turned_delta():
    """GPT-2's layers hold [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=14, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    model, fresh = GPT2LMHeadModel(shape).eval(), GPT2LMHeadModel(shape).eval()
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        lora.inject(model, tiny.config(lora={"rank": 2, "targets": ("c_attn", "c_fc")}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    state = model.state_dict()
    fresh.load_state_dict(dict(lora.merged(model, state, state.__getitem__)))
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)


def test_the_reference_is_the_same_model_with_its_adapters_off():
    config, actor = adapted()
    frozen = policy.Frozen(actor)
    positions = torch.arange(5)[None]
    head = lambda owner, hidden: policy.logits(owner, hidden[0])  # noqa: E731
    with torch.no_grad():
        live, off, again = (one(head, IDS, positions) for one in (actor, frozen, actor))
    assert torch.equal(off, logits(tiny.model(config).eval())[0])
    assert torch.equal(live, again)
    assert (live - off).abs().max() > 0.1
    assert all(p.requires_grad for name, p in actor.named_parameters() if "lora_" in name)


def train(folder, *args):
    flags = [*tiny.SMALL, *ADAPTERS, "--run.dir", str(folder), "--run.cache", str(folder.parent / "cache")]
    flags += ["--task.reward", "rewards_for_tests:by_length", "--task.reward_workers", "0"]
    return loop.train(config_file.override(Config(), [*flags, *args]))


def numbers(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [row for row in rows if row["kind"] in ("train", "eval", "final")]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s"))} for row in kept]


def test_a_run_leaves_a_merged_model_and_a_peft_folder_and_resumes_to_the_bit(tmp_path):
    steps = ["--run.steps", "4", "--checkpoint.export", "True"]
    want = train(tmp_path / "whole", *steps)
    train(tmp_path / "parts", "--run.steps", "2")
    assert train(tmp_path / "parts", *steps, "--run.resume", "True") == want
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")

    from transformers import AutoModelForCausalLM

    run = tmp_path / "whole"
    base, final = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("start", "final"))
    start = logits(base)
    told = peft.PeftModel.from_pretrained(base, run / "final" / "adapter")
    torch.testing.assert_close(logits(final), logits(told), rtol=1e-4, atol=1e-5)
    assert (logits(final) - start).abs().max() > 1e-2
    assert json.loads((run / "final/adapter/adapter_config.json").read_text())["r"] == 2
    kept = dcp.FileSystemReader(run / "checkpoints" / "step_4").read_metadata().state_dict_metadata
    weights = [name for name in kept if name.startswith("model.model.")]
    assert len(weights) == 14
    assert all("lora_" in name for name in weights)  # not the model's own


@pytest.mark.distributed
@pytest.mark.nightly
def test_two_ranks_have_the_gradients_of_one_which_can_resume_their_run(tmp_path):
    args = [*tiny.flags("lora.rank 2 optim.lr 1e-3 run.steps 2"), "--checkpoint.export", "True"]
    one = test_parallel.alone(tmp_path / "one", *args)
    two = test_parallel.spread(tmp_path / "two", 2, *args)
    test_parallel.assert_same(two["gradients"][0], one["gradients"][0])
    assert (two["gradients"][1] - one["gradients"][1]).norm() <= 1e-3 * one["gradients"][1].norm()
    assert two["final"]["accuracy"] == one["final"]["accuracy"]
    ours, theirs = (
        peft.utils.load_peft_weights(str(tmp_path / name / "run" / "final" / "adapter")) for name in ("two", "one")
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    more = ["--run.steps", "3", "--run.resume", "True"]
    three, other = (test_parallel.alone(tmp_path / n, *args, *more)["gradients"][0] for n in ("two", "one"))
    assert (three - other).norm() <= 1e-3 * other.norm()  # Adam divides by roots of squares: rounding has grown


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("lm_head",), "'lm_head' is the head, whose weight the fused loss reads"),
        (("embed_tokens",), "'model.embed_tokens' is a Embedding"),
        (("q_prog",), r"\['q_prog'\]: Target modules"),
    ],
)
def test_layers_that_cannot_be_merged_are_refused_by_name(targets, message):
    with pytest.raises(ValueError, match=f"lora.targets: .*{message}"):
        lora.inject(tiny.model(), tiny.config(lora={"rank": 2, "targets": targets}))


def test_settings_that_do_not_go_with_adapters_are_refused_before_anything_runs(tmp_path):
    for sections, message in (
        ({"lora": {"alpha": 4.0}}, "lora.alpha: wanted nothing beside lora.rank = 0; got 4.0"),
        ({"lora": {"targets": ("q_proj",)}}, "lora.targets: wanted nothing beside"),
        ({"lora": {"rank": 2, "targets": ()}}, "lora.targets: wanted names"),
        ({"lora": TABLE, "parallel": {"offload_reference": True}}, "parallel.offload_reference: wanted false"),
    ):
        with pytest.raises(ValueError, match=message):
            checks.check_lora(tiny.config(**sections))
    model = tiny.model()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora.rank: wanted 0 for .*quantised \(gptq\)"):
        checks.check_lora(tiny.config(lora=TABLE, model={"name": str(tmp_path)}))
