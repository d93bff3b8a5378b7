import math
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_model, toy_data
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cartl_hub import (
    FDM,
    NEFT,
    NFGSM,
    PGD,
    RFGSM,
    TRADES,
    AdversarialTraining,
    Augmentation,
    BatchNormPolicy,
    DataError,
    EpsSchedule,
    FineTuning,
    Jigsaw,
    LwF,
    MultiTask,
    Rotation,
    SimCLR,
)
from cartl_hub.blocks import last_blocks
from cartl_hub.data import ImageData
from cartl_hub.files import BusyError, locked
from cartl_hub.methods import Method
from cartl_hub.training import Schedule, TrainingArguments, TrainingError, checkpoint, loop, train
from cartl_hub.training.validation import Validator

HERE = Path(__file__).parent
ATTACK = PGD(eps=8 / 255, step_size=4 / 255, steps=2)


HEAD = FineTuning(num_blocks=1)


def arguments(**changes):
    defaults = {"epochs": 2, "batch_size": 8, "lr": 0.05, "precision": "fp32", "validation_attack": ATTACK}
    return TrainingArguments(**defaults | changes)


# Exact resume


def test_few_steps_are_pointed_out(data, caplog):
    assert len(data) == 24
    train(make_model("wrn10_1"), HEAD, data, arguments=arguments(epochs=1, batch_size=24))
    assert "24 images in batches of 24: 1 steps an epoch, 1 in all; a batch_size of 8 makes more" in caplog.text
    train(make_model("wrn10_1"), HEAD, data, arguments=arguments(epochs=1, batch_size=8))
    assert "24 images in batches of 8: 3 steps an epoch, 3 in all; a larger number of epochs makes more" in caplog.text


