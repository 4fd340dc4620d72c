"""verl's FSDP2 engines on gloo ranks of a CPU, for test_verl_engine.py.

verl has no CPU platform: `CPU` stands in for its device calls, which is all that is replaced. Nothing of verl is
imported before `start`, for its modules keep the device's name.
"""

import json
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

B, TEMPERATURE = 8, 0.7
PROMPTS, RESPONSES = [3, 5, 4, 1, 6, 2, 3, 4], [7, 1, 4, 2, 6, 3, 5, 8]
GROUPS = torch.arange(B) // 4


def start():
    """Import verl as on a machine whose accelerator is the CPU, and register the engine as a worker does."""
    os.environ |= {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_ENGINE_DEVICE": "cuda", "TOKENIZERS_PARALLELISM": "false"}
    import verl.plugin.platform as platform

    names = platform.PlatformBase.__abstractmethods__
    nothing = {name: lambda self, *a, **k: None for name in names}
    members = {
        "device_name": "cpu", "vendor_name": "cpu", "device_module": torch.cpu,
        "current_device": lambda self: "cpu", "device_count": lambda self: 1, "is_available": lambda self: False,
        "manual_seed": lambda self, seed: torch.manual_seed(seed), "nvtx_range": lambda self, msg: nullcontext(),
        "get_device_capability": lambda self, index=0: (None, None), "communication_backend_name": lambda self: "gloo",
    }  # fmt: skip
    torch.cpu.empty_cache = lambda: None  # as torch.cuda has it
    platform.set_platform(type("CPU", (platform.PlatformBase,), nothing | members)())
    import flowrl_kernels.integrations.verl  # noqa: F401  what the plug-in would import


def engine(path, vendor="flowrl", model=None, options=None, **settings):
    """An engine as TrainingWorker makes it."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    os.environ["VERL_ENGINE_VENDOR"] = vendor
    fp32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    made = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=path, override_config={"attn_implementation": "sdpa"},
            external_lib="flowrl_kernels.integrations.verl.engine",
            **{"enable_gradient_checkpointing": False} | (model or {}),
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", **{"mixed_precision": fp32, "use_torch_compile": False} | settings
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=3e-3, weight_decay=0.1, total_training_steps=100, override_optimizer_config=options
        ),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    made.initialize()
    return made


def rows_of(rank, world):
    return range(rank * B // world, (rank + 1) * B // world)


def batch():
    """Sequences and padded [B, T] tensors of the whole batch."""
    make = torch.Generator().manual_seed(3)
    sequences = [torch.randint(3, 16, (p + r,), generator=make) for p, r in zip(PROMPTS, RESPONSES)]
    width = max(RESPONSES)
    old = -2.5 - 0.3 * torch.rand(B, width, generator=make)
    return {
        "sequences": sequences,
        "mask": torch.arange(width) < torch.tensor(RESPONSES)[:, None],
        "old_log_probs": old,
        "ref_log_prob": old + 0.1 * torch.randn(B, width, generator=make),
        "reward": torch.randn(B, generator=make),
    }


def data_of(rows, whole=None, **more):
    """What verl hands the engine of one rank."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    whole = whole or batch()

    def jagged(values):
        return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)

    data = TensorDict(
        {
            "input_ids": jagged(whole["sequences"][i] for i in rows),
            "position_ids": jagged(torch.arange(len(whole["sequences"][i])) for i in rows),
            "prompts": jagged(whole["sequences"][i][: PROMPTS[i]] for i in rows),
            "responses": jagged(whole["sequences"][i][PROMPTS[i] :] for i in rows),
            "response_mask": jagged(torch.ones(RESPONSES[i], dtype=torch.long) for i in rows),
            "loss_mask": jagged(torch.ones(RESPONSES[i], dtype=torch.long) for i in rows),
            "advantages": jagged(whole["reward"][i].expand(RESPONSES[i]) for i in rows),
            **{
                name: jagged(whole[name][i, : RESPONSES[i]] for i in rows) for name in ("old_log_probs", "ref_log_prob")
            },
        },
        batch_size=[len(rows)],
    )
    settings = {
        "temperature": TEMPERATURE, "global_batch_size": B, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2,
        "calculate_entropy": True,
    }  # fmt: skip
    tu.assign_non_tensor(data, **settings | more)
    return data


