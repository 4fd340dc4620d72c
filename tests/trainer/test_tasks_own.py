"""A task of one's own: the one that docs/tasks.md shows, and what is refused by name."""

import re
from pathlib import Path

import pytest
import tiny

from flowrl_kernels.trainer import config_file, parts
from flowrl_kernels.trainer import run as runs
from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.tasks import Problem, build_task, check_characters

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text().split("## A task of your own")[1]

TASKS = """
from flowrl_kernels.trainer.tasks.base import OpenTask
def nothing(settings): pass
class Half(OpenTask):
    name = "half"
    trusted = True
    def verify(self, problem, response): return 1.0
def itself(settings): return Half
def half(settings): return Half()
"""


def test_the_task_of_the_page_starts_with_the_settings_of_the_page(tmp_path):
    code, settings = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.S)[1] for kind in ("python", "toml"))
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "run.toml").write_text(settings.replace("mine:make", f"{tmp_path}/mine.py:make"))
    config = config_file.load(str(tmp_path / "run.toml"))
    settled = runs.settle(config, tiny.ALONE)
    assert len(settled.problems) == config.rollout.prompts
    assert config.rollout.max_new_tokens == settled.text.task.max_response_tokens


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "got NoneType, which lacks alphabet, .*OpenTask has all but"),
        ("itself", "got the class Half itself"),
        ("half", "got Half, which lacks correct, problems;"),
    ],
)
def test_what_is_no_task_is_refused_by_what_it_lacks(tmp_path, name, why):
    (tmp_path / "tasks.py").write_text(TASKS)
    with pytest.raises(ValueError, match=rf"task\.name: .*:{name}' must return a task, {why}"):
        build_task(TaskConfig(name=f"{tmp_path}/tasks.py:{name}"))


def test_a_character_outside_the_alphabet_is_named():
    text = parts.make_text(tiny.config(), build_task(TaskConfig()))
    with pytest.raises(ValueError, match=r"task: alphabet '.*' lacks ' a', which the prompt '1 a=' has"):
        text.encode(Problem(0, "1 a=", 1))
    check_characters(["12", ""], "123", "answer")