def test_resuming_a_finished_run_returns_its_result(wrn, data, tmp_path):
    first = train(wrn, FineTuning(), data, validation=data, arguments=arguments(), output_dir=tmp_path)
    again = make_model("wrn10_1")
    second = train(again, FineTuning(), data, validation=data, arguments=arguments(), output_dir=tmp_path, resume=True)
    assert (second.steps, second.validations, second.best) == (first.steps, first.validations, first.best)
    assert all(torch.equal(a, b) for a, b in zip(wrn.state_dict().values(), again.state_dict().values(), strict=True))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(state, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_an_early_stopped_run_has_ended(data, tmp_path):
    chosen = arguments(epochs=10, patience=1, lr=1e-6)
    ends = []
    for _ in range(3):
        model = make_model("wrn10_1")
        result = train(model, HEAD, data, validation=data, arguments=chosen, output_dir=tmp_path, resume=True)
        ends.append((result.steps, result.stopped, state_of(model)))
    assert "has not risen for 1 validations" in ends[0][1]
    assert ends[0][:2] == ends[1][:2] == ends[2][:2]
    assert equal(ends[0][2], ends[1][2])
    assert equal(ends[0][2], ends[2][2])


def test_interrupted_in_one_process_the_model_is_as_it_was_and_the_run_goes_on(wrn, data, tmp_path, monkeypatch):
    chosen = {"validation": data, "arguments": arguments(), "resume": True}
    whole, before, step_of = make_model("wrn10_1"), state_of(wrn), loop._Run._step
    train(whole, FineTuning(), data, **chosen, output_dir=tmp_path / "whole")

    def interrupted(self, wrapped, task, optimizer, trained, drawn, step):
        if step == 4:  # one after a validation and its checkpoint
            raise KeyboardInterrupt
        step_of(self, wrapped, task, optimizer, trained, drawn, step)

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(wrn, FineTuning(), data, **chosen, output_dir=tmp_path / "part")
    assert equal(before, state_of(wrn))
    assert wrn.training
    monkeypatch.setattr(loop._Run, "_step", step_of)
    assert train(wrn, FineTuning(), data, **chosen, output_dir=tmp_path / "part").steps == 6
    assert equal(state_of(whole), state_of(wrn))


@pytest.mark.parametrize("changes", [{}, {"load_best": True}, {"ema": 0.9}])
def test_a_model_with_the_result_of_the_run_gets_it_again(changes, data, tmp_path, monkeypatch):
    chosen = {"validation": data, "arguments": arguments(**changes), "output_dir": tmp_path, "resume": True}
    model, method = make_model("wrn10_1"), NEFT(num_blocks=2)
    first = train(model, method, data, **chosen)
    ended = state_of(model)
    from_the_start = make_model("wrn10_1")
    train(from_the_start, method, data, **chosen)
    assert equal(ended, state_of(from_the_start))
    monkeypatch.setattr(loop._Run, "_train", None)
    assert train(model.train(), method, data, **chosen) == first
    assert equal(ended, state_of(model))
    assert not model.training
    model.head.bias.data += 1
    with pytest.raises(ValueError, match="got others \\(weights: then"):
        train(model, method, data, **chosen)


def test_resuming_with_other_arguments_is_refused(wrn, data, tmp_path):
    train(wrn, FineTuning(), data, arguments=arguments(), output_dir=tmp_path)
    with pytest.raises(
        ValueError,
        match=r"expected the arguments with which .* got others \(arguments\.lr: then 0\.05, now 0\.1\)\. Use the same ones",
    ):
        train(make_model("wrn10_1"), FineTuning(), data, arguments=arguments(lr=0.1), output_dir=tmp_path, resume=True)


def bare(data, **changes):
    """The data without a description."""
    parts = {"labels": data.labels, "label_names": data.label_names, "images": data.images, "policy": data.policy}
    return ImageData(**parts | changes)


def test_resuming_with_other_data_is_refused(data, tmp_path):
    def run(data, validation, folder="run"):
        model, chosen = make_model("wrn10_1"), arguments(epochs=1)
        return train(model, HEAD, data, validation=validation, arguments=chosen, output_dir=tmp_path / folder, resume=True)

    held = toy_data(9)
    run(bare(data), held)
    assert run(bare(data), held).steps == 3
    darker, relabelled = data.images.clone(), data.labels.roll(1)
    darker[5, 0, 3, 3] //= 2
    for other in (bare(data, images=darker), bare(data, labels=relabelled), data.subset(range(16))):
        with pytest.raises(ValueError, match=r"got others \(data: then"):
            run(other, held)
    with pytest.raises(ValueError, match=r"got others \(validation: then"):
        run(bare(data), held.subset(range(6)))
    decoded = {"images": lambda indices: data.images[list(indices)]}
    run(bare(data, **decoded), held, "decoded")
    with pytest.raises(ValueError, match=r"got others \(data: then"):
        run(bare(data, labels=relabelled, **decoded), held, "decoded")


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def without_metadata(path):
    save_file(load_file(path), path)


def with_other_metadata(path):
    save_file(load_file(path), path, {"cartl_hub": "{"})


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "best.safetensors"])
@pytest.mark.parametrize("damage", [cut, flip_a_bit, without_metadata, with_other_metadata])
def test_damaged_files_of_a_run_are_refused(name, damage, wrn, data, tmp_path):
    chosen = {"validation": data, "arguments": arguments(epochs=1, load_best=True), "output_dir": tmp_path}
    train(wrn, HEAD, data, **chosen)
    damage(tmp_path / name)
    with pytest.raises(TrainingError, match=rf"expected .*{name} as the run wrote it, got .*damaged.* remove .*checkpoint\.safe"):
        train(make_model("wrn10_1"), HEAD, data, **chosen, resume=True)


def test_lost_best_weights_are_refused_where_they_are_needed(wrn, data, tmp_path):
    for load_best in (True, False):
        chosen = {"validation": data, "arguments": arguments(epochs=1, load_best=load_best), "output_dir": tmp_path}
        train(make_model("wrn10_1"), HEAD, data, **chosen, resume=False)
        (tmp_path / "best.safetensors").unlink()
        if load_best:
            with pytest.raises(TrainingError, match=r"best\.safetensors as the run wrote it, got a missing"):
                train(make_model("wrn10_1"), HEAD, data, **chosen, resume=True)
        else:
            assert train(make_model("wrn10_1"), HEAD, data, **chosen, resume=True).steps == 3


