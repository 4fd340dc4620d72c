"""Configuration: strict TOML in, the same TOML out, every field on the command line."""

import dataclasses

import pytest

from flowrl_kernels.trainer import config_file
from flowrl_kernels.trainer.config import Config, check
from flowrl_kernels.trainer.config_file import changed, dumps, flat, load, override


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_what_is_written_reads_back_equal(tmp_path):
    config = override(Config(), ["--algorithm.clip", "0.8", "inf", "--optim.lr", "3e-4", "--task.system", 'a "b"\n'])
    assert load(write(tmp_path, dumps(config))) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[optim]\nlrr = 1.0", r"run\.toml:2: unknown key 'optim\.lrr'; did you mean 'lr'"),
        ("\n[optm]\nlr = 1.0", r"run\.toml:2: unknown key 'optm'; did you mean 'optim'"),
        ("[optim]\nlr = 'fast'", r"run\.toml:2: optim\.lr: wanted float; got 'fast'"),
        ("[run]\nsteps = 1.5", r"run\.toml:2: run\.steps: wanted int; got 1\.5"),
        ("[run]\nsteps = true", r"run\.steps: wanted int; got True"),
        ("[algorithm]\nname = 'grp'", r"algorithm\.name: wanted one of 'flowrl', 'grpo'"),
        ("[algorithm]\nclip = [0.8]", r"algorithm\.clip: wanted a list of 2"),
        ("optim = 3", r"'optim' is a table; write \[optim\]"),
        ("[optim\nlr = 1", r"not TOML"),
    ],
)
def test_a_bad_file_is_refused_by_line_with_the_nearest_name(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        load(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        load(tmp_path / "nowhere.toml")


def test_every_field_can_be_set_on_the_command_line():
    args = []
    for path, value in flat(Config()).items():
        if isinstance(value, bool):
            args += [f"--{path}", str(not value)]
        elif isinstance(value, int) and path != "task.seed":
            args += [f"--{path}", str(value + 1)]
    before, after = flat(Config()), flat(override(Config(), args))
    touched = {args[i][2:] for i in range(0, len(args), 2)}
    assert {path for path in before if before[path] != after[path]} == touched
    assert len(touched) > 40


def test_an_unknown_flag_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown option '--optim\.lrr'; did you mean '--optim\.lr'"):
        override(Config(), ["--optim.lrr", "1"])


def test_text_of_any_kind_survives_the_written_file(tmp_path):
    text = 'Denk nach 🤔 \U0001d54f "quotes" back\\slash\ttab\nline \x01 é'
    config = override(Config(), [f"--task.system={text}"])
    path = tmp_path / "config.toml"
    path.write_text(dumps(config), encoding="utf-8")
    assert load(path) == config
    assert load(path).task.system == text


def test_a_method_of_a_comparison_changes_the_files_settings_and_is_checked_by_line(tmp_path):
    text = "[run]\nsteps = 3\n[optim]\nlr = 1e-5\n[compare.grpo]\nalgorithm.name = 'grpo'\nrun.steps = 7\n"
    file = write(tmp_path, text)
    config = config_file.merge(load(file), config_file.methods(file)["grpo"])
    assert (config.run.steps, config.optim.lr, config.algorithm.name) == (7, 1e-5, "grpo")
    with pytest.raises(ValueError, match=r"run\.toml:6: unknown key 'optim\.lrr'"):
        config_file.methods(write(tmp_path, text.replace("algorithm.name = 'grpo'", "optim.lrr = 1.0")))


def test_every_field_says_what_it_is():
    import ast
    import inspect

    from flowrl_kernels.trainer import config

    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef) and node.name != "Config":
            for field, after in zip(node.body, [*node.body[1:], None]):
                if isinstance(field, ast.AnnAssign):
                    text = getattr(getattr(after, "value", None), "value", None)
                    assert isinstance(text, str), f"{node.name}.{ast.unparse(field.target)} has no sentence"
                    assert text.endswith((".", "off.", "none.")), f"{node.name}.{ast.unparse(field.target)}: {text!r}"


@pytest.mark.parametrize(
    ("section", "field", "value", "world", "said"),
    [
        ("rollout", "top_p", 0.0, 1, r"rollout\.top_p: wanted a number above 0"),
        ("rollout", "top_k", -5, 1, r"rollout\.top_k: wanted at least 0"),
        ("rollout", "min_p", 1.5, 1, r"rollout\.min_p: wanted a number in \[0, 1\]"),
        ("eval", "top_p", 2.0, 1, r"eval\.top_p: wanted a number above 0"),
        ("rollout", "temperature", 0.0, 1, r"rollout\.temperature: wanted more than 0"),
        ("algorithm", "minibatch_prompts", 5, 1, r"minibatch_prompts: wanted a divisor of rollout\.prompts = 32"),
        ("rollout", "prompts", 32, 3, r"rollout\.prompts: wanted a multiple of the 3 ranks"),
        ("parallel", "replicate", 2, 3, r"parallel\.replicate: wanted a divisor of 3"),
        ("parallel", "row_tokens", 10_000, 1, r"parallel\.row_tokens: wanted at most parallel\.max_tokens"),
        ("run", "steps", -1, 1, r"run\.steps: wanted at least 0; got -1"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(section, field, value, world, said):
    config = Config()
    table = dataclasses.replace(getattr(config, section), **{field: value})
    rest = {"rollout": dataclasses.replace(config.rollout, prompts=30)} if "replicate" in field else {}
    with pytest.raises(ValueError, match=said):
        check(dataclasses.replace(config, **rest, **{section: table}), world)


def test_the_default_configuration_is_sound():
    check(Config())


def test_resuming_may_lengthen_a_run_but_not_change_its_numbers():
    old = Config()
    free = override(old, ["--run.steps", "7", "--eval.every", "3", "--checkpoint.every", "2"])
    assert changed(old, free) == []
    assert changed(old, override(old, ["--optim.lr", "1e-3"])) == ["optim.lr: 0.0005 -> 0.001"]
    falling = override(old, ["--optim.schedule", "linear"])
    longer = override(falling, ["--run.steps", "7"])
    assert changed(falling, longer) == ["run.steps: 100 -> 7"]  # the rate falls towards the last step


def test_the_shipped_configs_are_valid():
    from pathlib import Path

    files = sorted((Path(config_file.__file__).parents[2] / "configs").glob("*.toml"))
    assert files
    for file in files:
        check(load(file))
