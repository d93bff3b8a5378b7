"""The evaluation against models whose robust accuracy is known, and what it refuses."""

import inspect
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model, toy_data
from known_models import EPS, FloatData, Linear, curved_case, linear_case
from PIL import Image
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, TensorDataset
from tqdm import tqdm

from cartl_hub.attacks import APGD, APGDT, FABT, FGSM, NFGSM, PGD, Attack, Noise, Square
from cartl_hub.data import DataError, ImageData, StreamingData
from cartl_hub.evaluation import CURVE_EPS, EvaluationOptions, default_attacks, evaluate
from cartl_hub.evaluation import run as evaluation_run
from cartl_hub.evaluation.cascade import Cascade
from cartl_hub.evaluation.checks import run_checks

FEW = {"FGSM": FGSM(eps=EPS), "PGD-3": PGD(eps=EPS, step_size=EPS, steps=3)}


# Known answers


@pytest.mark.parametrize("channels", [1, 3])
def test_linear_model_has_its_known_robust_accuracy(channels):
    model, data, signed = linear_case(channels=channels)
    l1, l2 = float(model.weight.detach().abs().sum()), float(model.weight.detach().norm())
    report = evaluate(model, data, attacks=default_attacks(EPS, beside_l2=0.05), curve=None, checks=False, progress=False)
    stands = {"Linf": signed > EPS * l1, "L2": signed > 0.05 * l2}
    assert 0 < stands["Linf"].sum() < stands["L2"].sum() < (signed > 0).sum()  # the case tells them apart
    np.testing.assert_array_equal(report.verdicts.correct["clean"], signed > 0)
    for name in ("FGSM", "PGD-20", "PGD-100"):
        np.testing.assert_array_equal(report.verdicts.correct[name], stands["Linf"], err_msg=name)
    found = report.verdicts.correct["PGD-20 L2"]
    assert (found >= stands["L2"]).all()
    assert (found <= (signed > 0.97 * 0.05 * l2)).all()  # 20 steps come within 3% of the pole of the ball
    assert report.clean.correct == (signed > 0).sum()
    assert report.robust.accuracy == stands["Linf"].mean()
    assert list(report.worst_case) == ["Linf 8/255", "L2 0.05"]
    assert sum(row.robust_correct for row in report.per_class) == stands["Linf"].sum()
    assert [row.num_images for row in report.per_class] == np.bincount(data.labels).tolist()


def test_curve_is_that_of_the_linear_model():
    model, data, signed = linear_case()
    report = evaluate(model, data, attacks=FEW, curve_images=30, checks=False, progress=False)
    l1 = float(model.weight.detach().abs().sum())
    spread = np.arange(30) * len(data) // 30
    expected = [int((signed[spread] > eps * l1).sum()) for eps in CURVE_EPS]
    assert list(report.curve.correct) == expected
    assert expected == sorted(expected, reverse=True)
    assert expected[0] > expected[3] > 0
    assert expected[-1] == 0
    assert report.curve.num_images == 30
    grid = [0, 1, 2, 4, 6, 8]
    assert report.curve.mean == pytest.approx(np.trapezoid(np.array(expected[:6]) / 30, grid) / 8)
    assert report.curve.mean_eps == EPS


def test_curve_falls_on_a_network():
    model, data = curved_case()
    report = evaluate(model, data, attacks=FEW, checks=False, progress=False)
    accuracy = report.curve.accuracy
    assert accuracy[0] == 1
    assert len(set(accuracy)) > 4
    assert all(larger <= smaller for smaller, larger in pairwise(accuracy))


