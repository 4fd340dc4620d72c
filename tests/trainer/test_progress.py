"""What a terminal shows of a run: one bar that stays on its line; elsewhere a line every so often."""

import io
import re
import sys

import tiny

from flowrl_kernels.trainer import config_file, loop, terminal
from flowrl_kernels.trainer.config import Config, LogConfig
from flowrl_kernels.trainer.log import Log


class Screen(io.StringIO):
    def isatty(self):
        return True


def pseudo_terminal(monkeypatch):
    """Makes stdout and stderr one terminal; calling what comes back gives what was written there."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    return screen.getvalue


def test_a_long_run_is_one_bar_on_one_line_with_its_evaluations_above(monkeypatch, tmp_path):
    screen = pseudo_terminal(monkeypatch)
    log = Log(tmp_path, LogConfig(), total=300)
    for step in range(1, 301):
        log.step(step, {"reward": 0.5, "tokens_per_s": 100.0})
        if step % 100 == 0:
            for done in (0, 5, 10):
                log.evaluating("valid", done, 10)
            log.evaluation(step, "valid", {"accuracy": 0.5})
    log.close()
    text = screen()
    shown = [line.split("\r")[-1].strip() for line in text.replace("\r\n", "\n").split("\n")]
    evaluations = [f"step {step}  valid: accuracy 0.500" for step in (100, 200, 300)]
    assert [line for line in shown if line.startswith("step ")] == evaluations
    assert len([line for line in shown if line]) == 4
    assert shown[-2].startswith("train: 100%")
    assert "300/300" in shown[-2]
    assert text.count("train:   0%") <= 1  # it never starts anew


def test_the_bar_of_a_resumed_run_starts_where_it_was_and_does_not_count_old_steps_in_its_rate(monkeypatch, tmp_path):
    screen = pseudo_terminal(monkeypatch)
    log = Log(tmp_path, LogConfig(), total=1000)
    log.step(901, {"reward": 0.5})
    assert (log.terminal.bar.n, log.terminal.bar.initial, log.terminal.bar.total) == (901, 901, 1000)
    log.close()
    assert re.search(r"train:\s+90%.* 901/1000", screen())


def test_an_evaluation_on_its_own_has_a_bar_that_goes_away(monkeypatch, tmp_path):
    screen = pseudo_terminal(monkeypatch)
    log = Log(tmp_path, LogConfig())
    for done in (0, 4, 8):
        log.evaluating("test", done, 8)
    log.evaluation(0, "test", {"accuracy": 0.5})
    log.close()
    text = screen()
    assert "evaluation (test)" in text
    last = [line.split("\r")[-1].strip() for line in text.replace("\r\n", "\n").split("\n")]
    assert [line for line in last if line] == ["step 0  test: accuracy 0.500"]


def test_a_run_shows_its_evaluations_on_the_line_of_its_bar(monkeypatch, tmp_path):
    screen = pseudo_terminal(monkeypatch)
    args = [*tiny.SMALL, *tiny.flags("log.progress True  run.steps 2  eval.every 1  eval.start True  rollout.batch 2")]
    args += ["--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path / "cache")]
    loop.train(config_file.override(Config(), args))
    lines = screen().replace("\r\n", "\n").split("\n")
    assert "evaluation (test) 3/4" in "".join(line for line in lines if "train:" in line)
    assert "evaluation (valid) 3/4" in "".join(line for line in lines if "train:" in line)
    left = [line.split("\r")[-1].strip() for line in lines]
    assert not any(line.startswith("evaluation") for line in left)
    assert [line for line in left if "train:" in line] == [line for line in left if "2/2" in line]


def test_a_log_file_of_a_long_run_is_short(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    log = Log(tmp_path, LogConfig(), total=3300)
    for step in range(1, 3301):
        now[0] += 10.0  # nine hours
        log.step(step, {"reward": 0.5})
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert 20 < len(out) < 200
    assert out[-1].startswith("train 3300/3300")