def test_a_full_disk_is_explained_and_the_last_checkpoint_kept(wrn, data, tmp_path, monkeypatch):
    write, before = checkpoint.save_file, state_of(wrn)

    def write_or_fail(tensors, path, metadata):
        write(tensors, path, metadata)
        if calls.append(1) or len(calls) == 2:
            raise SafetensorError("I/O error: No space left on device")

    calls: list[int] = []
    monkeypatch.setattr(checkpoint, "save_file", write_or_fail)
    message = r"expected to write .*checkpoint\.safetensors, got .*No space left.* an earlier step is kept.* resume=True"
    with pytest.raises(TrainingError, match=message):
        train(wrn, HEAD, data, arguments=arguments(), output_dir=tmp_path)
    assert equal(before, state_of(wrn))
    assert not list(tmp_path.glob("*.partial"))
    assert train(wrn, HEAD, data, arguments=arguments(), output_dir=tmp_path, resume=True).steps == 6
    assert len(calls) == 3  # the one that was kept was that of the first epoch


def hold(path, ready):
    with locked(path):
        ready.set()
        time.sleep(60)


def test_two_runs_in_one_folder(wrn, data, tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "training.lock", ready))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(BusyError, match=rf"no other run in .*, got process {other.pid} on .* use another folder"):
            train(wrn, HEAD, data, arguments=arguments(epochs=1), output_dir=tmp_path)
    finally:
        other.kill()
        other.join()
    assert train(wrn, HEAD, data, arguments=arguments(epochs=1), output_dir=tmp_path).steps == 3


def test_a_refused_lock_does_not_end_the_one_that_is_held(tmp_path):
    """POSIX ends all locks of a process on a file when it closes any of its handles to it."""
    path, other = tmp_path / "training.lock", "import sys; from pathlib import Path; from cartl_hub.files import locked\n"
    with locked(path):
        with pytest.raises(BusyError, match="another thread of this process"), locked(path):
            pass
        done = subprocess.run(
            [sys.executable, "-c", other + "with locked(Path(sys.argv[1])): pass", path],
            capture_output=True,
            text=True,
            check=False,
        )
    assert "BusyError" in done.stderr


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
    tensors, _ = checkpoint.read_checkpoint(tmp_path / "checkpoint.safetensors")
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
    with pytest.raises(
        DataError, match=r"row 7 .* Training stopped at step 3; run it again to continue from .*checkpoint\.safetensors"
    ):
        train(wrn, FineTuning(), data, arguments=arguments(), output_dir=tmp_path)
    data.images = lambda indices: images[list(indices)]
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
        Validator, "accuracies", lambda self, model, attacks: dict(zip(("clean", *attacks), next(accuracies), strict=True))
    )
    method = AdversarialTraining(attack=NFGSM(eps=8 / 255))
    result = train(wrn, method, data, validation=data, arguments=arguments(epochs=5))
    assert "catastrophic overfitting at step 6" in result.stopped
    assert result.weights == "best"
    assert result.best.step == 3


@pytest.mark.parametrize("earlier", [[], [(0.5, 0.4, 0.45)]])
def test_overfitted_weights_are_never_the_best(earlier, wrn, data, monkeypatch):
    accuracies = iter([*earlier, (0.9, 0.5, 0.9)])
    monkeypatch.setattr(
        Validator, "accuracies", lambda self, model, attacks: dict(zip(("clean", *attacks), next(accuracies), strict=True))
    )
    method = AdversarialTraining(attack=RFGSM(eps=8 / 255), num_blocks=1)
    result = train(wrn, method, data, validation=data, arguments=arguments(epochs=5))
    assert "catastrophic overfitting" in result.stopped
    if earlier:
        assert "the best weights before it are kept" in result.stopped
        assert (result.weights, result.best.step) == ("best", 3)
    else:
        assert "these weights are kept, as there was no validation before it" in result.stopped
        assert (result.weights, result.best) == ("last", None)