def test_progress_never_goes_backwards(monkeypatch):
    seen, run = [], Cascade.run

    def watched(self, stage, images, **options):
        run(self, stage, images, **options)
        seen.append((self.bar.n, self.bar.total))

    monkeypatch.setattr(Cascade, "run", watched)
    monkeypatch.setattr(evaluation_run, "tqdm", partial(tqdm, disable=False, file=StringIO()))
    model, data = curved_case()
    evaluate(model, data, attacks=default_attacks(strength="full"), checks=("transfer",))
    shares = [done / total for done, total in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    totals = [total for _, total in seen]
    assert totals == sorted(totals, reverse=True)
    assert len(seen) > 15


def test_worst_case_is_per_image_and_smaller_balls_belong_to_larger_ones():
    @dataclass(frozen=True, kw_only=True)
    class Breaks(Attack):
        """Moves images across the linear model's boundary where their pixel sum is divisible."""

        by: int

        def perturb(self, model, images, labels, keys):
            chosen = (images * 255).round().flatten(1).sum(1) % self.by == 0
            towards = (1 - 2 * labels).view(-1, 1) * model.weight.sign()
            return torch.where(chosen.view(-1, 1), images.flatten(1) + self.eps * towards, images.flatten(1)).view_as(images)

    model, data, signed = linear_case()
    two, three = (data.images.flatten(1).sum(1).numpy() % by == 0 for by in (2, 3))
    attacks = {"two": Breaks(eps=0.25, by=2), "three": Breaks(eps=0.2, by=3)}
    report = evaluate(model, data, attacks=attacks, curve=None, checks=False, progress=False)
    right = signed > 0
    assert (two & ~three & right).any()
    assert (three & ~two & right).any()
    assert report.worst_case["Linf 0.25"].attacks == ("two", "three")
    assert report.worst_case["Linf 51/255"].attacks == ("three",)
    assert report.worst_case["Linf 0.25"].correct == (right & ~two & ~three).sum()
    assert sum(row.robust_correct for row in report.per_class) == (right & ~two & ~three).sum()
    np.testing.assert_array_equal(report.standing("Linf 0.25"), right & ~two & ~three)
    np.testing.assert_array_equal(report.standing("Linf 51/255"), right & ~three)


@pytest.mark.parametrize(("num_classes", "channels", "size"), [(2, 1, 8), (3, 3, 8), (3, 1, 100)])
def test_every_default_attack_runs_on_few_classes_one_channel_and_large_images(num_classes, channels, size):
    images = torch.randint(0, 256, (9, channels, size, size), dtype=torch.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, num_classes)).eval()
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    data = ImageData(labels, tuple("abc"[:num_classes]), images)
    attacks = default_attacks(1 / 255, beside_l2=0.01, strength="full")
    attacks |= {name: replace(attacks[name], steps=5) for name in ("APGD-T", "FAB-T")}
    attacks["Square"] = replace(attacks["Square"], queries=20)
    report = evaluate(model, data, attacks=attacks, curve=(0, 1 / 255), progress=False)
    assert report.clean.correct == 9
    assert report.robust.correct <= report.attacks["PGD-100"].correct
    assert list(report.worst_case) == ["Linf 1/255", "L2 0.01"]
    assert not [check for check in report.checks if check.status in ("warn", "fail")]


def test_options_are_the_arguments():
    """Those that RobustFineTuner.evaluate passes on."""
    arguments = set(inspect.signature(evaluate).parameters) - {"model", "data", "source_report"}
    assert set(EvaluationOptions.__annotations__) == arguments


