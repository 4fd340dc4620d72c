"""The policy's one forward: packed equals unpacked, the head is the model's own, folders load elsewhere."""

import sys

import pytest
import tiny
import torch

from flowrl_kernels.log_partition import LOG_Z_FILE, LogPartition
from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.batches import pack
from flowrl_kernels.trainer.objective import score_head
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.tasks import char_tokenizer


def unpacked(model, prompts, responses, temperature):
    """Log-probs sequence by sequence, through transformers' own logits."""
    out = []
    for p, r in zip(prompts, responses):
        ids = torch.tensor([[*p, *r]])
        logits = model(input_ids=ids, use_cache=False).logits[0].double() / temperature
        out.append(logits.log_softmax(-1)[len(p) - 1 : -1].gather(-1, torch.tensor(r)[:, None])[:, 0])
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row_tokens", [0, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_log_probs_and_gradients_equal_those_of_each_sequence_alone(attention, row_tokens, tied):
    cfg = tiny.config(rollout={"temperature": 0.7}, model={"tied": tied})
    model = policies.build_model(cfg, char_tokenizer(tiny.ALPHABET), attention).eval()
    prompts, responses = tiny.sequences()
    batches = pack(list(range(9)), prompts, responses, max_tokens=60, row_tokens=row_tokens, device="cpu")
    assert any(batch.sequences > len(batch.ids) for batch in batches)  # some row holds several
    policy = Policy(model)
    weight = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    alone = unpacked(model, prompts, responses, 0.7)
    sum(w * logp.sum() for w, logp in zip(weight, alone)).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for batch in batches:
        out = policy(score_head(cfg, batch), batch.ids, batch.positions)
        for b, which in enumerate(batch.which.tolist()):
            got = out.logp[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]]
            torch.testing.assert_close(got.double(), alone[which].detach(), rtol=0, atol=2e-6)
        (weight[batch.which][batch.segment()] * out.logp).sum().backward()
    for name, p in model.named_parameters():
        error = (p.grad - want[name]).norm() / want[name].norm().clamp(min=1e-3)
        assert error < 2e-5, f"{name}: {error}"


def test_a_neighbour_in_the_row_changes_nothing():
    cfg = tiny.config()
    policy = Policy(tiny.model(cfg).eval())
    prompts, responses = tiny.sequences(2)
    other = [responses[0], responses[1][::-1].copy()]
    out = []
    for answers in (responses, other):
        (batch,) = pack([0, 1], prompts, answers, max_tokens=64, row_tokens=0, device="cpu")
        scores = policy(score_head(cfg, batch), batch.ids, batch.positions)
        b = batch.which.tolist().index(0)
        out.append(scores.logp[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]])
    torch.testing.assert_close(*out, rtol=0, atol=1e-6)


def test_a_head_that_is_not_a_plain_product_is_refused():
    model = tiny.model().eval()
    theirs = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.5 * theirs(hidden)
    with pytest.raises(ValueError, match=r"model\.name: Qwen2ForCausalLM turns hidden states into logits"):
        policies.make_policy(tiny.config(), tiny.ALONE, model)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizer = char_tokenizer(tiny.ALPHABET)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        policies.load_tokenizer(str(tmp_path), tiny.config().model)


def test_liger_without_liger_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ValueError, match="liger-kernel"):
        policies.apply_liger(tiny.model())


