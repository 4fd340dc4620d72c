"""`python -m tests.fuzz`: bad and odd input at every public door, 10,000 calls in all; exit 1 where one misbehaves."""

import argparse
import multiprocessing
import random
import sys

from tests.fuzz.run import DOORS, SLOW, missing, report, work


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time")
    parser.add_argument("--only", nargs="*", help="doors, or parts of their names")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    names = [n for n in DOORS if not options.only or any(o in n for o in options.only)]
    here = [n for n in names if missing(n) is None]
    share = options.inputs / sum(SLOW.get(n, 1.0) for n in here)
    jobs = [(n, round(share * SLOW.get(n, 1.0) + 0.5), seed) for n in here]
    failed, total = [], 0
    print(f"seed {seed}", flush=True)
    with multiprocessing.get_context("forkserver").Pool(options.workers) as pool:
        for name, _, counts, findings, seconds in pool.imap_unordered(work, jobs):
            total += sum(counts.values())
            told = "  ".join(f"{how} {counts[how]:5d}" for how in ("agreed", "refused", "failed"))
            print(f"{name:<24} {told}  {seconds:6.1f} s", flush=True)
            if findings:
                failed.append(name)
                print(report(findings), flush=True)
    for name in names:
        if name not in here:
            print(f"{name:<24} not run: {missing(name)} is not installed")
    print(f"{total} inputs; doors that misbehave: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
