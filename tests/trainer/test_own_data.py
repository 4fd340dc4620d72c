"""The example of data and reward of one's own, and what `flowrl from-gguf` refuses before it reads a model."""

import json

import pytest

from examples import arithmetic
from flowrl_kernels.trainer.gguf import convert


def test_every_answer_of_the_arithmetic_example_is_right_and_no_problem_is_held_out_and_trained_on():
    parts = arithmetic.rows()
    asked = {split: {row["prompt"].splitlines()[-1] for row in part} for split, part in parts.items()}
    assert {split: len(part) for split, part in asked.items()} == {"train": 155, "valid": 50, "test": 50}
    assert not asked["train"] & (asked["valid"] | asked["test"])
    assert not asked["valid"] & asked["test"]
    for split, part in parts.items():
        for row in part:
            *shots, question = row["prompt"].splitlines()
            assert {shot.partition("=")[0] + "=" for shot in shots} <= asked["train"] - {question}, split
            for line in [*shots, f"{question} {row['answer']}"]:
                left, sign, right, _, told = line.split()
                a, b = int(left), int(right)
                assert int(told) == {"+": a + b, "-": a - b, "*": a * b}[sign]


@pytest.mark.parametrize(
    ("response", "wanted"), [(" 9", 1.0), ("9\n", 1.0), ("9 5", 0.0), ("9\n8 + 1", 0.0), ("8", 0.0), ("", 0.0)]
)
def test_the_arithmetic_reward_wants_the_number_and_nothing_after_it(response, wanted):
    assert arithmetic.reward("7 + 2 =", response, "9") == wanted


def test_the_files_of_the_arithmetic_example_hold_its_rows(tmp_path):
    arithmetic.write(tmp_path / "data")
    lines = (tmp_path / "data" / "valid.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == arithmetic.rows()["valid"]


def test_a_gguf_file_that_is_not_there_and_a_folder_that_is_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="source: no such file"):
        convert(tmp_path / "no.gguf", tmp_path / "model")
    (tmp_path / "some.gguf").write_bytes(b"not a model")
    with pytest.raises(FileExistsError, match="folder: .* exists"):
        convert(tmp_path / "some.gguf", tmp_path)


def test_a_file_that_is_no_gguf_is_refused_by_name_and_leaves_no_folder(tmp_path):
    (tmp_path / "some.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="source: .*some.gguf"):
        convert(tmp_path / "some.gguf", tmp_path / "model")
    assert not list(tmp_path.glob("model*"))
