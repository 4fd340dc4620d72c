"""`python -m benchmarks`: time, peak memory and error of this library and its peers on this machine."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

# torch and the peers are imported where they are used: `report` needs neither
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--case", action="append", default=[], help="a case or a pattern; may be repeated")
    parser.add_argument("--impl", action="append", default=[], help="an implementation; may be repeated")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "benchmarks")
    parser.add_argument("--tag", default=None, help="name of the files; the date and device by default")
    parser.add_argument("--quick", action="store_true", help="the plain cases, few repeats, no sweeps")
    parser.add_argument("--repeats", type=int, default=None, help="timed runs each; 20 on a GPU, 5 on a CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of one case's timing")
    parser.add_argument("--broken", action="append", default=[], help="an implementation that a run lost the GPU to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--list", action="store_true", help="show cases and implementations, run nothing")
    return parser


def _show(device: str) -> int:
    from benchmarks.cases import CASES
    from benchmarks.peers import load

    print("cases:")
    for case in CASES.values():
        mark = " " if case.default else "*"
        print(f" {mark}{case.name:32s} {case.op:15s} {case.device:5s} N={case.n} H={case.h} V={case.v} {case.dtype}")
    print("  (* only when named)\nimplementations:")
    for peer in load().values():
        here, reason = peer.usable(device)
        print(f"  {peer.name:32s} {'yes' if here else 'no ':3s} {reason}")
    return 0


def _device(wanted: str) -> str:
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda was asked for, but torch sees no GPU")
    return wanted


def run(arguments: argparse.Namespace) -> int:
    """Run what was asked for; returns an exit status: 1 if one of ours failed or a case broke, 3 if an
    implementation broke the GPU's context (the last word printed names it): the rest wants a new process."""
    import torch

    from benchmarks import machine
    from benchmarks.cases import choose
    from benchmarks.peers import load
    from benchmarks.report import table
    from benchmarks.run import DeviceLost, Settings, run_case
    from flowrl_kernels import backends

    device = _device(arguments.device)
    if arguments.list:
        return _show(device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    peers = load()
    if unknown := sorted(set(arguments.impl) - set(peers)):
        raise SystemExit(f"--impl: wanted some of {', '.join(peers)}; got {', '.join(unknown)}")
    chosen = [peers[name] for name in arguments.impl] or list(peers.values())
    try:
        cases = choose(arguments.case, device, arguments.quick)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    repeats = arguments.repeats or (20 if device == "cuda" else 3 if arguments.quick else 5)
    settings = Settings(
        device, repeats, arguments.seed, arguments.threads, not arguments.no_memory,
        5.0 if arguments.quick else arguments.seconds, tuple(arguments.broken),
    )  # fmt: skip
    now = datetime.datetime.now(datetime.UTC)
    document = {
        "schema": 1,
        "started": now.isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "versions": machine.versions(),
        **machine.commit(),
        "cuda_library": backends()["cuda"].available,
        "seed": arguments.seed,
        "load_at_start": machine.load(),
        "ceilings": machine.ceilings(device, arguments.quick),
        "cases": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = arguments.tag or f"{now:%Y%m%d-%H%M%S}-{device}"
    path = arguments.out / f"{name}.json"
    for case in cases:
        print(f"{case.name}: {case.op} N={case.n} H={case.h} V={case.v} {case.dtype} {case.level}", flush=True)
        try:
            record = run_case(case, chosen, settings)
        except DeviceLost as lost:
            print(f"{lost}\nlost the GPU to {lost.peer}")
            return 3
        except Exception as error:
            record = {**case.record(), "error": f"{type(error).__name__}: {error}", "implementations": {}}
        document["cases"].append(record)
        path.write_text(json.dumps(document, indent=1) + "\n")  # after each case: a crash loses one case
        print(table(record, document), flush=True)
    # the better of before and after: a busy moment must not lower the ceiling
    after = machine.ceilings(device, arguments.quick)
    document["ceilings"] = {key: max(value, after[key]) for key, value in document["ceilings"].items()}
    path.write_text(json.dumps(document, indent=1) + "\n")
    _list_absent(document)
    if not arguments.no_plots:
        from benchmarks.plots import draw

        for made in draw(document, arguments.out, name):
            print(f"plot: {made.name}")
    print(f"json: {path}")
    entries = [(name, entry) for case in document["cases"] for name, entry in case["implementations"].items()]
    wrong = any(name.startswith("ours") and entry["status"] in ("failed", "error") for name, entry in entries)
    return 1 if wrong or any("error" in case for case in document["cases"]) else 0


def _list_absent(document: dict) -> None:
    absent: dict[str, str] = {}
    for case in document["cases"]:
        for name, entry in case["implementations"].items():
            if entry["status"] == "unavailable":
                absent[name] = entry["reason"]
    if absent:
        print("not run here:")
        for name, reason in absent.items():
            print(f"  {name}: {reason}")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        from benchmarks import pages, plots

        plots.draw_committed(RESULTS, ROOT / "docs" / "images")
        return pages.write(RESULTS, ROOT / "docs" / "benchmarks")
    if arguments[:1] == ["end-to-end"]:
        from benchmarks.end_to_end import main as end_to_end

        return end_to_end(arguments[1:])
    return run(_parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
