"""The doctor: 20 faults put into a sampler are named, 20 clean samplers are left in peace."""

import copy
import json
import string

import pytest
import tiny
import torch
from faulty_engine import FaultyEngine
from torch import nn

from flowrl_kernels.hf.head import HeadScales
from flowrl_kernels.trainer import __main__ as main
from flowrl_kernels.trainer.doctor import Setting, collect, examine
from flowrl_kernels.trainer.doctor.examine import effective
from flowrl_kernels.trainer.doctor.prompts import rewritten
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.rollout import Kept, Sampling
from flowrl_kernels.trainer.rollout.hf import HFEngine
from flowrl_kernels.trainer.tasks import char_tokenizer

ALPHABET = string.ascii_lowercase + string.digits + "<>=+ "
TEXTS = ["add 3", "sort fbd", "x+1=7", "say b", "0123", "why not", "k", "two=2"]


def tokenizer_of():
    tokenizer = char_tokenizer(ALPHABET)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    return tokenizer


TOKENIZER = tokenizer_of()
STOP = (TOKENIZER.eos_token_id,)


def prompts_of():
    made = [
        TOKENIZER.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
        for t in TEXTS
    ]
    return [[TOKENIZER.bos_token_id, *TOKENIZER(text, add_special_tokens=False)["input_ids"]] for text in made]


PROMPTS = prompts_of()


def model_of(seed=0, tied=False, layers=2):
    """Random weights that make decided guesses, not a trained model."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = Qwen2Config(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        initializer_range=0.25,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(shape).eval()


def moved(model, seed, by=0.02):
    """A copy after an update that moves every parameter by about `by`, Adam's way."""
    make, out = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for p in out.parameters():
            p.add_(by * torch.randn(p.shape, generator=make))
    return out


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


class Lora(nn.Module):
    def __init__(self, base, seed):
        super().__init__()
        make = torch.Generator().manual_seed(seed)
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base.out_features, bias=False)
        with torch.no_grad():
            for layer in (self.lora_A, self.lora_B):
                layer.weight.copy_(0.2 * torch.randn(layer.weight.shape, generator=make))

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class World:
    """A run after two updates: three versions of one model, the trainer's the newest."""

    def __init__(self, seed=0, tied=False, temperature=1.0, scales=None, by=0.02, tokens=12):
        self.start = model_of(seed, tied)
        self.before = moved(self.start, seed + 100, by)
        self.model = moved(self.before, seed + 200, by)
        self.scales = scales or HeadScales(1.0, None)
        self.sampling = Sampling(tokens, temperature, STOP)
        self.scored = None
        self.history = {"version 1, the push before": state(self.before), "version 0, the start": state(self.start)}

    def engine(self, model=None, **fault):
        given = {"scale": self.scales.logit_scale, "cap": self.scales.softcap}
        return FaultyEngine(copy.deepcopy(self.model if model is None else model), **{**given, **fault})

    def examine(self, engine, n=8, seed=0):
        policy = Policy(self.model)
        policy.scales = self.scales
        setting = Setting(self.history, rewritten(TOKENIZER, TEXTS, PROMPTS), self.scored)
        return examine(collect(policy, engine, PROMPTS, self.sampling, n=n, seed=seed, setting=setting))


def partly(new, old, names):
    """The new model with some tensors of the old one."""
    out, tensors = copy.deepcopy(new), state(old)
    with torch.no_grad():
        for name, p in out.named_parameters():
            if name in names:
                p.copy_(tensors[name])
    return out


def swapped_layers(model):
    out = copy.deepcopy(model)
    first, second = (copy.deepcopy(out.model.layers[i].state_dict()) for i in (0, 1))
    out.model.layers[0].load_state_dict(second)
    out.model.layers[1].load_state_dict(first)
    return out


def with_lora(world):
    for i, layer in enumerate(world.model.model.layers):
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj, i)
    base = copy.deepcopy(world.model)
    for layer in base.model.layers:
        layer.self_attn.q_proj = layer.self_attn.q_proj.base_layer
    return base


