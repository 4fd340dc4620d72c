"""FlowRL in verl, with settings of one's own. Name this file in VERL_USE_EXTERNAL_MODULES and launch verl as usual:

    PYTHONPATH=examples VERL_USE_EXTERNAL_MODULES=verl_flowrl python -m verl.trainer.main_ppo \
        algorithm.adv_estimator=flowrl_mild \
        actor_rollout_ref.actor.policy_loss.loss_mode=flowrl_mild \
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
        actor_rollout_ref.actor.use_kl_loss=true actor_rollout_ref.actor.kl_loss_coef=0.0 \
        actor_rollout_ref.rollout.n=8 ...

`flowrl` and the presets need no file: the package's plug-in registers them on `import verl`.
"""

from flowrl_kernels.integrations.verl import register

register("flowrl_mild", beta=5.0, clip="release")


def main() -> list[str]:
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    return sorted(name for name in POLICY_LOSS_REGISTRY if name in ADV_ESTIMATOR_REGISTRY)


if __name__ == "__main__":
    print("losses with an estimator of the same name:", ", ".join(main()))