def test_a_model_for_other_images_is_refused_in_words():
    _, data, _ = linear_case()
    channels = data.get(torch.arange(1)).shape[1]
    other = nn.Sequential(nn.Conv2d(channels + 1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(
        ValueError, match=rf"expected a model for images \[{channels}, .*, as the data have, got one that fails: "
    ):
        evaluate(other, data, attacks=FEW, progress=False)


def test_a_failed_check_is_said_in_the_log(caplog):
    class Rounding(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            rounded = (images * 8).round() / 8
            return self.model(images + (rounded - images).detach() * 1.0) * 1e6

    model, data, _ = linear_case()
    report = evaluate(Rounding(model).eval(), data, attacks=FEW, curve=None, progress=False)
    assert report.failed_checks
    assert report.mistrust in caplog.text


def test_strength():
    model, data, _ = linear_case()
    report = evaluate(model, data, strength="quick", checks=False, progress=False)
    assert list(report.attacks) == ["FGSM", "PGD-20", "PGD-20 L2"]
    assert report.curve is None
    report = evaluate(model, data, strength="quick", curve=(0, EPS), checks=False, progress=False)
    assert report.curve.eps == (0, EPS)
    with pytest.raises(ValueError, match="expected attacks or their strength, got both"):
        evaluate(model, data, attacks=FEW, strength="quick")


ODD = {
    "nothing": lambda images: images,
    "units": lambda images: images + 0.5,
    "one": lambda images: images[:1],
    "double": lambda images: images.double(),
    "none": lambda images: None,
}


@dataclass(frozen=True, kw_only=True)
class Odd(Attack):
    """An attack with a mistake."""

    mistake: str

    def perturb(self, model, images, labels, keys):
        return ODD[self.mistake](images)


@pytest.mark.parametrize("mistake", ["nothing", "units"])
def test_attacks_that_fail_for_a_technical_reason_are_found_out(mistake):
    model, data = curved_case()
    odd = Odd(eps=EPS, mistake=mistake)
    report = evaluate(model, data, attacks={"odd": odd}, curve=None, checks=("reported-attacks",), progress=False)
    (check,) = report.failed_checks
    assert check.name == "reported-attacks"
    assert check.figures["accuracy, all attacks of the report"] == report.robust.accuracy == report.clean.accuracy
    assert check.figures["accuracy, PGD-20"] < report.robust.accuracy - 0.2
    assert "PGD-20 left" in report.mistrust
    attacks = {"odd": odd, "PGD": PGD(eps=EPS, step_size=EPS / 4, steps=20)}
    honest = evaluate(model, data, attacks=attacks, curve=None, checks=("reported-attacks",), progress=False)
    assert honest.failed_checks == []
    assert [check.status for check in honest.checks] == ["pass", "pass"]


@pytest.mark.parametrize(("mistake", "got"), [("one", r"float32 \[1, 3, 4, 4\]"), ("double", "float64"), ("none", "NoneType")])
def test_an_attack_must_return_an_image_for_each(mistake, got):
    model, data = curved_case()
    with pytest.raises(ValueError, match=f"expected torch.float32 .* from Odd, an image for each one, got .*{got}"):
        evaluate(model, data, attacks={"odd": Odd(eps=EPS, mistake=mistake)}, curve=None, checks=False, progress=False)


def test_images_may_be_part_of_a_graph():
    model, data = curved_case()
    images = (data.images.float() / 255).requires_grad_()
    options = {"attacks": FEW, "curve": None, "checks": False, "progress": False}
    assert evaluate(model, (images, data.labels), **options).clean == evaluate(model, data, **options).clean


def test_a_scripted_module_is_refused_at_once():
    _, data = curved_case()
    scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(48, 4))).eval()
    with pytest.raises(TypeError, match="expected a module that is no TorchScript"):
        evaluate(scripted, data, attacks=FEW, checks=False, progress=False)


def test_default_attacks():
    assert default_attacks() == default_attacks(strength="standard")
    names = {strength: list(default_attacks(strength=strength)) for strength in ("quick", "standard", "full")}
    assert names == {
        "quick": ["FGSM", "PGD-20", "PGD-20 L2"],
        "standard": ["FGSM", "PGD-20", "PGD-100", "APGD-T", "PGD-20 L2"],
        "full": ["FGSM", "PGD-20", "PGD-100", "APGD-CE", "APGD-T", "FAB-T", "Square", "PGD-20 L2"],
    }
    full = default_attacks(0.1, beside_l2=1.0, strength="full")
    assert full["APGD-CE"] == APGD(eps=0.1, steps=100, loss="ce")
    assert full["APGD-T"] == APGDT(eps=0.1, steps=100, num_targets=9)
    assert full["FAB-T"] == FABT(eps=0.1, steps=100, num_targets=9)
    assert full["Square"] == Square(eps=0.1, queries=5000)
    assert full["PGD-20"] == PGD(eps=0.1, step_size=0.025, steps=20)
    assert full["PGD-20 L2"] == PGD(eps=1.0, step_size=0.125, steps=20, norm="L2")
    in_l2 = default_attacks(1.0, norm="L2", strength="full")
    assert {(attack.norm, attack.eps) for attack in in_l2.values()} == {("L2", 1.0)}
    assert list(in_l2) == [f"{name} L2" for name in names["full"][:-1]]
    assert default_attacks(norm="L2") == default_attacks(0.5, norm="L2")
    assert list(default_attacks(strength="quick", beside_l2=None)) == ["FGSM", "PGD-20"]
    for wrong in ({"norm": "L1"}, {"strength": "strong"}):
        with pytest.raises(ValueError, match=r"expected a norm of \('Linf', 'L2'\) and a strength of .*, got"):
            default_attacks(**wrong)


# Batches and survivors


def test_more_steps_on_survivors_are_the_same_as_on_all():
    short, long = PGD(eps=EPS, step_size=EPS / 4, steps=3), PGD(eps=EPS, step_size=EPS / 4, steps=30)
    model, data = curved_case()
    alone = evaluate(model, data, attacks={"long": long}, curve=None, checks=False, progress=False)
    seen_alone, model.seen = model.seen, 0
    both = evaluate(model, data, attacks={"short": short, "long": long}, curve=None, checks=False, progress=False)
    assert model.seen < 1.1 * seen_alone + len(data)  # the short attack took little beside the long one's own steps
    np.testing.assert_array_equal(both.verdicts.correct["long"], alone.verdicts.correct["long"])
    assert 0 < both.attacks["long"].correct < both.attacks["short"].correct < len(data)


@pytest.mark.parametrize(
    ("change", "of_both"),
    [
        ({"eps": 2 * EPS}, {}),
        ({"step_size": EPS / 2}, {}),
        ({"random_start": False}, {}),
        ({"norm": "L2"}, {}),
        ({}, {"restarts": 2}),
    ],
    ids=["eps", "step_size", "random_start", "norm", "restarts"],
)
def test_other_attacks_get_all_images(change, of_both, monkeypatch):
    model, data, signed = linear_case()
    settings = {"eps": EPS, "step_size": EPS} | of_both
    shorter, longer = PGD(**settings, steps=1), PGD(**(settings | change), steps=5)
    attacked = []
    search = PGD.__call__

    def counted(self, model, images, labels, keys=None, *, until_broken=False):
        attacked.append((self, len(images)))
        return search(self, model, images, labels, keys, until_broken=until_broken)

    monkeypatch.setattr(PGD, "__call__", counted)
    evaluate(model, data, attacks={"shorter": shorter, "longer": longer}, curve=None, checks=False, progress=False)
    assert attacked == [(shorter, (signed > 0).sum()), (longer, (signed > 0).sum())]


def test_verdicts_do_not_depend_on_the_batch_size_and_batches_stay_full():
    model, data = curved_case()
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    whole = evaluate(model, data, attacks=FEW, checks=False, progress=False)
    sizes.clear()
    parts = evaluate(model, data, attacks=FEW, batch_size=7, checks=False, progress=False)
    assert max(sizes) == 7
    for name in whole.verdicts.correct:
        np.testing.assert_array_equal(parts.verdicts.correct[name], whole.verdicts.correct[name], err_msg=name)
    assert parts.curve == whole.curve


def test_processes_must_measure_the_same_model(monkeypatch):
    monkeypatch.setattr(evaluation_run, "gather", lambda identity: [identity, identity.replace('"weights"', '"others"')])
    with pytest.raises(ValueError, match="expected the same model, attacks and settings in all processes"):
        evaluate(*curved_case(), attacks=FEW, progress=False)


def test_seed_decides_the_random_starts():
    model, data = curved_case()
    attacks = {"PGD-1": PGD(eps=EPS, step_size=0.0, steps=1)}  # the start alone

    def verdicts(seed):
        return evaluate(model, data, attacks=attacks, curve=None, seed=seed, checks=False, progress=False).verdicts.correct[
            "PGD-1"
        ]

    np.testing.assert_array_equal(verdicts(0), verdicts(0))
    assert any((verdicts(0) != verdicts(seed)).any() for seed in range(1, 6))


def test_num_images_takes_a_share_of_each_class():
    model, data, signed = linear_case()
    order = data.labels.argsort(stable=True)  # as a folder of classes is read
    data, signed = data.subset(order), signed[order]
    attacks = {"PGD-1": PGD(eps=0.3, step_size=1e-6, steps=1)}  # where an image ends is where it starts

    def measured(**options):
        return evaluate(model, data, attacks=attacks, curve=None, batch_size=5, checks=False, progress=False, **options)

    whole, few, fewer = measured(), measured(num_images=13), measured(num_images=6)
    indices = few.verdicts.indices
    assert set(fewer.verdicts.indices) < set(indices) < set(range(len(data)))
    present = data.labels.bincount()
    assert np.abs(np.bincount(few.verdicts.labels) - 13 * present.numpy() / len(data)).max() < 1
    assert (few.num_images, few.complete, few.data["sampled_from"]) == (13, False, len(data))
    assert f"13 images (of {len(data)}, each class in proportion)" in few.sentence
    np.testing.assert_array_equal(few.verdicts.correct["clean"], signed[indices] > 0)
    np.testing.assert_array_equal(few.verdicts.correct["PGD-1"], whole.verdicts.correct["PGD-1"][indices])
    everything = measured(num_images=len(data))
    assert everything.complete
    assert "sampled_from" not in everything.data
    assert "first" not in everything.sentence


class WithTargets(Dataset):
    """As torchvision's are."""

    def __init__(self, images, labels):
        self.images, self.targets = images, labels.tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


class WithoutTargets(WithTargets):
    def __init__(self, images, labels):
        super().__init__(images, labels)
        self.classes_of_images = self.__dict__.pop("targets")

    def __getitem__(self, index):
        return self.images[index], self.classes_of_images[index]


def test_num_images_of_a_data_set_of_pytorch_are_a_share_of_each_class():
    model, data, signed = linear_case()
    order = data.labels.argsort(stable=True)  # as a folder of classes is read
    data, signed = data.subset(order), signed[order]
    expected = evaluate(model, data, attacks=FEW, curve=None, num_images=13, checks=False, progress=False).verdicts
    tensors = (data.images, data.labels)
    subset = Subset(WithTargets(*tensors), range(len(data)))
    for given in (tensors, TensorDataset(*tensors), WithTargets(*tensors), DataLoader(WithTargets(*tensors), 4), subset):
        found = evaluate(model, given, attacks=FEW, curve=None, num_images=13, checks=False, progress=False)
        np.testing.assert_array_equal(found.verdicts.indices, expected.indices)
        np.testing.assert_array_equal(found.verdicts.correct["clean"], expected.correct["clean"])
        assert "each class in proportion" in found.sentence
    found = evaluate(model, WithoutTargets(*tensors), attacks=FEW, curve=None, num_images=13, checks=False, progress=False)
    assert np.diff(found.verdicts.indices).max() - np.diff(found.verdicts.indices).min() <= 1
    np.testing.assert_array_equal(found.verdicts.correct["clean"], signed[found.verdicts.indices] > 0)
    assert "evenly spaced" in found.sentence


def test_num_images_of_a_loader_in_an_order_of_its_own_are_the_first():
    model, data, signed = linear_case()
    sampler = BatchSampler(range(len(data)), 5, drop_last=False)
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_sampler=sampler)
    report = evaluate(model, loader, attacks=FEW, curve=None, num_images=13, checks=False, progress=False)
    assert report.verdicts.indices.tolist() == list(range(13))
    assert (report.num_images, report.complete) == (13, False)
    assert "on the first 13 images of" in report.sentence
    np.testing.assert_array_equal(report.verdicts.correct["clean"], signed[:13] > 0)


