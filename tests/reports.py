"""A report whose every figure is known, and a reader of its pages."""

from html.parser import HTMLParser

import numpy as np

from cartl_hub.report import Report
from cartl_hub.report.figures import Accuracy, AttackResult, ClassAccuracy, Curve, Sample, Verdicts, WorstCase

EPS = 8 / 255
INLINE = ("a", "b", "bdi", "em", "span")
NASTY = "<script>alert('$x')</script>"


def make_report(num_classes: int = 3, channels: int = 3, seed: int = 0, num: int = 40, size: int = 8, **changes) -> Report:
    """40 images, FGSM and PGD-20 alone, Square on what they left.

    Args:
        seed: Of the verdicts, and the seed that the report states.
        changes: Fields.
    """
    generator = np.random.default_rng(seed)
    clean = generator.random(num) < 0.9
    fgsm, pgd = (clean & (generator.random(num) < share) for share in (0.8, 0.6))
    left = fgsm & pgd
    square = left & (generator.random(num) < 0.9)
    labels, names = np.arange(num) % num_classes, (NASTY, *(f"class {k}" for k in range(1, num_classes)))

    def sample(index: int) -> Sample:
        image = generator.random((channels, size, size), dtype=np.float32)
        return Sample(index, 0, 1, "PGD-20", image, np.clip(image + EPS * np.sign(image - 0.5), 0, 1))

    ball = {"eps": EPS, "norm": "Linf"}
    pgd_settings = {"name": "PGD", **ball, "step_size": 2 / 255, "steps": 20, "random_start": True, "restarts": 1}
    attacked = int(clean.sum())
    fields = {
        "context": {"id": "wrn.toy", "revision": "r1", "notes": ["10% are held out", NASTY], "command": "cartl-hub evaluate"},
        "data": {"id": "somebody/toy", "split": "test", "image_policy": {"size": [8, 8]}},
        "split": "test",
        "num_images": num,
        "complete": True,
        "seed": seed,
        "label_names": names,
        "clean": Accuracy(attacked, num),
        "attacks": {
            "FGSM": AttackResult(int(fgsm.sum()), num, {"name": "FGSM", **ball}, attacked, seconds=1.25, passes=72),
            "PGD-20": AttackResult(int(pgd.sum()), num, pgd_settings, attacked, rejected=2),
            "Square": AttackResult(
                int(square.sum()), num, {"name": "Square", **ball, "queries": 100}, int(left.sum()), alone=False
            ),
        },
        "worst_case": {"Linf 8/255": WorstCase(int(square.sum()), num, "Linf", EPS, ("FGSM", "PGD-20", "Square"))},
        "curve": Curve("Linf", (0.0, 4 / 255, EPS, 16 / 255), (36, 24, 12, 0), 40, {"name": "PGD", "steps": 20}, EPS),
        "per_class": tuple(
            ClassAccuracy(name, int((labels == k).sum()), int(clean[labels == k].sum()), int(square[labels == k].sum()))
            for k, name in enumerate(names)
        ),
        "environment": {"python": "3.11", "seconds": 1.5, "date": "2026-01-01T00:00:00+00:00"},
        "verdicts": Verdicts(np.arange(num) + 100, labels, {"clean": clean, "FGSM": fgsm, "PGD-20": pgd, "Square": square}),
        "samples": tuple(map(sample, range(3))),
    }
    return Report(**fields | changes)


class Page(HTMLParser):
    """Start tags with their attributes, and the text outside of <style>; every tag must be closed."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.words.append("" if tag in INLINE else " ")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.words.append("" if tag in INLINE else " ")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str, kind: str = "") -> list[dict]:
        """Attributes of the elements with a tag, and with a class where one is named."""
        found = [attrs for name, attrs in self.elements if name == tag]
        return [attrs for attrs in found if not kind or kind in attrs.get("class", "").split()]
