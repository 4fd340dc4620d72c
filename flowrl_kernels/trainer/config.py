"""The whole configuration of a run: frozen dataclasses, one TOML table per class.

Every field carries a sentence and its unit; `--section.field value` on the command line replaces any of them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from flowrl_kernels.trainer.limits import LEAST

AlgorithmName = Literal[
    "flowrl",
    "grpo",
    "dapo",
    "dr_grpo",
    "gspo",
    "cispo",
    "ppo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "rloo",
    "opo",
    "raft",
    "reinforce_rej",
]


def listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names in a field that takes one or several; the empty name is one, and all there is in an empty list."""
    return (value,) if isinstance(value, str) else value or ("",)


@dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/default"
    """Folder of the run: resolved config, metrics, checkpoints, plots, final model."""
    seed: int = 0
    """Seed of everything random: initial weights, warm start, prompt order, sampling."""
    steps: int = 100
    """RL steps; each is one batch of rollouts and every update made from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy lives; "auto" takes CUDA where there is a device."""
    threads: int = 0
    """CPU threads per process; 0 leaves PyTorch's choice."""
    cache: str = "~/.cache/flowrl_kernels"
    """Folder for warm-started models, kept by the hash of what made them."""
    resume: bool = False
    """Continue from the run folder's last checkpoint (`--resume` for short)."""
    overwrite: bool = False
    """Replace what an earlier run left in the folder, once this one can start, instead of refusing it."""
    allow_changed: bool = False
    """Resume although the data, the model or the task's code are no longer those the run began with."""
    max_bad_updates: int = 5
    """Stop after this many updates in a row were skipped for a loss or gradient that is not finite."""


@dataclass(frozen=True)
class TaskConfig:
    name: str = "sums"
    """"sums", "countdown" (both made from a seed), "file" for your own prompts, "maths" for a published
    set of problems by its usual columns, "gym:NAME" for a generator of reasoning-gym, or "module:function"."""
    seed: int = 0
    """Seed of the problems and of their split into train, valid and test."""
    train: str | tuple[str, ...] = ""
    """For "file": JSONL or parquet file, or a `datasets` name, with the training prompts; or a list of them."""
    train_weights: tuple[float, ...] = ()
    """Share of the training prompts that is asked from each of several files; empty: as many as each holds."""
    valid: str = ""
    """For "file": problems that choose hyper-parameters; empty: none."""
    test: str = ""
    """For "file": problems of the final evaluation; empty: none."""
    prompt_key: str = "prompt"
    """For "file": column with the prompt, a text or a list of chat messages."""
    answer_key: str = "answer"
    """For "file": column with what the reward compares the response with."""
    system: str = ""
    """For "file": system message put before every prompt; needs `chat_template`."""
    chat_template: bool = True
    """For "file": wrap text prompts as one user message in the tokenizer's chat template."""
    reward: str | tuple[str, ...] = ""
    """"" for the task's own verifier, "math" (math-verify), "exact", "countdown", "code", "module:function" or
    "file.py:function"; a list of them is summed, and an evaluation goes by the first."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each of several rewards in their sum; empty: 1 each."""
    reward_timeout: float = 10.0
    """Longest time one response may take to score, seconds; then it is left out and counted."""
    reward_workers: int = 2
    """Processes that score responses where the verifier is not trusted to be quick, for each reward; 0: functions of
    yours run in the training process, without a deadline."""
    code_partial: bool = False
    """For "code": reward the share of tests passed instead of all or nothing."""
    code_tolerance: float = 0.0
    """For "code": largest difference of numbers that count as equal, relative and absolute, where the row has none."""
    code_memory: int = 1024
    """For "code": most memory of one program, MiB."""
    numbers: int = 3
    """For "countdown": how many numbers a problem gives."""
    largest: int = 9
    """For "countdown": the largest of those numbers (the smallest is 1)."""
    max_target: int = 30
    """For "countdown": the largest target."""
    min_solutions: int = 1
    """For "countdown": keep problems with at least this many different solutions."""
    answer: Literal["chain", "infix"] = "chain"
    """For "countdown": one step after another, "2*6=12,3+12=15", or one expression, "2*6+3"."""
    held_out: int = 200
    """For "countdown" and "gym:NAME": problems in each of the valid and test splits."""
    gym: dict[str, Any] = field(default_factory=dict)
    """For "gym:NAME": the generator's own settings, its difficulty say, as a TOML table: { max_terms = 3 }."""
    size: int = 1000
    """For "gym:NAME": training problems; each step asks some of them."""
    gym_partial: bool = True
    """For "gym:NAME": reward what its scorer gives, partial credit too; false: 1 for its full mark, else 0."""
    suffix: str = ""
    """For "file" and "gym:NAME": text put behind every prompt, how the answer should be given say."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = ""
    """Hugging Face name or folder of a causal LM; empty builds a Qwen2-type one of the sizes below."""
    hidden: int = 64
    """Width of a built model."""
    layers: int = 2
    """Decoder layers of a built model."""
    heads: int = 4
    """Attention heads of a built model."""
    ffn: int = 256
    """Width of the feed-forward layer of a built model."""
    context: int = 64
    """Longest sequence of a built model, tokens."""
    init: float = 0.02
    """Standard deviation of a built model's first weights; narrow models learn faster from 0.1 and more."""
    tied: bool = False
    """Whether a built model shares its embedding with its LM head."""
    vocab_multiple: int = 1
    """Rows of a built model's embedding and head, rounded up to a multiple of this; the last ones are no token."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention of transformers; "auto" is flash-attention 2 where installed and on CUDA, else SDPA (eager for models
    without it)."""
    liger: bool = False
    """Replace norms, rotary embedding and feed-forward by Liger kernels (needs liger-kernel)."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint; leave off unless you read it."""


