"""Every example runs, on small data and for a few steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, toy_data
from PIL import Image
from torch import nn

from cartl_hub import TrainingArguments, evaluate
from cartl_hub.testing import LocalHub, User
from cartl_hub.training import train

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def photos(tmp_path):
    for label, shade in (("bright", 180), ("dark", 20)):
        (tmp_path / "my_photos" / label).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (32, 32), (shade + 5 * index, shade, shade)).save(tmp_path / "my_photos" / label / f"{index}.png")
    return str(tmp_path / "my_photos")


def run(name, *arguments, tmp_path):
    command = [sys.executable, str(EXAMPLES / name), *arguments, "--output", str(tmp_path / "out")]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("finetune_folder.py", ["{photos}", "--epochs", "1", "--num-images", "2"], "model, card and report:"),
        (
            "choose_on_validation.py",
            ["{photos}", "--num-blocks", "1", "--betas", "0.4", "1.0", "--epochs", "1", "--num-images", "2"],
            "chosen: NEFT(num_blocks=1, beta=",
        ),
        ("finetune_timm.py", ["test_resnet", "{photos}", "--untrained", "--epochs", "1", "--num-images", "2"], "PGD-20"),
        ("evaluate_any_model.py", ["--num-images", "40"], "PGD-100 at 16/255"),
        (
            "sweep_dask.py",
            [
                *("{photos}", "--sources", "wrn16_2.fdm4_cifar100", "--workers", "1", "--num-images", "8"),
                *("--seeds", "0", "--blocks", "0", "--epochs", "1", "--test-images", "2"),
            ],
            "wrn16_2.fdm4_cifar100  0       8",
        ),
        ("selfsupervised.py", ["--max-steps", "3"], "tasks.png"),
        ("explain.py", ["--num-images", "8", "--train-images", "40"], "most influential images are of the image's own class"),
        (
            "pretrain_source.py",
            ["{photos}", "--architecture", "wrn10_1", "--epochs", "1", "--num-images", "2"],
            "model, card and report:",
        ),
    ],
)
def test_example(name, arguments, expected, photos, tmp_path):
    done = run(name, *(argument.format(photos=photos) for argument in arguments), tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_the_twelve_lines_of_the_readme(photos, tmp_path):
    text = (EXAMPLES.parent / "README.md").read_text()
    code = text.partition("## Fine-tuning\n\n```python\n")[2].partition("```")[0]
    with LocalHub(tokens={"hf_me": User("me", organizations=("my_org",))}) as hub:
        environment = os.environ | {"HF_HUB_OFFLINE": "0"} | hub.environment(tmp_path / "cache", token="hf_me")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        (published,) = hub.repositories
        assert "report.json" in hub.files(published[1])
    assert (tmp_path / "report" / "report.html").exists()
    assert {"model.safetensors", "config.json", "README.md", "report.json"} <= {p.name for p in (tmp_path / "my_model").iterdir()}


def test_a_backbone_as_the_readme_says(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (40, 50)).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES.parent / "README.md").read_text()
    names = {"images": torch.rand(2, 3, 32, 32)}
    exec(text.partition("## A backbone\n\n```python\n")[2].partition("```")[0], names)
    model = names["model"]
    assert (names["logits"].shape, names["features"].shape) == ((2, 100), (2, 128))
    torch.testing.assert_close(model.head(names["features"]), names["logits"])
    torch.testing.assert_close(model.backbone((names["images"] - model.mean) / model.std), names["logits"])
    assert "%" in capsys.readouterr().out


def code_of(page, block=0):
    """Names that a block of Python in a page of the package defines."""
    names = {"__name__": "page"}
    exec(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[block], names)
    return names


def test_the_method_and_the_attack_of_the_pages():
    package = EXAMPLES.parent / "cartl_hub"
    method = code_of(package / "methods" / "README.md")["Smoothed"](num_blocks=1)
    model = make_model("wrn10_1")
    before = [parameter.clone() for parameter in model.parameters()]
    arguments = TrainingArguments(max_steps=1, batch_size=6, precision="fp32")
    assert train(model, method, toy_data(6), arguments=arguments).steps == 1
    assert sum(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)) == 2  # the classifier's
    attack = code_of(package / "attacks" / "README.md")["attack"]
    images, labels = torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(attack(model, images, labels), (images - 8 / 255).clamp(0, 1))
    report = evaluate(model, (images, labels), attacks={"darker": attack}, curve=None, checks=False, progress=False)
    assert report.attacks["darker"].settings


def test_an_attack_of_another_library():
    evasion = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    model = make_model("wrn10_1").eval()
    wrapped = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=(3, 32, 32), nb_classes=model.num_classes, clip_values=(0, 1), device_type="cpu"
    )
    images = torch.rand(8, 3, 32, 32)
    labels = model(images).argmax(1)
    foreign = code_of(EXAMPLES.parent / "cartl_hub" / "attacks" / "README.md", block=1)["Foreign"]

    def attack(eps, promised):
        search = evasion.ProjectedGradientDescent(wrapped, eps=eps, eps_step=eps / 4, max_iter=5, verbose=False)

        def made(images, labels):
            return torch.from_numpy(search.generate(images.numpy(), labels.numpy()))

        return foreign(eps=promised, library="ART, PGD-5", run=made)

    attacks = {"honest": attack(0.5, 0.5), "leaves the ball": attack(0.5, 0.1)}
    report = evaluate(model, (images, labels), attacks=attacks, curve=None, checks=False, progress=False)
    assert report.attacks["honest"].correct < 8
    assert "ART, PGD-5" in report.attacks["honest"].settings
    assert report.attacks["leaves the ball"].rejected == report.attacks["leaves the ball"].correct == 8


def test_every_example_is_tried():
    tried = {mark.args[1][index][0] for mark in test_example.pytestmark for index in range(len(mark.args[1]))}
    assert tried == {path.name for path in EXAMPLES.glob("*.py")}
