"""The Python of docs/integrations.md runs as it stands, and its versions are those that were installed."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "integrations.md").read_text()
BLOCKS = re.findall(r"<!-- needs: (\w+) -->\n```python\n(.*?)```", PAGE, re.S)


def test_every_python_block_says_what_it_needs():
    assert len(BLOCKS) == PAGE.count("```python") == 4


@pytest.mark.parametrize(("package", "block"), BLOCKS, ids=[f"{need}-{i}" for i, (need, _) in enumerate(BLOCKS)])
def test_the_snippet_runs(package, block, request, tmp_path):
    pytest.importorskip(package, reason=f"the snippet needs {package}: `make test-integrations`")
    names = {}
    if package == "trl":
        from datasets import Dataset

        names = {
            "model": request.getfixturevalue("tiny_model"),
            "reward": lambda completions, **_: [float(len(text)) for text in completions],
            "dataset": Dataset.from_list([{"prompt": f"{i}+1="} for i in range(8)]),
            "options": {
                "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "max_steps": 1,
                "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4,
            },
        }  # fmt: skip
    exec(compile(block, "docs/integrations.md", "exec"), names)


@pytest.mark.parametrize(("package", "environment"), [("trl", "trl"), ("verl", "verl"), ("torchtitan", "torchtitan")])
def test_the_page_names_the_versions_that_are_tested(package, environment):
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / f"constraints-{environment}.txt").read_text(), re.M))
    named = {
        "trl": {"TRL": "trl", "peft": "peft", "transformers": "transformers"},
        "verl": {"verl": "verl", "tensordict": "tensordict", "transformers": "transformers"},
        "torchtitan": {"torchtitan": "torchtitan"},
    }[package]
    for word, name in named.items():
        assert f"{word} {pins[name]}" in PAGE
    try:
        installed = version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed here: `make test-integrations`")
    assert installed == pins[package]
