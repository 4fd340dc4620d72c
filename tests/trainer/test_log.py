import json
import math

import pytest

from flowrl_kernels.trainer.config import LogConfig
from flowrl_kernels.trainer.log import Log, read_lines
from flowrl_kernels.trainer.terminal import Terminal

QUIET = LogConfig(progress=False)


def test_every_line_is_strict_json_and_names_what_is_not_finite(tmp_path):
    log = Log(tmp_path, QUIET)
    log.step(1, {"loss": math.nan, "reward": 0.5, "groups": 3, "grad_norm": math.inf})
    # line buffered: on disk before close
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert line == {
        "step": 1, "kind": "train", "loss": None, "reward": 0.5, "groups": 3, "grad_norm": None,
        "nonfinite": ["loss", "grad_norm"],
    }  # fmt: skip
    log.close()


def test_kinds_steps_and_a_torn_last_line(tmp_path, capsys):
    log = Log(tmp_path, QUIET, total=2)
    log.warm(1, 2, 3.0)
    log.warm(2, 2, 2.5)
    log.step(1, {"reward": 0.25})
    log.evaluation(1, "valid", {"accuracy": 0.5, "pass@8": 0.75})
    log.note("skipped an update: loss is nan", 1)
    log.final(2, {"accuracy": 0.5})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "kind": "tra')
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("warm", -1), ("warm", 0), ("train", 1), ("eval", 1), ("note", 1), ("final", 2),
    ]  # fmt: skip
    assert [line["split"] for line in read_lines(tmp_path / "metrics.jsonl", "eval")] == ["valid"]
    out = capsys.readouterr().out
    assert "step 1  valid: accuracy 0.500  pass@8 0.750" in out
    assert "skipped an update: loss is nan" in out


def test_a_resumed_run_appends(tmp_path):
    for step in (1, 2):
        log = Log(tmp_path, QUIET)
        log.step(step, {"reward": 0.0})
        log.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_other_ranks_neither_write_nor_print(tmp_path, capsys):
    log = Log(tmp_path / "none", QUIET, main=False)
    log.step(1, {"reward": 1.0})
    log.evaluation(1, "test", {"accuracy": 1.0})
    log.samples(1, [{"prompt": "p"}])
    log.note("x")
    log.table("t", {"a": 1.0})
    log.warm(1, 1, 0.0)
    log.final(1, {})
    log.close()
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr().out == ""


def test_progress_without_a_terminal_is_a_few_lines(tmp_path, capsys):
    log = Log(tmp_path, LogConfig(), total=50)
    for step in range(1, 51):
        log.step(step, {"reward": 0.5, "tokens_per_s": 1234.0, "entropy": math.nan})
    log.close()
    out = capsys.readouterr().out.strip().splitlines()
    assert out == ["train 1/50  reward 0.500  tokens/s 1,234", "train 50/50  reward 0.500  tokens/s 1,234"]


def test_samples_are_readable_rows(tmp_path):
    log = Log(tmp_path, QUIET)
    log.samples(5, [{"prompt": "07=", "response": "1+2+4 é", "reward": None}])
    log.close()
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 5, "prompt": "07=", "response": "1+2+4 é", "reward": None}
    assert "é" in text


@pytest.mark.parametrize("switch", ["tensorboard", "wandb"])
def test_an_absent_logger_is_an_error_that_names_its_switch(tmp_path, switch, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(switch, switch), None)
    with pytest.raises(ValueError, match=rf"log\.{switch}: {switch} is not installed: pip install"):
        Log(tmp_path, LogConfig(**{switch: True}))


def test_tensorboard_and_wandb_get_the_same_figures(tmp_path, monkeypatch):
    import sys
    import types

    got = []
    board = types.SimpleNamespace(
        SummaryWriter=lambda folder: types.SimpleNamespace(
            add_scalar=lambda key, value, step: got.append((key, value, step)),
            add_text=lambda key, text, step: got.append((key, text, step)),
            close=lambda: None,
        )
    )
    wandb = types.SimpleNamespace(
        Table=lambda columns, data: (columns, data),
        init=lambda **k: types.SimpleNamespace(
            log=lambda metrics, step: got.extend((k, v, step) for k, v in metrics.items()), finish=lambda: None
        ),
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = Log(tmp_path, LogConfig(progress=False, tensorboard=True, wandb=True))
    log.step(3, {"reward": 0.5})
    log.evaluation(3, "valid", {"accuracy": 0.25})
    assert got == [("train/reward", 0.5, 3)] * 2 + [("valid/accuracy", 0.25, 3)] * 2
    got.clear()
    chat = [{"role": "user", "content": "é"}]
    log.samples(
        3, [{"prompt": "a|b\n<i>", "response": "x", "reward": None}, {"prompt": chat, "response": "", "reward": 1}]
    )
    log.close()
    lines = ["| prompt | response | reward |", "|---|---|---|", "| a&#124;b<br>&lt;i&gt; | x | null |"]
    lines += ["| [{&quot;role&quot;: &quot;user&quot;, &quot;content&quot;: &quot;é&quot;}] |  | 1 |"]
    columns, data = (
        ["prompt", "response", "reward"],
        [["a|b\n<i>", "x", None], [json.dumps(chat, ensure_ascii=False), "", 1]],
    )
    assert got == [("samples", "\n".join(lines), 3), ("samples", (columns, data), 3)]


def test_a_table_shows_gaps_as_dashes(capsys):
    Terminal().table("runs", [{"name": "a", "accuracy": 0.5}, {"name": "b", "kl": math.nan}])
    out = capsys.readouterr().out
    assert "0.500" in out
    assert out.count("–") == 3
