"""Docstrings name the arguments that there are, the site's pages are all in its menu, and lines are short."""

import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import flowrl_kernels

ROOT = Path(__file__).parent.parent
DOORS = [getattr(flowrl_kernels, name) for name in flowrl_kernels.__all__]
FUNCTIONS = [door for door in DOORS if inspect.isfunction(door)] + [
    door.forward for door in DOORS if inspect.isclass(door) and hasattr(door, "forward")
]


def documented(text):
    """The argument names of an Args section; one entry may name several."""
    section = re.search(r"^( *)Args:\n(.*?)(?=^\1\S|\Z)", inspect.cleandoc(text), re.DOTALL | re.MULTILINE)
    if section is None:
        return None
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): ", section[2], re.MULTILINE)
    return [name for entry in entries for name in entry.split(", ")]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__qualname__)
def test_an_args_section_names_arguments_that_there_are_and_the_docstring_leaves_none_out(function):
    text = function.__doc__ or ""
    names = documented(text)
    if names is None:
        assert text or function.__name__ == "forward", "a public function without a docstring"
        return
    taken = {
        name for name, p in inspect.signature(function).parameters.items() if name != "self" and p.kind != p.VAR_KEYWORD
    }
    assert len(names) == len(set(names))
    assert set(names) <= taken
    assert not {name for name in taken if not re.search(rf"\b{name}\b", text)}


def test_a_wrong_name_and_a_missing_one_are_seen():
    text = """One line.

    Args:
        a, b: two
            and more: not a name.
        c: a third.

    Returns:
        d: no argument.
    """
    assert documented(text) == ["a", "b", "c"]
    assert documented("No section.") is None


def test_every_page_is_in_the_menu_and_every_name_of_the_api_pages_exists():
    menu = set(re.findall(r"^ +- (?:.*: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert menu == pages | {"contributing.md", "changelog.md"}  # these two stand at the root
    asked = re.findall(r"^::: (\S+)$", "".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md")), re.MULTILINE)
    assert set(asked) >= {f"flowrl_kernels.{name}" for name in flowrl_kernels.__all__} - {
        "flowrl_kernels.group_normalize", "flowrl_kernels.reinforce_pp_advantage", "flowrl_kernels.gae",
    }  # fmt: skip
    for name in asked:
        module, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(module), attribute):
            importlib.import_module(name)


def test_lines_of_the_docs_stay_under_120_columns_but_for_tables_and_code():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        text = re.sub(r"^```.*?^```", lambda code: "\n" * code[0].count("\n"), page.read_text(), flags=re.M | re.DOTALL)
        for i, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 120 or line.lstrip().startswith("|"), f"{page.relative_to(ROOT)}:{i}"


def test_one_version_is_named_everywhere():
    version = flowrl_kernels.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_make_alone_lists_every_target_with_what_it_does():
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(phony) == set(re.findall(r"^  make ([a-z-]+) +\S", listed, re.MULTILINE))


def test_ci_and_hooks_run_commands_that_exist():
    assert "run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for path in re.findall(r"\btests/\w+\.py\b", hooks):
        assert (ROOT / path).exists(), path
    script = (ROOT / ".ci" / "run").read_text()
    targets = set(re.findall(r"^make ([a-z-]+)", script, re.MULTILINE))
    assert {"test", "test-integrations", "docs"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
