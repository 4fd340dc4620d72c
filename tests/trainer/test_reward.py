import os
import subprocess
import sys
import time

import pytest

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.reward import Scorer, find_reward
from flowrl_kernels.trainer.tasks.base import Problem
from flowrl_kernels.trainer.tasks.sums import Sums


def score(scorer, *responses):
    return scorer.score([Problem(0, "p", "a")] * len(responses), list(responses))


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:  # a zombie waits for its reaper, but is dead
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def gone(pid, seconds=5.0):
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


@pytest.fixture(scope="module")
def scorer():
    made = Scorer(TaskConfig(reward="rewards_for_tests:as_told", reward_timeout=1.0), Sums())
    yield made
    made.close()


@pytest.fixture(scope="module")
def patient():
    """With the time to import torch."""
    made = Scorer(TaskConfig(reward="rewards_for_tests:as_told", reward_timeout=60.0, reward_workers=1), Sums())
    yield made
    made.close()


def test_a_trusted_task_is_scored_without_processes():
    scorer = Scorer(TaskConfig(), Sums())
    problems = list(Sums().problems("train"))[:2]
    assert scorer.score(problems, ["1+2+1", "1+2+1"]) == [1.0, 0.0]
    assert scorer._workers == [None, None]
    assert scorer.take_counts() == {"raised": 0, "timed_out": 0, "unscorable": 0}


def test_order_survives_two_workers():
    by_length = Scorer(TaskConfig(reward="rewards_for_tests:by_length"), Sums())
    assert score(by_length, *("x" * (i % 7) for i in range(60))) == [(i % 7) / 10 for i in range(60)]
    by_length.close()


def test_every_way_to_fail_costs_one_sample_and_is_counted(scorer):
    got = score(scorer, "fine", "raise", "exit", "none", "nan", "text", "quit", "fine")
    assert got == [1.0, None, None, None, None, None, None, 1.0]
    assert scorer.take_counts() == {"raised": 5, "timed_out": 0, "unscorable": 6}
    assert scorer.take_counts() == {"raised": 0, "timed_out": 0, "unscorable": 0}
    reasons = {"raise": "RuntimeError: told to raise", "exit": "code 7", "nan": "must be finite"}
    for told, named in reasons.items():
        assert score(scorer, told) == [None]
        assert named in scorer.last_error
    scorer.take_counts()


@pytest.mark.parametrize(
    ("given", "reward"),
    [("bool", 1.0), ("int", 2.0), ("decimal", 0.25), ("fraction", 0.25), ("float32", 0.5), ("numpy bool", 0.0)]
    + [("array", 0.5), ("array of one", 0.5), ("tensor", 0.5)],
)
def test_every_kind_of_number_is_a_reward(patient, given, reward):
    scorer = patient
    assert score(scorer, f"give {given}") == [reward]
    assert scorer.take_counts() == {"raised": 0, "timed_out": 0, "unscorable": 0}
    assert scorer.last_error is None


@pytest.mark.parametrize(
    ("given", "named"),
    [("array of two", "ndarray"), ("tensor of two", "Tensor"), ("complex", "complex"), ("inf", "must be finite")]
    + [("huge", "OverflowError"), ("list", "list"), ("dict", "dict")],
)
def test_what_is_no_number_is_named_and_never_zero(patient, given, named):
    scorer = patient
    assert score(scorer, f"give {given}") == [None]
    assert scorer.take_counts() == {"raised": 1, "timed_out": 0, "unscorable": 1}
    assert named in scorer.last_error


def test_the_reasons_of_a_call_are_counted_by_name_in_one_short_line(scorer):
    assert score(scorer, "raise", "none", "raise", "silent", "long", "loud") == [None] * 5 + [1.0]
    counts = scorer.reasons
    assert counts["RuntimeError: told to raise"] == 2
    assert counts["the reward gave None"] == 1
    assert counts["Unspeakable: (its text cannot be made)"] == 1
    assert counts.total() == 5
    assert all("\n" not in reason and len(reason) <= 300 for reason in counts)
    assert score(scorer, "fine") == [1.0]
    assert scorer.last_error is None  # an old reason explains nothing new
    assert not scorer.reasons
    scorer.take_counts()


def test_a_problem_that_cannot_travel_costs_its_own_responses_only(scorer):
    problems = [Problem(0, "p", lambda: 0), Problem(1, "p", "a"), Problem(2, "p", lambda: 0)]
    assert scorer.score(problems, ["fine"] * 3) == [None, 1.0, None]
    assert "cannot be sent" in scorer.last_error
    assert scorer.take_counts() == {"raised": 2, "timed_out": 0, "unscorable": 2}


