"""`python -m flowrl_kernels.trainer train FILE` and its siblings; also the console script `flowrl`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

USAGE = """usage: flowrl train FILE.toml [--section.field value ...] [--resume]
       flowrl eval RUN_OR_FOLDER [--split NAME] [--config FILE.toml] [--out FILE.json] [--section.field value ...]
       flowrl eval RUN_OR_FOLDER --suite FILE.toml --out FOLDER [--overwrite] [--section.field value ...]
       flowrl eval --compare FOLDER FOLDER
       flowrl plot RUN [RUN ...] [--out FOLDER]
       flowrl export RUN FOLDER [--dtype float32|bfloat16|float16]
       flowrl doctor RUN_OR_FOLDER [--config FILE.toml] [--prompts N] [--samples N] [--out FILE.json] [--section...]
       flowrl from-gguf FILE.gguf FOLDER [--end TOKEN]
       flowrl compare FILE.toml [--out FOLDER] [--only NAME ...] [--section.field value ...] [--resume]

The same as `python -m flowrl_kernels.trainer ...`, which is what torchrun starts.
`flowrl COMMAND --help` says more; `flowrl train FILE.toml --help` lists every field."""
EXTRA = ("matplotlib", "numpy", "rich", "safetensors", "tomli_w", "tqdm", "transformers")  # what [train] brings


def cli(argv: list[str] | None = None) -> int:
    """Runs a sub-command; bad input ends in one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    if args[0].endswith(".toml"):
        args.insert(0, "train")
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        return refuse("", f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: your task and reward are found by their module's name
    try:
        from flowrl_kernels.trainer.loop import NotFinite
        from flowrl_kernels.trainer.rollout.faults import EngineError
    except ModuleNotFoundError as error:
        return missing(command, error)
    try:
        return COMMANDS[command](rest)
    except NotFinite as error:
        return refuse(command, error, 3)
    except EngineError as error:
        return refuse(command, error, 4)
    except (ValueError, OSError) as error:
        return refuse(command, error)
    except ModuleNotFoundError as error:
        return missing(command, error)
    except KeyboardInterrupt as error:
        return refuse(command, str(error) or "interrupted", getattr(error, "code", 130))
    except SystemExit as error:  # --help
        return int(error.code or 0)


def refuse(command: str, why: Exception | str, code: int = 2) -> int:
    """One line on stderr; under torchrun one rank's, where it is every rank's."""
    from flowrl_kernels.trainer import parallel

    rank = parallel.rank_here()
    everywhere = not parallel.joined() or parallel.EVERYWHERE in getattr(why, "__notes__", ())
    if rank == 0 or not everywhere:
        text = " ".join(str(why).split()) or type(why).__name__
        name = f"flowrl {command}".strip() + (f" (rank {rank})" if rank else "")
        with contextlib.suppress(BrokenPipeError):
            print(f"{name}: {text}", file=sys.stderr)
    return code


def missing(command: str, error: ModuleNotFoundError) -> int:
    """Says what to install where it is the trainer's extra that is not there; anything else is raised."""
    if (error.name or "").partition(".")[0] not in EXTRA:
        raise error
    print(f"flowrl {command}: {error.name} is not installed: pip install 'flowrl-kernels[train]'", file=sys.stderr)
    return 2


def train(args: list[str]) -> int:
    """Trains by a TOML file."""
    from flowrl_kernels.trainer import config_file, loop
    from flowrl_kernels.trainer.config import Config

    if args and args[0] in ("-h", "--help"):
        config_file.override(Config(), ["--help"])
    if not args or args[0].startswith("-"):
        raise ValueError("wanted a TOML file first; flowrl --help shows how")
    rest = [a for a in args[1:] if a != "--resume"]
    if len(rest) < len(args) - 1:
        rest += ["--run.resume", "True"]
    config = config_file.override(config_file.load(args[0]), rest)
    loop.train(config)
    return 0


def plot(args: list[str]) -> int:
    """Writes PNG plots of one or several runs, overlaid."""
    from pathlib import Path

    from flowrl_kernels.trainer import config_file
    from flowrl_kernels.trainer.plot import plot_runs

    parser = config_file.Parser(prog="flowrl plot", description=plot.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the PNGs (default: plots in the first run's)")
    given = parser.parse_args(args)
    out = Path(given.out).expanduser() if given.out else None
    for path in plot_runs([Path(a).expanduser() for a in given.runs], out):
        print(path)
    return 0


def export(args: list[str]) -> int:
    """Writes a run's last checkpoint as a folder that transformers and servers load."""
    from pathlib import Path

    from flowrl_kernels.trainer import config_file
    from flowrl_kernels.trainer.export import export_run

    parser = config_file.Parser(
        prog="flowrl export",
        description=export.__doc__,
        epilog="Code that comes with a model runs only with --model.trust_remote_code True on this line.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("folder", metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the run's)"
    )
    given, overrides = parser.parse_known_args(args)
    export_run(Path(given.run).expanduser(), Path(given.folder).expanduser(), given.dtype, overrides)
    print(given.folder)
    return 0


def from_gguf(args: list[str]) -> int:
    """Makes a GGUF file into a folder that transformers and this trainer load."""
    from pathlib import Path

    from flowrl_kernels.trainer import config_file
    from flowrl_kernels.trainer.gguf import convert

    parser = config_file.Parser(prog="flowrl from-gguf", description=from_gguf.__doc__)
    parser.add_argument("file", metavar="FILE.gguf", help="the model as llama.cpp ships it")
    parser.add_argument("folder", metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--end", metavar="TOKEN", help="token that ends a response (default: the one the file names)")
    given = parser.parse_args(args)
    print(convert(Path(given.file), Path(given.folder), given.end))
    return 0


def evaluate(args: list[str]) -> int:
    """Evaluates a run's policy, or a Hugging Face folder, on a split or on the suites of a file."""
    from flowrl_kernels.trainer import config_file
    from flowrl_kernels.trainer.export import evaluate_run

    if "--compare" in args:
        return compare_results(args)

    parser = config_file.Parser(
        prog="flowrl eval",
        description=evaluate.__doc__,
        epilog="--section.field value, as in training, says what the file does not; "
        "flowrl train --help lists every field.",
    )
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="run folder, Hugging Face folder, or TOML file")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test", help="default: test")
    parser.add_argument("--config", metavar="FILE.toml", help="the task of a Hugging Face folder")
    parser.add_argument("--out", metavar="FILE.json", help="also write the figures there; with --suite a folder")
    parser.add_argument("--suite", metavar="FILE.toml", help="evaluate on every [suite.NAME] of this file")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds of another evaluation")
    given, overrides = parser.parse_known_args(args)
    if given.suite is not None:
        from flowrl_kernels.trainer.suites.run import run_suites

        if given.out is None or given.config is not None or given.split != parser.get_default("split"):
            raise ValueError("--suite: wanted with --out FOLDER and without --config and --split, which the file says")
        run_suites(given.source, given.suite, given.out, overrides, given.overwrite)
        return 0
    if given.overwrite:
        raise ValueError("--overwrite: goes with --suite")
    evaluate_run(given.source, overrides, given.split, given.config, given.out)
    return 0


def compare_results(args: list[str]) -> int:
    """Compares two results of `flowrl eval --suite` problem by problem."""
    from flowrl_kernels.trainer import config_file
    from flowrl_kernels.trainer.suites.contrast import contrast

    parser = config_file.Parser(prog="flowrl eval", description=compare_results.__doc__)
    parser.add_argument(
        "--compare", nargs=2, metavar="FOLDER", required=True, help="what --out named, the first before"
    )
    parser.add_argument("--out", metavar="FILE.json", help="also write the differences there")
    given = parser.parse_args(args)
    first, second = given.compare
    contrast(first, second, given.out)
    return 0


def doctor(args: list[str]) -> int:
    """Says which part the gap between the sampler's log-probs and the trainer's comes from; exit 1 if there is one."""
    from flowrl_kernels.trainer import config_file
    from flowrl_kernels.trainer.doctor.main import doctor as examined

    parser = config_file.Parser(
        prog="flowrl doctor",
        description=doctor.__doc__,
        epilog="--section.field value, as in training, e.g. --rollout.engine; flowrl train --help lists every field.",
    )
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="run folder, Hugging Face folder, or TOML file")
    parser.add_argument("--config", metavar="FILE.toml", help="the task of a Hugging Face folder")
    parser.add_argument("--prompts", type=int, default=8, help="how many of the training prompts (default: 8)")
    parser.add_argument("--samples", type=int, default=8, help="responses to each (default: 8)")
    parser.add_argument("--out", metavar="FILE.json", help="default: doctor.json in the run folder")
    given, overrides = parser.parse_known_args(args)
    for name in ("prompts", "samples"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name}: wanted at least 1; got {getattr(given, name)}")
    found = examined(
        given.source, overrides, settings=given.config, prompts=given.prompts, samples=given.samples, out=given.out
    )
    return 0 if found.culprit is None else 1


def compare(args: list[str]) -> int:
    """Trains by several algorithms one after the other and prints one table."""
    from flowrl_kernels.trainer.compare import main

    return main(args)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train, "eval": evaluate, "plot": plot, "export": export, "doctor": doctor, "from-gguf": from_gguf,
    "compare": compare,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli())
