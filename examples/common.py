"""What the examples share: a tiny model, rollouts from it, and a module that scores them in one forward.

With your own model, `Policy` is all you need of this file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowrl_kernels import LogPartition, linear_logprob

PROMPT, LENGTH, EOS = 4, 8, 1
SYMBOLS = ["<pad>", "<eos>", "<unk>", *"0123456789+= "]


def tiny_model(seed: int = 0) -> nn.Module:
    """A 2-layer Qwen2 with 16 tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(SYMBOLS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, eos_token_id=EOS,
        bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def save_tiny(path: str) -> str:
    """The same model and a tokenizer in a folder, as TRL wants them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(path)
    tiny_model().save_pretrained(path)
    return path


class Policy(nn.Module):
    """A causal LM and log Z under one forward, so that DDP and FSDP see every parameter that gets a gradient."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.log_z = LogPartition(model.config.hidden_size)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """logp [B, T] of the response tokens, log Z [B] of the prompts, from ids [B, PROMPT + T]."""
        hidden = self.model.base_model(ids).last_hidden_state
        logp = linear_logprob(hidden[:, PROMPT - 1 : -1], self.model.lm_head.weight, ids[:, PROMPT:]).logp
        return logp, self.log_z(hidden[:, :PROMPT], torch.ones_like(ids[:, :PROMPT]))


def parameters(policy: Policy) -> list[dict]:
    """Optimiser groups: log Z has far to go, so its rate is higher."""
    return [
        {"params": policy.model.parameters(), "lr": 2e-3},
        {"params": policy.log_z.parameters(), "lr": 1e-2, "weight_decay": 0.0},
    ]


@torch.no_grad()
def rollout(policy: Policy, reference: Policy, prompts: int = 4, group: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Sampled responses [B, PROMPT + T], their mask [B, T], rewards [B], old and reference log-probs."""
    torch.manual_seed(seed)
    start = torch.randint(3, 13, (prompts, PROMPT)).repeat_interleave(group, 0)
    ids = policy.model.generate(start, do_sample=True, max_new_tokens=LENGTH, min_new_tokens=LENGTH, top_k=0)
    response = ids[:, PROMPT:]
    return {
        "ids": ids,
        "mask": torch.ones_like(response, dtype=torch.bool),
        "reward": (response.float().mean(1) - 8) / 2,  # a stand-in for a verifier: late symbols are good
        "logp_old": policy(ids)[0],
        "logp_ref": reference(ids)[0],
    }
