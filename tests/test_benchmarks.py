"""The benchmark harness: its counts, its oracle, its refusals, and that a wrong implementation shows no speed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import inputs, measure, oracle, pages, plots, report, run
from benchmarks.cases import CASES, Case, choose
from benchmarks.peers import Outcome, Peer, always, load
from benchmarks.peers.eager import forward as eager_forward
from flowrl_kernels import testing

ROOT = Path(__file__).resolve().parent.parent
TINY = Case("tiny", "linear_logprob", "cpu", 40, 24, 300, sequences=4)
SETTINGS = run.Settings("cpu", repeats=3, memory=False, seconds=1.0)


def _peer(name: str, forward) -> Peer:
    return Peer(name, forward, always)


def _scaled(factor: float):
    def forward(case, made):
        outcome = eager_forward(case, made)
        # right values, gradients off by `factor`
        logp = outcome.logp.detach() + factor * (outcome.logp - outcome.logp.detach())
        return Outcome(logp=logp)

    return forward


def _shifted(case, made):
    return Outcome(logp=eager_forward(case, made).logp + 0.01)


def _nan(case, made):
    return Outcome(logp=eager_forward(case, made).logp * float("nan"))


def _broken(case, made):
    raise RuntimeError("out of memory, say")


def test_flops_and_bytes_are_those_of_the_shapes():
    case = CASES["qwen2.5-7b-8k"]
    product = 2 * 8192 * 3584 * 152064
    assert case.flops() == {"forward": product, "step": 3 * product, "step_recompute": 4 * product}
    frozen = CASES["qwen2.5-7b-8k-frozen"].flops()
    assert frozen["step"] == 2 * product
    # X and W in bf16, int64 targets in, fp32 log-probs out
    assert case.bytes()["forward"] == 2 * 3584 * (8192 + 152064) + 8192 * 12
    logits = CASES["logprob-8k"]
    assert logits.bytes()["step"] == pytest.approx(3 * 2 * 8192 * 152064, rel=1e-3)


def test_every_case_has_a_machine_and_whole_sequences():
    for case in CASES.values():
        assert case.device in ("cpu", "cuda")
        assert case.n % case.sequences == 0, case.name
        assert case.record()["logits_bytes"] >= 0
        if case.level in ("rl", "late-rl"):
            assert case.slots == 64, f"{case.name}: RL-like batches come in sequences of 64 tokens"


def test_a_pattern_that_matches_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match="no-such-case"):
        choose(["no-such-case"], "cpu", quick=False)
    assert [c.name for c in choose(["cpu-contract-r*"], "cpu", quick=False)] == [
        "cpu-contract-rl",
        "cpu-contract-rl-zipf1.2",
    ]
    assert all(c.default and c.device == "cpu" for c in choose([], "cpu", quick=False))


@pytest.mark.parametrize("entropy", [False, True])
def test_the_tiled_oracle_is_the_reference_in_float64(entropy, monkeypatch):
    monkeypatch.setitem(oracle.TILE_ELEMENTS, "cpu", 1)  # several tiles
    case = dataclasses.replace(TINY, v=700, entropy=entropy)
    made = inputs.make(case, "cpu", seed=3)
    answer = oracle.solve(case, made, seed=3)
    x, w = made.hidden.double().requires_grad_(), made.weight.double().requires_grad_()
    logp, ent, _, _ = testing.oracle(made.hidden, made.weight, made.target)
    torch.testing.assert_close(answer.logp, logp, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(answer.entropy, ent, rtol=1e-10, atol=1e-10)
    from flowrl_kernels import reference

    out = reference.linear_logprob(x, w, made.target, entropy=True)
    loss = (out.logp * made.grad_logp.double()).sum()
    if entropy:
        loss = loss + (out.entropy * made.grad_entropy.double()).sum()
    dx, dw = torch.autograd.grad(loss, (x, w))
    testing.assert_grad_close(answer.token.dx, dx[answer.rows], rel=1e-9)
    testing.assert_grad_close(answer.token.dw, dw[answer.columns], rel=1e-9)
    uniform = torch.autograd.grad(-reference.linear_logprob(x, w, made.target).logp.mean(), (x, w))
    testing.assert_grad_close(answer.uniform.dx, uniform[0][answer.rows], rel=1e-9)
    testing.assert_grad_close(answer.uniform.dw, uniform[1][answer.columns], rel=1e-9)


def test_the_oracle_from_logits_is_the_reference_in_float64():
    case = Case("tiny-logits", "logprob", "cpu", 20, 0, 300, entropy=True, sequences=4)
    made = inputs.make(case, "cpu", seed=1)
    answer = oracle.solve(case, made, seed=1)
    from flowrl_kernels import reference

    logits = made.logits.double().requires_grad_()
    out = reference.logprob(logits, made.target, entropy=True)
    loss = (out.logp * made.grad_logp.double()).sum() + (out.entropy * made.grad_entropy.double()).sum()
    (dz,) = torch.autograd.grad(loss, logits)
    testing.assert_grad_close(answer.token.dx, dz[answer.rows], rel=1e-9)


def test_an_implementation_that_is_wrong_gets_no_speed():
    peers = [
        _peer("eager", eager_forward),
        _peer("two-percent-off", _scaled(1.02)),
        _peer("zero-gradient", _scaled(0.0)),
        _peer("shifted", _shifted),
        _peer("nan", _nan),
        _peer("broken", _broken),
        Peer("absent", eager_forward, lambda device: (False, "needs a part this machine lacks")),
        Peer("choosy", eager_forward, always, refuse=lambda case: "only on Sundays"),
    ]
    said = []
    record = run.run_case(TINY, peers, SETTINGS, say=said.append)
    results = record["implementations"]
    assert {name: entry["status"] for name, entry in results.items()} == {
        "eager": "ok",
        "two-percent-off": "failed",
        "zero-gradient": "failed",
        "shifted": "failed",
        "nan": "failed",
        "broken": "error",
        "absent": "unavailable",
        "choosy": "refused",
    }
    assert len(results["eager"]["step"]["repeats_s"]) >= 3
    for name, entry in results.items():
        assert ("step" in entry) == (name == "eager"), name
        assert ("forward" in entry) == (name == "eager"), name
    assert results["absent"]["reason"] == "needs a part this machine lacks"
    document = {"machine": {"threads": 1, "device": "cpu"}, "ceilings": {"matmul_fp32_flops": 1e12}}
    text = report.table(record, document)
    for name in ("two-percent-off", "zero-gradient", "shifted", "nan"):
        line = next(line for line in text.splitlines() if name in line)
        assert "FAILED" in line
        assert " ms" not in line
    assert sum("FAILED" in line for line in said) == 4
    json.dumps(record)


def test_an_implementation_that_breaks_while_it_is_timed_is_an_error_and_the_others_are_timed():
    calls = []

    def tires(case, made):
        calls.append(1)
        if len(calls) > 2:  # its check is over
            raise RuntimeError("out of memory, say")
        return eager_forward(case, made)

    results = run.run_case(TINY, [_peer("tires", tires), _peer("eager", eager_forward)], SETTINGS)["implementations"]
    assert results["tires"]["status"] == "error"
    assert {"step", "forward"} <= set(results["eager"])


def test_a_broken_gpu_context_ends_the_run_and_names_who_broke_it(monkeypatch, tmp_path, capsys):
    def dead():
        raise RuntimeError("an illegal memory access was encountered")

    peers = {"ours-bad": _peer("ours-bad", _broken), "eager": _peer("eager", eager_forward)}
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    entry = {}
    with pytest.raises(run.DeviceLost, match="ours-bad broke the device's context: RuntimeError: out of memory, say"):
        run._failed("ours-bad", entry, RuntimeError("out of memory, say"), "cuda")
    assert entry["status"] == "error"

    def lose(case, chosen, settings):
        raise run.DeviceLost("ours-bad", "illegal memory access")

    monkeypatch.setattr("benchmarks.peers.load", lambda: peers)
    monkeypatch.setitem(CASES, "tiny", TINY)
    arguments = ["--case", "tiny", "--quick", "--device", "cpu", "--no-memory", "--no-plots", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(run, "run_case", lose)
        assert cli.main(arguments) == 3
    assert capsys.readouterr().out.split()[-1] == "ours-bad"
    assert cli.main([*arguments, "--tag", "rest", "--broken", "ours-bad"]) == 1  # one of ours is missing
    results = json.loads((tmp_path / "rest.json").read_text())["cases"][0]["implementations"]
    assert results["ours-bad"]["reason"] == "broke the device's context"
    assert results["eager"]["status"] == "ok"


@pytest.mark.parametrize("op", ["linear_logprob", "logprob"])
def test_ours_passes_its_check_in_every_implementation_that_runs(op):
    case = TINY if op == "linear_logprob" else Case("tiny-logits", "logprob", "cpu", 40, 0, 300, sequences=4)
    made = inputs.make(case, "cpu", seed=0)
    answer = oracle.solve(case, made, seed=0)
    ran = []
    for name, peer in load().items():
        if name.startswith("ours") and peer.usable("cpu")[0] and peer.refusal(case) is None:
            record = run.check(peer, case, made, answer)
            assert record["status"] == "ok", (name, record["failures"])
            ran.append(name)
    assert {"ours-chunked", "ours-reference"} <= set(ran)


def test_a_bounded_step_reports_its_bound_and_its_errors():
    case = Case("tiny-rl", "linear_logprob", "cpu", 128, 64, 4096, level="rl", epsilon=0.01, sequences=2)
    made = inputs.make(case, "cpu", seed=0)
    peer = load()["ours-chunked-bounded"]
    record = run.check(peer, case, made, oracle.solve(case, made, seed=0))
    assert record["status"] == "ok", record["failures"]
    assert 0.0 <= record["bounded"]["bound"] <= 0.01
    assert 0.0 < record["bounded"]["share_of_tiles"] <= 1.0
    assert peer.refusal(dataclasses.replace(case, epsilon=0.0)) is not None


def test_every_adapter_answers_for_itself_on_a_machine_without_a_gpu():
    peers = load()
    for name in (
        "ours-triton",
        "liger-flce",
        "liger-scaled-ce",
        "cce",
        "trl-chunked",
        "verl-triton",
        "quack",
        "rl-kernel-cuda",
    ):
        here, reason = peers[name].usable("cpu")
        assert isinstance(here, bool)
        assert reason, name
    assert peers["eager"].usable("cpu")[0]
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        assert not peers["F.linear_cross_entropy"].usable("cpu")[0]


def test_the_same_seed_gives_the_same_inputs():
    for level in ("flat", "base", "peaked", "rl"):
        case = dataclasses.replace(TINY, n=64, level=level, sequences=1)
        first, again, other = (inputs.make(case, "cpu", seed) for seed in (5, 5, 6))
        assert all(torch.equal(a, b) for a, b in zip(first.tensors(), again.tensors()))
        assert not torch.equal(first.hidden, other.hidden)


def test_levels_order_the_entropy():
    entropies = []
    for level in ("flat", "base", "rl"):
        case = dataclasses.replace(TINY, n=128, h=64, v=2000, level=level, sequences=2)
        entropies.append(oracle.solve(case, inputs.make(case, "cpu", 0), 0).summary()["entropy_mean"])
    assert entropies[0] > entropies[1] > entropies[2]


def test_the_sampler_sees_a_block_that_came_and_went():
    size = 64 << 20

    def work():
        block = torch.ones(size // 4)
        time.sleep(0.05)
        del block
        return Outcome(logp=torch.zeros(256))

    peak = measure.cpu_peak(work, run.returned_bytes)
    assert 0.9 * size < peak["above_inputs"] < 1.5 * size
    assert peak["returned"] == 1024


def test_turns_alternate_and_keep_every_repeat():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = measure.take_turns(runs, measure.Clock("cpu"), repeats=3)
    assert "".join(order) == "abbaab"
    assert all(len(t["repeats_s"]) == 3 and t["min_s"] <= t["median_s"] <= t["max_s"] for t in times.values())


def test_the_command_writes_json_and_the_report_turns_it_into_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "tiny", TINY)
    threads = torch.get_num_threads()
    arguments = ["--case", "tiny", "--impl", "eager", "--impl", "ours-chunked", "--quick", "--device", "cpu"]
    status = cli.main([*arguments, "--no-memory", "--out", str(tmp_path), "--tag", "t"])
    assert status == 0
    assert torch.get_num_threads() == threads
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["machine"]["cpu"]
    assert document["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty", "seed", "load_at_start", "ceilings"} <= set(document)
    case = document["cases"][0]
    assert len(case["implementations"]["ours-chunked"]["step"]["repeats_s"]) >= 3
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in pages.PAGES:
        (folder / name).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert pages.write(tmp_path, folder) == 0
    for name in pages.PAGES:
        text = (folder / name).read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
    assert "| ours-chunked |" in (folder / "tables.md").read_text()
    assert "| `tiny`: " in (folder / "fastest.md").read_text()
    (folder / "exact.md").write_text("no marks\n")
    assert pages.write(tmp_path, folder) == 1


def test_a_sweep_is_one_table_for_each_quantity_with_what_varies_across():
    step = {"median_s": 0.02, "min_s": 0.01, "max_s": 0.03}
    ours = {"status": "ok", "step": step, "memory": {"extra": 3e6}, "errors": {}}
    cases = [
        dataclasses.replace(TINY, name=f"tiny-{n}", n=n, group="scaling").record()
        | {"implementations": {"ours": ours, "peer": {"status": "failed"}, "absent": {"status": "unavailable"}}}
        for n in (256, 512)
    ]
    text = "\n".join(report.sweep(cases))
    assert "### tiny\n" in text
    assert "| forward + backward | N 256 | N 512 |" in text
    assert "| ours | 20.00 ±10.00 ms | 20.00 ±10.00 ms |" in text
    assert "| ours | 3 MB | 3 MB |" in text
    assert text.count("| peer | FAILED | FAILED |") == 2
    assert "absent" not in text


@pytest.mark.parametrize("name", pages.PAGES)
def test_the_page_holds_what_the_committed_json_says(name):
    page = (ROOT / "docs" / "benchmarks" / name).read_text()
    held = page.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert held == pages.generate(ROOT / "benchmarks" / "results", name).strip(), "run `make bench-report`"


def test_a_case_ranks_what_could_stand_in_our_place_the_least_first(tmp_path):
    def entry(seconds, status="ok"):
        step = {"median_s": seconds, "min_s": seconds, "max_s": seconds}
        return {"status": status, "step": step, "memory": {"extra": 2e6 / seconds}, "errors": {"logp_max_abs": seconds}}

    made = {
        "ours-chunked": entry(2.0),
        "eager": entry(4.0),
        "torch.compile": entry(1.0),
        "F.linear_cross_entropy-mean": entry(0.5),  # a mean: no log-prob for a token
        "trl-chunked": entry(0.1, "failed"),
    }
    document = {
        "machine": {"cpu": "a cpu", "threads": 2, "device": "cpu", "gpu": None},
        "started": "2026-01-01T00:00:00", "commit": "0" * 40, "dirty": False,
        "cases": [dataclasses.replace(TINY, group="contract").record() | {"implementations": made}],
    }  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps(document))
    fastest = pages.generate(tmp_path, "fastest.md")
    assert "| torch.compile 1.00 ±0.00 s<br>**ours-chunked** 2.00 ±0.00 s<br>eager 4.00 ±0.00 s |" in fastest
    assert "`ours-chunked` takes **0.5** of eager's time" in fastest
    fits = pages.generate(tmp_path, "fits.md")
    assert "| eager 500 kB<br>**ours-chunked** 1 MB<br>torch.compile 2 MB |" in fits
    assert "| torch.compile 1<br>**ours-chunked** 2<br>eager 4 |" in pages.generate(tmp_path, "exact.md")


def test_every_picture_of_the_pages_is_drawn_from_the_committed_json():
    committed = {path.name for path in (ROOT / "docs" / "images").glob("*.png")}
    drawn = set(plots.pictures(ROOT / "benchmarks" / "results"))
    assert drawn | {"cost.png"} <= committed
    shown = set(
        re.findall(r"\.\./images/([\w.-]+)", "".join(p.read_text() for p in (ROOT / "docs/benchmarks").glob("*.md")))
    )
    assert shown == drawn


def test_a_sweep_draws_time_memory_and_both_together_with_the_same_bytes_each_time(tmp_path):
    def entry(n):
        return {"status": "ok", "step": {"median_s": n / 1e3}, "memory": {"extra": n * 1e6}}

    cases = [
        dataclasses.replace(TINY, n=n, group="scaling").record()
        | {"implementations": {"ours-chunked": entry(n), "eager": entry(2 * n), "trl-chunked": {"status": "failed"}}}
        for n in (256, 512)
    ]
    machine = {"cpu": "a cpu", "threads": 2, "device": "cpu", "gpu": None}
    document = {"machine": machine, "started": "2026-01-01T00:00:00", "cases": cases}
    made = plots.draw(document, tmp_path, "run")
    assert [path.name for path in made] == ["run-time.png", "run-memory.png", "run-cost.png"]
    before = [path.read_bytes() for path in made]
    assert [path.read_bytes() for path in plots.draw(document, tmp_path, "run")] == before
    assert plots.draw({**document, "cases": cases[:1]}, tmp_path, "one") == []
    (tmp_path / "one.json").write_text(json.dumps(document))
    drawn = plots.draw_committed(tmp_path, tmp_path / "images")
    assert [path.name for path in drawn] == ["one-time.png", "one-memory.png", "cost.png"]


def test_labels_keep_their_order_and_their_distance():
    assert plots._apart([0.0, 100.0], 10.0) == [0.0, 100.0]
    assert plots._apart([50.0, 50.0], 10.0) == [45.0, 55.0]
    assert plots._apart([0.0, 1.0, 2.0], 10.0) == [-9.0, 1.0, 11.0]
    made = plots._apart([0.0, 4.0, 5.0, 90.0], 10.0)
    assert all(b - a >= 10.0 - 1e-9 for a, b in itertools.pairwise(made))
    assert made[-1] == 90.0