@pytest.mark.parametrize(
    ("attack", "norm", "eps"),
    [
        (NFGSM(eps=2 / 255), "Linf", 2 / 255),
        (RFGSM(eps=0.5, norm="L2"), "L2", 0.5),
        (RFGSM(eps=8 / 255), "Linf", 8 / 255),
        (PGD(eps=2 / 255, step_size=2 / 255, steps=1), "Linf", 2 / 255),
    ],
)
def test_overfitting_is_looked_for_in_the_ball_of_the_training(attack, norm, eps, wrn, data, monkeypatch, caplog):
    looked = []

    def accuracies(self, model, attacks):
        looked.append(attacks)
        return {"clean": 0.9, "robust": 0.1, "fgsm": 0.5} | ({"pgd": 0.4} if "pgd" in attacks else {})

    monkeypatch.setattr(Validator, "accuracies", accuracies)
    schedule = EpsSchedule(start=0.5, end=0.9)
    method = AdversarialTraining(attack=attack, eps_schedule=schedule, num_blocks=1)
    result = train(wrn, method, data, validation=data, arguments=arguments(epochs=4))
    balls = [{(one.norm, one.eps) for name, one in attacks.items() if name != "robust"} for attacks in looked]
    factors = [schedule.factor(step / 12) for step in (2, 5, 8, 11)]
    assert balls[:2] == [set(), set()]  # the radius is 0 in the first half
    same = (norm, eps) == (ATTACK.norm, ATTACK.eps)  # then the attack on validation images says the same
    assert balls[2] == {(norm, eps * factors[2])}
    assert balls[3] == {(norm, eps)}
    assert ("pgd" in looked[3]) != same
    assert (result.stopped is not None) == same
    assert ("has the radius 0.03137 in Linf, that of training" in caplog.text) != same


def test_best_weights_of_an_attempt_that_was_not_repeated_stand_beside_their_own_accuracy(data, tmp_path, monkeypatch):
    """As on a GPU, where repeated steps differ: the file of the best weights is later than the checkpoint."""
    chosen = {"validation": data, "output_dir": tmp_path, "arguments": arguments(epochs=4, load_best=True, checkpoint_every=2)}
    robust = iter([0.1, 0.2, 0.9])

    def accuracies(self, model, attacks):
        return {"clean": 0.5, "robust": next(robust)}  # at the third the attempt ends, before its fourth validation

    monkeypatch.setattr(Validator, "accuracies", accuracies)
    with pytest.raises(StopIteration):
        train(make_model("wrn10_1"), HEAD, data, **chosen)
    robust = iter([0.3, 0.3])
    model = make_model("wrn10_1")
    result = train(model, HEAD, data, **chosen)
    assert (result.best.step, result.best.robust_acc) == (9, 0.3)  # repeated, and written again
    robust = iter([0.1, 0.2, 0.9])
    with pytest.raises(StopIteration):
        train(make_model("wrn10_1"), HEAD, data, **chosen, resume=False)
    attempt = load_file(tmp_path / "best.safetensors")
    robust = iter([0.15, 0.15])
    model = make_model("wrn10_1")
    result = train(model, HEAD, data, **chosen)
    assert (result.best.step, result.best.robust_acc) == (9, 0.9)
    assert equal(attempt, state_of(model))


def test_a_run_goes_on_with_the_normalisation_with_which_it_began(data, tmp_path):
    train(make_model("wrn10_1"), HEAD, data, arguments=arguments(), output_dir=tmp_path)
    other = make_model("wrn10_1")
    other.mean += 0.1
    with pytest.raises(ValueError, match=r"got others \(normalisation: then"):
        train(other, HEAD, data, arguments=arguments(), output_dir=tmp_path)


