"""What the trainer and the adapters must know of a transformers model: its head's scales, and how it packs."""
