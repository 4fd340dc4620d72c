"""A run on programs, from file to metrics: a model that writes digits and signs, of which some are Python."""

import json

import pytest

from flowrl_kernels.trainer import config_file, loop
from flowrl_kernels.trainer.config import Config
from tests.trainer import tiny


def settings(folder, *args):
    return config_file.override(Config(), [*tiny.SMALL, "--run.dir", str(folder), "--run.cache", str(folder), *args])


@pytest.mark.usefixtures("sandbox")
def test_a_run_is_trained_on_programs(tmp_path):
    export = tiny.flags("checkpoint.export True")
    loop.train(settings(tmp_path / "sums", *tiny.flags("run.steps 1"), *export))
    data = tmp_path / "data.jsonl"
    # whatever is Python and prints nothing is right
    rows = [{"prompt": f"{n}=", "inputs": [""], "outputs": [""]} for n in range(4, 8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--model.name", str(tmp_path / "sums" / "final"), "--task.name", "file", "--task.reward", "code"]
    args += [
        "--task.train",
        str(data),
        "--task.test",
        str(data),
        "--task.chat_template",
        "False",
        "--task.reward_workers",
        "1",
    ]
    loop.train(settings(tmp_path / "code", *args, *tiny.flags("run.steps 1")))
    found = [json.loads(line) for line in (tmp_path / "code" / "metrics.jsonl").read_text().splitlines()]
    trained = next(row for row in found if row["kind"] == "train")
    assert 0 <= trained["reward"] <= 1
    assert trained["unscorable"] == 0
    assert trained["raised"] + trained["timed_out"] > 0 or trained["reward"] == 1