@dataclass(frozen=True)
class WarmConfig:
    steps: int = 0
    """Supervised steps on the task's own examples before RL; 0: none."""
    batch: int = 256
    """Examples per supervised step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW in the supervised steps."""
    decay: float = 0.3
    """Last share of the supervised steps over which the rate falls to zero."""


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["hf", "vllm", "server"] = "hf"
    """What generates: "hf" is the live model with a KV cache, "vllm" vLLM in this process, "server" vLLM elsewhere."""
    servers: tuple[str, ...] = ()
    """For "server": addresses of vLLM servers that share the prompts, e.g. ["http://127.0.0.1:8000"] (`make serve`)."""
    push: Literal["folder", "nccl"] = "folder"
    """For "server": how weights reach it: a folder of safetensors under `run.dir` that it can read, or NCCL from rank
    0's GPU, for which both sides need the same version of NCCL and GPUs of their own. No GPU has run "nccl" yet."""
    tensor_parallel: int = 1
    """Ranks (for "vllm") or GPUs (of a server) that hold one engine together."""
    kv_cache: float = 1.0
    """For "vllm" and the server of `make serve`: memory of the KV cache on each GPU or in each process, GiB."""
    head: Literal["engine", "trainer"] = "engine"
    """For "vllm" and "server": whose head says the sampled tokens' log-probs. "trainer": the operator that scores in
    training, on the engine's hidden states, which leaves the backbone's part of the gap alone."""
    probe_limit: float = 0.0
    """Largest gap between the engine's and the trainer's log-probability of a token, nats, tried after each push of
    weights; 0: 1e-4 in float32, 0.5 in bfloat16."""
    timeout: float = 600.0
    """For "server": longest wait for an answer, seconds."""
    retries: int = 8
    """For "server": how often what failed is tried again, after 1, 2, 4, ... and at most 30 seconds, before the run
    stops."""
    overlap: int = 0
    """For "server": how many updates behind a batch may be sampled, so that it is sampled while the one before it
    trains; at most a step's. 0: one after the other."""
    prompts: int = 32
    """Prompts per step, over all ranks."""
    samples: int = 8
    """Responses per prompt (the group, G)."""
    dynamic: int = 0
    """Dynamic sampling: most extra rounds of a step, each asking other prompts in the place of groups that are all
    right or all wrong; 0: none."""
    max_new_tokens: int = 64
    """Longest response with its end token, tokens."""
    max_prompt_tokens: int = 0
    """Longest prompt, tokens; longer training prompts are left out (0: what the context leaves)."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, in training and evaluation; the token that completes one is its last."""
    temperature: float = 1.0
    """Sampling temperature; every log-probability in the loss is taken at it."""
    top_p: float = 1.0
    """Draw from the most likely tokens that hold this share of the mass; 1: from all. Every log-probability is then
    taken over the tokens that were left to draw from, so the engine must tell them."""
    top_k: int = 0
    """Draw from so many of the most likely tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the most likely one; 0: from all."""
    batch: int = 1024
    """Sequences decoded at once on each rank."""


