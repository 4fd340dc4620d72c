"""Texts that end a response: at the same token whichever engine sampled it, and counted as an end."""

import json

import fake_vllm
import pytest
import tiny
import torch

from flowrl_kernels.trainer import checks, config_file, loop
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parts import make_decoder
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.rollout import Sampling
from flowrl_kernels.trainer.rollout.hf import HFEngine
from flowrl_kernels.trainer.rollout.responses import Response, together, vllm_sampling
from flowrl_kernels.trainer.rollout.server import ServerEngine
from flowrl_kernels.trainer.rollout.stops import Stops
from flowrl_kernels.trainer.tasks import char_tokenizer
from flowrl_kernels.trainer.tasks.sums import Sums

PROMPTS = [[3, 4, 13], [5], [2, 9, 9, 12, 13], [7, 13]]
TOKENIZER = char_tokenizer(tiny.ALPHABET)
DECODE = make_decoder(TOKENIZER)
STRINGS = ("3", "+1", "44")
STOPS = Stops(STRINGS, DECODE, TOKENIZER)


class Words:
    """A vocabulary of texts: what a token shows may hold several characters, or a part of what stops."""

    texts = ("<s>", "</s>", "a", "\n", "\n\n", "b\n", ".\n\nQ", "\nA", " ")
    all_special_tokens, all_special_ids = ("<s>", "</s>"), (0, 1)

    def __len__(self):
        return len(self.texts)

    def decode(self, rows):
        return ["".join(self.texts[i] for i in row if i > 1) for row in rows]


def up_to_the_end(tokens, strings, decode, stop=(1,)):
    """Token by token: where the text first holds one of the strings, or an end token came; None: nowhere."""
    for n in range(1, len(tokens) + 1):
        text = decode([tokens[:n]])[0]
        if tokens[n - 1] in stop or any(string in text for string in strings):
            return n
    return None


def test_a_response_of_the_live_model_ends_where_its_text_first_holds_a_stop():
    engine = HFEngine(Policy(tiny.model().eval()), batch=24, device=torch.device("cpu"))
    free = engine.generate(PROMPTS, 16, Sampling(12, 1.5, (1,)), seed=0)
    out = engine.generate(PROMPTS, 16, Sampling(12, 1.5, (1,), stops=STOPS), seed=0)
    kept = engine.generate(PROMPTS, 16, Sampling(12, 1.5, (1,), top_k=12, stops=STOPS), seed=0)
    assert len(kept.kept.offsets) == int(kept.length.sum()) + 1  # a row for each token there is
    ends = 0
    for b in range(64):
        n = up_to_the_end(free.tokens[b, : free.length[b]].tolist(), STRINGS, DECODE)
        assert bool(out.finished[b]) == (n is not None)
        n = n or 12
        assert int(out.length[b]) == n
        assert torch.equal(out.tokens[b, :n], free.tokens[b, :n])
        torch.testing.assert_close(out.logp[b, :n], free.logp[b, :n], rtol=0, atol=3e-6)  # the batch is another
        ends += out.finished[b] and int(out.tokens[b, n - 1]) != 1
    assert ends > 10


@pytest.mark.parametrize(
    ("tokens", "length"),
    [([2, 3, 3, 2], 3), ([2, 4, 2], 2), ([5, 7, 2], 2), ([2, 6], 2), ([3, 2, 3], None), ([3, 8, 3], None), ([], None)],
)
def test_the_token_that_completes_a_stop_is_the_last_however_texts_are_cut_into_tokens(tokens, length):
    words = Words()
    stops = Stops(["\n\n"], words.decode, words)
    assert stops.length(tokens) == length
    assert stops.length([2] * 100 + tokens) == (length and 100 + length)
    assert stops.tokens == (4, 6)  # whatever came before
    for n in range(1, len(tokens) + 1):
        assert stops.ended([([2] * 100 + tokens[:n])[-stops.window :]])[0] == (length is not None and n >= length)


def test_a_special_token_alone_is_an_end_token_and_inside_a_text_it_is_refused():
    words = Words()
    assert Stops(["</s>"], words.decode, words).tokens == (1,)
    for strings, message in ((["a</s>"], "holds the special token '</s>'"), ([""], "at least one character")):
        with pytest.raises(ValueError, match=f"rollout.stop: .*{message}"):
            Stops(strings, words.decode, words)


def test_what_an_engine_sampled_behind_a_stop_is_cut_off_and_an_end_by_token_is_its_own_to_find():
    words = Words()
    sampling = Sampling(5, 1.0, (1,), stops=Stops(["\n\n"], words.decode, words))
    assert vllm_sampling(sampling, 1, 0)["stop_token_ids"] == [1, 4, 6]
    rows = [[2, 3, 3, 2, 2], [2, 4], [2, 3, 2, 3, 2], [2, 1]]
    out = together([Response(row, [-0.1 * (i + 1) for i in range(len(row))], ["0"]) for row in rows], sampling, 0)
    assert out.tokens.tolist() == [[2, 3, 3, 0, 0], [2, 4, 0, 0, 0], [2, 3, 2, 3, 2], [2, 1, 0, 0, 0]]
    assert out.length.tolist() == [3, 2, 5, 2]
    assert out.finished.tolist() == [True, True, False, True]
    assert out.logp[0].tolist() == pytest.approx([-0.1, -0.2, -0.3, 0, 0])


def test_a_servers_responses_end_at_the_same_texts(tmp_path):
    small = config_file.override(Config(), fake_vllm.small("http://a:1"))
    server = fake_vllm.FakeVLLM(small, TOKENIZER)
    flags = fake_vllm.small(server.address, "--run.dir", str(tmp_path))
    engine = ServerEngine(config_file.override(Config(), flags), 14, tiny.ALONE)
    engine.update_weights(server.engine.policy.model.state_dict().items(), 0)
    free = engine.generate(PROMPTS, 8, Sampling(10, 1.5, (1,)), 7)
    out = engine.generate(PROMPTS, 8, Sampling(10, 1.5, (1,), stops=STOPS), 7)
    for b in range(32):
        n = up_to_the_end(free.tokens[b, : free.length[b]].tolist(), STRINGS, DECODE)
        assert bool(out.finished[b]) == (n is not None)
        assert int(out.length[b]) == (n or 10)
        assert torch.equal(out.tokens[b, : n or 10], free.tokens[b, : n or 10])
    engine.close()
    server.kill()


def test_a_run_trains_and_evaluates_on_responses_that_end_with_their_stop(tmp_path):
    more = tiny.flags("run.steps 1 log.samples 16 task.reward rewards_for_tests:by_length task.reward_workers 0")
    stop = ["--rollout.stop", *"0123456", "--run.dir", str(tmp_path / "run")]
    config = config_file.override(Config(), [*tiny.SMALL, *more, *stop])
    figures = loop.train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    ended = [row["response"][-1:] in set("0123456") for row in rows]
    assert sum(ended) > 8
    assert not any(set("0123456") & set(row["response"][:-1]) for row in rows)
    assert figures["truncated"] < 0.5


def test_figures_over_listed_answers_do_not_go_with_stops():
    config = tiny.config(rollout={"stop": ("+",)})
    with pytest.raises(ValueError, match=r"eval.exact: wanted false beside rollout.stop = \['\+'\]: sums's listed"):
        checks.check_stop(config, Sums())
    checks.check_stop(tiny.config(rollout={"stop": ("+",)}, eval={"exact": False}), Sums())
