"""The policy: a Hugging Face causal LM, log Z and a value head under one root module with one forward.

The root's forward runs the backbone and hands the hidden states to a `head` function while the parameters are
whole, so a fused head sees plain tensors under FSDP2, tied to the embedding or not.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowrl_kernels.hf.head import check_head, head_logits, head_scales
from flowrl_kernels.hf.packing import Packing, block_mask, find_packing, shares_prompts
from flowrl_kernels.trainer import lora, parallel
from flowrl_kernels.trainer.config import Config, ModelConfig
from flowrl_kernels.trainer.parallel import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ValueHead(nn.Module):
    """State values for PPO: a two-layer network on the backbone's hidden states, fp32."""

    def __init__(self, hidden: int, *, detach: bool):
        super().__init__()
        self.detach = detach
        self.body = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU())
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:  # [N, H] -> [N]
        if self.detach:
            hidden = hidden.detach()
        return self.out(self.body(hidden.float())).sum(-1)  # not a view: FSDP hooks on it


class Policy(nn.Module):
    """Root module: `model` (exported, streamed to engines), and beside it `log_z` and `value` (never are).

    forward(head, ids, positions, ...) returns `head(policy, hidden)` with the final-norm states, `[R, L, H]`.
    """

    model: Any

    def __init__(self, model: Any, *, log_z: nn.Module | None = None, value: nn.Module | None = None):
        super().__init__()
        self.model = model
        self.log_z = log_z
        self.value = value
        self.scales = head_scales(model.config)
        self.lora = False  # whether adapters are trained in the place of the model's weights
        self.packing: Packing = "positions"  # how rows hold several sequences; `settle_packing` looks
        self.shares = False  # whether a row holds a prompt once for several responses (parallel.share_prompts)

    @property
    def head(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(
        self,
        head: Callable[[Policy, Tensor], Any],
        ids: Tensor,  # [R, L] int64
        positions: Tensor,  # [R, L] int64, restarting at 0 with each packed sequence
        mask: Tensor | None = None,  # [R, L + cached] for decoding
        cache: Any = None,
        branch: Tensor | None = None,  # [R, L] int64, see `MicroBatch`
    ) -> Any:
        if branch is not None or (self.packing == "mask" and mask is None and cache is None):
            mask = block_mask(positions, branch, boolean=self.model.config._attn_implementation != "eager")
        out = self.model.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return head(self, out.last_hidden_state)

    def groups(self, config: Config) -> list[dict[str, Any]]:
        """Optimiser groups: the policy, and log Z and the critic at rates of their own."""
        own = [p for p in self.model.parameters() if p.requires_grad]
        out = [{"params": own, "lr": config.optim.lr, "name": "policy"}]
        if self.log_z is not None:
            rate = config.log_z.lr or config.optim.lr
            out.append({"params": list(self.log_z.parameters()), "lr": rate, "name": "log_z"})
        if self.value is not None:
            out.append({"params": list(self.value.parameters()), "lr": config.critic.lr, "name": "value"})
        return out


class Frozen:
    """A policy with its adapters off: what it was before RL, in the same weights."""

    def __init__(self, policy: Policy):
        self.policy = policy

    @property
    def packing(self) -> Packing:
        return self.policy.packing

    @property
    def shares(self) -> bool:
        return self.policy.shares

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the policy's own forward."""
        with lora.off(self.policy.model):
            return self.policy(*args, **options)


Scored = Policy | Frozen
"""What gives log-probabilities."""


# ------------------------------------------------------------------------------------------------ making one


def load_tokenizer(source: str, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model.

    Raises:
        ValueError: it cannot be read, or has no end token, so no response could ever be finished.
    """
    from transformers import AutoTokenizer

    with named(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.name: the tokenizer of {source!r} has no end-of-sequence token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase, attention: str | None) -> Any:
    """A Qwen2-type model of the sizes in the config, weights from the run's seed."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    m = config.model
    shape = Qwen2Config(
        vocab_size=-(-len(tokenizer) // m.vocab_multiple) * m.vocab_multiple,
        hidden_size=m.hidden,
        intermediate_size=m.ffn,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.heads,
        max_position_embeddings=m.context,
        tie_word_embeddings=m.tied,
        initializer_range=m.init,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        return AutoModelForCausalLM.from_config(shape, attn_implementation=attention)


def quiet() -> None:
    """No progress bars by transformers: the run has its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_model(source: str, model: ModelConfig, attention: str | None, *, empty: bool = False) -> Any:
    """A causal LM from a Hugging Face name or folder, in float32; `empty`: its shape on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    options = {"attn_implementation": attention, "trust_remote_code": model.trust_remote_code}
    with named(source):
        if empty:
            shape = AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(shape, dtype=torch.float32, **options)
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)


@contextlib.contextmanager
def named(source: str) -> Iterator[None]:
    """A ValueError that says which model could not be read, and why."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # safetensors' own among them
        raise ValueError(f"model.name: {source!r} cannot be loaded: {error}") from error


def apply_liger(model: Any) -> None:
    """Liger kernels for norms, rotary embedding and feed-forward; the head and loss stay this library's.

    Raises:
        ValueError: liger-kernel is not installed, or has nothing for this kind of model.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        message = "model.liger = true needs liger-kernel: pip install 'flowrl-kernels[liger]'"
        raise ValueError(message) from error
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger itself would say so in its log and go on
        raise ValueError(f"model.liger: liger-kernel has nothing for a model of type {model.config.model_type!r}")
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def logits(policy: Policy, hidden: Tensor) -> Tensor:
    """[N, H] -> [N, V] fp32, for decoding, where N is small."""
    return head_logits(policy.head, hidden, policy.scales)


def make_policy(
    config: Config,
    world: World,
    model: Any,
    *,
    log_z: bool = False,
    value: bool = False,
    reference: bool = False,
    adapters: bool = False,
    packing: Packing | None = None,
) -> Policy:
    """Wraps, prepares and shards a model (real on rank 0, on the meta device elsewhere where sharded).

    Args:
        adapters: it gets those of `config.lora`, which are all of it that is trained.
        packing: how it packs, where that is known from the same model; None finds out.

    Raises:
        ValueError: its head, or what it does with padded rows, is not what training relies on.
    """
    hidden = model.config.get_text_config().hidden_size
    zeta = critic = None
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed + 1)
        if log_z:
            from flowrl_kernels.log_partition import LogPartition

            release = config.log_z.style == "release"
            zeta = LogPartition(hidden, layer_norm=release, dropout=0.1 if release else 0.0, detach=config.log_z.detach)
        if value:
            critic = ValueHead(hidden, detach=config.critic.detach)
    if adapters:
        lora.inject(model, config)
    policy = Policy(model, log_z=zeta, value=critic)
    policy.lora = adapters
    policy.eval()  # no dropout: old and current log-probabilities must agree bit for bit
    if policy.log_z is not None:
        policy.log_z.train()  # its own dropout, where it has one, is part of its training
    policy.requires_grad_(not reference)
    if adapters:
        lora.freeze(model)
    if world.main:
        check_head(model, policy.scales, "model.name")
    if config.model.liger:
        apply_liger(model)
    offload = reference and config.parallel.offload_reference
    state = copy_state(policy) if world.mesh is not None and world.main else None
    parallel.prepare_layers(model, config.parallel)
    extras = [extra for extra in (policy.log_z, policy.value) if extra is not None]
    parallel.shard(policy, model, extras, config.parallel, world, offload=offload)
    if world.mesh is None:
        policy.to(world.device)
    else:
        parallel.spread(policy, state, world, offload=offload)
    policy.packing = packing or settle_packing(policy, config, world)
    if config.parallel.share_prompts:
        policy.shares = settle_sharing(policy, config, world)
    return policy


def settle_packing(policy: Policy, config: Config, world: World) -> Packing:
    """How this model packs, tried on the policy as it will run; the same on every rank, and every rank calls it."""

    def forward(ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        return policy(lambda actor, hidden: hidden.float(), ids, positions, mask)

    with parallel.whole(policy):  # sharded again after it: the optimiser is made of the shards
        found = find_packing(
            forward,
            policy.model.config,
            dtype=parallel.DTYPES[config.parallel.dtype],
            device=world.device,
            name=type(policy.model).__name__,
            field="model.name",
        )
    return max(parallel.gather(found, world), key=("positions", "mask", "alone").index)


def settle_sharing(policy: Policy, config: Config, world: World) -> bool:
    """True; every rank calls it.

    Raises:
        ValueError: behind one copy of its prompt a response of this model is not what it is alone.
    """
    with parallel.whole(policy):
        good = shares_prompts(
            lambda ids, positions, mask: policy(lambda actor, hidden: hidden.float(), ids, positions, mask),
            policy.model.config,
            dtype=parallel.DTYPES[config.parallel.dtype],
            device=world.device,
        )
    if not all(parallel.gather(good, world)):
        how = getattr(policy.model.config, "_attn_implementation", None)
        raise ValueError(
            f"parallel.share_prompts: wanted false: {type(policy.model).__name__} with {how} attention does not give a "
            "response behind a shared copy of its prompt what it gives alone; got true"
        )
    return True


def copy_state(policy: Policy) -> dict[str, Tensor]:
    return {name: copy.deepcopy(tensor.detach()) for name, tensor in policy.state_dict().items()}


# ------------------------------------------------------------------------------------------------ leaving


def named_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """What a rollout engine receives: the language model's full tensors, adapters added, without log Z and critic."""
    state = policy.model.state_dict()

    def whole(name: str) -> Tensor:
        return state[name].full_tensor() if hasattr(state[name], "full_tensor") else state[name]

    if policy.lora:
        yield from lora.merged(policy.model, state, whole)
    else:
        yield from ((name, whole(name)) for name in state)


def save_folder(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    world: World,
    *,
    stop: tuple[int, ...] = (),
    dtype: str = "float32",
) -> None:
    """Writes a folder that transformers and servers load, log Z beside it in `nn.LOG_Z_FILE`; every rank calls it.

    Adapters are added to the weights, and stand apart in the folder `adapter` as peft has them.

    stop: tokens that end a response, for generation_config.json. dtype: of the language model's weights.
    """
    quiet()
    state = parallel.full_state(policy)
    if not world.main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    kind = getattr(torch, dtype)
    inner = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    if policy.lora:
        lora.save(policy.model, inner, folder / lora.FOLDER, policy.model.config._name_or_path)
        inner = dict(lora.merged(policy.model, list(inner), inner.__getitem__))
    inner = {name: t.to(kind) if t.is_floating_point() else t for name, t in inner.items()}
    for name in tied_names(policy.model):  # one tensor under two names is written once
        inner.pop(name, None)
    policy.model.save_pretrained(folder, state_dict=inner)
    config = folder / "config.json"
    shape = json.loads(config.read_text(encoding="utf-8"))
    shape["dtype"] = dtype
    config.write_text(json.dumps(shape, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if stop:
        from transformers import GenerationConfig

        generation = copy.deepcopy(getattr(policy.model, "generation_config", None)) or GenerationConfig()
        generation.eos_token_id = list(stop) if len(stop) > 1 else stop[0]
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    zeta = {name.removeprefix("log_z."): t for name, t in state.items() if name.startswith("log_z.")}
    if zeta:
        log_z: Any = policy.log_z
        log_z.save(folder, zeta)


def tied_names(model: Any) -> set[str]:
    """Names in the state dict of parameters that are another one's storage: the LM head of a tied model, say."""
    first: dict[int, str] = {}
    names = set()
    kept = {name for name, _ in model.named_parameters()}  # each parameter under its first name
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name and name not in kept:
            names.add(name)
    return names
