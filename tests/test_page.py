"""The report for people: its files, its page, and its table for the terminal."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from reports import EPS, NASTY, Page, make_report
from rich.console import Console

from cartl_hub import files
from cartl_hub.report import Report, plots, printable
from cartl_hub.report.figures import Accuracy, AttackResult, Check, ClassAccuracy, Curve, SourceResult, WorstCase
from cartl_hub.report.page import allowed, chart_lines, of_hundred, plain, report_html, save_report, ticks, verdict

HOSTILE = [
    NASTY,
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "]]>--><!-- $\\frac$",
    "a" * 300,
    "שלום \u202egnp.exe",
    "🦊 日本語",
    "two\nlines\tand \x1b[31m",
]
CHECKS = (
    Check("noise", "pass", {"share": 0.01}, "Noise breaks few.", num_images=40),
    Check("steps", "warn", {"losses": [1.5, 2]}, "It had not converged.", "Run more steps.", 40),
    Check("transfer", "skipped", {}, "No other model was given."),
    Check("gradients", "fail", {"share": 0.25}, "A quarter of the gradients is zero.", "Look at the logits.", 40),
)


def page(**changes) -> tuple[str, Page]:
    html = report_html(make_report(**changes))
    return html, Page(html)


def shown(report: Report, width: int = 120) -> str:
    """The summary as a terminal shows it."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        console.print(report.summary())
    return console.export_text()


# Files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "made" / "anew"
    make_report().save(folder)
    return folder


def test_save_writes_every_file(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        *("classes.png", "classes.svg", "curve.csv", "curve.png", "curve.svg", "per_image.csv", "report.html", "report.json"),
        *("robustness.png", "robustness.svg", "samples.png"),
    ]


def test_save_removes_what_an_earlier_report_had(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "again")
    save_report(make_report(curve=None, samples=(), per_class=()), tmp_path / "again")
    before, after = ({path.name for path in folder.iterdir()} for folder in (saved, tmp_path / "again"))
    assert before - after == {"curve.png", "curve.svg", "curve.csv", "samples.png", "classes.png", "classes.svg"}
    assert not after - before


def test_pictures_can_be_read(saved):
    for name in ("robustness", "curve", "classes", "samples"):
        with Image.open(saved / f"{name}.png") as image:
            assert image.width > 500
    for name in ("robustness", "curve", "classes"):
        assert ElementTree.parse(saved / f"{name}.svg").getroot().tag.endswith("}svg")


def test_the_same_report_gives_the_same_files(saved, tmp_path):
    make_report().save(tmp_path)
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_json_is_strict(saved):
    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads((saved / "report.json").read_text(), parse_constant=refuse)["schema_version"] == 2


def test_tables_have_a_row_per_image_and_per_radius(saved):
    report = make_report()
    header, *rows = (saved / "per_image.csv").read_text().splitlines()
    assert header == "index,label,clean,FGSM,PGD-20,Square"
    assert len(rows) == 40
    assert rows[1].startswith("101,1,")
    assert sum(int(row.rpartition(",")[2]) for row in rows) == report.attacks["Square"].correct
    with open(saved / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["correct"]) for row in rows] == [36, 24, 12, 0]
    assert float(rows[2]["eps"]) == EPS
    low, high = report.curve.intervals[1]
    assert [float(rows[1][name]) for name in ("accuracy", "low", "high")] == [0.6, low, high]


@pytest.mark.parametrize("name", ["report.html", "report.json"])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_save_leaves_the_old_report(tmp_path, monkeypatch, name, moment):
    monkeypatch.setattr(plots, "encode", lambda figure, kind: b"drawn")
    old, new = (make_report(seed=seed, curve=None, samples=()) for seed in (0, 5))
    old.save(tmp_path)
    html, replaced = (tmp_path / "report.html").read_text(), os.replace

    def replace_until(source, target):
        if moment == "replace" and Path(target).name == name:
            raise KeyboardInterrupt
        replaced(source, target)

    def sync_until(file):
        if moment == "fsync" and list(tmp_path.glob(f"{name}*partial")):
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", replace_until)
    monkeypatch.setattr(files.os, "fsync", sync_until)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path)
    assert Report.load(tmp_path) == old
    if name == "report.html":
        assert (tmp_path / "report.html").read_text() == html
    monkeypatch.setattr(files.os, "replace", replaced)
    monkeypatch.setattr(files.os, "fsync", lambda file: None)
    new.save(tmp_path)
    assert Report.load(tmp_path) == new
    assert not list(tmp_path.glob("*.partial"))


