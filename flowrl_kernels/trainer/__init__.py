"""Training: prompts -> rollouts -> rewards -> packed micro-batches -> a library loss -> FSDP2 update."""
