"""The server engine against one that works, dies, hangs, forgets and talks nonsense; vLLM: tests/rollout_vllm."""

import json
import threading
import time

import fake_vllm
import pytest
import tiny
import torch

from flowrl_kernels.trainer import config_file, loop
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.rollout import Sampling, faults
from flowrl_kernels.trainer.rollout.faults import EngineError, Fault, again
from flowrl_kernels.trainer.rollout.http import Http
from flowrl_kernels.trainer.rollout.server import ServerEngine, write


@pytest.fixture
def server():
    fake = fake_vllm.of_sums()
    yield fake
    if fake.server is not None:
        fake.kill()


@pytest.fixture
def second(server):
    fake = fake_vllm.of_sums()
    yield fake
    fake.kill()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited between tries; nobody waits."""
    waited = []
    monkeypatch.setattr(faults.time, "sleep", waited.append)
    return waited


def train(folder, addresses, *more):
    flags = [*fake_vllm.small(addresses, *more), "--run.dir", str(folder)]
    loop.train(config_file.override(Config(), flags))
    return steps(folder)


def steps(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "probe_gap" in line]


def test_a_run_by_servers_is_in_step_and_does_not_depend_on_how_many_there_are(tmp_path, server, second):
    one = train(tmp_path / "one", server.address)
    alone = len(server.asked)
    two = train(tmp_path / "two", [server.address, second.address])
    assert [x["step"] for x in one] == [1, 2, 3]
    assert max(x["probe_gap"] for x in one + two) < 1e-5
    assert [x["loss"] for x in one] == [x["loss"] for x in two]
    assert len(second.asked) * 2 == alone == (len(server.asked) - alone) * 2
    assert server.loads == 8  # before step 0 and after each of three steps, twice
    assert not (tmp_path / "two" / "weights").exists()
    params = server.asked[-1]["sampling_params"]
    assert params["logprobs"] == 0
    assert params["ignore_eos"] is True


def test_a_server_that_dies_and_comes_back_without_the_weights_gets_them_again(tmp_path, server, waits):
    gone = threading.Event()

    def dies(answer, handler):
        server.kill()
        gone.set()
        return None, None

    whole = train(tmp_path / "whole", server.address)
    again_at = len(waits)
    server.faults = [None] * 9 + [dies]  # in the second step: the first has 4 probes, 4 prompts
    server.loads = 0

    back_at_once = threading.Lock()

    def back(seconds, waited=waits):
        waited.append(seconds)
        gone.wait(10)
        with back_at_once:
            if server.server is None:
                server.start()

    faults.time.sleep = back
    cut = train(tmp_path / "cut", server.address)
    assert len(waits) > again_at
    assert server.loads == 5
    assert [x["loss"] for x in cut] == [x["loss"] for x in whole]


def hangs(answer, handler):
    time.sleep(0.4)
    return None, None


def no_json(answer, handler):
    return 200, b"<html>busy</html>"


def another_form(answer, handler):
    return 200, {"choices": [{"index": 0, "text": "12+3"}]}


def overloaded(answer, handler):
    return 503, {"error": "overloaded"}


def short(answer, handler):
    choice = answer["choices"][0]
    for values in (choice["token_ids"], choice["logprobs"]["content"]):
        del values[-1]
    return 200, answer


def part_of_the_group(answer, handler):
    return 200, {**answer, "choices": answer["choices"][:-1]}


def stale(answer, handler):
    for choice in answer["choices"]:
        choice["weight_versions"][0]["version"] = "another:7"
    return 200, answer


BAD = {
    hangs: "timed out",
    no_json: "answered what is no JSON",
    another_form: "an answer of another form came",
    overloaded: "answered 503",
    short: "a short response came|goes on after",
    part_of_the_group: "3 responses came, 4 were asked for",
    stale: "of weights 'another:7' came",
}


@pytest.mark.parametrize("fault", BAD)
def test_what_goes_wrong_once_is_asked_again_and_changes_nothing(tmp_path, server, fault, monkeypatch):
    monkeypatch.setattr(faults, "LONGEST", 0.01)
    patience = "0.2" if fault is hangs else "30"  # a busy machine must not look like a fault
    flags = fake_vllm.small(server.address, "--rollout.timeout", patience, "--run.dir", str(tmp_path))
    engine = ServerEngine(config_file.override(Config(), flags), 14, tiny.ALONE)
    engine.update_weights(server.engine.policy.model.state_dict().items(), 3)
    asked = [[3, 13], [4, 5, 13], [6]], 4, Sampling(6, 1.0, (1,)), 7
    good = engine.generate(*asked)
    server.faults = [None, fault]
    got = engine.generate(*asked)
    assert len(server.asked) == 3 + 3 + 1
    assert all(torch.equal(a, b) for a, b in zip(good[:4], got[:4]))
    assert got.version == 3
    engine.close()


@pytest.mark.parametrize(
    "fault", [short, *(pytest.param(bad, marks=pytest.mark.nightly) for bad in BAD if bad is not short)]
)
def test_what_goes_on_going_wrong_stops_the_run_by_name_behind_a_good_checkpoint(tmp_path, server, fault, waits):
    server.faults = [None] * (4 + 4 + 4) + [fault] * 1000  # the second step's prompts
    with pytest.raises(EngineError, match=rf"rollout\.servers: {server.address}: .*({BAD[fault]}).*\(tried 3 times\)"):
        train(tmp_path / "run", server.address, "--rollout.timeout", "0.2", "--rollout.retries", "2")
    assert set(waits) <= {0.4, 1.0, 2.0}  # of the fault itself; then twice as long each time
    assert [x["step"] for x in steps(tmp_path / "run")] == [1]
    assert (tmp_path / "run" / "checkpoints" / "step_1").is_dir()
    server.faults = []
    done = train(tmp_path / "run", server.address, "--run.resume", "True")
    assert [x["step"] for x in done] == [1, 2, 3]


def test_a_server_that_is_not_there_is_named_before_anything_is_written(tmp_path, waits):
    with pytest.raises(EngineError, match=r"rollout\.servers: http://127\.0\.0\.1:9: .*refused.* \(tried 9 times\)"):
        train(tmp_path / "run", "http://127.0.0.1:9")
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert not (tmp_path / "run").exists()


def test_a_server_without_weight_endpoints_is_refused_at_once(server, tmp_path, waits):
    server.answer = lambda *args: (404, {"detail": "Not Found"})
    with pytest.raises(EngineError, match="GET /weight_info answered 404.*make serve"):
        train(tmp_path / "run", server.address)
    assert not waits


def test_a_kept_connection_that_the_server_closed_is_opened_again(server):
    http = Http(server.address, 5.0)
    assert http.ask("GET", "/weight_info") == {"weight_version": "default"}
    server.kill()
    server.start()
    assert http.ask("GET", "/weight_info") == {"weight_version": "default"}
    server.kill()
    with pytest.raises(OSError, match="refused|Refused|closed"):
        http.ask("GET", "/weight_info")


def test_only_what_may_pass_is_tried_again(waits):
    with pytest.raises(ZeroDivisionError):
        again(lambda: 1 / 0, retries=3, what="x")
    calls = []

    def third():
        calls.append(1)
        if len(calls) < 3:
            raise Fault("not yet")
        return 7

    assert again(third, retries=2, what="x") == 7
    assert waits == [1, 2]


def test_a_server_is_told_of_the_trainers_head_with_every_push_for_it_may_have_been_away(tmp_path, server):
    for head, told in (("trainer", [("flowrl_head", "chunked")]), ("engine", [])):
        server.called = []
        more = ["--rollout.head", head, "--parallel.impl", "chunked", "--run.dir", str(tmp_path)]
        config = config_file.override(Config(), fake_vllm.small(server.address, *more))
        engine = ServerEngine(config, 14, tiny.ALONE)
        for version in (1, 2):
            engine.update_weights(server.engine.policy.model.state_dict().items(), version)
        assert [call for call in server.called if call[0] == "flowrl_head"] == told * 2
        assert [call[0] for call in server.called if call[0] == "flowrl_load"] == ["flowrl_load"] * 2
        engine.close()


def test_weights_are_written_whole_in_the_type_that_computes_and_in_files_of_a_size(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr("flowrl_kernels.trainer.rollout.server.FILE", 50)
    shared = torch.randn(5, 4, requires_grad=True)
    weights = {"embed": shared, "head": shared, "norm": torch.randn(3), "count": torch.tensor(3)}
    write(weights.items(), tmp_path / "version_2", torch.bfloat16)
    files = sorted(tmp_path.glob("version_2/*"))
    assert len(files) > 1
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == weights.keys()
    assert torch.equal(found["head"], shared.bfloat16())
    assert found["count"].dtype == torch.int64
    assert [path.name for path in tmp_path.iterdir()] == ["version_2"]
