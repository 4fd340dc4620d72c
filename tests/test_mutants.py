"""The list of mutants fits the source and the tests; the runner kills what is wrong and reports what is not."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from mutants.table import MUTANTS

ROOT = Path(__file__).resolve().parents[1]


@cache
def functions(file):
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_has_one_place_in_the_source_and_a_test_that_exists(mutant):
    text = (ROOT / "flowrl_kernels" / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}: give this row the new text of the same fault"
    assert mutant.old != mutant.new
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert function.split("[")[0] in functions(file), f"no {test}"


def test_names_are_distinct():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.nightly
def test_a_run_kills_a_fault_and_reports_a_change_that_nothing_sees(tmp_path):
    probe = (
        "import sys; from tests.mutants import table, __main__ as m;"
        "kept = [x for x in table.MUTANTS if x.name == 'an id of V'];"
        "same = kept[0]._replace(name='the same', new=kept[0].old + ' ');"
        "table.MUTANTS[:] = kept + [same]; sys.exit(m.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    assert "1 killed, 1 survived" in done.stdout
    assert "not killed: the same" in done.stdout
