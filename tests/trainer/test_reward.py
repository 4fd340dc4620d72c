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


@pytest.mark.parametrize("setting", [{"reward_timeout": 0.0}, {"reward_workers": 0}])
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
