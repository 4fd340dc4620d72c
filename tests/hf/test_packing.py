"""Packed rows: what a model type does with them is found out, and is then right for every way it is packed."""

import pytest
import tiny_models
import torch

from flowrl_kernels.hf.packing import Probe, block_mask, find_packing, relative, takes_masks

WAYS = {  # a handful; the nightly list below has the rest
    ("qwen2", "sdpa"): "positions",
    ("qwen2", "eager"): "positions",
    ("gpt2", None): "positions",
    ("opt", "sdpa"): "mask",  # absolute positions
    ("opt", "eager"): "mask",
    ("falcon", None): "mask",
    ("mpt", None): "mask",  # alibi
    ("bloom", None): "alone",  # takes no mask of four dimensions
    ("gpt_oss", "eager"): "alone",  # a window: one mask does not serve every layer
    ("jamba", None): "alone",  # state space
    ("qwen3_next", None): "alone",  # linear attention and convolutions
    ("recurrent_gemma", None): "alone",
}
MORE = """
apertus arcee bamba biogpt bitnet codegen cohere cohere2 ctrl cwm dbrx deepseek_v2 deepseek_v3 diffllama doge dots1
ernie4_5 ernie4_5_moe exaone4 falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt_bigcode
gpt_neo gpt_neox gptj granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense hyperclovax jetmoe
lfm2 llama llama4_text mamba mamba2 minicpm3 minimax ministral mistral mixtral modernbert-decoder nanochat nemotron
nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt persimmon phi phi3 phimoe qwen2_moe qwen3 qwen3_5_text
qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma xglm xlstm zamba zamba2
""".split()  # noqa: SIM905


def forward_of(model):
    def forward(ids, positions, mask):
        out = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        return out.last_hidden_state

    return forward


def gap(model, packing):
    """Largest relative difference of states, in longer rows than the probe's, from transformers' own of each alone."""
    make = torch.Generator().manual_seed(5)
    sequences = [torch.randint(3, 60, (n,), generator=make) for n in (9, 1, 14, 6)]
    rows = [[s] for s in sequences] if packing == "alone" else [sequences[:3], sequences[3:]]
    width = max(sum(map(len, row)) for row in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.int64)
    places = []
    for r, row in enumerate(rows):
        at = 0
        for s in row:
            ids[r, at : at + len(s)], positions[r, at : at + len(s)] = s, torch.arange(len(s))
            places.append((r, at, len(s)))
            at += len(s)
        positions[r, at:] = torch.arange(width - at)
    boolean = model.config._attn_implementation != "eager"
    mask = block_mask(positions, boolean=boolean) if packing == "mask" else None
    with torch.no_grad():
        got = forward_of(model)(ids, positions, mask)
        errors = []
        for s, (r, at, n) in zip(sequences, places):
            want = model.base_model(input_ids=s[None], use_cache=False).last_hidden_state[0]
            errors.append(relative(got[r, at : at + n], want))
    return max(errors)


@pytest.mark.parametrize(("kind", "attention"), WAYS, ids=str)
def test_the_way_that_is_found_gives_every_sequence_what_it_gives_alone(kind, attention):
    model = tiny_models.tiny(kind, attention)
    found = find_packing(forward_of(model), model.config)
    assert found == WAYS[kind, attention]
    assert gap(model, found) < 1e-5
    if found != "positions":  # and the way that was not taken would have been wrong by far
        assert gap(model, "positions") > 1e-2


@pytest.mark.nightly
@pytest.mark.parametrize("kind", MORE)
def test_every_model_type_is_packed_rightly_or_refused_by_name(kind):
    try:
        model = tiny_models.tiny(kind)
        model(input_ids=torch.arange(3, 8)[None], use_cache=False)
    except Exception as error:  # these few sizes do not suit every type
        pytest.skip(f"no tiny {kind}: {type(error).__name__}")
    try:
        found = find_packing(forward_of(model), model.config, name=kind, field="model.name")
    except ValueError as error:
        assert str(error).startswith(f"model.name: {kind} ")  # noqa: PT017
        return
    assert gap(model, found) < 1e-4


def test_layers_with_a_window_never_share_one_mask():
    assert takes_masks(tiny_models.tiny("opt").config)
    assert not takes_masks(tiny_models.tiny("gpt_oss").config)
    assert not takes_masks(tiny_models.tiny("mistral", sliding_window=8).config)


def fake(leak=0.0, padding=0.0, sees=1.0, bad=False):
    """A model of running means whose sequences leak by `leak`, and padding by `padding`."""
    table = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def forward(ids, positions, mask):
        x = table[ids]
        sequence = (positions == 0).cumsum(-1)
        order = torch.arange(ids.shape[1])
        causal = (order[:, None] >= order).double()
        same = (sequence[:, :, None] == sequence[:, None, :]).double()
        weight = causal * (same + leak * (1 - same)) + padding * (1 - causal)
        mixed = x + sees * weight @ x / 8
        return mixed * float("nan") if bad else mixed

    return forward


def config(**extra):
    from transformers import OPTConfig

    return OPTConfig(vocab_size=64, max_position_embeddings=64, **extra)


def test_a_leak_of_a_thousandth_is_seen_and_rounding_is_not():
    assert find_packing(fake(), config()) == "positions"
    assert find_packing(fake(leak=1e-9), config()) == "positions"
    assert find_packing(fake(leak=1e-3), config()) == "alone"
    with pytest.raises(ValueError, match=r"m\.n: OddModel gives a sequence in a padded row of its own other hidden"):
        find_packing(fake(padding=1e-2), config(), name="OddModel", field="m.n")
    with pytest.raises(ValueError, match="relative difference nan"):
        find_packing(fake(bad=True), config())
    assert Probe(fake(leak=1e-3), 64, 64).error("positions") > 1e-4


def test_a_model_in_which_no_leak_could_be_seen_is_not_packed():
    assert find_packing(fake(sees=0.0), config()) == "alone"
