"""The main task on data that come with a dependency: three transfers to handwritten digits, compared under attack."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
from rich.console import Console
from rich.table import Table

from .attacks import PGD
from .batchnorm import BatchNormPolicy
from .card import percent
from .data import Augmentation
from .finetuner import RobustFineTuner
from .loading import DataArguments
from .methods import NEFT, FineTuning, Method
from .publishing import publish
from .report import Report, paired_bootstrap
from .report.comparison import save_comparison
from .testing import LocalHub
from .training import TrainingArguments

EPS = 8 / 255
ATTACK = PGD(eps=EPS, step_size=2 / 255, steps=20)
CURVE = tuple(k / 255 for k in (0, 4, 8, 16, 32, 64))
ROBUST, NATURAL = "wrn16_2.fdm4_cifar100", "wrn16_2.natural_cifar100"
POLICY = BatchNormPolicy(extractor_statistics="source", submodel_affine="frozen")
RUNS: tuple[tuple[str, str, Method], ...] = (
    ("robust source, NEFT", ROBUST, NEFT(num_blocks=4, beta=1.0)),  # best of 0.4, 0.6 and 1.0 on the validation digits
    ("robust source, vanilla freezing", ROBUST, FineTuning(num_blocks=4)),
    ("natural source, vanilla freezing", NATURAL, FineTuning(num_blocks=4)),
)


def digits() -> datasets.Dataset:
    """The 1,797 handwritten digits of scikit-learn (Alpaydin and Kaynak, 1998), 8x8 gray scans, as a data set."""
    from sklearn.datasets import load_digits

    content = load_digits()
    pixels = np.round(content.images * 255 / 16).astype(np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    from PIL import Image

    pictures = [Image.fromarray(picture, mode="L") for picture in pixels]
    return datasets.Dataset.from_dict({"image": pictures, "label": content.target.tolist()}, features=features)


def run(folder: Path, console: Console | None = None) -> dict[str, Report]:
    """Run the three transfers, print the comparison, publish the first model and load it back in a new process.

    Args:
        folder: Folder for models and reports; the results of an earlier quickstart there are replaced.
        console: Console to print to.
    """
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    begun = time.monotonic()
    logging.getLogger("cartl_hub.loading").setLevel(logging.ERROR)  # the splits are explained below, once
    data = digits()
    console.print(
        "[bold]Robust transfer to handwritten digits.[/bold] Two WRN-16-2 were trained on CIFAR-100, one adversarially with "
        "feature distance minimisation, one naturally. Their last 4 of 8 blocks are now fine-tuned on clean digits only "
        f"({len(data)} scans of 8x8 pixels, enlarged to 32x32), and the results are attacked: PGD-20 in the Linf ball of 8/255. "
        "A fifth of the digits is set aside for this before training. The first is also attacked at six radii, for a curve. "
        "All takes three to four minutes on two cores that do nothing else.\n"
    )
    reports: dict[str, Report] = {}
    tuners: list[RobustFineTuner] = []
    for number, (title, source, method) in enumerate(RUNS, start=1):
        output = folder / title.replace(", ", ".").replace(" ", "_")
        shutil.rmtree(output, ignore_errors=True)
        console.print(f"[bold]{number} of {len(RUNS)}: {title}[/bold] ({source})")
        tuner = RobustFineTuner(
            source,
            data,
            method=method,
            bn=POLICY,
            arguments=TrainingArguments(
                epochs=8,
                batch_size=32,
                lr=0.02,
                augmentation=Augmentation(padding=2, flip=False),
                validate_every=4,
                validation_attack=PGD(eps=EPS, step_size=2 / 255, steps=10),
            ),
            data_arguments=DataArguments(id="sklearn_digits"),
            output_dir=output,
            name=f"wrn16_2.{title.split()[0]}_{type(method).__name__.lower()}4_digits",
        )
        tuner.train()
        curve = CURVE if not tuners else None  # one is enough to look at
        reports[title] = tuner.evaluate(
            attacks={"PGD-20": ATTACK}, curve=curve, curve_images=60, checks=False, context={"command": "make quickstart"}
        )
        tuner.save()
        tuners.append(tuner)
    console.print(_comparison(reports))
    console.print(f"\n{_gain(reports)}")
    save_comparison(list(reports.values()), folder / "comparison")
    model_folder, repo_id = tuners[0].output_dir / "model", f"org/{tuners[0].name}"
    with LocalHub() as hub, TemporaryDirectory() as cache:
        with hub.client(token=hub.write_token, cache=Path(cache, "publisher")):
            commit = publish(model_folder, repo_id)
        again = _accuracy_in_new_process(repo_id, hub.environment(Path(cache, "user")))
    here = reports[RUNS[0][0]].clean
    if again != here.correct:
        raise RuntimeError(f"expected {here.correct} correct from the model loaded back, got {again}.")
    console.print(
        f"\nPublished as {repo_id}, commit {commit.oid[:7]}, to a Hub that ran on this machine for this, and loaded from "
        f"it in a new process: {again} of {here.num_images} test digits correct, as before.\n"
        f"\nmodel folder   {model_folder}   (weights, config, report, card)"
        f"\nreport         {model_folder / 'report.html'}   (open it in a browser)"
        f"\nall three      {folder / 'comparison' / 'comparison.html'}   (their models are beside it)"
        f"\n\nNext: [bold]cartl-hub finetune {ROBUST} YOUR_FOLDER[/bold] does it with your images, one folder per class;"
        f"\n      [bold]cartl-hub predict {model_folder} PICTURE[/bold] uses the model;"
        f"\n      [bold]cartl-hub publish {model_folder} --to ORG/NAME[/bold] puts it on the Hugging Face Hub."
        f"\n({time.monotonic() - begun:.0f} seconds)"
    )
    return reports


def _comparison(reports: dict[str, Report]) -> Table:
    first = next(iter(reports.values()))
    table = Table(
        "transfer",
        "clean accuracy",
        "PGD-20 accuracy, Linf 8/255",
        title=f"{first.num_images} test digits, kept out of training (95 % Wilson intervals)",
    )
    for title, report in reports.items():
        table.add_row(title, *(_with_interval(measured) for measured in (report.clean, report.attacks["PGD-20"])))
    return table


def _gain(reports: dict[str, Report]) -> str:
    """Sentence on what the bound of NEFT gains here, and where it gains more."""
    neft, vanilla = (reports[title].verdicts.correct["PGD-20"] for title, _, _ in RUNS[:2])
    middle, low, high = (100 * share for share in paired_bootstrap(neft, vanilla))
    verdict = "ahead of" if low > 0 else "behind" if high < 0 else "level with"
    return (
        "Both transfers keep what the robust source learned; the natural source has nothing to keep. On these easy images "
        f"NEFT is {verdict} vanilla freezing under attack: {middle:+.1f} points, 95 % paired interval {low:+.1f} to {high:+.1f}. "
        "Where fine-tuning forgets more, there is more to gain, and clean accuracy to pay: see CIFAR-10 in the README."
    )


def _with_interval(measured) -> str:
    low, high = measured.interval
    return f"{percent(measured.accuracy)}  [{100 * low:.1f}, {100 * high:.1f}]"


_LOAD_BACK = """
import sys, torch
from cartl_hub import load_model, load_splits
from cartl_hub.quickstart import digits
model = load_model(sys.argv[1])
test = load_splits(digits(), model.image_policy).test
with torch.inference_mode():
    print(sum(int((model(d.images.float() / 255).argmax(1) == d.labels).sum()) for d in test.batches(128)))
"""


def _accuracy_in_new_process(repo_id: str, environment: dict[str, str]) -> int:
    """Number of correct test digits of a model on the Hub that ``environment`` names."""
    command = [sys.executable, "-c", _LOAD_BACK, repo_id]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{repo_id} can't be loaded back:\n{done.stderr}")
    return int(done.stdout.split()[-1])
