import csv
import hashlib
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, toy_data
from safetensors.torch import load_file

import cartl_hub.training as training
from cartl_hub import FDM, NEFT, NFGSM, PGD, AdversarialTraining, Augmentation, BatchNormPolicy, DataError, FineTuning, LwF
from cartl_hub.methods import Method
from cartl_hub.training import Schedule, TrainingArguments, TrainingError, train

HERE = Path(__file__).parent
ATTACK = PGD(eps=8 / 255, step_size=4 / 255, steps=2)


def arguments(**changes):
    defaults = {"epochs": 2, "batch_size": 8, "lr": 0.05, "precision": "fp32", "validation_attack": ATTACK}
    return TrainingArguments(**defaults | changes)


# Exact resume


def start(*options, processes=1):
    command = [sys.executable, str(HERE / "train_script.py"), *map(str, options)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def weights_hash(folder):
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("run", ["at", "neft", "lwf", "dropout"])
def test_killed_and_resumed_run_ends_with_the_same_file(run, tmp_path):
    assert start(tmp_path / "whole", run).returncode == 0
    draw = random.Random(run)
    kills = [("--die-at", draw.randint(5, 7)), ("--die-in-write", draw.randint(1, 2)), ("--die-at", draw.randint(9, 11))]
    for kill in kills if run == "at" else kills[:1]:
        killed = start(tmp_path / "killed", run, *kill)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = start(tmp_path / "killed", run)
    assert finished.returncode == 0, finished.stderr
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")
    assert (tmp_path / "killed" / "losses.csv").read_text() == (tmp_path / "whole" / "losses.csv").read_text()


def test_resuming_a_finished_run_returns_its_result(wrn, data, tmp_path):
    first = train(wrn, FineTuning(), data, validation=data, arguments=arguments(), output_dir=tmp_path)
    again = make_model("wrn10_1")
    second = train(again, FineTuning(), data, validation=data, arguments=arguments(), output_dir=tmp_path, resume=True)
    assert (second.steps, second.validations, second.best) == (first.steps, first.validations, first.best)
    assert all(torch.equal(a, b) for a, b in zip(wrn.state_dict().values(), again.state_dict().values(), strict=True))


def test_resuming_with_other_arguments_is_refused(wrn, data, tmp_path):
    train(wrn, FineTuning(), data, arguments=arguments(), output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"expected the arguments with which .* got others \(arguments: .*Use the same ones"):
        train(make_model("wrn10_1"), FineTuning(), data, arguments=arguments(lr=0.1), output_dir=tmp_path, resume=True)


def test_damaged_checkpoint_is_refused(wrn, data, tmp_path):
    train(wrn, FineTuning(), data, arguments=arguments(), output_dir=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged file"):
        train(make_model("wrn10_1"), FineTuning(), data, arguments=arguments(), output_dir=tmp_path, resume=True)


# Several processes


@pytest.mark.parametrize("run", ["head", "vit_blocks", "vit_at"])
def test_two_processes_with_half_the_batch_give_the_weights_of_one(run, tmp_path):
    assert start(tmp_path / "one", run).returncode == 0
    two = start(tmp_path / "two", run, processes=2)
    assert two.returncode == 0, two.stderr
    one = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "two" / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, one[name], atol=2e-5, rtol=1e-4, msg=name)
    logs = [csv.DictReader((tmp_path / name / "losses.csv").read_text().splitlines()) for name in ("one", "two")]
    losses = [[float(row["loss"]) for row in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[1]) == 12  # written once, not by each process


def test_processes_share_a_batch_without_duplicates():
    shards = [list(toy_data(8).training_batches(batch_size=4, seed=0, start=0, stop=2, rank=rank, world=2)) for rank in (0, 1)]
    drawn = torch.cat([batch.indices for shard in shards for batch in shard])
    assert sorted(drawn.tolist()) == list(range(8))


# What happens on the way


class Exploding(FineTuning):
    """A loss that becomes NaN."""

    def losses(self, model, batch):
        found = super().losses(model, batch)
        return found | {"loss": found["loss"] * (math.nan if batch.progress > 0.6 else 1.0)}


def test_nan_loss_stops_and_keeps_checkpoint_and_model(wrn, data, tmp_path):
    before = {name: tensor.clone() for name, tensor in wrn.state_dict().items()}
    with pytest.raises(TrainingError, match=r"loss became nan at step 4 of 6; the last good checkpoint is .*Lower lr"):
        train(wrn, Exploding(), data, arguments=arguments(), output_dir=tmp_path)
    tensors, _ = training._read(tmp_path / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrn.state_dict().items())


def test_unreadable_image_found_late_keeps_what_was_trained(wrn, data, tmp_path):
    images = data.images

    def get(indices):
        if calls.append(1) or len(calls) > 3:
            raise DataError("row 7 of the train split: expected a readable picture.")
        return images[list(indices)]

    calls: list[int] = []
    data.images = get
    with pytest.raises(DataError, match=r"row 7 .* Training stopped at step 3; the run goes on from .*checkpoint\.safetensors"):
        train(wrn, FineTuning(), data, arguments=arguments(), output_dir=tmp_path)
    data.images = images
    resumed = make_model("wrn10_1")
    assert train(resumed, FineTuning(), data, arguments=arguments(), output_dir=tmp_path, resume=True).steps == 6


def test_training_learns_and_leaves_a_plain_model(model, data):
    before = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    train(model, NEFT(num_blocks=2), data, arguments=arguments())
    assert [(name, tuple(t.shape)) for name, t in model.state_dict().items()] == before
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_natural_training_fits_the_toy_data(wrn, data):
    result = train(wrn, FineTuning(), data, validation=data, arguments=arguments(epochs=12, augmentation=None))
    assert result.validations[-1].clean_acc == 1.0


def test_average_is_the_result(wrn, data):
    """With decay so small that the average is the last weights, and with one so large that it stays near the first."""
    plain, fast, slow = (make_model("wrn10_1") for _ in range(3))
    for model, ema in ((plain, None), (fast, 1e-6), (slow, 0.9999)):
        train(model, FineTuning(), data, arguments=arguments(ema=ema, epochs=6))
    distance = [
        sum(float((a - b).detach().square().sum()) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        for model in (fast, slow)
    ]
    assert distance[0] < 1e-6 < distance[1]


def test_best_weights_are_loaded(wrn, data, tmp_path):
    result = train(wrn, FineTuning(), data, validation=data, arguments=arguments(epochs=4, load_best=True), output_dir=tmp_path)
    assert result.weights == "best"
    best = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in wrn.state_dict().items() if name in best)
    assert result.best.robust_acc == max(found.robust_acc for found in result.validations)


def test_catastrophic_overfitting_stops_with_the_best_weights(wrn, data, monkeypatch):
    accuracies = iter([(0.5, 0.4, 0.45), (0.6, 0.3, 0.5), (0.6, 0.1, 0.9)])
    monkeypatch.setattr(
        training._Run, "_accuracies", lambda self, attacks: dict(zip(("clean", *attacks), next(accuracies), strict=True))
    )
    method = AdversarialTraining(attack=NFGSM(eps=8 / 255))
    result = train(wrn, method, data, validation=data, arguments=arguments(epochs=5))
    assert "catastrophic overfitting at step 6" in result.stopped
    assert result.weights == "best"
    assert result.best.step == 3


def test_patience(wrn, data, monkeypatch):
    monkeypatch.setattr(training._Run, "_accuracies", lambda self, attacks: dict.fromkeys(("clean", *attacks), 0.5))
    result = train(wrn, FineTuning(), data, validation=data, arguments=arguments(epochs=9, patience=2))
    assert "has not risen for 2 validations" in result.stopped
    assert result.steps == 9


def test_auto_precision_is_measured_once_and_kept(wrn, data, tmp_path):
    chosen = arguments(precision="auto", epochs=1)
    first = train(wrn, FineTuning(), data, arguments=chosen, output_dir=tmp_path)
    assert set(first.timing) == {"fp32", "bf16"}
    assert first.precision == min(first.timing, key=first.timing.get)
    resumed = train(make_model("wrn10_1"), FineTuning(), data, arguments=chosen, output_dir=tmp_path, resume=True)
    assert (resumed.precision, resumed.timing) == (first.precision, first.timing)


def test_auto_precision_leaves_the_run_as_it_was(data):
    """Its trial steps change nothing: a run with the same precision fixed ends with the same weights."""
    auto, fixed = make_model("wrn10_1"), make_model("wrn10_1")
    result = train(auto, FineTuning(), data, arguments=arguments(precision="auto"))
    train(fixed, FineTuning(), data, arguments=arguments(precision=result.precision))
    assert all(torch.equal(a, b) for a, b in zip(auto.state_dict().values(), fixed.state_dict().values(), strict=True))


def test_gradient_is_clipped(data):
    free, clipped = make_model("wrn10_1"), make_model("wrn10_1")
    start_point = [parameter.detach().clone() for parameter in free.parameters()]
    for model, bound in ((free, None), (clipped, 1e-4)):
        plain = {"momentum": 0.0, "weight_decay": 0.0, "schedule": Schedule(warmup=0, decay="constant"), "max_steps": 1}
        train(model, FineTuning(), data, arguments=arguments(clip_grad_norm=bound, lr=1.0, **plain))
    moved = [
        math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in zip(model.parameters(), start_point, strict=True)))
        for model in (free, clipped)
    ]
    assert moved[0] > 1e-2
    assert moved[1] == pytest.approx(1e-4, rel=0.05)


