"""The README's code runs as it stands, its links lead somewhere, and it stays short."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_in_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "weight_mean" in capsys.readouterr().out


def test_every_link_of_the_docs_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 120


def test_the_config_for_ones_own_model_and_data_loads(tmp_path):
    from flowrl_kernels.trainer import config_file
    from flowrl_kernels.trainer.tasks.dataset import read_problems

    (toml,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    (tmp_path / "mine.toml").write_text(toml)
    config = config_file.load(tmp_path / "mine.toml")
    assert config.task.name == "file"
    (row,) = re.findall(r'`(\{"prompt".*?\})`', README)
    (tmp_path / config.task.train).write_text(row)
    (problem,) = read_problems(str(tmp_path / config.task.train), config.task.prompt_key, config.task.answer_key)
    assert problem.answer == "56"


def test_the_environment_is_activated_before_its_commands_are_used():
    assert ". .venv/bin/activate" in README.partition("torchrun --nproc")[0]


def test_commands_of_the_readme_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
