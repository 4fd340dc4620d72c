import numpy as np
import pytest

from flowrl_kernels.trainer.tasks import char_tokenizer
from flowrl_kernels.trainer.tasks.sums import Sums


@pytest.fixture(scope="module")
def sums():
    return Sums()


def test_every_prompt_has_15_to_75_right_answers_among_a_thousand(sums):
    counts = [len(sums.solutions(p)) for p in sums.problems("train")]
    assert len(counts) == 20
    assert min(counts) == 15
    assert max(counts) == 75
    assert all(len(sums.responses(p)) == len(set(sums.responses(p))) == 1000 for p in sums.problems("test"))


def test_the_listed_right_answers_are_exactly_what_the_verifier_accepts(sums):
    for problem in sums.problems("valid"):
        accepted = [text for text in sums.responses(problem) if sums.verify(problem, text) == 1.0]
        assert accepted == sums.solutions(problem) == [text for text, _ in sums.correct_texts(problem)]
        assert all(sums.canonical(problem, text) == text for text in accepted)


@pytest.mark.parametrize("text", ["", "1+2", "1+2+4+0", "1+2+4 ", "7", "01+2+4", "1+2+5", "1+2+4=", "٣+٢+٢"])
def test_wrong_or_ill_formed_answers_earn_nothing(sums, text):
    problem = next(p for p in sums.problems("test") if p.answer == 7)
    assert sums.verify(problem, text) == 0.0
    assert sums.canonical(problem, text) is None


def test_the_warm_start_knows_the_format_and_not_the_arithmetic(sums):
    pairs = sums.warm_start(np.random.default_rng(0), 4000)
    right = np.mean([sums.verify(problem, text) for problem, text in pairs])
    assert 0.03 < right < 0.08
    assert {len(text) + 1 for _, text in pairs} == {sums.max_response_tokens}
    assert {len(problem.prompt) for problem, _ in pairs} == {sums.max_prompt_tokens}
    again = sums.warm_start(np.random.default_rng(0), 4000)
    assert again == pairs


def test_an_unknown_split_is_named(sums):
    with pytest.raises(ValueError, match=r"train, valid, test, got 'dev'"):
        sums.problems("dev")


def test_the_character_tokenizer_survives_saving_and_pads_on_the_left(sums, tmp_path):
    from transformers import AutoTokenizer

    made = char_tokenizer(sums.alphabet)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer("07=")["input_ids"]
        assert ids == [2 + sums.alphabet.index(c) for c in "07="]
        assert len(tokenizer) == len(sums.alphabet) + 2
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
        assert tokenizer.decode([*ids, 1, 0, 0], skip_special_tokens=True) == "07="
        assert tokenizer(["07=", "1+2+4"], padding=True)["input_ids"][0][:2] == [0, 0]
        with pytest.raises(Exception, match="UNK"):
            tokenizer("x")


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_an_alphabet_must_be_distinct_characters(alphabet):
    with pytest.raises(ValueError, match="alphabet"):
        char_tokenizer(alphabet)
