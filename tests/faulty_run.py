"""A run of two processes that goes wrong in one of them; its `main` in forks, or run as a script, under a launcher.

python tests/faulty_run.py loss|die|wait OUTPUT_DIR

loss: rank 1's loss is NaN at step 2, with a gradient that is finite. die: rank 1 is killed at step 2. wait: steps take
a while, until a signal comes.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from tiny_task import tiny_trainer
from transformers import TrainerCallback

from rlseq.training.run.callbacks import GracefulStop
from rlseq.training.run.launch import run_recipe


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class Fault(TrainerCallback):
    def __init__(self, kind: str, out: Path):
        self.kind, self.out = kind, out

    def on_step_begin(self, args, state, control, **_):
        if self.kind == "die" and rank() == 1 and state.global_step == 1:
            (self.out / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "wait":
            (self.out / f"rank-{rank()}-began").touch()
            time.sleep(0.3)

    def on_step_end(self, args, state, control, model=None, **_):
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        with (self.out / f"rank-{rank()}.txt").open("a") as file:
            file.write(f"{state.global_step} {digest}\n")


def main() -> None:
    kind, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(exist_ok=True)
    steps = 10_000 if kind == "wait" else 3
    trainer = tiny_trainer(out, per_device_train_batch_size=8, max_steps=steps, report_to="none")
    trainer.add_callback(Fault(kind, out))
    trainer.add_callback(stop := GracefulStop())
    if kind == "loss":
        plain = trainer.micro_batch_loss
        trainer.micro_batch_loss = lambda model, inputs: (
            plain(model, inputs) + (float("nan") if rank() == 1 and trainer.state.global_step == 1 else 0.0)
        )
    trainer.train()
    print(f"rank {rank()} stopped by {stop.stopped} at step {trainer.state.global_step}", flush=True)


if __name__ == "__main__":
    run_recipe(main)