@dataclass(frozen=True)
class AlgorithmConfig:
    name: AlgorithmName = "flowrl"
    """The loss and its advantage."""
    preset: str = "paper"
    """For flowrl: a row of `flowrl_kernels.presets.PRESETS`, which sets clip, ratio, anchor, phi and more."""
    log_z: Literal["preset", "learned", "group", "none"] = "preset"
    """For flowrl: what the preset says, a network on the prompt, the group's mean (VarGrad), or none."""
    reward: Literal["zscore", "centred", "raw"] = "zscore"
    """For flowrl: the reward in the residual, normalised in its group, centred in it, or as it came."""
    beta: float | None = None
    """For flowrl: scale of the reward in the residual (inverse temperature of the target); absent: the preset's, 15."""
    alpha: float | None = None
    """For flowrl: the residual's penalty L_alpha (0 covers modes, 1 is half the square, 2 seeks them); absent: the
    preset's, the square."""
    clip: tuple[float, float] | None = None
    """Range of the importance ratio, e.g. [0.8, 1.2]; inf opens a side; absent: the algorithm's own."""
    minibatch_prompts: int = 0
    """Prompts per optimiser update; 0: all of the step's (one update, purely on-policy)."""
    epochs: int = 1
    """Passes over each batch of rollouts."""
    kl: float = 0.0
    """Weight of the KL to the reference in policy-gradient losses (reinforce_pp: in the reward), nats."""
    entropy: float = 0.0
    """Weight of the entropy bonus in policy-gradient losses."""
    gamma: float = 1.0
    """For ppo, reinforce_pp and reinforce_pp_baseline: discount per token."""
    gae_lambda: float = 1.0
    """For ppo: lambda of the generalised advantage."""
    value_clip: float = 0.2
    """For ppo: range of the value update."""
    dual_clip: float = 0.0
    """Lower bound factor for negative advantages (3 is common); 0: off."""
    tis_cap: float = 0.0
    """Cap of a response's weight exp(sum of logp_old - logp_sampler): correction = "sequence_truncate" in short; 0:
    none."""
    correction: str = ""
    """What is made of the gap to the engine's log-probabilities, by a name of `rollout_correction`, or a weight and a
    rejection joined by "+", e.g. "token_truncate+seq_mean_k1"; empty: it is reported only."""
    correction_cap: str = ""
    """Its bounds as verl writes them, "2.0", "0.5_5.0" or "2.0,0.999_1.001"; empty: verl's and TRL's values."""
    filter_groups: bool = False
    """Leave out groups whose rewards are all equal."""
    unlikeliness: float = 0.0
    """Strength of the unlikeliness reward, which pays more for rarer correct answers; 0: off."""
    overlong_buffer: int = 0
    """Last tokens of the response budget over which a penalty grows to `overlong_penalty`; 0: off."""
    overlong_penalty: float = 1.0
    """Reward taken from a response that fills the whole budget."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """Rank of the LoRA adapters that are trained in the place of the model's own weights; 0: none."""
    alpha: float = 0.0
    """An adapter's product counts alpha / rank times; 0: twice the rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers that get one, by the ends of their names, ["q_proj", "v_proj"]; "all-linear": all but the head."""


@dataclass(frozen=True)
class LogZConfig:
    style: Literal["paper", "release"] = "paper"
    """"paper": Linear and GELU; "release": LayerNorm and dropout 0.1 as in the authors' code."""
    lr: float = 0.0
    """Learning rate of log Z; 0: the policy's."""
    detach: bool = False
    """Stop the gradient of log Z at the prompt's hidden states."""


