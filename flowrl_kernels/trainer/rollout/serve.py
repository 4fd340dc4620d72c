"""Starts vLLM for the server engine: `python -m flowrl_kernels.trainer.rollout.serve FILE.toml [--port 8000]`.

It takes the run's own configuration for the shape of the model and waits for the trainer's weights. **Whoever reaches
its port may replace the weights and call any method of its workers: no endpoint of it asks for a password.** So it
listens on 127.0.0.1 unless told otherwise.
"""

from __future__ import annotations

import os
import sys
import tempfile

from flowrl_kernels.trainer import config_file, parts, policy
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.rollout.vllm import save_shape
from flowrl_kernels.trainer.rollout.vllm_plugin import EXTENSION
from flowrl_kernels.trainer.tasks import build_task

TRANSFER = '{"backend": "nccl"}'  # what vLLM needs to know of `rollout.push = "nccl"` when it starts


def shape_of(config: Config) -> tuple[object, str]:
    """The transformers configuration of the run's model, and its class's name."""
    if config.model.name:
        from transformers import AutoConfig

        shape = AutoConfig.from_pretrained(config.model.name, trust_remote_code=config.model.trust_remote_code)
        return shape, (shape.architectures or [""])[0]
    model = policy.build_model(config, parts.make_tokenizer(config, build_task(config.task)), None)
    return model.config, type(model).__name__


def command(config: Config, folder: str, host: str, port: int) -> list[str]:
    """vLLM's command line for the model in `folder`."""
    r = config.rollout
    flags = [
        "--host", host, "--port", str(port), "--served-model-name", "policy",
        "--load-format", "dummy", "--skip-tokenizer-init", "--tokens-only", "--generation-config", "vllm",
        "--dtype", config.parallel.dtype, "--logprobs-mode", "processed_logprobs",
        "--worker-extension-cls", EXTENSION, "--kv-cache-memory-bytes", str(int(r.kv_cache * 2**30)),
        "--max-num-seqs", str(min(r.batch, r.prompts * r.samples)), "--tensor-parallel-size", str(r.tensor_parallel),
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    from vllm.platforms import current_platform

    flags += ["--enforce-eager"] if current_platform.is_cpu() else []
    if r.push == "nccl":
        if current_platform.is_cpu():
            raise ValueError("rollout.push: wanted 'folder', this vLLM is a build for CPUs; got 'nccl'")
        flags += ["--weight-transfer-config", TRANSFER]
    # not the `vllm` command: it asks for a package of that name, which the CPU build's is not
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *flags]


def main(args: list[str]) -> None:
    """Becomes vLLM's server. `--section.field value` changes the file's settings; what follows `--` is vLLM's."""
    if not args or args[0].startswith("-"):
        raise ValueError("wanted a TOML file first: FILE.toml [--host H] [--port N] [--section.field value] [-- ...]")
    cut = args.index("--") if "--" in args else len(args)
    parser = config_file.Parser(prog="serve", add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given, rest = parser.parse_known_args(args[1:cut])
    config = config_file.expand(config_file.override(config_file.load(args[0]), rest, "serve FILE.toml"))
    folder = tempfile.mkdtemp(prefix="flowrl-serve-")
    save_shape(*shape_of(config), folder)
    line = command(config, folder, given.host, given.port) + args[cut + 1 :]
    settings = {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    print(f"flowrl serve: http://{given.host}:{given.port}, no password; the weights come from the trainer", flush=True)
    os.execve(line[0], line, {**settings, **os.environ})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"flowrl serve: {error}")