def other_base(model, base):
    out = copy.deepcopy(model)
    rotary = out.model.rotary_emb
    with torch.no_grad():
        rotary.inv_freq.copy_(base ** -(torch.arange(len(rotary.inv_freq)) / len(rotary.inv_freq)))
    return out


def half_backbone(model):
    head, out = model.lm_head.weight.detach().clone(), copy.deepcopy(model).bfloat16()
    return out, head


def fault(number, seed=0):
    """(the run, the engine with the fault, the name wanted, what the detail says)."""
    hot = number in (8, 9)
    scales = HeadScales(1.0, 4.0) if number == 19 else None
    world = World(seed, tied=number == 7, temperature=0.7 if hot else 1.0, scales=scales)
    tensor = "model.layers.1.mlp.down_proj.weight"
    if number == 6:
        model, head = half_backbone(world.model)
        return world, world.engine(model, head=head), "a bfloat16 backbone", "states in bfloat16"
    if number == 8:
        world.scored = 1.0
    if number == 20:
        return world, world.engine(with_lora(world)), "adapters not merged", "2 adapters off"
    engine = {
        1: lambda: world.engine(world.start),
        2: lambda: world.engine(world.before),
        3: lambda: world.engine(partly(world.model, world.before, [tensor])),
        4: lambda: world.engine(swapped_layers(world.model)),
        5: lambda: world.engine(half_head=True),
        7: lambda: world.engine(head=world.before.get_input_embeddings().weight.detach().clone()),
        8: lambda: world.engine(),
        9: lambda: world.engine(temperature=1.0),
        10: lambda: world.engine(top_p=0.8),
        11: lambda: world.engine(top_k=5),
        12: lambda: world.engine(penalty=1.2),
        13: lambda: world.engine(bias={9: 1.5}),
        14: lambda: world.engine(write=lambda prompt: [prompt[0], *prompt[2:-2]]),
        15: lambda: world.engine(write=lambda prompt: [prompt[0], *prompt]),
        16: lambda: world.engine(drop_end=True),
        17: lambda: world.engine(shift=1),
        18: lambda: world.engine(other_base(world.model, 1e6)),
        19: lambda: world.engine(cap=None),
    }[number]()
    name, detail = {
        1: ("stale weights", "version 0, the start"), 2: ("stale weights", "version 1, the push before"),
        3: ("tensors not updated", tensor), 4: ("layers swapped", "layers 0 and 1"),
        5: ("a bfloat16 head", "logits rounded"), 7: ("a tied head that is stale", "version 1"),
        8: ("temperature left out of the trainer", "0.7"), 9: ("temperature left out of the sampler", "sampled at 1"),
        10: ("truncated sampling left on", "top-p 0.8"), 11: ("truncated sampling left on", "top-k 5"),
        12: ("a repetition penalty", "penalty 1.2"), 13: ("a logit bias", "+1.5 on token 9"),
        14: ("another prompt", "without the chat template"), 15: ("another prompt", "with one more BOS"),
        16: ("end token dropped", "have no end token"), 17: ("positions", "response +1"),
        18: ("another rope base", "1e+06"), 19: ("soft-cap or logit scale left out", "without the soft-cap"),
    }[number]  # fmt: skip
    return world, engine, name, detail


@pytest.mark.parametrize("number", range(1, 21))
def test_a_fault_is_named(number):
    world, engine, name, detail = fault(number)
    found = world.examine(engine)
    assert found.culprit == name, found.contents()
    assert detail in found.detail


@pytest.mark.parametrize("seed", range(20))
def test_a_sampler_without_fault_is_left_in_peace(seed):
    scales = HeadScales(1.3, 6.0) if seed % 4 == 3 else None
    world = World(50 + seed, tied=seed % 2 == 1, temperature=(1.0, 0.6, 1.4)[seed % 3], scales=scales)
    found = world.examine(world.engine(), seed=seed)
    assert found.culprit is None, found.contents()
    assert found.gap["rms"] < 1e-5
    assert found.gap["effective_samples"] > 0.999