def test_stream_is_measured_like_images_in_memory():
    model, data, _ = linear_case()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"image": pictures, "label": data.labels.tolist()}, features=features)
    stream = StreamingData(
        table.to_iterable_dataset(), ("no", "yes"), data.policy, "image", "label", description=data.description
    )
    report = evaluate(model, stream, attacks=FEW, batch_size=16, checks=False, progress=False)
    held = evaluate(model, data, attacks=FEW, batch_size=16, checks=False, progress=False)
    assert report.complete
    for name in held.verdicts.correct:
        np.testing.assert_array_equal(report.verdicts.correct[name], held.verdicts.correct[name])
    part = StreamingData(table.to_iterable_dataset(), ("no", "yes"), data.policy, "image", "label", part=(0.0, 0.5))
    indices = evaluate(model, part, attacks=FEW, curve=None, num_images=10, checks=False, progress=False).verdicts.indices
    assert len(indices) == 10
    assert indices.max() > 9  # positions in the stream, not in the part


# Verification


@dataclass(frozen=True, kw_only=True)
class Leaves(Attack):
    """Shifts images by more than it states, or to a value that is no pixel."""

    shift: float

    def perturb(self, model, images, labels, keys):
        return images + self.shift * ((1 - 2 * labels).view(-1, 1) * model.weight.sign()).view_as(images)


