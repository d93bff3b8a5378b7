"""Each check on a model that it is there for, on honest ones, and in numbers that are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from known_models import EPS, FloatData, curved_case, linear_case
from test_masked_models import OtherGradient, toy
from torch import Tensor, nn

from cartl_hub.attacks import PGD, FeatureDistance
from cartl_hub.data import ImageData
from cartl_hub.evaluation import checks, evaluate
from cartl_hub.evaluation.checks import run_checks, second_verdict, thresholds_table
from cartl_hub.evaluation.probes import CHECKS, REPORTED
from cartl_hub.evaluation.trial import lower, share

SUSPICIOUS = ("warn", "fail")


def flagged(model, data, *names, **settings) -> dict:
    """Status and figures of the checks that are flagged."""
    found = run_checks(model.eval(), data, names=names or None, progress=False, **settings)
    assert [check.name for check in found] == [name for name in CHECKS if name in (names or CHECKS.keys() - {REPORTED})]
    return {check.name: check for check in found if check.status in SUSPICIOUS}


# Statistics


def standing(num, *broken):
    found = np.ones(num, dtype=bool)
    found[list(broken)] = False
    return found


def test_excess_is_paired_and_has_a_direction():
    suspect, reference = {"weak": standing(100, 1, 2, 3, 4, 5, 6)}, {"strong": standing(100, 1, 99)}
    comparison = lower(suspect, reference)
    assert comparison.excess == pytest.approx((5 - 1) / 100)
    assert comparison.error == pytest.approx(math.sqrt(6) / 100)
    assert comparison.figures == {"accuracy, weak": 0.94, "accuracy, strong": 0.98}
    assert lower(reference, suspect).excess == -comparison.excess
    assert share("odd", 9, 36) == (0.25, 3 / 36, {"odd": 0.25})


@pytest.mark.parametrize(
    ("num", "more", "suspicious"),
    [(1000, 5, False), (1000, 6, True), (10_000, 50, False), (10_000, 51, True), (2, 2, False), (100, 4, False), (100, 5, True)],
)
def test_threshold_is_half_a_point_or_two_errors(num, more, suspicious, monkeypatch):
    comparison = lower({"a": standing(num, *range(more))}, {"b": standing(num)})
    probe = CHECKS["more-steps"]
    check = checks._judged("more-steps", probe, [comparison], num)
    assert check.figures["threshold"] == pytest.approx(max(0.005, 2 * math.sqrt(more) / num))
    assert check.status == ("warn" if suspicious else "pass")
    assert (check.meaning, check.remedy) == ((probe.suspicious, probe.remedy) if suspicious else (probe.honest, ""))
    other_way = lower({"b": standing(num)}, {"a": standing(num, *range(more))})
    assert checks._judged("more-steps", probe, [other_way], num).status == "pass"
    both = checks._judged("more-steps", probe, [other_way, comparison], num)
    assert (both.status, both.figures["excess"]) == (check.status, check.figures["excess"])


@pytest.mark.parametrize(("unconfirmed", "status"), [(0, "pass"), (2, "pass"), (5, "pass"), (6, "fail")])
def test_second_verdicts(unconfirmed, status):
    check = second_verdict({"FGSM": 0, "PGD": unconfirmed}, 300, 1000)
    assert (check.status, check.num_images) == (status, 1000)
    assert check.figures["second verdicts"] == 300
    assert check.figures["not confirmed"] == unconfirmed
    assert check.figures["excess"] == unconfirmed / 1000


# Honest models


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_honest_models_pass(norm):
    eps = {"Linf": EPS, "L2": 0.1}[norm]
    for model, data in (linear_case()[:2], curved_case()):
        assert flagged(model, data, eps=eps, norm=norm, transfer_source=curved_case()[0].eval()) == {}


class Grey(nn.Module):
    """Sees whether an image is brighter than grey; on images of 0.25 and 0.75 it is robust up to 0.25."""

    def forward(self, images):
        margin = 10 * (images.flatten(1).mean(1) - 0.5)
        return torch.stack([-margin, margin], 1)


def grey_case():
    images = torch.full((40, 1, 4, 4), 0.25)
    images[::2] = 0.75
    return Grey(), FloatData(images, (torch.arange(40) % 2 == 0).long())


def test_a_model_that_is_robust_up_to_grey_passes():
    model, data = grey_case()
    assert flagged(model, data) == {}
    (check,) = run_checks(model, data, names=["large-radius"], progress=False)
    assert check.figures["accuracy"] == 0


# What each check is there for


class Wrapped(nn.Module):
    """A model and what is done to its input or output."""

    def __init__(self, model, before=lambda images: images, after=lambda logits: logits):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.model(self.before(images)))


def noisy(images):
    return images + 0.01 * torch.randn_like(images)


def coarse(images):
    return (images * 16).round() / 16


def one_hot(logits):
    return nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()


CASES = {
    "determinism": {"before": noisy},
    "zero-gradient": {"before": coarse},
    "zero-gradient of classes": {"after": one_hot},
    "small-gradient": {"after": lambda logits: 10 * torch.tanh(40 * logits)},
    "dead-pixels": {"before": lambda images: images.clamp(0.45, 0.55)},
    "logit-range below": {"after": lambda logits: 1e-4 * logits},
    "logit-range above": {"after": lambda logits: 1e5 * logits},
    "logit-range of probabilities": {"after": lambda logits: logits.softmax(1)},
    "logit-scale": {"after": lambda logits: 1e4 * logits},
    "ce-against-dlr": {"after": lambda logits: 1e4 * logits},
    "attack-order": {"before": coarse},
    "gradient-free": {"before": coarse},
    "transfer": {"before": coarse},
}


@pytest.mark.parametrize("case", CASES)
def test_masked_model_is_flagged(case):
    model, data = curved_case()
    name = case.partition(" ")[0]
    assert name in flagged(Wrapped(model, **CASES[case]), data, name, transfer_source=model)
    assert flagged(model, data, name, transfer_source=model) == {}


def test_attack_that_has_not_converged_is_flagged():
    class Staircase(nn.Module):
        """Pixels must be raised one after the other: the gradient is that of the first one which isn't up yet."""

        def forward(self, images):
            flat = images.flatten(1) - 0.5
            up = (flat > EPS / 2).long().cumprod(1).sum(1)
            height = up + flat.gather(1, up[:, None].clamp(max=63)).squeeze(1) / EPS
            margin = 0.05 * (12 - height)
            return torch.stack([margin, -margin], 1)

    data = FloatData(torch.full((30, 1, 8, 8), 0.5), torch.zeros(30, dtype=torch.int64))
    found = flagged(Staircase(), data, "more-steps", "rising-loss")
    assert {name: check.status for name, check in found.items()} == {"more-steps": "warn", "rising-loss": "warn"}
    assert 0.05 < found["rising-loss"].figures["excess"] < 0.2


