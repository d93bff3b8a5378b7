"""The report: its statistics, its files, and what people read."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cartl_hub import files, plots
from cartl_hub.report import (
    Accuracy,
    AttackResult,
    Check,
    ClassAccuracy,
    Curve,
    Report,
    Sample,
    Verdicts,
    WorstCase,
    eps_text,
    paired_bootstrap,
    plain_json,
    wilson_interval,
)

EPS = 8 / 255
NASTY = "<script>alert('$x')</script>"


def make_report(num_classes: int = 3, channels: int = 3, **changes) -> Report:
    generator = np.random.default_rng(0)
    num = 40
    clean = generator.random(num) < 0.9
    fgsm, pgd = (clean & (generator.random(num) < share) for share in (0.7, 0.5))
    labels, names = np.arange(num) % num_classes, (NASTY, *(f"class {k}" for k in range(1, num_classes)))
    standing = fgsm & pgd

    def sample(index: int) -> Sample:
        image = generator.random((channels, 8, 8), dtype=np.float32)
        return Sample(index, 0, 1, "PGD-20", image, np.clip(image + EPS * np.sign(image - 0.5), 0, 1))

    pgd_settings = {
        "name": "PGD",
        "eps": EPS,
        "norm": "Linf",
        "step_size": 2 / 255,
        "steps": 20,
        "random_start": True,
        "restarts": 1,
    }
    fields = {
        "context": {"id": "wrn.toy", "revision": "r1", "notes": ["10% are held out", NASTY], "command": "cartl-hub evaluate"},
        "data": {"id": "somebody/toy", "split": "test", "image_policy": {"size": [8, 8]}},
        "split": "test",
        "num_images": num,
        "complete": True,
        "seed": 0,
        "label_names": names,
        "clean": Accuracy(int(clean.sum()), num),
        "attacks": {
            "FGSM": AttackResult(int(fgsm.sum()), num, {"name": "FGSM", "eps": EPS, "norm": "Linf"}),
            "PGD-20": AttackResult(int(pgd.sum()), num, pgd_settings, rejected=2),
        },
        "worst_case": {"Linf 8/255": WorstCase(int(standing.sum()), num, "Linf", EPS, ("FGSM", "PGD-20"))},
        "curve": Curve("Linf", (0.0, 4 / 255, EPS, 16 / 255), (36, 24, 12, 0), num, {"name": "PGD", "steps": 20}, EPS),
        "per_class": tuple(
            ClassAccuracy(name, int((labels == k).sum()), int(clean[labels == k].sum()), int(standing[labels == k].sum()))
            for k, name in enumerate(names)
        ),
        "environment": {"python": "3.11", "seconds": 1.5, "date": "2026-01-01T00:00:00+00:00"},
        "verdicts": Verdicts(np.arange(num) + 100, labels, {"clean": clean, "FGSM": fgsm, "PGD-20": pgd}),
        "samples": tuple(map(sample, range(3))),
    }
    return Report(**fields | changes)


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
    ("norm", "eps", "text"),
    [("Linf", 8 / 255, "8/255"), ("Linf", 0.3, "0.3"), ("Linf", 0.5 / 255, "0.001961"), ("L2", 0.2, "0.2"), ("Linf", 0, "0")],
)
def test_radius_in_words(norm, eps, text):
    assert eps_text(norm, eps) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {"a": [{1, 2}]}])
def test_plain_json_is_strict(value):
    with pytest.raises(ValueError, match=r"expected JSON .* in the context"):
        plain_json(value, "context")


# Files


def test_round_trip(tmp_path):
    report = make_report(checks=(Check("steps", "pass", {"difference": 0.1}, "Twice the steps change nothing."),))
    report.save(tmp_path)
    loaded = Report.load(tmp_path)
    assert loaded == report
    for name in ("indices", "labels"):
        np.testing.assert_array_equal(getattr(loaded.verdicts, name), getattr(report.verdicts, name))
    assert loaded.verdicts.correct.keys() == report.verdicts.correct.keys()
    for name, row in report.verdicts.correct.items():
        np.testing.assert_array_equal(loaded.verdicts.correct[name], row)
        assert loaded.verdicts.correct[name].dtype == bool
    np.testing.assert_array_equal(loaded.standing("Linf 8/255"), report.standing("Linf 8/255"))
    assert loaded.samples == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("curve.png", "per_image.csv", "report.html", "report.json", "robustness.png", "samples.png")
    ]


def test_json_is_strict_and_says_accuracies(tmp_path):
    report = make_report()
    report.save(tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert content["schema_version"] == 1
    assert content["clean"]["accuracy"] == report.clean.accuracy
    assert content["worst_case"]["Linf 8/255"]["interval"] == list(report.robust.interval)
    assert content["curve"]["mean"] == pytest.approx((0.75 + 0.45) / 2)
    assert content["attacks"]["PGD-20"]["attack"]["steps"] == 20


def test_csv_has_a_row_per_image(tmp_path):
    report = make_report()
    report.save(tmp_path)
    header, *rows = (tmp_path / "per_image.csv").read_text().splitlines()
    assert header == "index,label,clean,FGSM,PGD-20"
    assert len(rows) == 40
    assert rows[1].startswith("101,1,")
    assert sum(int(row.rpartition(",")[2]) for row in rows) == report.attacks["PGD-20"].correct


def test_pictures_can_be_read_and_old_ones_go(tmp_path):
    make_report(channels=1).save(tmp_path)
    for name in ("robustness", "curve", "samples"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 500
    make_report(curve=None, samples=()).save(tmp_path)
    assert not {"curve.png", "samples.png"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["report.html", "report.json"])
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_save_leaves_the_old_report(tmp_path, monkeypatch, name, moment):
    monkeypatch.setattr(plots, "robustness", lambda report: b"bars")
    old, new = (make_report(seed=seed, curve=None, samples=()) for seed in (0, 5))
    old.save(tmp_path)
    page, replaced = (tmp_path / "report.html").read_text(), os.replace

    def replace_until(source, target):
        if moment == "replace" and Path(target).name == name:
            raise KeyboardInterrupt
        replaced(source, target)

    def sync_until(file):
        if moment == "fsync" and (tmp_path / f"{name}.partial").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", replace_until)
    monkeypatch.setattr(files.os, "fsync", sync_until)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path)
    assert Report.load(tmp_path) == old
    if name == "report.html":
        assert (tmp_path / "report.html").read_text() == page
    monkeypatch.setattr(files.os, "replace", replaced)
    monkeypatch.setattr(files.os, "fsync", lambda file: None)
    new.save(tmp_path)
    assert Report.load(tmp_path) == new
    assert not list(tmp_path.glob("*.partial"))


def test_load_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Report.load(tmp_path)
    path = tmp_path / "report.json"
    for content in ("<html>", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(ValueError, match="got something else"):
            Report.load(tmp_path)
    path.write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match=r"expected a report of schema version 1.*got 99; update cartl_hub"):
        Report.load(tmp_path)
    path.write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match="got a damaged one"):
        Report.load(tmp_path)


# For people


class Elements(HTMLParser):
    """Start tags with their attributes, and the text outside of <style>."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page(**changes) -> tuple[str, Elements]:
    html = make_report(**changes)._html({"robustness.png": b"bars", "curve.png": b"curve"})
    return html, Elements(html)