@dataclass(frozen=True, kw_only=True)
class ReturnsNaN(Attack):
    def perturb(self, model, images, labels, keys):
        return torch.full_like(images, torch.nan)


@pytest.mark.parametrize(
    "attack",
    [
        Leaves(eps=0.2, shift=0.25),
        Leaves(eps=0.25 * 48**0.5 - 0.1, shift=0.25, norm="L2"),
        Leaves(eps=1.0, shift=0.9),
        ReturnsNaN(eps=1.0),
    ],
    ids=["ball", "L2 ball", "pixels", "nan"],
)
def test_images_outside_the_threat_model_break_nothing(attack, caplog):
    model, data, signed = linear_case()
    report = evaluate(model, data, attacks={"leaves": attack}, curve=None, checks=False, progress=False)
    assert report.attacks["leaves"].correct == report.clean.correct
    assert report.attacks["leaves"].rejected == (signed > 0).sum()
    assert "moved images out" in caplog.text
    inside = evaluate(model, data, attacks={"stays": Leaves(eps=0.25, shift=0.25)}, curve=None, checks=False, progress=False)
    assert inside.attacks["stays"].correct < inside.clean.correct
    assert inside.attacks["stays"].rejected == 0


def test_samples_are_broken_images_of_different_classes():
    model, data = curved_case()
    report = evaluate(model, data, attacks=FEW, curve=None, checks=False, progress=False)
    assert len(report.samples) == 8
    assert report.attacks["PGD-3"].correct <= report.attacks["FGSM"].correct  # of two that broke as many, the later one
    assert {sample.label for sample in report.samples} == set(data.labels[~report.verdicts.correct["PGD-3"]].tolist())
    for sample in report.samples:
        assert sample.attack == "PGD-3"
        assert sample.label == data.labels[sample.index]
        images = torch.from_numpy(np.stack([sample.image, sample.adversarial]))
        assert model(images).argmax(1).tolist() == [sample.label, sample.predicted]
        assert sample.label != sample.predicted
        assert np.abs(sample.adversarial - sample.image).max() <= EPS + 1e-6
        assert 0 <= sample.perturbation.min() < sample.perturbation.max() <= 1


def test_images_of_many_channels_have_no_samples():
    model, data, _ = linear_case(channels=5)
    assert evaluate(model, data, attacks=FEW, curve=None, checks=False, progress=False).samples == ()


# What is refused


@pytest.mark.parametrize("train", [lambda model: model, lambda model: model.backbone.bn], ids=["all", "one"])
def test_train_mode_is_refused(train):
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.bn = nn.BatchNorm2d(3)
    model.eval()
    train(model).train()
    with pytest.raises(ValueError, match=r"train mode \(.*\); call model.eval\(\) first"):
        evaluate(model, linear_case()[1], checks=False, progress=False)


@pytest.mark.parametrize("num_images", [2, 60])
def test_statistics_of_the_batch_are_refused(num_images):
    layers = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(48, 2)).eval()
    with pytest.raises(ValueError, match=r"expected logits that depend on one image each, .*use stored statistics"):
        evaluate(layers, linear_case(num_images)[1], attacks=FEW, checks=False, progress=False)


class Decides(Linear):
    """Gives classes, not logits."""

    def forward(self, images):
        return nn.functional.one_hot(super().forward(images).argmax(1), 2).float()


def test_logits_without_a_gradient_are_refused_for_attacks_that_need_one():
    _, data, _ = linear_case()
    model = Decides().eval()
    with pytest.raises(ValueError, match=r"expected logits with a gradient in the pixels for FGSM, PGD-3, .*Square, Noise"):
        evaluate(model, data, attacks=FEW, curve=None, progress=False)
    without = {"Square": Square(eps=EPS, queries=5), "noise": Noise(eps=EPS, samples=5)}
    with pytest.raises(ValueError, match="for the curve, got logits without one"):
        evaluate(model, data, attacks=without, progress=False)
    report = evaluate(model, data, attacks=without, curve=None, progress=False)
    assert report.robust.correct < report.clean.correct
    assert {check.name: check.status for check in report.checks}["zero-gradient"] == "fail"


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_images_outside_the_unit_interval_are_refused(value):
    model, data, _ = linear_case()
    images = data.images / 255
    images[11, 0, 1, 2] = value
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\], got image 11 .*leave out the normalisation"):
        evaluate(model, FloatData(images, data.labels), attacks=FEW, batch_size=4, checks=False, progress=False)
    report = evaluate(model, FloatData(data.images / 255, data.labels), attacks=FEW, curve=None, checks=False, progress=False)
    assert report.attacks == evaluate(model, data, attacks=FEW, curve=None, checks=False, progress=False).attacks


