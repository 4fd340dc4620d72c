"""The head's scales: right for every model type that scales or caps its logits, refused where the head is unknown."""

import pytest
import tiny_models
import torch

from flowrl_kernels.functional import linear_logprob
from flowrl_kernels.hf.head import HeadScales, check_head, head_logits, head_scales

KNOWN = {  # what each model type does to h W^T, read from its forward
    "qwen2": (1.0, None),
    "opt": (1.0, None),
    "phi": (1.0, None),  # a head with a bias
    "cohere": (0.25, None),
    "granite": (1 / 8, None),
    "hyperclovax": (0.25, None),  # multiplies by logits_scaling
    "falcon_h1": (0.2, None),
    "gemma2": (1.0, 30.0),
    "recurrent_gemma": (1.0, 30.0),
    "xlstm": (1.0, 30.0),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_log_probs_of_the_fused_head_are_those_of_the_models_own_logits(kind):
    model = tiny_models.tiny(kind)
    scales = head_scales(model.config)
    assert scales == pytest.approx(KNOWN[kind])
    check_head(model, scales)
    model.get_output_embeddings().weight.data *= 40  # logits where a cap shows
    check_head(model, scales)
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        head = model.get_output_embeddings()
        got = linear_logprob(hidden, head.weight, ids[0], bias=head.bias, **scales._asdict()).logp
    assert logits.abs().max() > 10
    want = logits.log_softmax(-1).gather(-1, ids.T)[:, 0]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head_logits(head, hidden, scales).double(), logits, rtol=1e-5, atol=1e-4)


def test_a_scale_or_a_cap_that_is_not_known_is_refused_even_where_a_new_models_logits_are_too_small_to_show_it():
    model = tiny_models.tiny("recurrent_gemma")
    model.get_output_embeddings().weight.data *= 1e-3
    scales = head_scales(model.config)
    check_head(model, scales, "model.name")
    said = (
        r"model\.name: RecurrentGemmaForCausalLM turns hidden states into logits in a way the fused head does not know"
    )
    for wrong in (HeadScales(1.0, None), HeadScales(1.0, 31.0), HeadScales(1.02, 30.0), HeadScales(0.0, 30.0)):
        with pytest.raises(ValueError, match=said):
            check_head(model, wrong, "model.name")


def test_a_head_behind_something_else_than_the_backbones_states_is_refused():
    model = tiny_models.tiny("qwen2")
    theirs = model.lm_head.forward
    model.lm_head.forward = lambda hidden: theirs(hidden / 4.0)  # as MiniCPM's own code scales
    with pytest.raises(ValueError, match="does not know"):
        check_head(model, head_scales(model.config))


def test_a_model_without_a_linear_head_is_refused_by_name():
    model = tiny_models.tiny("qwen2").model
    with pytest.raises(ValueError, match="wanted a causal LM with one linear head; got Qwen2Model"):
        check_head(model, HeadScales(1.0, None))