def test_a_checkpoint_that_states_no_normalisation_is_resumed(data, tmp_path):
    train(make_model("wrn10_1"), HEAD, data, arguments=arguments(), output_dir=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors, record = checkpoint.read_checkpoint(path)
    del record["fingerprint"]["normalisation"]
    checkpoint.write_checkpoint(path, tensors, record)
    assert train(make_model("wrn10_1"), HEAD, data, arguments=arguments(), output_dir=tmp_path).steps == 6


def test_speed_counts_the_images_that_there_are(wrn, data):
    result = train(wrn, HEAD, data, arguments=arguments(batch_size=10 * len(data)))
    assert result.images_per_second == pytest.approx(2 * len(data) / result.seconds)


def test_patience(wrn, data, monkeypatch):
    monkeypatch.setattr(Validator, "accuracies", lambda self, model, attacks: dict.fromkeys(("clean", *attacks), 0.5))
    result = train(wrn, FineTuning(), data, validation=data, arguments=arguments(epochs=9, patience=2))
    assert "has not risen for 2 validations" in result.stopped
    assert result.steps == 9


def test_auto_precision_is_that_of_the_hardware_and_is_kept_on_another_machine(wrn, data, tmp_path, monkeypatch):
    chosen = {"arguments": arguments(precision="auto", epochs=2), "output_dir": tmp_path}
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    whole = make_model("wrn10_1")
    assert train(whole, HEAD, data, arguments=chosen["arguments"]).precision == "bf16"
    step_of = loop._Run._step

    def interrupted(self, wrapped, task, optimizer, trained, drawn, step):
        if step == 4:
            raise KeyboardInterrupt
        step_of(self, wrapped, task, optimizer, trained, drawn, step)

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(wrn, HEAD, data, **chosen)
    monkeypatch.setattr(loop._Run, "_step", step_of)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert train(wrn, HEAD, data, **chosen).precision == "bf16"
    assert equal(state_of(whole), state_of(wrn))
    assert train(make_model("wrn10_1"), HEAD, data, arguments=chosen["arguments"]).precision == "fp32"


METHODS = [
    FineTuning(),
    NEFT(num_blocks=2),
    LwF(warm_start=0.0),
    AdversarialTraining(attack=ATTACK),
    AdversarialTraining(attack=PGD(eps=0.5, step_size=0.2, steps=2, norm="L2")),
    TRADES(attack=PGD(eps=8 / 255, step_size=2 / 255, steps=2)),
    FDM(num_blocks=2, attack=NFGSM(eps=8 / 255)),
    SimCLR(),
    Rotation(attack=ATTACK),
    MultiTask(tasks=(SimCLR(), Jigsaw(grid=2))),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.tag)
def test_every_method_trains_every_weight_in_every_precision(method, precision, data):
    model = make_model("wrn10_1")
    before = state_of(model)
    chosen = arguments(precision=precision, epochs=1, max_steps=1, augmentation=None, weight_decay=0.0)
    assert train(model, method, data, arguments=chosen).precision == precision
    trained = {name for block in last_blocks(model, method.trained_blocks) for name in block.parameters}
    if not method.uses_labels:
        trained -= {"head.fc.weight", "head.fc.bias"}
    still = {name for name in trained if torch.equal(before[f"backbone.{name}"], model.state_dict()[f"backbone.{name}"])}
    assert not still


def test_validation_images_are_of_all_classes():
    """Also where the data are sorted by class, as folders of images are."""
    labels = torch.arange(4).repeat_interleave(25)
    images = torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    data = ImageData(labels, ("a", "b", "c", "d"), images)
    validator = Validator(data, 20, 8, lambda images: images.float(), Accelerator())
    assert labels[validator.indices].bincount().tolist() == [5] * 4
    seen = []

    class Model(nn.Module):
        def forward(self, images):
            seen.append(len(images))
            return F.one_hot(torch.zeros(len(images), dtype=torch.long), 4).float()

    assert validator.accuracies(Model(), {}) == {"clean": 0.25}
    assert seen == [8, 8, 4]


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


def test_accumulation_in_the_environment_changes_nothing(data, monkeypatch):
    plain, other = make_model("wrn10_1"), make_model("wrn10_1")
    train(plain, HEAD, data, arguments=arguments(epochs=1))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(other, HEAD, data, arguments=arguments(epochs=1))
    assert equal(state_of(plain), state_of(other))


@pytest.fixture
def accelerate_anew():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate_anew")
def test_an_accelerator_of_another_precision_is_explained(wrn, data):
    Accelerator(mixed_precision="bf16")
    with pytest.raises(ValueError, match=r"Accelerator of another precision.* Make it with mixed_precision='no'"):
        train(wrn, HEAD, data, arguments=arguments(epochs=1))


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**40)])
def test_large_seeds(seed, wrn, data):
    assert train(wrn, HEAD, data, arguments=arguments(epochs=1, seed=seed)).steps == 3


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
        ({"ema": 1.0}, "ema must be > 0 and < 1, got 1.0"),
        ({"precision": "fp8"}, "precision must be one of"),
    ],
)
def test_arguments_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: value}, f"{name} must be a finite number, got {value}")
            for name in ("lr", "momentum", "weight_decay", "clip_grad_norm", "ema", "checkpoint_minutes")
            for value in (math.nan, math.inf)
        ),
        *(
            ({name: 1.5}, f"{name} must be a whole number, got 1.5")
            for name in ("epochs", "max_steps", "batch_size", "validate_every", "validation_images", "patience", "seed")
        ),
        ({"momentum": 1}, "momentum must be >= 0 and < 1, got 1"),
        ({"momentum": -0.1}, "momentum must be >= 0 and < 1"),
        ({"weight_decay": -1e-4}, "weight_decay must be >= 0"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be > 0"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes must be >= 0"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"epochs": np.int64(2)}, r"epochs must be a whole number, got np.int64\(2\); convert it with int"),
        ({"load_best": "no"}, "load_best must be True or False, got 'no'"),
        ({"seed": 2**63}, "seed must be >= -9223372036854775808 and <= 9223372036854775807"),
        ({"schedule": "linear"}, "schedule must be a Schedule, .* got 'linear'"),
        ({"augmentation": True}, "augmentation must be an Augmentation or None, got True"),
        ({"validation_attack": "pgd"}, "validation_attack must be an attack, .* got 'pgd'"),
    ],
)
def test_arguments_that_mean_nothing(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": math.nan}, "warmup must be a finite number"),
        ({"warmup": 1.1}, "warmup must be >= 0 and <= 1"),
        ({"gamma": math.inf}, "gamma must be a finite number"),
        ({"gamma": -1}, "gamma must be >= 0"),
        ({"milestones": 0.5}, r"milestones must be a tuple of shares of the run, such as \(0.5, 0.75\), got 0.5"),
        ({"milestones": (0.5, 1.0)}, "each of milestones must be > 0 and < 1, got 1.0"),
        ({"decay": "sine"}, "decay must be linear, cosine, exponential, steps or constant, got 'sine'"),
        ({"decay": "exponential", "gamma": 0}, "gamma must be > 0, got 0"),
    ],
)
def test_schedule_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**changes)