# Plots


def axes_of(figure: Figure):
    return figure.axes[0]


def test_bars_have_the_lengths_of_the_figures():
    report = make_report()
    axes = axes_of(plots.robustness(report))
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * row[2].accuracy for row in report.rows()])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["clean", *(f"{name}, Linf 8/255" for name in ("FGSM", "PGD-20")), *labels[3:]]
    assert labels[3:] == ["Square, Linf 8/255 (cumulative)", "worst case, Linf 8/255"]


@pytest.mark.parametrize(("num_classes", "labels"), [(20, 20), (21, 21)])
def test_plot_of_many_classes_shows_the_worst_and_the_best(num_classes, labels):
    report = make_report(num_classes=num_classes, num=2 * num_classes)
    axes = axes_of(plots.classes(report))
    words = [label.get_text() for label in axes.get_yticklabels()]
    assert len(words) == labels
    assert words[0] == report.ranked_classes()[0].name
    assert ("1 more classes" in words) == (num_classes == 21)
    assert len(axes.patches) == 40


def test_curve_of_an_l2_ball_is_in_pixel_units():
    curve = Curve("L2", (0.0, 0.5, 1.0), (40, 20, 0), 40, {"name": "PGD"}, 0.5)
    axes = axes_of(plots.curve(curve))
    assert axes.lines[0].get_xdata().tolist() == [0, 0.5, 1]
    assert axes.get_xlabel() == "radius eps of the L2 ball"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", HOSTILE)
def test_plots_hold_any_name(name, channels):
    report = make_report(channels=channels, label_names=(name, "b", "c"), per_class=(ClassAccuracy(name, 40, 30, 20),), size=4)
    root = ElementTree.fromstring(plots.encode(plots.classes(report), "svg"))
    assert not {"script", "image", "a", "foreignObject"} & {element.tag.rpartition("}")[2] for element in root.iter()}
    assert plots.encode(plots.samples(report), "png").startswith(b"\x89PNG")


# Page