def test_integers_that_are_no_bytes_are_refused():
    model, data, _ = linear_case()
    with pytest.raises(ValueError, match=r"uint8 or floats in \[0, 1\], got torch.int64"):
        evaluate(model, FloatData(data.images.long(), data.labels), attacks=FEW, checks=False, progress=False)


def test_logits_of_another_shape_are_refused():
    _, data, _ = linear_case()
    for head, got in ((nn.Linear(48, 3), r"\[60, 3\]"), (nn.Identity(), r"\[60, 48\]"), (nn.LSTM(48, 2), "tuple")):
        model = nn.Sequential(nn.Flatten(), head).eval()
        with pytest.raises(ValueError, match=rf"expected logits \[60, 2\].*got {got}; wrap the model"):
            evaluate(model, data, attacks=FEW, checks=False, progress=False)


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_outside_the_classes_are_refused(label):
    model, data, _ = linear_case()
    data.labels[3] = label
    with pytest.raises(ValueError, match="expected labels from 0 to 1"):
        evaluate(model, data, attacks=FEW, checks=False, progress=False)


def test_empty_data_are_refused():
    model, data, _ = linear_case()
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        evaluate(model, data.subset([]), attacks=FEW, checks=False, progress=False)


def test_logits_that_are_not_finite_are_refused_with_the_images():
    class Overflows(Linear):
        def forward(self, images):
            logits = super().forward(images)
            bad = (images[:, 0, 0, 0] * 255).round() == 255
            return torch.where(bad[:, None], torch.inf, logits)

    _, data, _ = linear_case()
    data.images[[4, 9, 30], 0, 0, 0] = 255
    with pytest.raises(ValueError, match=r"NaN or infinite ones on clean images with index 4, 9, 30; check"):
        evaluate(Overflows().eval(), data, attacks=FEW, checks=False, progress=False)
    data.images[:, 0, 0, 0] = 254
    with pytest.raises(ValueError, match=r"on the images of FGSM with index .* more; check"):
        evaluate(Overflows().eval(), data, attacks={"FGSM": FGSM(eps=1 / 255)}, checks=False, progress=False)


