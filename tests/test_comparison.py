"""Reports side by side: what may be compared, and what is said of it."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from reports import EPS, NASTY, Page, make_report
from rich.console import Console

from cartl_hub.report import Report
from cartl_hub.report.comparison import Comparison, Difference, compare, comparison_html, save_comparison
from cartl_hub.report.figures import Accuracy, Check, Curve, Verdicts, WorstCase, paired_bootstrap

CHECK = Check("steps", "pass", {}, "Twice the steps change nothing.")


def named(name: str, seed: int = 0, **changes) -> Report:
    return make_report(seed=seed, num=400, **{"context": {"id": name}, "complete": False} | changes)


def with_verdicts(report: Report, **changes) -> Report:
    verdicts = report.verdicts
    fields = {"indices": verdicts.indices, "labels": verdicts.labels, "correct": verdicts.correct}
    return replace(report, verdicts=Verdicts(**fields | changes))


def without(report: Report, images: int) -> Report:
    """The report of a model that gets the first images wrong, whatever the attack."""
    correct = {name: row & (np.arange(len(row)) >= images) for name, row in report.verdicts.correct.items()}
    return with_verdicts(report, correct=correct)


def entry(comparison: Comparison, title: str, position: int = 1):
    (measure,) = [measure for measure in comparison.measures if measure.title == title]
    return measure.entries[position]


# Differences


def test_differences_are_those_of_the_paired_bootstrap():
    first, second = named("first"), named("second", seed=1)
    comparison = compare([first, second])
    for title, a, b in (
        ("clean", first.verdicts.correct["clean"], second.verdicts.correct["clean"]),
        ("worst case, Linf 8/255", first.standing("Linf 8/255"), second.standing("Linf 8/255")),
        ("FGSM, Linf 8/255", first.verdicts.correct["FGSM"], second.verdicts.correct["FGSM"]),
    ):
        found = entry(comparison, title).difference
        assert (found.difference, found.low, found.high) == paired_bootstrap(b, a)
        assert entry(comparison, title).result == Accuracy(int(b.sum()), 400)
        assert entry(comparison, title, 0).difference is None
    assert comparison.models == ("first", "second")


def test_better_is_said_only_where_the_interval_excludes_zero():
    first = named("first")
    worse, same = without(first, 60), named("same", seed=3)
    assert entry(compare([first, worse]), "clean").difference.words == "worse"
    assert entry(compare([worse, first]), "clean").difference.words == "better"
    assert entry(compare([first, same]), "clean").difference.words == "no difference shown"
    assert entry(compare([first, first]), "clean").difference == Difference(0, 0, 0)
    for low, high, words in ((-0.1, 0, "no difference shown"), (0, 0.1, "no difference shown"), (1e-9, 0.1, "better")):
        assert Difference(0.0, low, high).words == words


def test_every_report_is_compared_with_the_first():
    comparison = compare([named("first"), named("second", seed=1), named("third", seed=2)])
    third = compare([named("first"), named("third", seed=2)])
    assert entry(comparison, "clean", 2) == entry(third, "clean", 1)


def test_attacks_that_ran_on_what_others_left_are_not_compared_alone():
    comparison = compare([named("first"), named("second", seed=1)])
    assert [measure.title for measure in comparison.measures] == [
        *("clean", "worst case, Linf 8/255", "FGSM, Linf 8/255", "PGD-20, Linf 8/255")
    ]


# What is not compared


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: replace(one, data={"id": "other/data"}), "measured on other/data instead of somebody/toy"),
        (lambda one: replace(one, data={}), "does not say which data"),
        (lambda one: replace(one, split="train"), "on the train split instead of test"),
        (lambda one: replace(one, label_names=("a", "b", "c")), "with other classes"),
        (lambda one: with_verdicts(one, indices=one.verdicts.indices + 1), "on other images of the same data"),
        (lambda one: with_verdicts(one, labels=2 - one.verdicts.labels), "with other labels"),
        (lambda one: make_report(num=39, context={"id": "second"}), "other images of the same data (39, the reference on 400)"),
    ],
)
def test_other_images_are_not_paired(change, reason):
    comparison = compare([named("first"), change(named("second", seed=1))])
    for measure in comparison.measures:
        assert measure.entries[1].difference is None
        assert reason in measure.entries[1].reason
    (note,) = [note for note in comparison.notes if "image by image" in note]
    assert note.startswith("second is not compared with first image by image: ")
    assert reason in note


@pytest.mark.parametrize("key", ["revision", "index_hash", "fingerprint"])
def test_data_that_state_something_else_are_not_paired(key):
    first, second = (named(name, data={"id": "toy", key: name}) for name in ("a1", "b2"))
    assert f"{key.replace('_', ' ')} b2 instead of a1" in entry(compare([first, second]), "clean").reason
    unstated = named("unstated", data={"id": "toy"})
    assert not entry(compare([first, unstated]), "clean").reason


def changed_attack(report: Report, **settings) -> Report:
    square = report.attacks["Square"]
    return replace(report, attacks=report.attacks | {"Square": replace(square, attack=square.attack | settings)})


def test_worst_cases_under_other_attacks_are_not_compared():
    first, second = named("first"), changed_attack(named("second", seed=1), queries=50)
    comparison = compare([first, second])
    found = entry(comparison, "worst case, Linf 8/255")
    assert found.difference is None
    assert found.reason == "it met other attacks, or others with other settings (Square)"
    assert entry(comparison, "clean").difference
    assert entry(comparison, "FGSM, Linf 8/255").difference
    fewer = {"Linf 8/255": replace(first.robust, attacks=("FGSM", "PGD-20"))}
    assert "(Square)" in entry(compare([first, replace(second, worst_case=fewer)]), "worst case, Linf 8/255").reason


def test_worst_cases_that_a_budget_cut_short_are_not_compared():
    reports = [named("first"), named("second", seed=1, dropped=("Square: run on 100 of 200 images",))]
    for comparison in (compare(reports), compare(reports[::-1])):
        assert entry(comparison, "worst case, Linf 8/255").reason == "a budget cut one of the two measurements short"
        assert entry(comparison, "FGSM, Linf 8/255").difference


def test_an_attack_with_other_settings_is_left_out():
    first, second = named("first"), named("second", seed=1)
    fgsm = replace(second.attacks["FGSM"], attack={"name": "FGSM", "eps": 4 / 255, "norm": "Linf"})
    comparison = compare([first, replace(second, attacks=second.attacks | {"FGSM": fgsm})])
    assert not any(measure.name == "FGSM" for measure in comparison.measures)
    third = compare([first, replace(second, attacks=second.attacks | {"FGSM": fgsm}), named("third", seed=2)])
    (measure,) = (measure for measure in third.measures if measure.name == "FGSM")
    assert [found.model for found in measure.entries] == ["first", "third"]


def test_threat_models_of_one_report_are_shown_for_it():
    first = named("first")
    second = replace(
        first, context={"id": "second"}, worst_case=first.worst_case | {"L2 0.5": WorstCase(5, 400, "L2", 0.5, ("FGSM",))}
    )
    only = entry(compare([first, second]), "worst case, L2 0.5", 0)
    assert (only.model, only.difference) == ("second", None)
    assert only.reason == "the reference was not measured in this threat model"
    assert entry(compare([second, first]), "worst case, L2 0.5", 0).reason == ""


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_reports_are_refused(number):
    with pytest.raises(ValueError, match=f"expected two or more reports to compare, got {number}"):
        compare([named("one")] * number)


# Names and notes


def test_models_of_the_same_name_are_numbered():
    assert compare([named("a"), named("b"), named("a")]).models == ("a (1)", "b", "a (2)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checks": (replace(CHECK, status="fail"),)}, "A check of second failed"),
        ({"data": {"id": "somebody/toy", "image_policy": {"size": [224, 224]}}}, "images of different sizes"),
        ({"curve": Curve("L2", (0.0, 1.0), (10, 0), 40, {"name": "PGD"}, 0.5)}, "The curves differ in more than the model"),
    ],
)
def test_what_a_reader_must_know_is_noted(change, words):
    assert compare([named("first"), named("other")]).notes == ()
    (note,) = compare([named("first"), named("second", **change)]).notes
    assert words in note


# Files and pages


def test_files(tmp_path):
    reports = [named("first", checks=(CHECK,)), changed_attack(named("second", seed=1, dropped=("a curve",)), queries=50)]
    comparison = save_comparison(reports, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["comparison.html", "comparison.json"]
    content = json.loads((tmp_path / "new" / "folder" / "comparison.json").read_text())
    assert content == json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert content["reference"] == "first"
    assert [model["checks"] for model in content["models"]] == [{"steps": "pass"}, {}]
    assert content["models"][1]["dropped"] == ["a curve"]
    clean, worst = content["measures"][:2]
    found = entry(comparison, "clean").difference
    assert clean["entries"][1]["difference"] == {"difference": found.difference, "interval": [found.low, found.high]}
    assert clean["entries"][1]["verdict"] == found.words
    assert (worst["entries"][1]["difference"], worst["entries"][1]["verdict"]) == (None, None)
    assert "a budget" in worst["entries"][1]["reason"]


def test_names_instead_of_titles():
    reports = [named("model"), named("model")]
    assert compare(reports).models == ("model (1)", "model (2)")
    assert compare(reports, ["small", "large"]).models == ("small", "large")
    with pytest.raises(ValueError, match="expected a name for each of the 2 reports, got 1"):
        compare(reports, ["small"])


def test_page_says_who_is_better():
    first, second, third = named("first"), without(named("second"), 60), named("third", label_names=("a", "b", "c"))
    parsed = Page(comparison_html(compare([first, second, third])))
    worse = entry(compare([first, second]), "clean")
    assert "first and 2 others" in parsed.text
    accuracy, interval = f"{worse.result.accuracy:.1%}", worse.result.interval_text
    assert f"second {accuracy} {interval} worse: {worse.difference}" in parsed.text
    assert f"first {first.clean.accuracy:.1%} {first.clean.interval_text} the reference" in parsed.text
    assert "not comparable: measured with other classes" in parsed.text
    assert parsed.all("b", "loss")
    assert not parsed.all("b", "gain")
    assert "first and second" in Page(comparison_html(compare([first, second]))).text


def test_page_draws_the_curves_of_one_norm():
    other = Curve("L2", (0.0, 1.0), (10, 0), 40, {"name": "PGD"}, 0.5)
    reports = [named("first"), named("second"), named("third", curve=other), named("fourth", curve=None)]
    parsed = Page(comparison_html(compare(reports)))
    assert len(parsed.all("polyline", "line")) == 2
    assert "first: mean 60.0% up to 8/255, on 40 images second: mean" in parsed.text
    assert len(parsed.all("polygon", "band")) == 2
    bare = Page(comparison_html(compare([named("a", curve=None), named("b", curve=None)])))
    assert "Accuracy against radius" not in bare.text


def test_bands_of_many_curves_are_left_out():
    parsed = Page(comparison_html(compare([named(f"model {k}") for k in range(8)])))
    assert len(parsed.all("polyline", "line")) == 8
    assert not parsed.all("polygon", "band")


def test_page_puts_checks_side_by_side():
    first, second = named("first", checks=(CHECK,)), named("second", checks=(replace(CHECK, name="noise", status="warn"),))
    comparison = compare([first, second])
    assert comparison.check_rows() == [("steps", ["pass", ""]), ("noise", ["", "warn"])]
    text = Page(comparison_html(comparison)).text
    assert "steps passed absent noise absent warning" in text
    assert "None of the reports holds checks" in Page(comparison_html(compare([named("a"), named("b")]))).text


def test_page_needs_nothing_else_and_escapes():
    hostile = named(NASTY, dropped=(NASTY,), checks=(replace(CHECK, name=NASTY),), context={"id": NASTY, "command": NASTY})
    html = comparison_html(compare([hostile, replace(hostile, data={"id": NASTY})]))
    parsed = Page(html)
    assert "<script" not in html
    assert parsed.text.count(NASTY) > 10
    assert "default-src 'none'" in html
    assert not {"href", "src", "style", "onload"} & {name for _, attrs in parsed.elements for name in attrs}


def test_summary():
    comparison = compare(
        [named("first"), changed_attack(named("[b]second[/b]", seed=1), queries=50), named("x\x1b[31m", data={})]
    )
    with open(os.devnull, "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        console.print(comparison.summary())
    words = console.export_text()
    found = entry(comparison, "clean")
    assert f"{found.difference.words}: {found.difference}" in words
    assert "[b]second[/b]" in words
    assert "not comparable: it met other attacks, or others with other settings (Square)" in words
    assert "FGSM" not in words
    assert "\x1b" not in words
    assert comparison.notes[0].replace("\x1b", " ")[:60] in words
    assert str(EPS) not in words


def test_images_with_other_pixels_are_not_paired():
    def measured(pixels):
        report = make_report()
        return replace(report, data=report.data | {"pixels": pixels})

    digest = {"sha256": "a", "shape": [3, 32, 32]}
    for other, reason in (
        (digest, ""),
        (digest | {"sha256": "b"}, "measured on images with other pixels"),
        ({"sha256": "b", "shape": [3, 64, 64]}, ""),  # the same pictures in another size
    ):
        comparison = compare([measured(digest), measured(other)])
        assert comparison.measures[0].entries[1].reason == reason
