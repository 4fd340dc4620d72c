"""Run by test_trl.py under torchrun: three FlowRL steps on two gloo ranks; each writes what it ended with."""

import json
import sys
from pathlib import Path

import test_trl

path, folder = sys.argv[1:]
trainer = test_trl.flow_trainer(path, folder, max_steps=3)
trainer.train()
result = {
    "processes": trainer.accelerator.num_processes,
    "log_z": trainer.log_z.out.weight[0].tolist(),
    "model": next(iter(trainer.accelerator.unwrap_model(trainer.model).parameters())).sum().item(),
}
(Path(folder) / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
