"""`python -m flowrl_kernels.trainer train FILE` and its siblings; also the console script `flowrl`."""

from __future__ import annotations

import sys

USAGE = """usage: flowrl train FILE.toml [--section.field value ...] [--resume]
       flowrl eval RUN_OR_FOLDER [--section.field value ...]
       flowrl plot RUN [RUN ...] [--out FOLDER]
       flowrl export RUN FOLDER
       flowrl compare FILE.toml [...]

The same as `python -m flowrl_kernels.trainer ...`, which is what torchrun starts.
`flowrl train FILE.toml --help` lists every field."""
EXTRA = ("matplotlib", "numpy", "rich", "safetensors", "tqdm", "transformers", "tyro")  # what [train] brings


def cli(argv: list[str] | None = None) -> int:
    """Runs a sub-command; bad input ends in one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    if args[0].endswith(".toml"):
        args.insert(0, "train")
    command, rest = args[0], args[1:]
    commands = {"train": train, "eval": evaluate, "plot": plot, "export": export, "compare": compare}
    if command not in commands:
        print(f"flowrl: unknown command {command!r}\n{USAGE}", file=sys.stderr)
        return 2
    try:
        from flowrl_kernels.trainer.loop import NotFinite
    except ModuleNotFoundError as error:
        return missing(command, error)
    try:
        return commands[command](rest)
    except (ValueError, FileNotFoundError, OSError, NotFinite) as error:
        print(f"flowrl {command}: {error}", file=sys.stderr)
        return 3 if isinstance(error, NotFinite) else 2
    except ModuleNotFoundError as error:
        return missing(command, error)
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return 130


def missing(command: str, error: ModuleNotFoundError) -> int:
    """Says what to install where it is the trainer's extra that is not there; anything else is raised."""
    if (error.name or "").partition(".")[0] not in EXTRA:
        raise error
    print(f"flowrl {command}: {error.name} is not installed: pip install 'flowrl-kernels[train]'", file=sys.stderr)
    return 2


def train(args: list[str]) -> int:
    """Trains by a TOML file."""
    from flowrl_kernels.trainer import config_file, loop

    if not args or args[0].startswith("-"):
        raise ValueError(f"wanted a TOML file first\n{USAGE}")
    rest = [a for a in args[1:] if a != "--resume"]
    if len(rest) < len(args) - 1:
        rest += ["--run.resume", "True"]
    loop.train(config_file.override(config_file.load(args[0]), rest))
    return 0


def plot(args: list[str]) -> int:
    """Writes PNG plots of one or several runs, overlaid."""
    from pathlib import Path

    from flowrl_kernels.trainer.plot import plot_runs

    out = None
    if "--out" in args:
        at = args.index("--out")
        if at + 1 == len(args):
            raise ValueError("--out: wanted a folder")
        out = Path(args[at + 1])
        args = args[:at] + args[at + 2 :]
    if not args:
        raise ValueError(f"wanted at least one run folder\n{USAGE}")
    for path in plot_runs([Path(a) for a in args], out):
        print(path)
    return 0


def export(args: list[str]) -> int:
    """Writes a run's last checkpoint as a Hugging Face folder."""
    from pathlib import Path

    from flowrl_kernels.trainer.export import export_run

    if len(args) != 2:
        raise ValueError(f"wanted a run folder and a folder to write\n{USAGE}")
    export_run(Path(args[0]), Path(args[1]))
    print(args[1])
    return 0


def evaluate(args: list[str]) -> int:
    """Evaluates a run's policy, or a Hugging Face folder, on a split."""
    from flowrl_kernels.trainer.export import evaluate_run

    if not args or args[0].startswith("-"):
        raise ValueError(f"wanted a run folder first\n{USAGE}")
    evaluate_run(args[0], args[1:])
    return 0


def compare(args: list[str]) -> int:
    """Trains by several algorithms one after the other and prints one table."""
    from flowrl_kernels.trainer.compare import main

    return main(args)


if __name__ == "__main__":
    sys.exit(cli())