def test_page_needs_nothing_else():
    html, parsed = page()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", re.sub(r"base64,[^\"]*", "", html))
    sources = [attributes["src"] for tag, attributes in parsed.elements if tag == "img"]
    assert len(sources) == 2 + 3 * 3  # two plots and three samples
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any("href" in attributes or "onload" in attributes for _, attributes in parsed.elements)


def test_page_escapes_the_words_of_others():
    html, parsed = page()
    assert "<script" not in html
    assert parsed.text.count(NASTY) == 2 + 3  # a class, a note, three captions


def test_page_says_what_was_measured():
    report = make_report()
    _, parsed = page()
    assert report.sentence in parsed.text
    assert report.sentence == "wrn.toy (revision r1) was measured on 40 images of somebody/toy, split: test, with seed 0."
    assert f"{report.robust.accuracy:.1%} robust accuracy, Linf 8/255 95% interval {report.robust.interval_text}" in parsed.text
    assert "PGD-20: PGD, step size 2/255, steps 20, random start yes, restarts 1; 2 of its images lay outside" in parsed.text
    assert "Radii: 0, 4/255, 8/255, 16/255." in parsed.text
    assert "10% are held out" in parsed.text
    assert "AutoAttack" not in parsed.text
    assert "Checks" not in parsed.text


def test_page_of_a_part_of_the_data_says_so():
    assert "was measured on the first 40 images of" in page(complete=False)[1].text


def test_page_shows_checks_where_there_are_some():
    check = Check("noise", "warn", {"share": 0.25}, "Noise breaks a quarter.")
    _, parsed = page(checks=(check,))
    assert "Checks check result noise warn Noise breaks a quarter. share: 0.25" in parsed.text


@pytest.mark.parametrize(("num_classes", "folded"), [(20, False), (21, True)])
def test_page_folds_many_classes(num_classes, folded):
    _, parsed = page(num_classes=num_classes)
    assert ("details" in [tag for tag, _ in parsed.elements]) == folded
    assert f"class {num_classes - 1}" in parsed.text


def test_page_without_curve_samples_and_context():
    _, parsed = page(curve=None, samples=(), context={}, per_class=(ClassAccuracy("empty", 0, 0, 0),))
    assert "Accuracy against radius" not in parsed.text
    assert "another class" not in parsed.text
    assert "the model was measured on" in parsed.text
    assert "no images" in parsed.text


def test_summary_names_attacks_with_their_radius():
    report = make_report(context={"id": "[red]model[/red]"})
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.summary())
    text = console.export_text()
    assert "[red]model[/red] on somebody/toy" in text
    for name in ("FGSM", "PGD-20", "worst case"):
        assert re.search(rf"{name}\W+Linf 8/255\W+\d+\.\d%", text), name
    assert report.robust.interval_text in text


def test_import_is_light():
    code = (
        "import sys, cartl_hub.report; print([name for name in ('matplotlib', 'jinja2', 'rich', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