def test_a_saved_folder_loads_in_transformers_with_log_z_apart(tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = tiny.config()
    policy = policies.make_policy(cfg, tiny.ALONE, tiny.model(cfg), log_z=True, value=True)
    policies.save_folder(policy, char_tokenizer(tiny.ALPHABET), tmp_path, tiny.ALONE)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(policy.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert AutoTokenizer.from_pretrained(tmp_path)("12=")["input_ids"] == [3, 4, 13]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "log_z" in name or "value" in name]  # noqa: SIM118
    with safe_open(tmp_path / LOG_Z_FILE, "pt") as file:
        assert set(file.keys()) == set(policy.log_z.state_dict())
    assert not list(tmp_path.glob("*.bin"))


def test_no_file_of_a_saved_folder_but_the_models_own_looks_like_weights_and_log_z_comes_back(tmp_path):
    cfg = tiny.config(log_z={"style": "release"})
    policy = policies.make_policy(cfg, tiny.ALONE, tiny.model(cfg), log_z=True)
    torch.nn.init.normal_(policy.log_z.out.weight)
    policies.save_folder(policy, char_tokenizer(tiny.ALPHABET), tmp_path, tiny.ALONE)
    weights = [p.name for p in tmp_path.rglob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    assert weights == ["model.safetensors"]
    hidden, mask = torch.randn(3, 5, 32), torch.ones(3, 5, dtype=torch.bool)
    want = policy.log_z.eval()(hidden, mask)
    assert want.abs().min() > 0
    assert torch.equal(LogPartition.load(tmp_path)(hidden, mask), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_folder_has_one_copy_of_a_tied_head_the_stop_tokens_the_template_and_the_type(tmp_path, dtype):
    import json

    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = tiny.config(model={"tied": True})
    policy = policies.make_policy(cfg, tiny.ALONE, tiny.model(cfg))
    tokenizer = char_tokenizer(tiny.ALPHABET)
    tokenizer.chat_template = "{{ messages[0].content }}"
    policies.save_folder(policy, tokenizer, tmp_path, tiny.ALONE, stop=(1, 3), dtype=dtype)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {str(file.get_tensor(name).dtype) for name in names} == {f"torch.{dtype}"}
    assert "model.embed_tokens.weight" in names
    assert not [name for name in names if "lm_head" in name]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 3]
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ messages[0].content }}"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, policy.model.lm_head.weight.to(getattr(torch, dtype)))


def test_engines_are_sent_the_language_model_alone():
    cfg = tiny.config()
    policy = policies.make_policy(cfg, tiny.ALONE, tiny.model(cfg), log_z=True, value=True)
    assert set(dict(policies.named_weights(policy))) == set(policy.model.state_dict())


def test_log_z_and_the_critic_have_optimiser_groups_of_their_own():
    cfg = tiny.config(log_z={"lr": 1e-2}, critic={"lr": 2e-2}, optim={"lr": 3e-2})
    policy = policies.make_policy(cfg, tiny.ALONE, tiny.model(cfg), log_z=True, value=True)
    groups = {group["name"]: group for group in policy.groups(cfg)}
    assert {name: group["lr"] for name, group in groups.items()} == {"policy": 3e-2, "log_z": 1e-2, "value": 2e-2}
    counted = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(counted) == sorted(map(id, policy.parameters()))


@pytest.mark.parametrize("kind", ["opt", "jamba"])
def test_a_model_type_that_does_not_tell_packed_sequences_apart_scores_them_as_alone(monkeypatch, kind):
    from pathlib import Path

    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "hf")
    from tiny_models import tiny as tiny_model

    cfg = tiny.config()
    policy = policies.make_policy(cfg, tiny.ALONE, tiny_model(kind))
    assert policy.packing == {"opt": "mask", "jamba": "alone"}[kind]
    prompts, responses = tiny.sequences()
    alone = unpacked(policy.model, prompts, responses, 1.0)
    options = {"max_tokens": 60, "device": "cpu", "alone": policy.packing == "alone"}
    for row_tokens in (0, 20):
        batches = pack(list(range(9)), prompts, responses, row_tokens=row_tokens, **options)
        assert any(batch.sequences > len(batch.ids) for batch in batches) == (kind == "opt")
        for batch in batches:
            out = policy(score_head(cfg, batch), batch.ids, batch.positions)
            for b, which in enumerate(batch.which.tolist()):
                got = out.logp[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]]
                torch.testing.assert_close(got.double(), alone[which].detach(), rtol=0, atol=1e-5)