def test_page_needs_nothing_else():
    html, parsed = page(checks=CHECKS)
    outside = re.sub(r"base64,[^\"]*", "", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe|<object|<form", outside)
    sources = [attrs["src"] for attrs in parsed.all("img")]
    assert len(sources) == 3 * 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    attributes = {name for _, attrs in parsed.elements for name in attrs}
    assert not {name for name in attributes if name.startswith("on") or name == "style"}
    places = {attrs["id"] for _, attrs in parsed.elements if "id" in attrs}
    assert {attrs["href"] for _, attrs in parsed.elements if "href" in attrs} == {"#checks"}
    assert "checks" in places


def test_page_allows_its_own_style_and_nothing_else():
    html, parsed = page()
    (policy,) = (attrs["content"] for attrs in parsed.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


@pytest.mark.parametrize("words", HOSTILE)
def test_page_escapes_the_words_of_others(words):
    report = make_report()
    checks = (Check(words, "fail", {words: words, "a": {"b": [words]}}, words, words, 1),)
    context = {"id": words, "notes": [words], "command": words, words: words}
    source = SourceResult(words, words, "Linf 8/255", Accuracy(8, 10), Accuracy(4, 10), (words,))
    report = replace(report, context=context, data={"id": words}, checks=checks, source=source, dropped=(words,))
    report = replace(report, label_names=(words,) * 3, per_class=(ClassAccuracy(words, 40, 30, 20),))
    html = report_html(report)
    parsed = Page(html)
    tags = {tag for tag, _ in parsed.elements}
    assert not {"script", "b ", "iframe"} & tags
    assert all(attrs["src"].startswith("data:") for attrs in parsed.all("img"))
    assert len(parsed.all("img")) == 9
    assert parsed.text.count(" ".join(printable(words, keep="\n").replace("_", " ").split())) >= 18


def test_names_of_others_do_not_turn_the_text_around():
    """A name stays inside its own <bdi>, and marks of direction are left out."""
    report = make_report(label_names=("ש\u202eb",) * 3, per_class=(ClassAccuracy("ש\u202eb", 40, 30, 20),))
    html = report_html(report)
    assert "\u202e" not in html
    assert html.count("<bdi>ש b</bdi>") == 1 + 2 * 3


def test_page_says_what_was_measured():
    report = make_report()
    _, parsed = page()
    assert report.sentence in parsed.text
    robust, clean = report.robust, report.clean
    assert f"{robust.accuracy:.1%} robust accuracy, Linf 8/255 95% interval {robust.interval_text}" in parsed.text
    assert f"{clean.accuracy:.1%} clean accuracy 95% interval {clean.interval_text}" in parsed.text
    assert (
        f"about {round(100 * robust.accuracy)} still are when an attacker who knows the model changes each colour value"
        in parsed.text
    )
    assert "10% are held out" in parsed.text
    assert "AutoAttack" not in parsed.text
    assert "cartl-hub evaluate" in parsed.text


def test_page_of_a_part_of_the_data_says_so():
    assert "was measured on the first 40 images of" in page(complete=False)[1].text


def test_page_tells_own_figures_from_cumulative_ones():
    report = make_report()
    _, parsed = page()
    clean, left = report.clean.correct, report.attacks["Square"].attacked
    assert f"PGD-20 Linf 8/255 {clean} images, alone {report.attacks['PGD-20'].accuracy:.1%}" in parsed.text
    assert f"Square Linf 8/255 {left} images, cumulative {report.attacks['Square'].accuracy:.1%}" in parsed.text
    assert f"worst case Linf 8/255 3 attacks {report.robust.accuracy:.1%}" in parsed.text
    assert "PGD, step size 2/255, steps 20, random start yes, restarts 1; 2 of its images lay outside" in parsed.text
    assert "FGSM, one step; 72 passes through the model; 1.2 seconds" in parsed.text


@pytest.mark.parametrize(("correct", "words"), [(0, "none still are"), (40, "all still are"), (11, "about 28 still are")])
def test_headline_of_none_and_all(correct, words):
    worst = {"Linf 8/255": WorstCase(correct, 40, "Linf", EPS, ("FGSM",))}
    assert words in page(worst_case=worst)[1].text


@pytest.mark.parametrize(
    ("norm", "eps", "words"),
    [
        ("Linf", 8 / 255, "each colour value of each pixel by up to 8 on the scale from 0 to 255"),
        ("Linf", 0.3, "each colour value of each pixel by up to 30% of its range"),
        ("L2", 0.5, "all pixel values together by up to 0.5 (Euclidean length, where pixel values go from 0 to 1)"),
    ],
)
def test_threat_models_in_words(norm, eps, words):
    assert allowed(norm, eps) == words


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "none"), (0.001, "fewer than 1"), (0.213, "about 21"), (0.996, "nearly all"), (1, "all")],
)
def test_shares_of_a_hundred(share, words):
    assert of_hundred(share) == words


def test_page_shows_failed_checks_first_with_what_to_do():
    _, parsed = page(checks=CHECKS)
    assert [attrs["class"] for attrs in parsed.all("li", "check")] == [
        f"check {kind}" for kind in ("fail", "warn", "pass", "skipped")
    ]
    assert (
        "failed gradients A quarter of the gradients is zero. What to do: Look at the logits. Figures, on 40 images"
        in parsed.text
    )
    assert "warning steps It had not converged. What to do: Run more steps." in parsed.text
    assert "losses 1.5, 2" in parsed.text
    assert (
        "passed noise Noise breaks few. Figures, on 40 images share 0.01 not made transfer No other model was given."
        in parsed.text
    )
    assert len(parsed.all("span", "status")) == len(CHECKS) + 1  # an icon with a word for each, and in the headline
    assert "Doubtful 1 of 3 checks failed (gradients): the robust accuracy may be far too high." in parsed.text
    assert "How many still are when an attacker who knows the model changes" in parsed.text
    assert "is not known: checks of this report failed" in parsed.text
    assert [attrs["class"] for attrs in parsed.all("div", "robust")] == ["robust doubtful"]


def test_what_a_check_broke_bounds_the_headline():
    """A figure of a check is of other images, and counts where a check failed, in the same ball, and if it is lower."""
    lower = Check("gradient-free", "fail", {"accuracy, Square": 0.02, "accuracy, APGD": 0.9, "excess": 0.0}, "Masked.", "", 128)
    wider = Check("eps-order", "fail", {"accuracy, twice the radius": 0.0}, "Rises.", "", 128)
    doubtful = make_report(checks=(lower, wider))
    assert doubtful.below == ("Square", 0.02, 128)
    assert doubtful.mistrust == doubtful.doubt
    assert doubtful.mistrust == (
        "2 of 2 checks failed (gradient-free, eps-order): the robust accuracy may be far too high; in the same ball Square left "
        "2.0% of 128 images. Read them before you rely on it."
    )
    assert "(gradient-free, eps-order): the robust accuracy may be far too high" in " ".join(str(doubtful).split())
    assert make_report(checks=(wider,)).below is None
    assert make_report(checks=(replace(lower, status="pass"),)).below is None
    assert make_report(checks=(replace(lower, status="pass"),)).doubt == ""


