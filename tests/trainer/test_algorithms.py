"""The table of algorithms and what follows from a row."""

from pathlib import Path
from typing import get_args

import pytest
import tiny
from test_golden_steps import CASES

from flowrl_kernels.trainer import algorithms, checks, objective
from flowrl_kernels.trainer.config import AlgorithmConfig, AlgorithmName


def test_the_names_a_config_may_give_are_those_of_the_table():
    assert list(get_args(AlgorithmName)) == list(algorithms.ALGORITHMS)  # in the table's order


def test_every_row_has_a_golden_step_and_a_line_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    for name in algorithms.ALGORITHMS:
        assert any(case.split(",")[0].split()[0] == name for case in CASES), f"test_golden_steps.CASES has no {name!r}"
        assert f"\n| `{name}` |" in page, f"no line of {name} in docs/trainer.md"


def test_a_row_that_pays_its_kl_in_the_return_has_returns():
    paid = {name: row.tokens for name, row in algorithms.ALGORITHMS.items() if row.kl == "return"}
    assert paid == {"reinforce_pp": "returns"}


def test_the_settings_that_a_row_may_ignore_have_the_defaults_of_the_config():
    config = AlgorithmConfig()
    assert {name: getattr(config, name) for name in algorithms.OWN} == algorithms.OWN


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_a_setting_is_read_or_refused(name):
    for field in algorithms.OWN:
        config = tiny.config(algorithm={"name": name, field: 0.5})
        if field in algorithms.ALGORITHMS[name].reads:
            checks.check_algorithm(config)
        else:
            with pytest.raises(ValueError, match=rf"algorithm\.{field}: wanted .*, {name} does not use it; got 0\.5"):
                checks.check_algorithm(config)


def test_what_has_to_be_there_before_an_update_follows_from_the_row():
    found = {name: objective.needs(tiny.config(algorithm={"name": name})) for name in algorithms.ALGORITHMS}
    assert {name for name, needs in found.items() if needs.reference} == {"flowrl"}
    assert {name for name, needs in found.items() if needs.value} == {"ppo"}
    assert {name for name, needs in found.items() if needs.old} == {"ppo"}  # flowrl's ratio is 1 after one update
    paid = {
        name: objective.needs(tiny.config(algorithm={"name": name, "kl": 0.1})) for name in ("grpo", "reinforce_pp")
    }
    assert [paid[name].old for name in ("grpo", "reinforce_pp")] == [False, True]
    assert paid["grpo"].reference


def test_a_group_of_one_is_refused_where_responses_are_compared():
    alone = {name for name, row in algorithms.ALGORITHMS.items() if not row.compares and not row.residual}
    assert alone == {"ppo", "reinforce_pp", "raft"}
    for name in algorithms.ALGORITHMS:
        config = tiny.config(algorithm={"name": name}, rollout={"samples": 1})
        if name in alone:
            checks.check_algorithm(config)
        else:
            with pytest.raises(ValueError, match=r"rollout\.samples: wanted at least 2"):
                checks.check_algorithm(config)
