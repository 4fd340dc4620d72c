"""`patch_logprobs` alone: every trainer of TRL keeps its loss, with log-probs from hidden states."""

import pytest
import torch

trl = pytest.importorskip("trl", reason="TRL is not installed here: `make test-integrations` has it")
from datasets import Dataset  # noqa: E402
from test_trl import PROMPTS, grpo, late, rollout, settings  # noqa: E402

from flowrl_kernels.integrations import trl as ours  # noqa: E402
from flowrl_kernels.testing import assert_grad_close  # noqa: E402


def rloo(path, folder):
    args = trl.RLOOConfig(**settings(folder, beta=0.04, temperature=0.7))
    return trl.RLOOTrainer(model=path, reward_funcs=late, args=args, train_dataset=PROMPTS)


def offline(path, folder, name):
    own = {k: v for k, v in settings(folder).items() if k not in ("num_generations", "max_completion_length")}
    pairs = [{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": "77"} for i in range(9)]
    data = {
        "SFT": [{"text": f"{i}+1={i + 1}"} for i in range(9)],
        "DPO": pairs,
        "KTO": [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)],
    }[name]
    from transformers import AutoTokenizer

    args = getattr(trl, f"{name}Config")(**own)
    return getattr(trl, f"{name}Trainer")(
        model=path,
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(path),
    )


MAKERS = {"GRPO": grpo, "RLOO": rloo} | {
    name: (lambda path, folder, name=name: offline(path, folder, name)) for name in ("SFT", "DPO", "KTO")
}


@pytest.mark.parametrize("name", MAKERS)
def test_patched_log_probs_leave_the_loss_of_every_trainer_as_it_was(tiny_model, tmp_path, name, monkeypatch):
    trainer = MAKERS[name](tiny_model, tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    if hasattr(trainer, "_generate_and_score_completions"):
        inputs = rollout(trainer)
    else:
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():  # away from the reference, so that every term of the loss is there
        trainer.model.lm_head.weight.mul_(1.05)

    def measure():
        count = torch.tensor(20) if name == "SFT" else None
        loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=count)
        return loss.detach(), torch.autograd.grad(loss, trainer.model.lm_head.weight)[0]

    theirs = measure()
    ours.patch_logprobs(trainer)
    calls = []
    apply = ours._Head.apply
    monkeypatch.setattr(ours._Head, "apply", lambda self, *a, **k: calls.append(1) or apply(self, *a, **k))
    mine = measure()
    assert calls, "the patch was not used"
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert_grad_close(mine[1], theirs[1], rel=1e-4)
    if name == "GRPO":
        trainer.train()


def test_patched_log_probs_equal_trl_s_to_1e_5_at_peaked_logits(tiny_model, tmp_path):
    trainer = grpo(tiny_model, tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(8.0)
    inputs = rollout(trainer)
    inputs["completion_ids"].random_(3, 16)  # sampled tokens are likely ones; these are not

    def measure():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        keep = inputs["completion_ids"].size(1)
        with torch.no_grad():
            return [
                trainer._get_per_token_logps_and_entropies(
                    model, ids, mask, keep, compute_entropy=model is trainer.model
                )[:2]
                for model in (trainer.model, trainer.ref_model)
            ]

    theirs = measure()
    ours.patch_logprobs(trainer)
    for (logp, entropy), (wanted, wanted_entropy) in zip(measure(), theirs):
        assert (logp - wanted).abs().max() <= 1e-5
        assert wanted.abs().max() > 5
        if wanted_entropy is not None:
            torch.testing.assert_close(entropy, wanted_entropy, rtol=1e-4, atol=2e-5)


def test_accuracy_and_mean_logits_are_trl_s_without_a_second_forward():
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=make), torch.randn(300, 16, generator=make)
    targets = (hidden @ weight.T).argmax(1)
    targets[::2] = torch.randint(300, (20,), generator=make)
    for softcap in (None, 20.0):
        arguments = (hidden, weight, None, targets, 0.7, 8192, softcap, 1.0)
        names = ("log_probs", "entropy", "mean_logits", "is_top1")
        theirs = ours.trl_utils._ChunkedLogProbFunction.apply(*arguments, names)
        head = ours._Head(None, "chunked", ours.HeadScales(1.0, softcap))  # nothing of TRL's to call
        mine = head.apply(*arguments, names)
        assert torch.equal(mine[4], theirs[4])
        assert 20 <= int(mine[4].sum()) < 40
        assert mine[2] is theirs[2] is None
        for i in (0, 1, 3):
            torch.testing.assert_close(mine[i], theirs[i], rtol=1e-5, atol=2e-5)
    head = ours._Head(ours.trl_utils._ChunkedLogProbFunction, "chunked", ours.HeadScales(1.0, None))
    squares = ("log_probs", "log_sum_sq_probs")
    plain = (hidden, weight, None, targets, 0.7, 8192, None, 1.0)
    assert torch.equal(head.apply(*plain, squares)[2], ours.trl_utils._ChunkedLogProbFunction.apply(*plain, squares)[2])