@dataclass(frozen=True)
class CriticConfig:
    lr: float = 1e-3
    """For ppo: learning rate of the value head."""
    detach: bool = True
    """For ppo: stop the value gradient at the backbone's hidden states."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 5e-4
    """Learning rate of AdamW for the policy."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    warmup: int = 10
    """Updates over which the rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Course of the rate after the warm-up: "linear" and "cosine" fall to zero, "wsd" does over its last fifth only."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; inf: never."""


@dataclass(frozen=True)
class ParallelConfig:
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Collectives; "auto" is NCCL for CUDA and gloo else."""
    replicate: int = 1
    """Copies of the sharded model (HSDP); must divide the number of ranks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameters and activations in forward and backward; master weights and reductions stay float32."""
    checkpoint_activations: bool = False
    """Recompute each decoder layer in the backward pass to save memory."""
    compile: bool = False
    """torch.compile each decoder layer."""
    offload_reference: bool = False
    """Keep the reference model's shards in host memory."""
    max_tokens: int = 8192
    """Most tokens in a micro-batch on one rank."""
    memory: float = 0.0
    """Most memory for what a micro-batch's forward keeps for its backward on one rank, GiB: lowers `max_tokens` to what
    fits; 0: `max_tokens` as it is."""
    row_tokens: int = 0
    """Most tokens in one packed row; 0: one row per micro-batch with flash-attention, else short rows, because
    SDPA's block mask grows with the square of the row."""
    share_prompts: bool = False
    """Compute a prompt once for the responses that share a row with it; needs attention that takes a mask (SDPA)."""
    impl: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of the library's fused head and losses."""
    epsilon: float = 0.0
    """Bound on the relative L1 error of dlogits in the head's backward pass, which may then leave out light parts of
    the vocabulary (docs/numerics.md); 0: exact."""
    share: float = 0.0
    """Share of the pairs of a token and 128 columns of the vocabulary that the head's backward pass computes, drawn
    anew at each update so that its gradient is right in expectation (docs/numerics.md); 0: all of them, exact."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0
    """RL steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    export: bool = True
    """Write the final model as a Hugging Face folder into the run folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Weights of that folder; training itself keeps float32 master weights. log Z stays float32."""


@dataclass(frozen=True)
class EvalConfig:
    start: bool = True
    """Also evaluate the model RL starts from, on the split of the final evaluation."""
    every: int = 0
    """RL steps between evaluations on the valid split; 0: only at the end, on the test split."""
    problems: int = 200
    """Most problems in an evaluation; 0: all of the split."""
    samples: int = 16
    """Responses per problem, the largest k of pass@k."""
    temperature: float = 1.0
    """Sampling temperature of the evaluation; 0 is greedy."""
    top_p: float = 1.0
    """The evaluation draws from the most likely tokens that hold this share of the mass; 1: from all."""
    top_k: int = 0
    """The evaluation draws from so many of the most likely tokens; 0: from all."""
    seed: int = 0
    """Seed of the evaluation's samples; the same for every evaluation of a run, whatever `run.seed`."""
    exact: bool = True
    """Where every response can be listed: exact accuracy, KL to the optimum and error of log Z."""
    kl_problems: int = 4
    """Problems, spread evenly over the split, whose exact KL is taken on the way (0: none); at the end it is all."""