def loss_of(mode, **changes):
    from verl.workers.config import ActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    settings = {
        "strategy": "fsdp2", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 2, "use_kl_loss": True,
        "kl_loss_coef": 0.0, "loss_agg_mode": "seq-mean-token-mean", "policy_loss": PolicyLossConfig(loss_mode=mode),
    }  # fmt: skip
    return partial(ppo_loss, ActorConfig(**settings | changes))


def steps(made, data, loss, num):
    """`num` updates; the loss of each."""
    seen = []
    for _ in range(num):
        with made.train_mode():
            out = made.train_batch(data, loss)
            made.lr_scheduler_step()
        seen.append(sum(out["loss"]))
    return seen


def score(made, data):
    """(log-probs, entropy) [sum of responses], as verl's trainer cuts them out."""
    from verl.workers.utils.padding import response_from_nested

    with made.eval_mode():
        out = made.infer_batch(data, None)["model_output"]
    return tuple(response_from_nested(out[name], data["response_mask"]).values() for name in ("log_probs", "entropy"))


def whole(parameters):
    return {name: p.full_tensor().detach().clone() for name, p in parameters}


def furthest(one, other):
    """The largest difference, over names that must be the same."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def nudge(log_z, seed=5):
    """Away from its start, where the last layer's zeros hide the gradient of the others."""
    from torch.distributed.tensor import distribute_tensor

    make = torch.Generator().manual_seed(seed)
    for p in log_z.parameters():
        value = 0.2 * torch.randn(p.shape, generator=make)
        p.data.copy_(distribute_tensor(value, p.device_mesh, p.placements))


def oracle(path, log_z_state):
    """(loss, gradients of the model, gradients of log Z) in float64, one process, the whole batch at once."""
    from transformers import AutoModelForCausalLM

    from flowrl_kernels import LogPartition, flowrl_loss, linear_logprob

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    log_z = LogPartition(model.config.hidden_size).double()
    log_z.load_state_dict({name: value.double() for name, value in log_z_state.items()})
    data, logps, values = batch(), [], []
    for ids, prompt in zip(data["sequences"], PROMPTS):
        hidden = model.base_model(ids[None]).last_hidden_state
        out = linear_logprob(
            hidden[0, prompt - 1 : -1], model.lm_head.weight, ids[prompt:], temperature=TEMPERATURE, impl="reference"
        )
        logps.append(out.logp)
        values.append(log_z(hidden[:, :prompt], torch.ones(1, prompt))[0])
    logp = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)
    out = flowrl_loss(
        logp, data["ref_log_prob"].double(), data["reward"].double(), torch.stack(values).double(),
        logp_old=data["old_log_probs"].double(), mask=data["mask"], impl="reference",
    )  # fmt: skip
    out.loss.backward()
    gradients = [{name: p.grad for name, p in module.named_parameters()} for module in (model, log_z)]
    return out.loss.item(), *gradients