@pytest.mark.parametrize(
    ("kinds", "status", "words"),
    [
        ((), "skipped", "No check was made"),
        (("skipped",), "skipped", "No check was made"),
        (("pass",), "skipped", "The one check that was made passed; most were not made."),
        (("pass", "pass", "skipped"), "skipped", "All 2 checks that were made passed; most were not made."),
        (("pass",) * 9, "pass", "All 9 checks that were made passed; on 40 images they show large differences only."),
        (("pass", "warn"), "warn", "1 of 2 checks gave a warning"),
        (("fail", "warn", "pass"), "fail", "1 of 3 checks failed"),
    ],
)
def test_verdict_is_that_of_the_worst_check(kinds, status, words):
    checks = tuple(replace(CHECKS[0], status=kind) for kind in kinds)
    found, sentence = verdict(make_report(checks=checks))
    assert found == status
    assert sentence.startswith(words)
    guessed, warned = verdict(make_report(checks=checks, clean=Accuracy(17, 40)))  # 14 of 40 are of one class
    assert guessed == ("fail" if status == "fail" else "warn")
    assert warned.startswith("The model may be guessing: its clean accuracy, 42.5% (28.5 to 57.8%), is not above the 35.0%")
    assert "All" not in warned


@pytest.mark.parametrize("status", ["warn", "fail"])
def test_a_second_verdict_alone_is_no_check_and_hides_none(status):
    second, other = (replace(CHECKS[0], name=name, status="pass") for name in ("second-verdict", "gradient-free"))
    alone = make_report(checks=(second,))
    assert verdict(alone) == ("skipped", "No check was made of whether the attacks were as strong as they can be.")
    assert verdict(make_report(checks=(second, replace(other, status=status))))[0] == status
    assert verdict(make_report(checks=(replace(second, status=status),)))[0] == status
    assert verdict(make_report(checks=(second, other)))[1].startswith("All 2 checks")


def test_page_draws_the_curve():
    _, parsed = page()
    (line,) = parsed.all("polyline", "line")
    assert line["points"].split() == ["0.0,10.0", "25.0,40.0", "50.0,70.0", "100.0,100.0"]
    assert "mean 60.0% up to 8/255" in parsed.text
    assert "On 40 images by PGD (steps 20)." in parsed.text
    assert "4/255 60.0% 44.6% to 73.7%" in parsed.text


def test_lines_of_a_chart_share_its_width():
    near, far = (Curve("Linf", (0.0, eps), (40, 0), 40, {}, eps) for eps in (0.1, 0.4))
    lines = chart_lines({"near": near, "far": far})
    assert [line["points"] for line in lines] == [[(0, 0), (25, 100)], [(0, 0), (100, 100)]]
    assert [line["mean_end"] for line in lines] == [25, 100]
    low = near.intervals[0][0]
    assert lines[0]["band"][-1] == (0, pytest.approx(100 - 100 * low, abs=0.01))


@pytest.mark.parametrize(
    ("largest", "expected"), [(64, [0, 8, 16, 24, 32, 40, 48, 56, 64]), (2, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])]
)
def test_ticks_are_round(largest, expected):
    assert ticks(largest) == pytest.approx(expected)


@pytest.mark.parametrize(("num_classes", "folded"), [(2, False), (20, False), (21, True), (1000, True)])
def test_page_folds_many_classes(num_classes, folded):
    report = make_report(num_classes=num_classes, num=num_classes)
    parsed = Page(report_html(report))
    assert bool(parsed.all("details", "long")) == folded
    assert (f"The 10 least robust of {num_classes:,} classes" in parsed.text) == folded
    assert f"class {num_classes - 1}" in parsed.text
    if folded:
        least = parsed.text.index("The 10 least robust")
        assert parsed.text.index(report.ranked_classes()[0].name, least) < parsed.text.index("The 10 most robust")