@dataclass(frozen=True)
class LogConfig:
    progress: bool = True
    """Show a progress bar with reward and tokens per second."""
    samples: int = 4
    """Responses with their rewards written to samples.jsonl every `samples_every` steps."""
    samples_every: int = 50
    """RL steps between written samples."""
    kl: bool = False
    """Log the KL to the model RL started from though the algorithm has no reference: keeps one, and scores a few
    responses a step. Where there is a reference it is logged anyway."""
    plots: bool = True
    """Draw PNG plots of the run into its folder at the end."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    wandb: bool = False
    """Also log to Weights & Biases; WANDB_PROJECT and its other variables say where."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    warm: WarmConfig = field(default_factory=WarmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    log_z: LogZConfig = field(default_factory=LogZConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def updates_a_step(self) -> int:
        a = self.algorithm
        return a.epochs * (self.rollout.prompts // (a.minibatch_prompts or self.rollout.prompts))


OPEN = ("optim.max_grad_norm",)  # may be infinite
TELLS_KEPT = ("hf",)  # the engines that return what a truncated draw was left to draw from


def check(config: Config, world: int = 1) -> None:
    """Refuses settings that cannot work together on `world` ranks.

    Raises:
        ValueError: naming the key, what was wanted and what came.
    """
    rollout, algorithm, parallel = config.rollout, config.algorithm, config.parallel

    def want(ok: bool, key: str, wanted: str, got: object) -> None:
        if not ok:
            raise ValueError(f"{key}: wanted {wanted}; got {got!r}")

    for key, least in LEAST.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        want(value >= least, key, f"at least {least}", value)
    for table in dataclasses.fields(config):
        for name, value in vars(getattr(config, table.name)).items():
            key = f"{table.name}.{name}"
            if isinstance(value, float) and key not in OPEN:
                want(math.isfinite(value), key, "a finite number", value)
            want(value == value, key, "a number", value)  # not NaN
    want(rollout.temperature > 0, "rollout.temperature", "more than 0", rollout.temperature)
    for key, value in (("rollout.top_p", rollout.top_p), ("eval.top_p", config.eval.top_p)):
        want(0 < value <= 1, key, "a number above 0 and at most 1 (all)", value)
    want(0 <= rollout.min_p <= 1, "rollout.min_p", "a number in [0, 1]", rollout.min_p)
    for name, whole in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        key, value = f"rollout.{name}", getattr(rollout, name)
        if value != whole:
            replay = f"{rollout.engine!r} does not return the tokens it kept, without which every ratio is wrong"
            want(rollout.engine in TELLS_KEPT, key, f"{whole} ({replay})", value)
            for part in ("epsilon", "share"):
                partial = f"{whole} beside parallel.{part}: log-probs over kept tokens are exact"
                want(getattr(parallel, part) == 0, key, partial, value)
    for part in ("epsilon", "share"):
        key, value = f"parallel.{part}", getattr(parallel, part)
        want(0 <= value < 1, key, "a number in [0, 1)", value)
        refused = {
            f"with impl = {parallel.impl!r}": parallel.impl == "reference",
            "beside algorithm.entropy": algorithm.entropy > 0,
            "beside parallel.epsilon": part == "share" and parallel.epsilon > 0,
        }
        for why, holds in refused.items():
            want(not (value > 0 and holds), key, f"0 {why}", value)
    want(config.optim.max_grad_norm > 0, "optim.max_grad_norm", "more than 0", config.optim.max_grad_norm)
    update = algorithm.minibatch_prompts or rollout.prompts
    divisor = f"a divisor of rollout.prompts = {rollout.prompts}"
    want(rollout.prompts % update == 0, "algorithm.minibatch_prompts", divisor, update)
    key = "algorithm.minibatch_prompts" if algorithm.minibatch_prompts else "rollout.prompts"
    want(update % world == 0, key, f"a multiple of the {world} ranks (they share every update evenly)", update)
    want(
        world % parallel.replicate == 0,
        "parallel.replicate",
        f"a divisor of {world} ranks",
        parallel.replicate,
    )
    for name in ("gamma", "gae_lambda"):
        want(0 <= getattr(algorithm, name) <= 1, f"algorithm.{name}", "a number in [0, 1]", getattr(algorithm, name))
    want(0 <= config.warm.decay <= 1, "warm.decay", "a number in [0, 1]", config.warm.decay)
    want(
        config.model.hidden % config.model.heads == 0, "model.hidden", "a multiple of model.heads", config.model.hidden
    )
    row = f"at most parallel.max_tokens = {parallel.max_tokens}"
    want(parallel.row_tokens <= parallel.max_tokens, "parallel.row_tokens", row, parallel.row_tokens)
