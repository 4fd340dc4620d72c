"""Training with a bounded backward: it leaves something out, and the run follows the exact one."""

import json

import pytest
import tiny

from flowrl_kernels.trainer import config_file, loop, objective, parts
from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.batches import build
from flowrl_kernels.trainer.config import Config, check
from flowrl_kernels.trainer.tasks import char_tokenizer

PADDED = tiny.flags("model.vocab_multiple 4096  warm.steps 25  warm.batch 32  warm.lr 2e-2  run.steps 4")


def steps(tmp_path, name, *args):
    settings = [*tiny.SMALL, *PADDED, "--run.dir", str(tmp_path / name), "--run.cache", str(tmp_path / "cache"), *args]
    loop.train(config_file.override(Config(), settings))
    rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("algorithm", ["flowrl", "grpo"])
def test_a_bounded_run_drops_tiles_of_a_padded_vocabulary_and_follows_the_exact_one(tmp_path, algorithm):
    arguments = tiny.flags(f"algorithm.name {algorithm}  run.seed 3")
    exact = steps(tmp_path, "exact", *arguments)
    bounded = steps(tmp_path, "bounded", *arguments, "--parallel.epsilon", "0.01")
    live = [row for row in bounded if row["grad_norm"] > 0]
    assert len(live) >= 2
    for row in live:
        assert 0.0 < row["dlogits_share"] < 1.0
        assert 0.0 < row["dlogits_error_bound"] <= 0.01
    assert not any("dlogits_share" in row for row in exact)
    for a, b in zip(exact, bounded, strict=True):  # few steps: sampled tokens soon differ
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01, abs=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.02, abs=1e-4)
    assert [a["grad_norm"] for a in exact] != [b["grad_norm"] for b in bounded]


@pytest.mark.parametrize("algorithm", ["flowrl", "grpo"])
def test_a_sampled_run_draws_anew_at_each_update_and_the_same_again(tmp_path, algorithm):
    arguments = tiny.flags(f"algorithm.name {algorithm}  run.seed 3  parallel.share 0.02")
    first, again = (steps(tmp_path, name, *arguments) for name in ("first", "again"))
    live = [row for row in first if row["grad_norm"] > 0]
    assert len(live) >= 2
    for row in live:
        assert 0.0 < row["dlogits_share"] < 0.06
        assert 0.0 < row["dlogits_error_estimate"] < 1.0
        assert "dlogits_error_bound" not in row
    assert [row["grad_norm"] for row in first] == [row["grad_norm"] for row in again]


def test_each_response_token_has_a_name_of_its_own_and_each_update_its_draw(tmp_path):
    prompts, responses = tiny.sequences()
    batch = build([[0, 2], [1]], prompts, responses, "cpu")
    config = tiny.config(parallel={"share": 0.1}, run={"seed": 5})
    one, two = (objective.partial_of(config, batch, update) for update in (1, 2))
    assert one.sampled.draw == (5, 1)
    assert two.sampled.draw == (5, 2)
    assert one.report.shape == (4,)


def test_a_built_vocabulary_is_rounded_up_and_its_last_rows_are_no_token():
    tokenizer = char_tokenizer(tiny.ALPHABET)
    for multiple, rows in ((1, 14), (8, 16), (7, 14), (4096, 4096)):
        model = policies.build_model(tiny.config(model={"vocab_multiple": multiple}), tokenizer, "sdpa")
        assert model.get_output_embeddings().weight.shape[0] == rows
    decode = parts.make_decoder(tokenizer)
    three, four = tokenizer("34")["input_ids"]
    assert decode([[three, four], [three, 14, 15, four], [4095], []]) == ["34", "3\ufffd\ufffd4", "\ufffd", ""]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"epsilon": 1.0}}, r"parallel.epsilon: wanted a number in \[0, 1\); got 1.0"),
        ({"parallel": {"epsilon": 0.01, "impl": "reference"}}, "parallel.epsilon: wanted 0 with impl = 'reference'"),
        (
            {"parallel": {"epsilon": 0.01}, "algorithm": {"name": "grpo", "entropy": 0.1}},
            "parallel.epsilon: wanted 0 beside algorithm.entropy",
        ),
        ({"parallel": {"share": 1.0}}, r"parallel.share: wanted a number in \[0, 1\); got 1.0"),
        ({"parallel": {"share": 0.1, "impl": "reference"}}, "parallel.share: wanted 0 with impl = 'reference'"),
        ({"parallel": {"share": 0.1, "epsilon": 0.01}}, "parallel.share: wanted 0 beside parallel.epsilon"),
        (
            {"parallel": {"share": 0.1}, "algorithm": {"name": "grpo", "entropy": 0.1}},
            "parallel.share: wanted 0 beside algorithm.entropy",
        ),
        ({"model": {"vocab_multiple": 0}}, "model.vocab_multiple: wanted at least 1; got 0"),
    ],
)
def test_settings_that_cannot_be_bounded_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        check(tiny.config(**sections))


def test_an_exact_run_has_no_report_and_a_bounded_one_is_refused_on_resume():
    prompts, responses = tiny.sequences()
    batch = build([[0, 1]], prompts, responses, "cpu")
    assert objective.partial_of(Config(), batch, 1) == (0.0, None, None)
    other = config_file.override(Config(), ["--parallel.epsilon", "0.01"])
    assert any("parallel.epsilon" in line for line in config_file.changed(Config(), other))