def test_other_precisions_are_refused():
    model, data, _ = linear_case()
    with pytest.raises(ValueError, match=r"expected a model in torch.float32, got weight in torch.bfloat16; call model.float"):
        evaluate(model.bfloat16(), data, attacks=FEW, checks=False, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attacks": {}}, "at least one attack"),
        ({"attacks": {"clean": FGSM(eps=EPS)}}, 'another name for the attack "clean"'),
        ({"attacks": {"label": FGSM(eps=EPS)}}, 'another name for the attack "label"'),
        ({"attacks": {"noisy": NFGSM(eps=EPS)}}, "attacks that stay in their ball, got NFGSM"),
        ({"num_images": 0}, "num_images must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"check_images": 0}, "check_images must be >= 1, got 0"),
        ({"checks": ["determinism", "luck"]}, "expected names of checks, got 'luck'; there are determinism, "),
        ({"keep": True}, "expected resume=, the folder to keep"),
        ({"curve": (0.1, 0.2)}, "rising radii from 0"),
        ({"curve": (0, 0.2, 0.2)}, "rising radii from 0"),
        ({"context": {"loss": float("nan")}}, "expected JSON .* in the context"),
        ({"context": {"model": object()}}, "expected JSON .* in the context"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_batch(arguments, message, monkeypatch):
    model, data, _ = linear_case()
    monkeypatch.setattr(ImageData, "batches", None)
    with pytest.raises(ValueError, match=message):
        evaluate(model, data, **({"attacks": FEW, "checks": False, "progress": False} | arguments))


# What is left as it was


@pytest.mark.parametrize("is_ours", [True, False])
def test_layout_of_the_kernels_is_changed_for_our_networks_only_and_for_the_while(wrn, data, is_ours):
    model = (wrn if is_ours else nn.Sequential(wrn)).eval()
    before = {name: (parameter.data_ptr(), parameter.stride()) for name, parameter in model.named_parameters()}
    seen = set()
    model.register_forward_pre_hook(lambda module, inputs: seen.add(kernel.is_contiguous(memory_format=torch.channels_last)))
    kernel = next(parameter for parameter in wrn.parameters() if parameter.ndim == 4)
    evaluate(model, data, attacks=FEW, num_images=4, curve=None, checks=False, progress=False)
    assert seen == {is_ours}
    assert before == {name: (parameter.data_ptr(), parameter.stride()) for name, parameter in model.named_parameters()}


class CallsBackward(Attack):
    def perturb(self, model, images, labels, keys):
        images = images.clone().requires_grad_(True)
        model(images).sum().backward()
        return images.detach()


def test_nothing_changes(wrn, data):
    wrn.eval()
    first, *_ = wrn.parameters()
    first.requires_grad_(False)
    required = [parameter.requires_grad for parameter in wrn.parameters()]
    before = {name: tensor.clone() for name, tensor in wrn.state_dict().items()}
    state, switches = torch.get_rng_state(), (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    attacks = FEW | {"backward": CallsBackward(eps=EPS)}
    report = evaluate(wrn, data, attacks=attacks, num_images=4, curve=(0, EPS), checks=False, progress=False)
    assert report.num_images == 4
    assert [parameter.requires_grad for parameter in wrn.parameters()] == required
    assert all(parameter.grad is None for parameter in wrn.parameters())
    assert not any(module.training for module in wrn.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrn.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == switches


@pytest.mark.parametrize("chosen", ["older", "newer"])
def test_fp32_inside_and_the_switches_as_before(chosen):
    matmul, conv = torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None)
    if chosen == "newer" and conv is None:
        pytest.skip("this torch has the older switches alone")
    seen = []

    class Looks(Linear):
        def forward(self, images):
            if chosen == "older":
                seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            else:
                seen.append((matmul.fp32_precision, conv.fp32_precision))
            seen.append((images.float() @ images.float().mT).dtype)
            return super().forward(images)

    _, data, _ = linear_case()
    if chosen == "older":
        torch.set_float32_matmul_precision("high")
        before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    else:
        before = (matmul.fp32_precision, conv.fp32_precision)
        matmul.fp32_precision = "tf32"
    try:
        for failing in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if failing:
                    with pytest.raises(ValueError, match="finite"):
                        evaluate(Looks().eval().apply(_spoil), data, attacks=FEW, checks=False, progress=False)
                else:
                    evaluate(Looks().eval(), data, attacks=FEW, num_images=4, curve=None, checks=False, progress=False)
            if chosen == "older":
                assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
            else:
                assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", before[1])
        assert set(seen) == {("highest", False) if chosen == "older" else ("ieee", "ieee"), torch.float32}
    finally:
        if chosen == "older":
            torch.set_float32_matmul_precision("highest")
        else:
            matmul.fp32_precision = before[0]


def _spoil(module: nn.Module) -> None:
    module.weight.data.fill_(torch.nan)


def test_an_error_leaves_the_parameters_as_they_were():
    model, data, _ = linear_case()
    data.labels[-1] = 9
    with pytest.raises(ValueError, match="labels"):
        evaluate(model, data, attacks=FEW, batch_size=8, checks=False, progress=False)
    assert model.weight.requires_grad


def test_report_says_what_was_measured():
    model, data, _ = linear_case()
    context = {"id": "linear.toy", "notes": ("a note",)}
    report = evaluate(model, data, attacks=FEW, seed=3, context=context, checks=False, progress=False)
    assert report.sentence == "linear.toy was measured on 60 images of toy, split: test, with seed 3."
    assert report.context == {"id": "linear.toy", "notes": ["a note"]}
    assert report.attacks["PGD-3"].attack["steps"] == 3
    assert {"python", "torch", "timm", "cartl_hub", "device", "threads", "seconds", "date"} <= report.environment.keys()
    assert [check.name for check in report.checks] == ["second-verdict"]


def test_data_that_is_not_ours_is_explained(wrn):
    for measure in (evaluate, run_checks):
        with pytest.raises(TypeError, match=r"expected what load_splits makes, a DataLoader .* got list; load_test_split"):
            measure(wrn.eval(), [1, 2], progress=False)


class Pictures(Dataset):
    """As torchvision's: single images in [0, 1] with their labels, and the names of the classes."""

    classes = ("ant", "bee", "cat")

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data.images[index].float() / 255, int(self.data.labels[index])


class Flipped(Pictures):
    """With a random transform."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.flip(2) if torch.rand(()) < 0.5 else image, label


def test_data_of_pytorch(wrn, data):
    settings = {"attacks": FEW, "curve": None, "checks": False, "progress": False}
    wrn.eval()
    expected = evaluate(wrn, data, **settings)
    pictures = Pictures(data)
    loaders = DataLoader(pictures, batch_size=6, drop_last=True), DataLoader(Subset(pictures, range(len(data))), batch_size=5)
    for given in (pictures, *loaders, (data.images, data.labels), [data.images.float() / 255, data.labels]):
        report = evaluate(wrn, given, **settings)
        assert (report.clean, report.attacks) == (expected.clean, expected.attacks)
        np.testing.assert_array_equal(report.verdicts.correct["PGD-3"], expected.verdicts.correct["PGD-3"])
        assert report.label_names == (("0", "1", "2") if isinstance(given, (tuple, list)) else Pictures.classes)
    assert run_checks(wrn, pictures, names=["determinism"], num_images=4, progress=False)[0].status == "pass"
    pictures.dataset = TensorDataset(torch.zeros(1))  # of a wrapper with classes of its own
    pictures.dataset.classes = ["z", "y", "x"]
    assert evaluate(wrn, pictures, **settings).label_names == Pictures.classes
    with pytest.raises(DataError, match="labels that are whole numbers, got torch"):
        evaluate(wrn, (data.images, data.labels.float() + 0.7), **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: DataLoader(Pictures(data), shuffle=True), "expected a DataLoader that keeps the order"),
        (lambda data: DataLoader(Pictures(data), batch_size=5, drop_last=True), "one that leaves 4 of the last ones out"),
        (lambda data: DataLoader(Flipped(data), batch_size=5), "other ones the second time: transforms are random"),
        (lambda data: Flipped(data), "other ones the second time"),
        (
            lambda data: DataLoader(
                Pictures(data), batch_sampler=BatchSampler(RandomSampler(range(24)), batch_size=6, drop_last=False)
            ),
            "or the order is; evaluate with fixed transforms",
        ),
        (lambda data: (data.images, data.labels[:2]), "expected a label for each of 24 images, got 2"),
        (lambda data: (data.images[:0], data.labels[:0]), "expected at least one image, got none"),
        (
            lambda data: TensorDataset(data.labels, data.labels),
            r"expected batches of images .*, got \[\[24\], \[24\]\]",
        ),
    ],
)
def test_data_of_pytorch_that_cannot_be_used(make, message, wrn, data):
    with pytest.raises(DataError, match=message):
        evaluate(wrn.eval(), make(data), progress=False)


# Radii and models that are nearly the same


@pytest.mark.parametrize("order", [1, -1])
def test_radii_that_read_the_same_are_one_threat_model(order):
    model, data = curved_case()
    strong, weak = PGD(eps=float(np.float32(EPS)), step_size=EPS, steps=5), FGSM(eps=EPS)
    attacks = dict([("strong", strong), ("weak", weak)][::order])
    report = evaluate(model, data, attacks=attacks, curve=None, checks=False, progress=False)
    assert set(report.worst_case) == {"Linf 8/255"}
    assert set(report.robust.attacks) == {"strong", "weak"}
    assert report.robust.correct == (report.verdicts.correct["strong"] & report.verdicts.correct["weak"]).sum()


class Clamped(nn.Module):
    def __init__(self, model, reach):
        super().__init__()
        self.model, self.reach = model, reach

    def forward(self, images):
        return self.model(images.clamp(0.5 - self.reach, 0.5 + self.reach))


def test_a_model_that_does_something_else_with_its_weights_does_not_resume(tmp_path):
    model, data = curved_case()
    settings = {"attacks": FEW, "curve": None, "checks": False, "progress": False, "resume": tmp_path / "journal", "keep": True}
    whole = evaluate(Clamped(model, 0.5).eval(), data, **settings)
    assert evaluate(Clamped(model, 0.5).eval(), data, **settings).robust == whole.robust
    with pytest.raises(ValueError, match="one of another: logits differ"):
        evaluate(Clamped(model, 0.02).eval(), data, **settings)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attacks": [PGD(eps=EPS, step_size=EPS, steps=1)]}, TypeError, "expected attacks by name, .* got \\[PGD"),
        ({"attacks": {1: FGSM(eps=EPS)}}, TypeError, "expected attacks by name"),
        ({"num_images": 1.5}, ValueError, "num_images must be a whole number, got 1.5"),
        ({"device": "meta"}, ValueError, "expected a device that computes, got meta"),
    ],
)
def test_arguments_of_another_kind(wrn, data, change, error, message):
    with pytest.raises(error, match=message):
        evaluate(wrn.eval(), data, **{"attacks": FEW, "progress": False} | change)
    assert not any(parameter.is_meta for parameter in wrn.parameters())


def test_models_without_weights_and_data_of_one_class(wrn, data):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        evaluate(lambda images: images, data, attacks=FEW)
    with pytest.raises(ValueError, match="on the meta device; load the weights first"):
        evaluate(make_model("wrn10_1").to("meta").eval(), data, attacks=FEW)
    one = ImageData(data.labels * 0, ("all",), data.images)
    with pytest.raises(ValueError, match="expected data of at least 2 classes, got 1"):
        evaluate(make_model("wrn10_1", num_classes=1).eval(), one, attacks=FEW, progress=False)


def test_classes_without_images_are_said(wrn, data):
    few = evaluate(wrn.eval(), data, num_images=1, attacks=FEW, curve=None, checks=False, progress=False)
    assert few.sentence.endswith("Of 3 classes, 2 have no image among them.")


def test_classes_in_another_order_than_the_models_are_refused():
    data, model = toy_data(12), make_model("wrn10_1").eval()
    model.label_names = tuple(reversed(data.label_names))
    with pytest.raises(ValueError, match=r"expected 'a' as class 2, as in the model's label_names, got data in which it is 0"):
        evaluate(model, data, attacks={"FGSM": FGSM(eps=0.1)}, curve=None, checks=False, progress=False)
    model.label_names = data.label_names
    evaluate(model, data, attacks={"FGSM": FGSM(eps=0.1)}, curve=None, checks=False, progress=False)


def test_grey_images_are_not_spread_over_the_channels_of_a_model():
    images, labels, model = torch.rand(4, 1, 32, 32), torch.zeros(4, dtype=torch.int64), make_model("wrn10_1").eval()
    with pytest.raises(ValueError, match=r"expected images with 3 channels, got \["):
        evaluate(model, (images, labels), attacks={"FGSM": FGSM(eps=0.1)}, curve=None, checks=False, progress=False)