def everything(path, folder, rank, world):
    """Runs all of it and writes what it saw; the tests judge."""
    start()
    rows, seen = rows_of(rank, world), {}
    data = data_of(rows)
    loss = loss_of("flowrl_learned")

    # gradients of micro-batches on two ranks against one process
    ours = engine(path, options={"log_z_lr": 0.02})
    nudge(ours.log_z)
    with ours.train_mode():
        ours.optimizer_zero_grad()
        out = ours.forward_backward_batch(data, loss)
        grads = [
            {name: p.grad.full_tensor().clone() for name, p in module.named_parameters()}
            for module in (ours.module, ours.log_z)
        ]
    expected_loss, *expected = oracle(path, whole(ours.log_z.named_parameters()))
    seen["loss"] = [sum(out["loss"]), expected_loss]
    seen["metrics"] = sorted(out["metrics"])
    for key, got, wanted in zip(("model_gradient", "log_z_gradient"), grads, expected):
        assert got.keys() == wanted.keys()
        error = sum(float((got[n] - wanted[n]).square().sum()) for n in got)
        seen[key] = (error / sum(float(wanted[n].square().sum()) for n in got)) ** 0.5
    seen["groups"] = [
        [len(g["params"]), g["lr"], g["weight_decay"]] for g in ours.optimizer.param_groups
    ]  # after warm-up's schedule
    seen["units"] = [type(ours.log_z).__name__, type(ours.module.lm_head).__name__]
    seen["exported"] = sorted(name for name, _ in ours.get_per_tensor_param()[0])
    seen["sharded_export"] = sorted(name for name, *_ in ours.get_per_tensor_param_shard()[0])

    # the same log-probs as verl's own engine
    theirs = engine(path, vendor="nvidia")
    seen["class"] = [type(ours).__name__, type(theirs).__name__]
    pairs = zip(score(ours, data), score(theirs, data))
    seen["logp_error"], seen["entropy_error"] = (float((a - b).abs().max()) for a, b in pairs)

    # another loss, which leaves log Z alone: the same weights as verl's own engine
    plain = engine(path)
    vanilla = loss_of("vanilla", loss_agg_mode="token-mean", entropy_coeff=0.01)
    seen["vanilla"] = [steps(plain, data, vanilla, 3), steps(theirs, data, vanilla, 3)]
    seen["vanilla_weights"] = furthest(*(whole(e.module.named_parameters()) for e in (plain, theirs)))
    seen["unused_log_z"] = float(whole(plain.log_z.named_parameters())["out.weight"].abs().max())

    # training, and a resume
    trained = engine(path, options={"log_z_lr": 0.02})
    seen["losses"] = steps(trained, data, loss, 10)
    trained.save_checkpoint(folder + "/saved", global_step=10)
    seen["after"] = steps(trained, data, loss, 5)
    resumed = engine(path, options={"log_z_lr": 0.02})
    resumed.load_checkpoint(folder + "/saved")
    seen["resumed"] = steps(resumed, data, loss, 5)
    for key, name in (("resumed_weights", "module"), ("resumed_log_z", "log_z")):
        seen[key] = furthest(*(whole(getattr(e, name).named_parameters()) for e in (trained, resumed)))
    seen["log_z"] = float(whole(trained.log_z.named_parameters())["out.bias"].abs().max())
    seen["saved"] = sorted(os.listdir(folder + "/saved"))
    theirs.save_checkpoint(folder + "/theirs")
    seen["refusals"] = {
        "log_z": refusal(lambda: resumed.load_checkpoint(folder + "/theirs")),
        "ulysses": refusal(lambda: engine(path, ulysses_sequence_parallel_size=2)),
        "padding": refusal(lambda: engine(path, model={"use_remove_padding": False})),
        "fp16": refusal(lambda: engine(path, mixed_precision={"param_dtype": "fp16"})),
        "topk": refusal(lambda: steps(ours, data_of(rows, distillation_use_topk=True), loss, 1)),
        "engine": refusal(lambda: steps(theirs, data, loss, 1)),
    }
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(seen))


def variants(path, folder, rank, world):
    """LoRA, bf16, padding, and a reference worker's forward-only engine."""
    start()
    rows, seen = rows_of(rank, world), {}
    data, loss = data_of(rows), loss_of("flowrl_learned")
    from verl.workers.engine.fsdp import transformer_impl

    lora = engine(path, model={"lora_rank": 4, "target_modules": ["q_proj", "v_proj"]})
    plain = engine(path)
    base = score(plain, data)[0]
    seen["start"] = float((score(lora, data)[0] - base).abs().max())
    seen["losses"] = steps(lora, data, loss, 5)
    seen["moved"] = float((score(lora, data)[0] - base).abs().max())
    with lora.disable_adapter():
        seen["off"] = float((score(lora, data)[0] - base).abs().max())
    params, config = lora.get_per_tensor_param(base_sync_done=True)
    seen["exported"] = sorted(name for name, _ in params)
    seen["rank_of_lora"] = config["r"]
    on_head = {"lora_rank": 4, "target_modules": ["q_proj", "lm_head"]}
    seen["refusal"] = refusal(lambda: engine(path, model=on_head))
    usual = engine(path, model={"enable_gradient_checkpointing": True}, mixed_precision=None, pad_to_length=True)
    seen["bf16_error"] = float((score(usual, data)[0] - base).abs().max())
    seen["bf16_losses"] = steps(usual, data, loss, 5)
    seen["dtypes"] = sorted({str(p.dtype) for p in usual.log_z.parameters()})
    padded = engine(path, pad_to_length=True, pad_to_length_bucket=64)
    seen["padded_error"] = float((score(padded, data)[0] - base).abs().max())
    transformer_impl.CPUOffloadPolicy = lambda pin_memory: None  # memory cannot be pinned without an accelerator
    reference = engine(path, forward_only=True)
    seen["reference"] = [reference.log_z is None, reference.optimizer is None]
    seen["reference_error"] = float((score(reference, data)[0] - base).abs().max())
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(seen))


def refusal(call):
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return "not refused"
