"""The report as data: its statistics, its JSON and the schema of it."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import scipy.stats
from reports import make_report

import cartl_hub
from cartl_hub.attacks import FGSM, PGD
from cartl_hub.evaluation import evaluate
from cartl_hub.report import Report
from cartl_hub.report.figures import (
    Accuracy,
    Check,
    ClassAccuracy,
    Curve,
    SourceResult,
    WorstCase,
    paired_bootstrap,
    wilson_interval,
)
from cartl_hub.report.results import SCHEMA, plain_json
from cartl_hub.report.words import eps_text, text

CHECK = Check("steps", "warn", {"difference": 0.1}, "Twice the steps break more.", "Run more steps.", 40)
SOURCE = SourceResult("wrn.source", "somebody/else", "Linf 8/255", Accuracy(80, 100), Accuracy(40, 100), ("PGD-20",))
CARDS = sorted((Path(__file__).parent.parent / "model_cards").glob("*/report.json"))
OLD = Path(__file__).parent / "report_of_version_1"  # one of wrn16_2.fdm4_cifar100, as that version measured it


# Statistics


@pytest.mark.parametrize(
    ("correct", "num", "low", "high"),
    [  # from Newcombe (1998), table I, method 3, and R's prop.test(correct=FALSE)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(correct, num, low, high):
    assert wilson_interval(correct, num) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("correct", "num", "words"),
    [
        (5320, 10_000, "52.2 to 54.2%"),
        (0, 10_000, "0.0 to 0.04%"),  # no zero that isn't one
        (10_000, 10_000, "99.96 to 100.0%"),
        (0, 1_000_000, "0.0 to 0.0%"),
        (1, 10_000, "0.002 to 0.1%"),
    ],
)
def test_an_interval_in_words(correct, num, words):
    assert Accuracy(correct, num).interval_text == words


def test_paired_bootstrap_finds_what_pairing_shows():
    generator = np.random.default_rng(1)
    a = generator.random(2000) < 0.5
    b = a.copy()
    b[np.flatnonzero(a)[:40]] = False
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(0.02)
    assert low == pytest.approx(0.02 - 1.96 * math.sqrt(0.02 * 0.98 / 2000), abs=1e-3)
    assert high == pytest.approx(0.02 + 1.96 * math.sqrt(0.02 * 0.98 / 2000), abs=1e-3)
    assert paired_bootstrap(a, b) == (difference, low, high)
    assert paired_bootstrap(b, a)[0] == -difference
    assert paired_bootstrap(a, a) == (0, 0, 0)


@pytest.mark.parametrize(("won", "lost", "shown"), [(4, 0, False), (5, 0, False), (6, 0, True), (7, 1, False), (8, 1, True)])
def test_few_images_that_differ_show_nothing(won, lost, shown):
    a, b = np.zeros(1000, dtype=bool), np.zeros(1000, dtype=bool)
    a[:won], b[won : won + lost] = True, True
    assert (scipy.stats.binomtest(won, won + lost).pvalue < 0.05) == shown
    difference, low, high = paired_bootstrap(a, b)
    assert difference == (won - lost) / 1000
    assert (low > 0) == shown
    assert high > difference


def test_paired_bootstrap_is_that_over_images():
    generator = np.random.default_rng(2)
    a, b = generator.random(50) < 0.7, generator.random(50) < 0.5
    drawn = generator.integers(0, 50, (20_000, 50))
    slow = np.quantile(a[drawn].mean(1) - b[drawn].mean(1), [0.025, 0.975])
    assert paired_bootstrap(a, b)[1:] == pytest.approx(slow, abs=0.021)  # one image


def test_paired_bootstrap_refuses_other_images():
    with pytest.raises(ValueError, match=r"the same images.*got \[3\] and \[4\]"):
        paired_bootstrap(np.ones(3, bool), np.ones(4, bool))


def test_mean_of_the_curve_is_interpolated_at_its_end():
    curve = Curve("Linf", (0.0, 0.1, 0.2), (10, 8, 0), 10, {}, 0.15)
    assert curve.mean == pytest.approx((0.9 * 0.1 + 0.6 * 0.05) / 0.15)
    assert replace(curve, mean_eps=0.0).mean == 1.0


@pytest.mark.parametrize(
    ("norm", "eps", "words"),
    [("Linf", 8 / 255, "8/255"), ("Linf", 0.3, "0.3"), ("Linf", 0.5 / 255, "0.001961"), ("L2", 0.2, "0.2"), ("Linf", 0, "0")],
)
def test_radius_in_words(norm, eps, words):
    assert eps_text(norm, eps) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "none"),
        (True, "yes"),
        (1 / 3, "0.3333"),
        ([32, 32], "32, 32"),
        ({}, "none"),
        ({"name": "NEFT", "num_blocks": 4, "beta": 0.4}, "NEFT (num blocks 4, beta 0.4)"),
        ({"size": [8, 8], "mode": "RGB"}, "size 8, 8, mode RGB"),
    ],
)
def test_json_in_words(value, words):
    assert text(value) == words


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {"a": [{1, 2}]}])
def test_plain_json_is_strict(value):
    with pytest.raises(ValueError, match=r"expected JSON .* in the context"):
        plain_json(value, "context")


# What follows from the fields


def test_sentence_says_what_was_measured():
    expected = "wrn.toy (revision r1) was measured on 40 images of somebody/toy, split: test, with seed 0."
    assert make_report().sentence == expected
    assert "on the first 40 images" in make_report(complete=False).sentence


def test_worst_classes_and_worst_checks_come_first():
    rows = (
        ClassAccuracy("a", 10, 9, 5),
        ClassAccuracy("b", 10, 9, 2),
        ClassAccuracy("none", 0, 0, 0),
        ClassAccuracy("c", 10, 8, 2),
    )
    checks = tuple(replace(CHECK, name=status, status=status) for status in ("pass", "skipped", "warn", "fail"))
    report = make_report(per_class=rows, checks=checks)
    assert [row.name for row in report.ranked_classes()] == ["c", "b", "a"]
    assert [check.status for check in report.ranked_checks()] == ["fail", "warn", "pass", "skipped"]


def test_standing_images_are_those_that_no_attack_broke():
    report = make_report()
    expected = np.logical_and.reduce([report.verdicts.correct[name] for name in ("FGSM", "PGD-20", "Square")])
    np.testing.assert_array_equal(report.standing(report.threat), expected)
    assert report.robust.correct == expected.sum()


def test_source_is_told_in_the_threat_model_of_the_target():
    source = make_report()
    second = WorstCase(7, 40, "L2", 0.5, ("PGD-20",))
    source = replace(source, worst_case=source.worst_case | {"L2 0.5": second})
    found = source.as_source("L2 0.5")
    assert (found.id, found.data, found.threat, found.robust.correct, found.attacks, found.num_images) == (
        *("wrn.toy", "somebody/toy", "L2 0.5", 7, ("PGD-20",), 40),
    )
    assert source.as_source("Linf 4/255").threat == "Linf 8/255"


# JSON


def test_round_trip(tmp_path):
    report = make_report(checks=(CHECK,), source=SOURCE, dropped=("Square: 500 of 5,000 queries",))
    report.save(tmp_path)
    loaded = Report.load(tmp_path)
    assert type(loaded) is Report
    assert loaded == report
    assert loaded.attacks["FGSM"].seconds == 1.25  # not compared, as no two runs take the same time
    for name in ("indices", "labels"):
        np.testing.assert_array_equal(getattr(loaded.verdicts, name), getattr(report.verdicts, name))
    assert loaded.verdicts.correct.keys() == report.verdicts.correct.keys()
    for name, row in report.verdicts.correct.items():
        np.testing.assert_array_equal(loaded.verdicts.correct[name], row)
        assert loaded.verdicts.correct[name].dtype == bool
    assert loaded.samples == ()


@pytest.mark.parametrize("change", ["seed", "clean", "attacks", "checks", "source", "dropped"])
def test_reports_that_differ_are_not_equal(change):
    other = {"checks": (CHECK,), "source": SOURCE, "dropped": ("a check",), "clean": Accuracy(1, 40), "seed": 7, "attacks": {}}
    report = make_report()
    assert replace(report, **{change: other[change]}) != report


def test_reports_that_took_another_time_are_equal():
    report = make_report()
    slower = {name: replace(result, seconds=99.0) for name, result in report.attacks.items()}
    assert replace(report, attacks=slower) == report


def test_json_says_accuracies():
    report = make_report()
    content = as_json(report)
    assert (content["$schema"], content["schema_version"]) == (SCHEMA, 2)
    assert content["clean"]["accuracy"] == report.clean.accuracy
    assert content["worst_case"]["Linf 8/255"]["interval"] == list(report.robust.interval)
    assert content["curve"]["mean"] == pytest.approx((0.75 + 0.45) / 2)
    assert content["attacks"]["PGD-20"]["attack"]["steps"] == 20
    assert (content["attacks"]["Square"]["alone"], content["attacks"]["FGSM"]["passes"]) == (False, 72)


def test_reports_of_version_1_are_read():
    content, report = json.loads((OLD / "report.json").read_bytes()), Report.load(OLD)
    for name, result in content["attacks"].items():
        found = report.attacks[name]
        assert (found.correct, found.attack) == (result["correct"], result["attack"])
        assert (found.alone, found.attacked, found.seconds, found.passes) == (True, content["clean"]["correct"], None, None)
    assert (report.checks, report.source, report.dropped) == ((), None, ())
    again = report.to_json()
    assert again.keys() - content.keys() == {"$schema", "source", "dropped"}
    assert json.loads(json.dumps(again["per_image"])) == content["per_image"]


def test_load_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Report.load(tmp_path)
    path = tmp_path / "report.json"
    for content in ("<html>", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(ValueError, match="got something else"):
            Report.load(tmp_path)
    path.write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match=r"expected a report of schema version 1 or 2.*got 99; update cartl_hub"):
        Report.load(tmp_path)
    for version in (1, 2):
        path.write_text(f'{{"schema_version": {version}}}')
        with pytest.raises(ValueError, match="got a damaged one"):
            Report.load(tmp_path)


def change(content: dict, place: tuple, value: object) -> None:
    """Set what lies at a place of JSON."""
    for key in place[:-1]:
        content = content[key]
    content[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("attacks", "FGSM", "attack", "eps"), "8/255", r"attacks\.FGSM\.attack\.eps: '8/255' is not of type 'number'"),
        (("attacks", "FGSM", "attack", "eps"), float("inf"), "not JSON compliant"),
        (("context", "id"), "\ud800", "surrogates not allowed"),
        (("data", "sampled_from"), "many", r"data\.sampled_from"),
        (("per_class",), [], "per_class: expected a row for each of the classes, got 0"),
        (("per_image", "labels"), "0 1", "per_image: expected entries for 40 images"),
        (("per_image", "labels"), " ".join(["3"] * 40), "per_class: expected a row for each of the classes"),
        (("per_image", "correct", "FGSM"), "1", "per_image: expected entries for 40 images"),
        (
            ("per_image", "correct", "other"),
            "1" * 40,
            "got a damaged one .per_image: expected verdicts of clean images and of 3 attacks",
        ),
        (("clean", "correct"), 40, r"clean: expected \d+ of 40 images, as in per_image, got 40 of 40"),
        (("worst_case", "Linf 8/255", "correct"), 40, r"Linf 8/255: expected \d+ of 40 images"),
        (("worst_case", "Linf 8/255", "attacks"), ["APGD-T"], r"worst_case\.Linf 8/255: expected the attacks in"),
        (("worst_case", "Linf 8/255", "attacks"), ["FGSM"], r"worst_case\.Linf 8/255: expected the attacks in"),
        (("worst_case", "Linf 8/255", "eps"), 0.9, r"worst_case\.Linf 8/255: expected the attacks in Linf 0\.9"),
        (("per_image", "indices"), " ".join(["7"] * 40), r"per_image\.indices: expected 40 different ones"),
        (("per_image", "indices"), " ".join(["9" * 400] * 40), "per_image: expected entries for 40 images"),
        (("per_image", "correct", "FGSM"), "1" * 40, "FGSM: expected images to stand that are classified correctly before it"),
        (("per_class", 1, "robust_correct"), 10**6, r"per_class\.1: expected the counts"),
        (("attacks", "FGSM", "attacked"), 10**9, r"attacks\.FGSM: expected at most 40 images, got 1000000000"),
        (("curve", "correct"), [36, 37, 12, 0], "curve: expected falling shares"),
        (("data", "sampled_from"), 3, r"data\.sampled_from: expected at least the 40 images, got 3"),
        (("schema_version",), True, "schema version 1 or 2"),
        (("source", "robust", "num_images"), 0, "source: expected a share of images, got 40 of 0"),
        (("curve", "eps"), [0, 0, 0.1, 0.2], "curve: expected falling shares of the images at growing radii"),
        (("curve", "num_images"), 1, "curve: expected"),
        (("curve", "mean_eps"), 0.5, "curve: expected"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_load_refuses_figures_that_cannot_be(tmp_path, place, value, message):
    content = as_json(make_report(checks=(CHECK,), source=SOURCE))
    change(content, place, value)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"expected a .*{message}"):
        Report.load(tmp_path)


# Schema


@pytest.fixture(scope="module")
def validator():
    schema = json.loads((Path(cartl_hub.__file__).parent / "report" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == SCHEMA
    return jsonschema.Draft202012Validator(schema)


def as_json(report: Report) -> dict:
    return json.loads(json.dumps(report.to_json(), allow_nan=False))


def test_measured_reports_follow_the_schema(validator, wrn, data):
    attacks = {"FGSM": FGSM(eps=8 / 255), "PGD-2 L2": PGD(eps=0.5, step_size=0.5, steps=2, norm="L2")}
    report = evaluate(
        wrn.eval(), data, attacks=attacks, curve=(0, 8 / 255), context={"id": "toy", "notes": ("a",)}, progress=False
    )
    validator.validate(as_json(report))


@pytest.mark.parametrize(
    "changes",
    [{}, {"checks": (CHECK,), "source": SOURCE, "dropped": ("a",)}, {"curve": None, "samples": (), "context": {}, "data": {}}],
    ids=["plain", "whole", "bare"],
)
def test_any_report_follows_the_schema(validator, changes):
    validator.validate(as_json(make_report(**changes)))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_committed_reports_follow_the_schema_once_they_are_read(validator, path):
    validator.validate(as_json(Report.load(path.parent)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema_version",), 1),
        (("$schema",), "https://example.org"),
        (("clean", "accuracy"), 1.5),
        (("clean", "interval"), [0.1]),
        (("attacks", "FGSM", "alone"), "yes"),
        (("attacks", "FGSM", "attack"), {"name": "FGSM", "norm": "Linf"}),
        (("attacks", "FGSM", "attacked"), -1),
        (("checks", 0, "status"), "green"),
        (("source", "robust"), 0.4),
        (("dropped",), "Square"),
        (("per_image", "correct", "clean"), "0120"),
        (("worst_case",), {}),
        (("extra",), 1),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_the_schema_refuses_other_content(validator, place, value):
    content = as_json(make_report(checks=(CHECK,), source=SOURCE))
    change(content, place, value)
    assert not validator.is_valid(content)


def test_import_is_light():
    code = (
        "import sys, cartl_hub.report; print([name for name in ('matplotlib', 'jinja2', 'rich', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
