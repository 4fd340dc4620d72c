"""A tiny Qwen2 with a tokenizer on disk, as a user's model path: TRL loads the reference from it.

`--environment trl` fails a run in which tests that this environment is made for were skipped.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

ANYWHERE = {"test_prime_rl.py", "test_other_trainers.py"}
MUST_RUN = {  # files, or beginnings of tests, none of which may be skipped there; by environment (constraints-*.txt)
    "trl": {
        "test_trl.py", "test_trl_patch.py", "test_trl_benchmark.py", "test_examples.py::test_the_example_trains",
        "test_examples.py::test_three_loops", "test_docs.py::test_the_snippet_runs[trl", *ANYWHERE,
    },
    "verl": {
        "test_verl.py", "test_verl_engine.py", "test_verl_correction.py", "test_examples.py::test_the_verl_example",
        "test_docs.py::test_the_snippet_runs[verl", *ANYWHERE,
    },
    "torchtitan": {"test_torchtitan.py", "test_docs.py::test_the_snippet_runs[torchtitan", *ANYWHERE},
}  # fmt: skip
seen: dict[str, set[str]] = {"passed": set(), "skipped": set()}


def pytest_addoption(parser):
    parser.addoption("--environment", choices=sorted(MUST_RUN), default=None)


def pytest_collectreport(report):
    if report.skipped:
        seen["skipped"].add(Path(report.nodeid).name)


def pytest_runtest_logreport(report):
    if report.skipped or (report.passed and report.when == "call"):
        seen[report.outcome].add(report.nodeid.rsplit("/", 1)[-1])


def unproved(config):
    wanted = MUST_RUN.get(config.getoption("environment", None), set())

    def any_of(outcome, start):
        return any(test.startswith(start) for test in seen[outcome])

    return sorted(start for start in wanted if any_of("skipped", start) or not any_of("passed", start))


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and unproved(session.config):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    if missing := unproved(config):
        terminalreporter.write_line(f"not run as environment {config.getoption('environment')} has to: {missing}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of the examples' 2-layer Qwen2 (V = 16, H = 32) and its tokenizer."""
    pytest.importorskip("transformers")
    from common import save_tiny

    return save_tiny(str(tmp_path_factory.mktemp("tiny") / "qwen2"))
