"""Train several objectives for two steps each and keep what came out; run by one process or by several.

accelerate launch --config_file recipes/accelerate/cpu-2proc.yaml tests/tiny_family.py OUTPUT_DIR
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from tiny_task import shares_letters, tiny_trainer

from rlseq.config.training import GRPOConfig
from rlseq.training.run.launch import run_recipe

# global rows; in halves, groups of 4 straddle the processes with 12, as minimum risk's may not
RUNS = {
    "reference_exact": (12, {"objective": "reference_exact"}),
    "minimum_risk": (
        16,
        {"objective": "minimum_risk", "minimum_risk_sharpness": 0.5, "minimum_risk_references": True},
    ),
    "greedy": (12, {"advantage_baseline": "greedy", "scale_rewards": "none"}),
    "expected_accuracy": (8, {"objective": "expected_accuracy"}),
}


def run(output: Path, processes: int) -> None:
    """Write rollouts/, loss.json and weights.pt of each objective under `output`."""
    for name, (rows, settings) in RUNS.items():
        trainer = tiny_trainer(
            output / name,
            rewards=[shares_letters],
            per_device_train_batch_size=rows // processes,
            loss_type="dapo" if "objective" not in settings else GRPOConfig.loss_type,
            optim="sgd",
            learning_rate=1.0,
            max_steps=2,
            **settings,
        )
        trainer.train()
        if trainer.accelerator.is_main_process:
            losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
            (output / name).mkdir(parents=True, exist_ok=True)
            (output / name / "loss.json").write_text(json.dumps(losses))
            model = trainer.accelerator.unwrap_model(trainer.model)
            torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), output / name / "weights.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_recipe(lambda: run(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])))