@pytest.mark.parametrize(("num_images", "said"), [(29, True), (30, False)])
def test_page_warns_of_classes_with_few_images(num_images, said):
    rows = (ClassAccuracy("few", num_images, 20, 10), ClassAccuracy("many", 500, 400, 300), ClassAccuracy("none", 0, 0, 0))
    assert ("Some classes have few images" in page(per_class=rows)[1].text) == said


def test_small_pictures_keep_their_pixels():
    assert all(attrs.get("class") == "square" for attrs in page(size=96)[1].all("img"))
    assert not any("class" in attrs for attrs in page(size=97)[1].all("img"))


def test_page_compares_with_the_source():
    source = SourceResult("wrn.source", "other/data", "Linf 8/255", Accuracy(80, 100), Accuracy(40, 100), ("PGD-20",))
    report = make_report(source=source)
    parsed = Page(report_html(report))
    kept = report.robust.correct / report.clean.correct
    assert "wrn.source (source) other/data, 100 images 80.0% 40.0% Linf 8/255: PGD-20" in parsed.text
    assert f"the source keeps 50.0% under attack, this model {kept:.1%}" in parsed.text
    assert "here the attacks differ too" in parsed.text
    same = replace(source, attacks=report.robust.attacks)
    assert "here the attacks differ too" not in page(source=same)[1].text
    other = replace(same, threat="Linf 4/255")
    assert "here the attacks differ too" in page(source=other)[1].text
    nothing = replace(source, clean=Accuracy(0, 100), robust=Accuracy(0, 100))
    assert "under attack, this model" not in page(source=nothing)[1].text


def test_page_says_what_the_budget_left_out():
    _, parsed = page(dropped=("Square: 500 of 5,000 queries",))
    assert "Cut short A budget left out a part of the measurement." in parsed.text
    assert "Left out to keep within the budget Square: 500 of 5,000 queries" in parsed.text


def test_page_of_a_bare_report():
    rows = (ClassAccuracy("empty", 0, 0, 0), ClassAccuracy("full", 20, 15, 10), ClassAccuracy("other", 20, 15, 10))
    _, parsed = page(curve=None, samples=(), context={}, data={}, environment={}, per_class=rows)
    assert "the model was measured on 40 images of the data" in parsed.text
    assert "Not checked No check was made" in parsed.text
    for words in ("against radius", "another class", "budget", "Beside its source", "Environment", "again", "trusted?", "Notes"):
        assert words not in parsed.text
    assert "empty 0 full 20 75.0% 50.0%" in parsed.text
    assert "Classes" not in page(per_class=())[1].text


# Terminal


def test_summary_names_attacks_with_their_radius():
    report = make_report(context={"id": "[red]model[/red]"})
    words = shown(report)
    assert "[red]model[/red] on somebody/toy" in words
    for name in ("FGSM", "PGD-20", r"Square \(cumulative\)", "worst case"):
        assert re.search(rf"{name}\W+Linf 8/255\W+\d+\.\d%", words), name
    assert report.robust.interval_text in words


def test_summary_tells_what_is_wrong():
    words = shown(make_report(checks=CHECKS, dropped=("the curve",)), width=200)
    assert "1 of 3 checks failed" in words
    assert words.index("FAILED gradients: A quarter of the gradients is zero. Look at the logits.") < words.index("WARNING steps")
    assert "noise" not in words
    assert "Left out to keep within the budget: the curve." in words
    assert "budget" not in shown(make_report())


def test_print_shows_the_summary(monkeypatch):
    report = make_report(checks=CHECKS)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert [line.rstrip() for line in str(report).splitlines()] == [line.rstrip() for line in shown(report).splitlines()]
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, str(report).splitlines())) <= 60
    assert repr(report) == f"Report('wrn.toy', clean {report.clean}, Linf 8/255 {report.robust}, n = 40)"
    with Console(width=120, record=True, file=io.StringIO()) as console:
        console.print(report)
    assert console.export_text() == shown(report)


def test_terminal_is_not_steered_by_names():
    assert plain("a\x1b[31m\nb\u202e").plain == "a [31m b "
    assert "\x1b" not in shown(make_report(context={"id": "a\x1b[31mb"}))


def test_perturbation_is_stretched():
    sample = make_report().samples[0]
    assert np.abs(sample.perturbation - 0.5).max() == pytest.approx(0.5)
    assert replace(sample, adversarial=sample.image).perturbation == pytest.approx(0.5)
    assert isinstance(make_report().attacks["FGSM"], AttackResult)
