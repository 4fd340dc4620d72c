"""A tiny Qwen2 with a tokenizer on disk, as a user's model path: TRL loads the reference from it."""

import pytest
import torch

SYMBOLS = [*"0123456789+= "]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a 2-layer Qwen2 (V = 16, H = 32) and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("tiny") / "qwen2"
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", "<unk>", *SYMBOLS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