class Twisted:
    """An engine whose answer is changed."""

    def __init__(self, engine, change):
        self.engine, self.change = engine, change

    def generate(self, *args):
        return self.change(self.engine.generate(*args))


def test_what_nothing_explains_is_said_to_be_unexplained():
    world = World()

    def noisy(out):
        noise = torch.randn(out.logp.shape, generator=torch.Generator().manual_seed(0))
        return out._replace(logp=out.logp + 0.05 * noise)

    found = world.examine(Twisted(world.engine(), noisy))
    assert found.culprit == "unexplained", found.contents()
    assert found.gap["rms"] == pytest.approx(0.05, rel=0.1)
    assert {m.row.part for m in found.measured} > {"weights", "backbone", "head", "template and tokens"}


def test_two_faults_at_once_are_not_taken_for_one():
    world = World()
    found = world.examine(world.engine(world.before, penalty=1.1))
    assert found.culprit == "unexplained", found.contents()


@pytest.mark.parametrize(("truncation", "said"), [({"top_p": 0.8}, "top-p about 0."), ({"top_k": 5}, "top-k 5")])
def test_truncation_under_raw_log_probs_shows_in_the_draws(truncation, said):
    world = World()
    found = world.examine(world.engine(raw=True, **truncation))
    assert found.gap["rms"] < 1e-5
    assert found.culprit == "truncated sampling left on"
    assert said in found.detail


def test_kept_sets_are_looked_at_where_draws_are_truncated():
    world = World()
    world.sampling = Sampling(12, 1.0, STOP, top_p=0.8)
    engine = HFEngine(Policy(world.model), batch=64, device=torch.device("cpu"))
    assert world.examine(engine).culprit is None
    silent = world.examine(Twisted(engine, lambda out: out._replace(kept=None)))
    assert silent.culprit == "kept sets not returned"
    others = world.examine(Twisted(engine, lambda out: out._replace(kept=Kept(out.kept.ids * 0, out.kept.offsets))))
    assert [name for name, _, _ in others.findings] == ["kept set without its token"]
    raw = world.examine(world.engine(top_p=0.8, raw=True))
    assert raw.culprit == "log-probs of the whole distribution"


def test_the_predicted_loss_is_that_of_weights_whose_gaps_are_independent():
    class Drawn:
        responses = [[0] * 40] * 4000
        owner = torch.arange(4000).repeat_interleave(40)

    gap = 0.1 * torch.randn(160_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = (-gap).view(4000, 40).sum(1).exp()
    share = float(weight.sum() ** 2 / (4000 * weight.square().sum()))
    assert effective(Drawn, gap, 40) == pytest.approx(share, rel=0.05)
    assert effective(Drawn, gap, 160) == pytest.approx(share**4, rel=0.15)


def test_the_command_looks_at_a_run_and_writes_what_it_found(tmp_path, capsys, monkeypatch):
    folder = str(tmp_path / "run")
    (tmp_path / "run.toml").write_text("")
    small = [*tiny.SMALL, *tiny.flags("run.steps 2  checkpoint.every 1  optim.lr 0.05  rollout.temperature 0.8")]
    paths = ["--run.dir", folder, "--run.cache", str(tmp_path / "cache")]
    assert main.cli(["train", str(tmp_path / "run.toml"), *small, *paths]) == 0
    capsys.readouterr()
    assert main.cli(["doctor", folder]) == 0
    assert "verdict: no fault found" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "doctor.json").read_text())
    assert found["culprit"] is None
    generate = HFEngine.generate

    def cold(engine, prompts, n, sampling, *rest):
        return generate(engine, prompts, n, Sampling(sampling.max_new_tokens, 1.0, sampling.stop), *rest)

    monkeypatch.setattr(HFEngine, "generate", cold)
    assert main.cli(["doctor", folder, "--prompts", "4", "--out", str(tmp_path / "out.json")]) == 1
    assert "verdict: temperature left out of the sampler (sampled at 1)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["tried"][0]["explains"] > 0.99
