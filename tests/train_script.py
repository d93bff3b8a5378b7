"""A small training run as a process of its own: the tests kill it, resume it, and start it several times at once.

python tests/train_script.py FOLDER METHOD [--die-at STEP | --die-in-write NUMBER]
"""

import argparse
import atexit
import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_model, toy_data

from cartl_hub import (
    FDM,
    NEFT,
    PGD,
    RFGSM,
    AdversarialTraining,
    FeatureCache,
    FineTuning,
    Jigsaw,
    LwF,
    MultiTask,
    Rotation,
    SimCLR,
)
from cartl_hub.folder import save_model
from cartl_hub.processes import gather
from cartl_hub.training import Schedule, TrainingArguments, checkpoint, loop, train
from cartl_hub.weights import content_hash

ATTACK = PGD(eps=8 / 255, step_size=4 / 255, steps=2)
RUNS = {
    "at": ("wrn10_1", AdversarialTraining(attack=ATTACK), {"ema": 0.9}),
    "fdm": ("wrn10_1", FDM(num_blocks=2, attack=ATTACK), {}),
    "neft": ("wrn10_1", NEFT(num_blocks=3), {"ema": 0.9}),
    "cache": ("wrn10_1", NEFT(num_blocks=3), {"cache": FeatureCache(views=2)}),
    "lwf": ("wrn10_1", LwF(weight=0.1, warm_start=0.3), {"augmentation": None}),
    "dropout": ("test_vit", FineTuning(num_blocks=2), {"optimizer": "adamw", "lr": 1e-3}),
    "vit_multitask": (
        "test_vit",
        MultiTask(tasks=(SimCLR(attack=RFGSM(eps=8 / 255)), Rotation(), Jigsaw(grid=2, num_permutations=4))),
        {"augmentation": None},
    ),
    "head": ("wrn10_1", FineTuning(num_blocks=1), {}),
    "best": ("wrn10_1", FineTuning(num_blocks=1), {"load_best": True}),
    "vit_blocks": ("test_vit", FineTuning(num_blocks=3), {}),
    "vit_at": ("test_vit", AdversarialTraining(attack=ATTACK, num_blocks=2), {}),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("run")
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--die-in-write", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    atexit.register(lambda: print(f"in a group at the end: {dist.is_initialized()}"))  # handlers run in reverse order

    if options.die_at is not None:
        step_of = loop._Run._step

        def step_or_die(self, wrapped, task, optimizer, trained, drawn, step):
            if step == options.die_at:
                die()
            step_of(self, wrapped, task, optimizer, trained, drawn, step)

        loop._Run._step = step_or_die
    if options.die_in_write is not None:
        write, count = checkpoint.save_file, iter(range(1000))

        def write_or_die(tensors, path, metadata):
            write(tensors, path, metadata)
            if next(count) == options.die_in_write:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        checkpoint.save_file = write_or_die

    name, method, arguments = RUNS[options.run]
    model = make_model(name, **({"drop_rate": 0.3} if options.run == "dropout" else {}))
    defaults = {"epochs": options.epochs, "batch_size": 16, "lr": 0.05, "schedule": Schedule(warmup=0.2), "precision": "fp32"}
    result = train(
        model,
        method,
        toy_data(64),
        validation=toy_data(16, seed=5),
        arguments=TrainingArguments(**defaults | {"validation_attack": ATTACK} | arguments),
        output_dir=options.folder,
        resume=True,
    )
    assert result.steps == result.num_steps
    assert len(set(gather(content_hash(model.state_dict())))) == 1  # the same model in every process
    if dist.is_initialized():
        options_of_group = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options
        print(f"hours of patience: {options_of_group._timeout.total_seconds() / 3600:g}")
    (options.folder / "validations.json").write_text(json.dumps([vars(found) for found in result.validations]))
    save_model(model, options.folder / "model")


if __name__ == "__main__":
    main()
