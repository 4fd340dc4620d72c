"""model.liger and model.attention = "flash_attention_2" against the packages, as far as these go without a GPU.

flash-attn builds on a CUDA machine only. A function with its signature (2.8) stands in for it here and does what its
documentation says; where the package's sources are on the path, the signature is read from them. liger-kernel imports
anywhere; its kernels are not run.
"""

import ast
import importlib.util
import inspect
import itertools
from pathlib import Path

import pytest
import tiny
import torch
from test_policy import unpacked
from transformers import modeling_flash_attention_utils as flash
from transformers.models.qwen2 import modeling_qwen2

from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.batches import pack
from flowrl_kernels.trainer.objective import score_head
from flowrl_kernels.trainer.policy import Policy

MOST = 400


def attention(q, k, v, softmax_scale, causal):
    """[n, heads, head_dim] of one sequence."""
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
    return out.transpose(0, 1)


class StandIn:
    """flash_attn_func and flash_attn_varlen_func of flash-attn 2.8; notes what they are called with."""

    def __init__(self):
        self.calls = []

    def varlen(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        self.calls.append({name: value for name, value in locals().items() if name != "self"})
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        edges = cu_seqlens_q.tolist()
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        return torch.cat([attention(q[own], k[own], v[own], softmax_scale, causal) for own in parts])

    def dense(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return torch.stack([attention(*rows, softmax_scale, causal) for rows in zip(q, k, v)])


@pytest.fixture
def stand_in(monkeypatch):
    own = StandIn()
    functions = (own.dense, own.varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)  # and back: what this test loads goes with it
    for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(flash, name, None)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", None)
    return own


def flash_model():
    model = tiny.model().eval()
    model.config._attn_implementation = "flash_attention_2"  # as loading sets it where the package and a GPU are there
    return model


def packed_once(stand_in):
    """A batch in one row, scored by a model whose attention is the stand-in's: (batch, log-probs, the call)."""
    policy = Policy(flash_model())
    prompts, responses = tiny.sequences()
    (batch,) = pack(list(range(9)), prompts, responses, max_tokens=MOST, row_tokens=MOST, device="cpu")
    with torch.no_grad():
        scored = policy(score_head(tiny.config(), batch), batch.ids, batch.positions)
    assert len(stand_in.calls) == policy.model.config.num_hidden_layers
    return batch, scored.logp, stand_in.calls[0]


def test_flash_attention_gets_the_boundaries_of_the_packed_row(stand_in):
    batch, logp, call = packed_once(stand_in)
    prompts, responses = tiny.sequences()
    assert batch.ids.shape[0] == 1
    assert call["cu_seqlens_q"].dtype == torch.int32
    lengths = torch.tensor([len(prompts[i]) + len(responses[i]) - 1 for i in batch.which.tolist()])
    assert call["cu_seqlens_q"].tolist()[: len(lengths) + 1] == [0, *lengths.cumsum(0).tolist()]
    assert call["cu_seqlens_q"][-1] == batch.ids.shape[1] == len(call["q"])
    assert int(call["max_seqlen_q"]) == int(lengths.max())
    assert call["causal"]
    assert call["dropout_p"] == 0.0
    for b, which in enumerate(batch.which.tolist()):
        alone = unpacked(tiny.model().eval(), [prompts[which]], [responses[which]], 1.0)[0]
        got = logp[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]]
        torch.testing.assert_close(got.double(), alone.detach(), rtol=0, atol=2e-6)


def test_flash_attention_is_found_to_pack_by_positions_in_one_row(stand_in):
    assert policies.settle_packing(Policy(flash_model()), tiny.config(), tiny.ALONE) == "positions"
    assert stand_in.calls


def parameters(source: Path, function: str) -> list[str]:
    """Names of a function's arguments, read from its file without importing it."""
    (found,) = [
        node for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]  # fmt: skip
    return [argument.arg for argument in found.args.args]


def test_the_stand_in_has_the_signatures_of_the_installed_flash_attn():
    spec = importlib.util.find_spec("flash_attn")
    if spec is None:
        pytest.skip("flash-attn is not installed: the stand-in's arguments are those of 2.8.3.post2's sdist")
    source = Path(spec.origin).parent / "flash_attn_interface.py"
    for ours, theirs in ((StandIn.varlen, "flash_attn_varlen_func"), (StandIn.dense, "flash_attn_func")):
        assert list(inspect.signature(ours).parameters)[1:] == parameters(source, theirs)


@pytest.fixture
def liger(monkeypatch):
    """liger-kernel; what it puts in the place of transformers' own is put back."""
    module = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    for name, value in list(vars(modeling_qwen2).items()):
        monkeypatch.setattr(modeling_qwen2, name, value)
    return module


def test_liger_replaces_norms_rotary_and_feed_forward_and_leaves_head_and_loss(liger):
    model = tiny.model()
    forward, product = model.forward, torch.nn.functional.cross_entropy
    policies.apply_liger(model)
    norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    assert len(norms) == 2 * model.config.num_hidden_layers + 1
    assert {m.forward.__func__ for m in norms} == {liger.LigerRMSNorm.forward}
    assert {layer.mlp.forward.__func__ for layer in model.model.layers} == {liger.LigerSwiGLUMLP.forward}
    assert modeling_qwen2.apply_rotary_pos_emb.__module__.startswith("liger_kernel.")
    assert model.forward == forward
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert torch.nn.functional.cross_entropy is product


def test_liger_is_refused_where_it_would_do_nothing(liger):
    model = tiny.model()
    model.config.model_type = "opt"
    with pytest.raises(ValueError, match=r"model\.liger: liger-kernel has nothing for a model of type 'opt'"):
        policies.apply_liger(model)


def test_every_function_that_liger_would_call_takes_what_it_is_told(liger):
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kinds = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "phi3")
    for kind in kinds:
        taken = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[kind]).parameters
        assert {"model", "cross_entropy", "fused_linear_cross_entropy"} <= set(taken), kind