def test_robustness_that_rises_with_the_radius_is_flagged():
    class Misled(nn.Module):
        """Long steps lead into a corner in which the loss is low, short ones to the border."""

        def forward(self, images):
            mean = images.flatten(1).mean(1) - 0.5
            margin = torch.where(mean.abs() < 0.6 * EPS, EPS / 4 - mean.abs(), mean.abs() * 10)
            return torch.stack([margin, -margin], 1)

    data = FloatData(torch.full((40, 1, 4, 4), 0.5) + 0.001, torch.zeros(40, dtype=torch.int64))
    found = flagged(Misled(), data, "eps-order")
    assert found["eps-order"].status == "fail"


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_accuracy_left_at_grey_is_flagged(norm):
    model, data = grey_case()
    found = flagged(Wrapped(model, before=coarse), data, "large-radius", norm=norm)
    assert found["large-radius"].figures["accuracy"] > found["large-radius"].figures["share of the largest class"]
    assert flagged(model, data, "large-radius", norm=norm) == {}


# What is skipped and what is refused


def test_what_cannot_be_made_is_skipped():
    model, data = curved_case()
    found = {check.name: check for check in run_checks(Wrapped(model, after=one_hot).eval(), data, progress=False)}
    for name in ("attack-order", "gradient-free", "more-steps", "large-radius"):
        assert (found[name].status, found[name].figures) == ("skipped", {})
        assert "no gradient in the pixels" in found[name].meaning
    assert "no other model" in found["transfer"].meaning
    (check,) = run_checks(Wrapped(model, before=noisy).eval(), data, names=["batch-independence"], progress=False)
    assert (check.status, check.meaning) == ("skipped", "Not made: the model draws random numbers.")
    wrong = ImageData(1 - linear_case()[1].labels.clamp(max=1), ("no", "yes"), linear_case()[1].images)
    wrong.labels[:] = 1 - linear_case()[0](wrong.images / 255).argmax(1)
    statuses = {check.name: check.status for check in run_checks(linear_case()[0], wrong, progress=False)}
    assert statuses["zero-gradient"] == "skipped"
    assert not set(statuses.values()) & set(SUSPICIOUS)


def test_a_norm_without_attacks_is_refused():
    model, data = linear_case()[:2]
    with pytest.raises(ValueError, match=r"norm must be one of \('Linf', 'L2'\), got 'L1'"):
        run_checks(model, data, norm="L1", progress=False)


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(48, 2)).eval()
    with pytest.raises(ValueError, match="depend on one image each"):
        run_checks(model, linear_case()[1], progress=False)
    with pytest.raises(ValueError, match="expected a model in eval mode"):
        run_checks(model.train(), linear_case()[1], progress=False)


def test_other_models_with_other_classes_need_features():
    model, data = curved_case()
    other = curved_case()[0]
    other.layers[-1] = nn.Linear(64, 7)
    (check,) = run_checks(model, data, names=["transfer"], transfer_source=other.eval(), progress=False)
    assert (check.status, "and no features" in check.meaning) == ("skipped", True)
    other.features = lambda images: other.layers[:-1](4 * images - 2)
    (check,) = run_checks(model, data, names=["transfer"], transfer_source=other, progress=False)
    assert check.status == "pass"
    assert check.figures["accuracy, transfer"] < 1