def test_checkpoints_by_epochs_alone(wrn, data, tmp_path):
    result = train(wrn, HEAD, data, arguments=arguments(epochs=1, checkpoint_minutes=None), output_dir=tmp_path)
    assert result.steps == 3


def test_validation_that_does_not_fit(wrn, data):
    other = toy_data(9)
    other.label_names = ("a", "b", "d")
    with pytest.raises(ValueError, match=r"validation images of the classes 'a', 'b', 'c', as in training, got 'a', 'b', 'd'"):
        train(wrn, HEAD, data, validation=other, arguments=arguments())
    with pytest.raises(ValueError, match="expected validation images, got 0 of them"):
        train(wrn, HEAD, data, validation=data.subset([]), arguments=arguments())
    for name, value in (("patience", 3), ("load_best", True)):
        with pytest.raises(ValueError, match=f"{name}={value} needs validation images, got validation=None"):
            train(wrn, HEAD, data, arguments=arguments(**{name: value}))


def test_floats_from_a_decoder_are_refused(wrn, data):
    decoded = bare(data, images=lambda indices: data.images[list(indices)] / 255)
    with pytest.raises(DataError, match=r"expected uint8 images from the data, got torch\.float32"):
        train(wrn, HEAD, decoded, arguments=arguments(augmentation=None))


def test_wrong_number_of_classes(data):
    with pytest.raises(ValueError, match=r"expected a model for the 3 classes .* got one for 5; call model\.reset_head"):
        train(make_model("wrn10_1", num_classes=5), FineTuning(), data, arguments=arguments())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(warmup=0.5, decay="linear"), [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (Schedule(warmup=0, decay="steps", milestones=(0.5, 0.75), gamma=0.1), [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        (Schedule(warmup=0.25, decay="constant"), [0.5, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule(warmup=0, decay="exponential", gamma=1 / 256), [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128]),
        (Schedule(warmup=0.5, decay="exponential", gamma=1 / 16), [0.25, 0.5, 0.75, 1, 1, 1 / 2, 1 / 4, 1 / 8]),
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


def test_a_tracker_that_is_not_installed_is_said_before_the_first_step(tmp_path):
    arguments = TrainingArguments(epochs=1, batch_size=8, precision="fp32", log_with="comet_ml")
    with pytest.raises(ValueError, match="expected a tracker that is installed"):
        train(make_model("wrn10_1"), FineTuning(num_blocks=1), toy_data(16), arguments=arguments, output_dir=tmp_path)