@pytest.mark.parametrize(
    ("name", "named"),
    [("later", "asynchronous"), ("two_arguments", "must take .prompt, response, answer"), ("Reward", "a class")],
)
def test_a_function_that_could_never_score_is_refused_at_the_start(name, named):
    with pytest.raises(ValueError, match=named):
        find_reward(f"rewards_for_tests:{name}")


def test_a_module_in_the_current_folder_is_found_and_whatever_it_raises_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "mine_here.py").write_text("def reward(prompt, response, answer):\n    return 0.5\n")
    (tmp_path / "mine_broken.py").write_text("raise SystemExit(1)\n")
    assert find_reward("mine_here:reward")("p", "r", "a") == 0.5
    with pytest.raises(ValueError, match=r"task\.reward must be .* got 'mine_broken:f': SystemExit: 1"):
        find_reward("mine_broken:f")


def test_a_hang_is_killed_at_the_deadline_and_the_others_are_scored(scorer):
    start = time.monotonic()
    assert score(scorer, "fine", "hang", "fine", "spin", "fine") == [1.0, None, 1.0, None, 1.0]
    assert time.monotonic() - start < 30
    counts = scorer.take_counts()
    assert counts == {"raised": 0, "timed_out": 2, "unscorable": 2}
    assert "no reward within 1 s" in scorer.last_error


def test_the_kill_takes_the_childrens_children_along(scorer, tmp_path):
    assert score(scorer, f"child {tmp_path / 'pid'}") == [None]
    scorer.take_counts()
    assert gone(int((tmp_path / "pid").read_text()))


def test_math_hangs_are_bounded_by_the_same_deadline():
    pytest.importorskip("math_verify")
    scorer = Scorer(TaskConfig(reward="math", reward_timeout=5.0, reward_workers=1), Sums())
    problems = [Problem(0, "p", "1/2"), Problem(1, "p", ""), Problem(2, "p", "7")]
    assert scorer.score(problems, [r"\boxed{0.5}", "1", r"\boxed{8}"]) == [1.0, None, 0.0]
    assert scorer.take_counts()["unscorable"] == 1
    # an exponent tower that would be evaluated for ever
    assert scorer.score(problems[:1], [r"\boxed{9^{9^{9^{9^{9}}}}}"]) in ([None], [0.0])
    scorer.close()


@pytest.mark.parametrize(
    "name", ["maths", "no_such_module:f", "rewards_for_tests:none", "rewards_for_tests:not_a_function"]
)
def test_a_reward_that_is_not_there_is_refused_at_the_start(name):
    with pytest.raises(ValueError, match=r"task\.reward must be math, exact, countdown, code or module:function"):
        Scorer(TaskConfig(reward=name), Sums())


@pytest.mark.parametrize("setting", [{"reward_timeout": 0.0}, {"reward_workers": -1}])
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Scorer(TaskConfig(**setting), Sums())


def test_one_response_per_problem():
    with pytest.raises(ValueError, match="got 1 for 2"):
        Scorer(TaskConfig(), Sums()).score([Problem(0, "p", 4)], ["a", "b"])


def test_built_in_rewards_have_names():
    assert find_reward("exact")("p", "7", 7) == 1.0


def test_a_task_that_is_not_trusted_is_scored_apart():
    task = Sums(trusted=False)
    scorer = Scorer(TaskConfig(reward_workers=1), task)
    problems = list(task.problems("train"))[:2]
    assert scorer.score(problems, ["1+2+1", "1+2+1"]) == [1.0, 0.0]
    assert scorer._workers[0] is not None
    scorer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a signal at the parent's death")
def test_workers_do_not_outlive_a_killed_trainer(tmp_path):
    code = """if True:
        from flowrl_kernels.trainer.config import TaskConfig
        from flowrl_kernels.trainer.reward import Scorer
        from flowrl_kernels.trainer.tasks.base import Problem
        from flowrl_kernels.trainer.tasks.sums import Sums
        scorer = Scorer(TaskConfig(reward="rewards_for_tests:as_told", reward_workers=1), Sums())
        problem = Problem(0, "", "")
        scorer.score([problem], ["fine"])
        print(scorer._workers[0].process.pid, flush=True)
        scorer._timeout = 600
        scorer.score([problem], ["hang"])
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    pid = int(trainer.stdout.readline())
    assert alive(pid)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert gone(pid)