def test_tracker_writes_events(wrn, data, tmp_path):
    train(wrn, FineTuning(), data, validation=data, arguments=arguments(log_with="tensorboard"), output_dir=tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_global_random_state_is_the_users(wrn, data):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train(wrn, FineTuning(), data, arguments=arguments(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_policy_that_freezes_everything_is_refused(data):
    model = make_model("wrn10_1")
    model.head.requires_grad_(False)

    class Nothing(FineTuning):
        def setup(self, model, images=None):
            return Method.setup(self, model, images)

    with pytest.raises(ValueError, match=r"num_blocks must be in \[1, 5\] for this wrn10_1, got 9"):
        train(model, FineTuning(num_blocks=9), data, arguments=arguments())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"ema": 1.0}, "ema must be a decay in"),
        ({"precision": "fp8"}, "precision must be one of"),
    ],
)
def test_arguments_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**changes)


def test_wrong_number_of_classes(data):
    with pytest.raises(ValueError, match=r"expected a model for the 3 classes .* got one for 5; call model\.reset_head"):
        train(make_model("wrn10_1", num_classes=5), FineTuning(), data, arguments=arguments())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(warmup=0.5, decay="linear"), [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (Schedule(warmup=0, decay="steps", milestones=(0.5, 0.75), gamma=0.1), [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        (Schedule(warmup=0.25, decay="constant"), [0.5, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedule(schedule, expected):
    assert [schedule.factor(step, 8) for step in range(8)] == pytest.approx(expected)


def test_crop_and_flip_can_be_off(wrn, data):
    other = make_model("wrn10_1")
    train(wrn, FineTuning(), data, arguments=arguments(augmentation=None))
    train(other, FineTuning(), data, arguments=arguments(augmentation=Augmentation(padding=0, flip=False)))
    assert all(torch.equal(a, b) for a, b in zip(wrn.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", [FDM(num_blocks=2, attack=ATTACK), LwF(), AdversarialTraining(attack=ATTACK)])
def test_each_method_trains_each_family(method, model, data):
    result = train(model, method, data, bn=BatchNormPolicy(), arguments=arguments(epochs=1, lr=0.01))
    assert result.steps == 3