def test_transfer_uses_the_loss_where_classes_are_the_same(monkeypatch):
    model, data = curved_case()
    model.features = None
    monkeypatch.setattr(FeatureDistance, "perturb", None)
    (check,) = run_checks(model, data, names=["transfer"], transfer_source=model, progress=False)
    pgd = evaluate(
        *(model, data), attacks={"PGD-20": PGD(eps=EPS, step_size=EPS / 4, steps=20)}, curve=None, checks=False, progress=False
    )
    assert check.figures["accuracy, transfer"] == pytest.approx(pgd.robust.accuracy, abs=0.1)


# As a part of the evaluation, and in the documentation


def test_evaluation_makes_the_same_checks():
    model, data = curved_case()
    attacks = {"PGD": PGD(eps=2 * EPS, step_size=EPS, steps=2)}
    report = evaluate(model, data, attacks=attacks, curve=None, check_images=30, seed=4, batch_size=9, progress=False)
    settings = {"num_images": 30, "eps": 2 * EPS, "seed": 4, "batch_size": 9, "progress": False}
    assert report.checks[:-2] == run_checks(model, data, **settings)
    assert {check.num_images for check in report.checks[:-1]} == {30}
    some = evaluate(model, data, attacks=attacks, curve=None, checks=["eps-order", "determinism"], progress=False)
    assert [check.name for check in some.checks] == ["determinism", "eps-order", "second-verdict"]


def test_cost_is_what_the_documentation_says():
    images = torch.full((10, 1, 2, 2), 0.5)

    class Robust(nn.Module):
        """Nothing changes its mind, and the other model's neither."""

        passes = 0

        def forward(self, images):
            self.passes += len(images)
            margin = 100 + images.flatten(1).mean(1)
            return torch.stack([margin, 0 * margin], 1)

    model = Robust().eval()
    run_checks(model, FloatData(images, torch.zeros(10, dtype=torch.int64)), transfer_source=Robust().eval(), progress=False)
    assert "at most about 800 passes for each image" in " ".join(run_checks.__doc__.split())
    assert 700 < model.passes / 10 < 850, model.passes


def test_every_check_is_in_the_tables():
    assert all(probe.flagged in SUSPICIOUS and probe.remedy for probe in CHECKS.values())
    text = (Path(__file__).parent.parent / "cartl_hub" / "evaluation" / "README.md").read_text()
    between = text.partition("<!-- checks: cartl_hub.evaluation.checks.thresholds_table -->\n")[2].partition("\n<!-- end -->")[0]
    assert between == thresholds_table()
    assert thresholds_table().count("\n") == 2 + len(CHECKS)  # the second verdict comes with the attacks


def test_checks_leave_the_model_as_it_was():
    model, data = curved_case()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    run_checks(model, data, transfer_source=curved_case()[0].eval(), progress=False)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_pre_hooks


# Where they say nothing


def test_a_share_of_few_images_says_nothing():
    model, data = toy()
    masked = Wrapped(model, lambda images: OtherGradient.apply(images, torch.neg))
    few = {check.name: check for check in run_checks(masked.eval(), data, num_images=4, progress=False)}
    for name in ("zero-gradient", "gradient-direction", "gradient-differences", "attack-order", "gradient-free", "large-radius"):
        assert few[name].status == "skipped", name
    assert "only 4 of 4 images are classified correctly, and 8 are needed" in few["attack-order"].meaning
    enough = {check.name: check.status for check in run_checks(masked.eval(), data, num_images=32, progress=False)}
    assert enough["gradient-direction"] == enough["gradient-differences"] == "fail"


def test_a_radius_of_zero_is_no_failure():
    model, data = toy()
    found = {check.name: check.status for check in run_checks(model, data, eps=0.0, num_images=32, progress=False)}
    assert "fail" not in found.values()
    assert found["gradient-direction"] == found["attack-order"] == found["eps-order"] == "skipped"
    assert found["gradient-differences"] == "pass"


@pytest.mark.parametrize("after", [lambda logits: logits + 1e6, lambda logits: logits.bfloat16().float()])
def test_differences_that_rounding_hides(after):
    model, data = toy()
    (check,) = run_checks(Wrapped(model, after=after).eval(), data, names="gradient-differences", progress=False)
    assert (check.status, "roun" in check.meaning) == ("skipped", True)


def test_images_are_spread_over_sorted_data():
    model, data = toy()
    ordered = data.subset(data.labels.argsort(stable=True))
    (check,) = run_checks(model, ordered, names="large-radius", num_images=32, progress=False)
    assert check.status == "pass"
    (check,) = run_checks(model, ordered.subset(range(20)), names=["large-radius"], progress=False)
    assert (check.status, check.meaning) == ("skipped", "Not made: all of the images are of one class.")


@pytest.mark.parametrize("name", ["num_images", "batch_size"])
def test_numbers_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        run_checks(*toy(), **{name: 0})
