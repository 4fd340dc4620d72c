"""Engines with weights of their own: in step with the trainer, proved after each push, found where they are not."""

import dataclasses
import itertools
import json

import pytest
import tiny
import torch

from flowrl_kernels.trainer import checks, config_file, loop, parts
from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.rollout import Sampling
from flowrl_kernels.trainer.rollout.faults import EngineError, Fault
from flowrl_kernels.trainer.rollout.hf import HFEngine
from flowrl_kernels.trainer.rollout.responses import Response, draw_seed, look_at, together, vllm_sampling

SETTINGS = [*tiny.SMALL, "--run.steps", "3", "--rollout.engine", "vllm"]


class Pushed(HFEngine):
    """Decodes with a copy of the model that only `update_weights` changes, as an engine in another process would.

    fault(names -> tensors, version) -> what arrives, and as which version.
    """

    def __init__(self, model, batch, fault):
        import copy

        super().__init__(Policy(copy.deepcopy(model)), batch=batch, device=torch.device("cpu"))
        self.fault, self.names, self.released = fault, [], 0

    def update_weights(self, weights, version):
        given = {name: tensor.clone() for name, tensor in weights}
        self.names.append(set(given))
        given, self.version = self.fault(given, version)
        self.policy.model.load_state_dict(given, strict=False)

    def release(self):
        self.released += 1


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(fault, more arguments): trains three steps with such an engine; the engine."""
    monkeypatch.setattr("flowrl_kernels.trainer.packages.require", lambda field: None)
    made = []

    def train(fault, *args, algorithm="flowrl"):
        def make(config, actor, world):
            made.append(Pushed(actor.model, config.rollout.batch, fault))
            return made[-1]

        monkeypatch.setattr("flowrl_kernels.trainer.run.make_engine", make)
        flags = [*SETTINGS, "--algorithm.name", algorithm, "--run.dir", str(tmp_path / "run"), *args]
        loop.train(config_file.override(Config(), flags))
        return made[-1]

    train.made, train.folder = made, tmp_path / "run"
    return train


def steps(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "probe_gap" in line]


def sound(given, version):
    return given, version


def test_an_engine_in_step_trains_as_the_live_model_does_and_says_how_far_it_is(run, tmp_path):
    engine = run(sound)
    assert [line["step"] for line in steps(run.folder)] == [1, 2, 3]
    assert max(line["probe_gap"] for line in steps(run.folder)) < 1e-5
    assert engine.released == 3
    live = [*tiny.SMALL, "--run.steps", "3", "--run.dir", str(tmp_path / "live")]
    loop.train(config_file.override(Config(), live))
    lines = [json.loads(line) for line in (tmp_path / "live" / "metrics.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in lines if "loss" in x] == [x["loss"] for x in steps(run.folder)]


@pytest.mark.parametrize("algorithm", ["flowrl", "ppo"])
def test_no_log_z_critic_or_optimiser_state_is_ever_sent_to_an_engine(run, algorithm):
    engine = run(sound, algorithm=algorithm)
    wanted = set(engine.policy.model.state_dict())
    assert len(engine.names) == 4
    assert all(names == wanted for names in engine.names)
    assert not any("log_z" in name or "value" in name for name in wanted)


def skipped(given, version):
    return ({}, version) if version else (given, version)


def one_tensor_stale(given, version):
    return {name: tensor for name, tensor in given.items() if not version or "down_proj" not in name}, version


def swapped(given, version):
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    return {**given, q: given[k], k: given[q]}, version


def not_a_number(given, version):
    return {name: tensor * float("nan") if version else tensor for name, tensor in given.items()}, version


@pytest.mark.parametrize("fault", [skipped, one_tensor_stale, swapped, not_a_number])
def test_weights_that_did_not_arrive_stop_the_run_behind_a_checkpoint(run, fault):
    # a rate at which one update shows in the log-probabilities: a probe cannot see less than rounding
    with pytest.raises(EngineError, match=r"rollout\.probe_limit: with weights \d .* up to .* nats apart"):
        run(fault, "--optim.lr", "1e-2", "--optim.warmup", "0", "--algorithm.entropy", "1.0", algorithm="grpo")
    at_once = fault is swapped  # before step 0: nothing was trained, and the folder is as it was
    assert run.folder.exists() != at_once
    if not at_once:
        assert [line["step"] for line in steps(run.folder)] == [1]
        assert (run.folder / "checkpoints" / "step_1").is_dir()


def test_a_push_that_is_one_version_late_is_found_by_its_number(run):
    with pytest.raises(EngineError, match="responses of weights 0 came, those of 1 updates were pushed last"):
        run(lambda given, version: (given, max(0, version - 1)))


def test_an_engines_failure_has_an_exit_code_of_its_own(run, tmp_path, capsys):
    from flowrl_kernels.trainer.__main__ import cli

    (tmp_path / "run.toml").write_text("")
    monkey = [*SETTINGS, "--run.dir", str(tmp_path / "run")]
    run(sound)  # sets the engine up
    run.made[-1].fault = sound
    assert cli(["train", str(tmp_path / "run.toml"), *monkey, "--run.overwrite", "True"]) == 0
    assert cli(["train", str(tmp_path / "run.toml"), *monkey, "--run.overwrite", "True", "--rollout.probe_limit",
                "1e-12"]) == 4  # fmt: skip
    assert "flowrl train: rollout.probe_limit: with weights 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("rollout.servers http://a:1", r"rollout\.servers: wanted \(\), engine = 'hf' does not use it"),
        ("rollout.engine server", r"rollout\.servers: wanted at least one address"),
        ("rollout.engine server rollout.servers host:80", r"wanted addresses like 'http://127.*; got 'host:80'"),
        ("rollout.engine server rollout.servers http://h:80/v1", r"got 'http://h:80/v1'"),
        ("rollout.engine server rollout.servers http://h:1 rollout.timeout 0", r"rollout\.timeout: wanted more than 0"),
        ("rollout.engine vllm rollout.kv_cache 0", r"rollout\.kv_cache: wanted more than 0 GiB"),
        ("rollout.engine vllm rollout.tensor_parallel 2", r"rollout\.tensor_parallel: wanted a divisor of 1 ranks"),
        ("rollout.head trainer", r"rollout\.head: wanted 'engine', engine = 'hf' does not use it"),
        ("rollout.engine vllm rollout.head trainer rollout.tensor_parallel 2", r"rollout\.head: .* splits the head"),
        ("rollout.push nccl", r"rollout\.push: wanted 'folder', engine = 'hf' does not use it; got 'nccl'"),
        (
            "rollout.engine server rollout.servers http://h:1 run.device cpu rollout.push nccl",
            r"rollout\.push: wanted 'folder', the trainer runs on a CPU; got 'nccl'",
        ),
        ("rollout.probe_limit 1.0", r"rollout\.probe_limit: wanted 0\.0, engine = 'hf' does not use it"),
    ],
)
def test_settings_that_the_engine_cannot_follow_are_refused_by_name(args, said):
    words = [word if i % 2 else f"--{word}" for i, word in enumerate(args.split())]
    with pytest.raises(ValueError, match=said):
        checks.check_engine(config_file.override(Config(), words), ranks=1)


def test_several_servers_are_given_in_a_file_and_on_the_command_line(tmp_path):
    (tmp_path / "a.toml").write_text('[rollout]\nservers = ["http://a:1", "http://b:2", "http://c:3"]')
    assert config_file.load(tmp_path / "a.toml").rollout.servers == ("http://a:1", "http://b:2", "http://c:3")
    given = config_file.override(Config(), ["--rollout.servers", "http://a:1", "http://b:2"])
    assert given.rollout.servers == ("http://a:1", "http://b:2")
    (tmp_path / "b.toml").write_text(config_file.dumps(given))
    assert config_file.load(tmp_path / "b.toml") == given
    (tmp_path / "c.toml").write_text("[rollout]\nservers = 'http://a:1'")
    with pytest.raises(ValueError, match=r"rollout\.servers: wanted a list"):
        config_file.load(tmp_path / "c.toml")


def test_the_live_model_is_what_flowrl_eval_decodes_with():
    from flowrl_kernels.trainer.export import single

    config = tiny.config(rollout={"engine": "server", "servers": ("http://127.0.0.1:1",)})
    actor = policies.Policy(tiny.model().eval())
    assert isinstance(parts.make_engine(single(config), actor, tiny.ALONE), HFEngine)


GOOD = Response([4, 5, 1], [-1.0, -0.5, -2.0], ["run:3"])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"tokens": [4, 5]}, "2 tokens came with 3 log-probabilities"),
        ({"tokens": [4, 14, 1]}, "token ids outside 0 to 13"),
        ({"tokens": [4, -1, 1]}, "token ids outside 0 to 13"),
        ({"tokens": [4, "5", 1]}, "token ids outside"),
        ({"logp": [-1.0, 0.5, -2.0]}, "no numbers below 0"),
        ({"logp": [-1.0, None, -2.0]}, "no numbers below 0"),
        ({"tokens": [4, 1, 1]}, "goes on after its end token at 1"),
        ({"tokens": [4, 5, 6]}, "a short response came: 3 of 4 tokens and no end token"),
        ({"tokens": [4] * 5, "logp": [-1.0] * 5}, "5 tokens came, at most 4 were asked for"),
        ({"versions": ["default"]}, "of weights 'default' came, 'run:3' were pushed"),
        ({"versions": ["run:3", "run:4"]}, "of weights 'run:3', 'run:4' came"),
        ({"versions": []}, "of weights unnamed came"),
        ({"tokens": [], "logp": []}, "a short response came: 0 of 4"),
    ],
)
def test_a_response_that_is_not_what_was_asked_for_is_refused(bad, said):
    sampling = Sampling(4, 1.0, (1,))
    look_at(GOOD, sampling, 14, "run:3")
    look_at(Response([4] * 4, [-1.0] * 4, ["run:3"]), sampling, 14, "run:3")  # the budget ran out
    with pytest.raises(Fault, match=said):
        look_at(GOOD._replace(**bad), sampling, 14, "run:3")


def test_responses_become_one_batch_with_nothing_after_the_end():
    out = together([GOOD, Response([4, 5, 6, 7], [-1.0, -2.0, -3.0, -4.0], [])], Sampling(4, 1.0, (1,)), 3)
    assert out.tokens.tolist() == [[4, 5, 1, 0], [4, 5, 6, 7]]
    assert out.logp.tolist() == [[-1.0, -0.5, -2.0, 0.0], [-1.0, -2.0, -3.0, -4.0]]
    assert out.length.tolist() == [3, 4]
    assert out.finished.tolist() == [True, False]
    assert out.version == 3
    greedy = together([GOOD], Sampling(4, 0.0, (1,)), 3)
    assert greedy.logp.eq(0).all()


def test_every_prompt_and_step_draws_from_seeds_of_its_own():
    starts = sorted(draw_seed(seed, number) for seed in range(40) for number in range(40))
    assert min(b - a for a, b in itertools.pairwise(starts)) > 1024  # room for a group's responses
    assert draw_seed(3, 4) == draw_seed(3, 4)


def test_everything_that_samples_is_said_to_vllm_and_nothing_left_to_its_defaults():
    said = vllm_sampling(Sampling(7, 0.6, (1, 2), top_p=0.9, top_k=5, min_p=0.1), 4, seed=11)
    assert said["stop_token_ids"] == [1, 2]
    assert said["ignore_eos"] is True
    fields = {field.name for field in dataclasses.fields(Sampling)} - {"max_new_tokens", "stop", "stops"}
    assert {name: said[name] for name in fields} == {"temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
