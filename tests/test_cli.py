import json
import re
import shlex
import subprocess
import sys
import textwrap
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from conftest import make_model
from huggingface_hub.errors import HTTPError
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import cartl_hub
from cartl_hub import FGSM, PGD, ModelError, load_model, save_model
from cartl_hub.cli import app, main
from cartl_hub.cli.shown import command as typed_command
from cartl_hub.testing import LocalHub

COMMANDS = ("finetune", "evaluate", "compare", "predict", "pretrain", "blocks", "sources", "publish", "import", "card")
COMMANDS += ("quickstart", "explain")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=200)


def words(result) -> str:
    """What was printed, without the frame of an error."""
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def photos(tmp_path):
    """Ten pictures of each of two classes, as a folder of folders."""
    for label, shade in (("bright", 200), ("dark", 50)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (40, 36), (shade + index, shade, shade)).save(tmp_path / "photos" / label / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def source(tmp_path):
    return save_model(make_model("wrn10_1", num_classes=2), tmp_path / "source")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_defaults_and_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert f"Example: cartl-hub {command}" in text
    if command in ("finetune", "evaluate"):
        assert "8/255" in text


def test_help_does_not_import_torch():
    script = (
        "import sys; sys.argv = ['cartl-hub', '--help']\n"
        "from cartl_hub.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('loaded', [name for name in ('torch', 'timm', 'numpy', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "loaded []", done.stdout + done.stderr


def test_main_job(photos, source, tmp_path):
    options = ["--method", "finetune", "--num-blocks", 1, "--epochs", 1, "--batch-size", 4, "--precision", "fp32"]
    options += ["--train-share", 0.5]
    result = run("finetune", source, photos, *options, "--num-images", 2, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    model = tmp_path / "run" / "model"
    assert str(model) in result.output
    assert (model / "report.html").exists()
    assert "training on 7 of 14 images" in (model / "README.md").read_text()
    of_folder = run("predict", model, photos / "dark", photos / "bright" / "1.png", "--top", 1)
    assert [line.partition(": ")[0] for line in of_folder.output.splitlines()] == [
        *(str(photos / "dark" / f"{index}.png") for index in range(10)),
        str(photos / "bright" / "1.png"),
    ]
    (tmp_path / "empty").mkdir()
    assert "expected pictures in" in run("predict", model, tmp_path / "empty").output
    named = run("predict", model, photos / "dark" / "1.png", "--top", 1)
    assert re.search(r"1\.png: (bright|dark) \d+\.\d%", named.output)
    measured = run("evaluate", model, photos, "--seed", 5, "--output", tmp_path / "report")
    assert measured.exit_code == 0, measured.output
    again, first = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "report", model))
    assert again["data"]["index_hash"] == first["data"]["index_hash"]  # what was set aside, whatever the seed of the attacks
    assert again["num_images"] == 4
    compared = run("compare", model, tmp_path / "report", "--output", tmp_path / "comparison")
    assert compared.exit_code == 0, compared.output
    assert (tmp_path / "comparison" / "comparison.html").exists()
    assert str(tmp_path / "report") in json.loads((tmp_path / "comparison" / "comparison.json").read_text())["models"][1]["name"]
    with_bundled = run("compare", model, "wrn16_2.fdm4_cifar100", "--output", tmp_path / "comparison")
    assert with_bundled.exit_code == 0, with_bundled.output
    assert "measured on uoft-cs/cifar100 instead of photos" in " ".join(with_bundled.output.split())
    file = tmp_path / "file"
    file.touch()
    assert "expected a folder for the output" in run("evaluate", model, photos, "--output", file).output


def test_cached_job(photos, source, tmp_path):
    options = ["--num-blocks", 1, "--epochs", 2, "--batch-size", 4, "--precision", "fp32", "--num-images", 2]
    result = run("finetune", source, photos, *options, "--cache", "--cache-views", 2, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert '"cache": {"name": "FeatureCache", "views": 2, "dtype": "fp32"}' in json.dumps(config)
    assert "--cache-views is of --cache" in run("finetune", source, photos, "--cache-views", 2).output


def test_publish_and_find(source, photos, tmp_path):
    planned = run("publish", source, "--to", "org/toy", "--dry-run")
    assert "Some of the test images are in" not in planned.output
    assert re.search(r"[\d,]+  model\.safetensors", planned.output), planned.output
    assert "Nothing was sent." in planned.output
    with LocalHub() as hub, hub.client(token=hub.write_token, backoff=False):
        sent = run("publish", source, "--to", "org/toy", "--message", "First", "--private")
        assert sent.output == f"Published: {hub.endpoint}/org/toy/commit/{hub.commits('org/toy')[0].oid}\n"
        assert (hub.commits("org/toy")[0].title, hub.repo("org/toy").private) == ("First", True)
        assert "Nothing differs" in run("publish", source, "--to", "org/toy", "--create-pr").output
        assert "org/toy" in run("sources", "--author", "org").output
        options = ["--num-blocks", 1, "--epochs", 1, "--batch-size", 4, "--precision", "fp32", "--num-images", 2]
        tuned = run("finetune", "org/toy", photos, *options, "--output", tmp_path / "run", "--push-to", "org/tuned", "--private")
        assert tuned.exit_code == 0, tuned.output
        assert f"Published: {hub.endpoint}/org/tuned/commit/{hub.commits('org/tuned')[0].oid}\n" in tuned.output
        assert hub.repo("org/tuned").private
        assert hub.files("org/tuned")["model.safetensors"] == (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
        assert "--private and --public are of" in run("finetune", "org/toy", photos, "--private").output
        assert "base_model: org/toy" in hub.files("org/tuned")["README.md"].decode()


def test_commands_in_cards_hold_no_folders_of_this_machine(monkeypatch):
    arguments = ["finetune", "org/toy", "/home/me/my photos", "--output=/home/me/run", "runs/a", "--eps", "8/255"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cartl-hub", *arguments])
    assert typed_command() == "cartl-hub finetune org/toy 'my photos' --output=run runs/a --eps 8/255"


def test_many_classes_are_no_file_name():
    from cartl_hub.cli.zoo import _lines

    assert _lines(",".join(["class"] * 100)) == ["class"] * 100


def test_data_from_the_hub_keep_their_name_in_a_sweep(tmp_path):
    done = run("sweep", "wrn16_2.fdm4_cifar100", "--data", "org/noisy", "--data-id", "org/plain", "--output", tmp_path)
    assert done.exit_code == 2
    assert "loaded by that name" in " ".join(done.output.replace("│", "").split())
    assert not list(tmp_path.iterdir())


def test_import_from_a_file_and_from_the_hub(tmp_path):
    model = make_model("wrn10_1", num_classes=2)
    state = {f"module.model.{name}": tensor for name, tensor in model.backbone.state_dict().items()}
    torch.save({"model": state, "epoch": 7}, tmp_path / "last.ckpt")
    options = ["--format", "timm", "--architecture", "wrn10_1", "--mean", "0.5,0.4,0.3", "--std", 1, "--labels", "cat, dog"]
    options += ["--model-arg", "negative_slope=0"]
    declared = ["--norm", "Linf", "--eps", "4/255", "--license", "mit"]
    done = run("import", tmp_path / "last.ckpt", "--to", tmp_path / "wrn.robust", *options, *declared)
    assert done.exit_code == 0, done.output
    assert "dropped, beside the weights: epoch" in done.output
    loaded = load_model(tmp_path / "wrn.robust")
    assert loaded.label_names == ("cat", "dog")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.backbone(images), model.backbone.eval()(images))
    card = (tmp_path / "wrn.robust" / "README.md").read_text()
    assert "Trained for Linf 4/255, as the importer declared." in card
    with LocalHub() as hub, hub.client(backoff=False):
        hub.add_repo("others/robust", {"runs/last.ckpt": (tmp_path / "last.ckpt").read_bytes()})
        there = run("import", "others/robust/runs/last.ckpt", "--to", tmp_path / "from_hub", *options)
        assert there.exit_code == 0, there.output
        imported = load_model(tmp_path / "from_hub").lineage["imported"]
        assert (imported["repo_id"], imported["revision"]) == ("others/robust", hub.commits("others/robust")[0].oid)
        for name in ("others/robust/none.ckpt", "others/robust/../last.ckpt", "last.ckpt"):
            assert isinstance(run("import", name, "--to", tmp_path / "no").exception, ModelError)
    assert not (tmp_path / "no").exists()


def test_import_by_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = make_model("wrn10_1", num_classes=2).backbone.state_dict()
    torch.save({"model": weights}, tmp_path / "last.ckpt")
    text = """
        id: wrn10_1.at_toy
        title: A toy.
        checkpoint: others/robust/last.ckpt
        remarks: [Made by others.]
        architecture: wrn10_1
        model_args: {negative_slope: 0}
        mean: [0.5]
        std: [1.0]
        norm: L2
        eps: 1/2
    """
    Path("import.yaml").write_text(textwrap.dedent(text))
    with LocalHub() as hub, hub.client(backoff=False):
        hub.add_repo("others/robust", {"last.ckpt": Path("last.ckpt").read_bytes()})
        done = run("import", "import.yaml")
        assert done.exit_code == 0, done.output
        loaded = load_model("models/wrn10_1.at_toy")
        assert loaded.lineage["threat_model"] == {"norm": "L2", "eps": 0.5}
        assert loaded.lineage["imported"]["repo_id"] == "others/robust"
        assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.backbone.state_dict().items())
        card = Path("models/wrn10_1.at_toy/README.md").read_text()
        assert "A toy." in card
        assert "Made by others." in card
        Path("beside").mkdir()
        Path("beside/import.yaml").write_text(textwrap.dedent(text).replace("others/robust/last.ckpt", "own.ckpt"))
        Path("last.ckpt").rename("beside/own.ckpt")
        assert run("import", "beside", "--to", "models/own").exit_code == 0
    assert "--norm is stated by the recipe" in run("import", "import.yaml", "--norm", "Linf").output
    assert "expected a folder for the model" in run("import", "last.ckpt").output
    Path("import.yaml").write_text("id: ../a\ntitle: A\ncheckpoint: b")
    assert "expected an id of letters, digits" in str(run("import", "import.yaml").exception)
    Path("import.yaml").write_text("id: a\nchekpoint: b")
    assert "(did you mean 'checkpoint'?)" in str(run("import", "import.yaml").exception)


def test_import_leaves_other_models_alone(tmp_path):
    save_model(make_model("wrn10_1"), tmp_path / "mine")
    before = (tmp_path / "mine" / "config.json").read_bytes()
    torch.save(make_model("wrn10_1", num_classes=2).backbone.state_dict(), tmp_path / "a.pt")
    options = ["--architecture", "wrn10_1", "--model-arg", "negative_slope=0", "--mean", 0, "--std", 1]
    refused = run("import", tmp_path / "a.pt", "--to", tmp_path / "mine", *options)
    assert refused.exit_code == 2
    assert (tmp_path / "mine" / "config.json").read_bytes() == before
    for std in (1, 2):  # the same file again
        assert run("import", tmp_path / "a.pt", "--to", tmp_path / "new", *options[:-1], std).exit_code == 0
    for argument in ("slope", "slope=[1"):
        refused = run("import", tmp_path / "a.pt", "--to", tmp_path / "other", "--model-arg", argument, *options)
        assert refused.exit_code == 2
        assert f"expected NAME=VALUE for --model-arg, got '{argument}'" in words(refused)


def test_a_card_is_written_again(source):
    (source / "README.md").write_text("old")
    assert run("card", source).exit_code == 0
    assert "wrn10_1" in (source / "README.md").read_text()


def test_blocks_are_printed_by_name():
    result = run("blocks", "wrn16_2")
    assert "8 blocks and the stem" in result.output
    assert re.search(r"4 .*stages\.2\.0 .*stages\.2\.0\.norm1, stages\.2\.0\.conv1", result.output)


def test_sources_are_listed():
    result = run("sources")
    assert "wrn16_2.fdm4_cifar100" in result.output
    markdown = run("sources", "--markdown").output
    assert markdown.startswith("| id |")
    assert "leave --hub, --author and --search out" in words(run("sources", "--markdown", "--search", "wrn"))


def test_version():
    assert run("--version").output.strip() == cartl_hub.__version__


def test_names_of_classes_do_not_steer_the_terminal(tmp_path):
    model = make_model("wrn10_1", num_classes=2)
    model.label_names = ("a\x1b[2Jb", "[/bold]\u202ec")
    save_model(model, tmp_path / "model")
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    output = run("predict", tmp_path / "model", tmp_path / "picture.png").output
    assert "a [2Jb" in output
    assert "[/bold] c" in output


def test_unknown_names_are_answered_with_similar_ones():
    assert "Similar names: wrn16_2" in str(run("blocks", "wrn16_22").exception)


def test_errors_are_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "cartl_hub.cli", "predict", "no_such_model", __file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: expected a folder, a Hub id")
    assert len(done.stderr.strip().splitlines()) == 1


def test_radius_is_checked():
    assert "expected a radius such as 8/255" in run("evaluate", "x", "y", "--eps", "eight").output


def test_any_module_can_be_measured(photos, tmp_path, monkeypatch):
    (tmp_path / "toy_net.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 2))\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    options = [photos, "--image-size", 16, "--strength", "quick", "--no-checks", "--output", "report"]
    done = run("evaluate", "toy_net:make", *options)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "report" / "report.json").read_text())["num_images"] == 20  # nobody has trained on them
    assert run("evaluate", "toy_net:make", *options, "--fail-under", "1").exit_code == 1
    assert "expected a torch module" in run("evaluate", "toy_net:wrong", *options).output
    assert "expected module:function" in run("evaluate", "toy_net:none", *options).output
    assert "pass --image-size" in run("evaluate", "toy_net:make", photos).output


def test_an_error_in_a_module_of_the_user_is_said_with_its_place(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, images):\n"
        "        return super().forward(images)\n"  # without flattening them
        "def make():\n"
        "    return Net(3 * 16 * 16, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cartl-hub", "evaluate", "broken_net:make", str(photos), "--image-size", "16"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"Error in {tmp_path / 'broken_net.py'}, line 4 (forward), RuntimeError: " in error


def test_a_script_that_exits_is_no_measured_model(photos, tmp_path, monkeypatch):
    (tmp_path / "script_net.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    refused = run("evaluate", "script_net:make", photos, "--image-size", 16)
    assert refused.exit_code == 2
    assert "expected a module that can be imported" in words(refused)


def test_attacks_in_another_norm(source, photos, tmp_path):
    options = ["--norm", "L2", "--strength", "quick", "--no-checks", "--output", tmp_path / "report"]
    for eps, expected in (([], 0.5), (["--eps", "0.25"], 0.25)):
        assert run("evaluate", source, photos, *options, *eps).exit_code == 0
        report = json.loads((tmp_path / "report" / "report.json").read_text())
        attacks = report["attacks"]
        assert report["curve"] is None
        assert {name: (found["attack"]["norm"], found["attack"]["eps"]) for name, found in attacks.items()} == dict.fromkeys(
            ("FGSM L2", "PGD-20 L2"), ("L2", expected)
        )


@pytest.mark.parametrize("command", ["evaluate", "explain"])
@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there(command, name, source, photos):
    refused = run(command, source, photos, "--device", name)
    assert refused.exit_code == 2
    assert f"expected a device that torch has here, got '{name}'" in words(refused)


def test_a_model_knows_its_image_size(source, photos):
    assert "--image-size is of module:function" in words(run("evaluate", source, photos, "--image-size", 7))


def test_trades(source, photos, tmp_path):
    options = ["--method", "trades", "--trades-weight", 3, "--eps", "4/255", "--num-blocks", 2, "--epochs", 1]
    options += ["--precision", "fp32", "--output", tmp_path / "run", "--num-images", 2, "--strength", "quick", "--no-checks"]
    assert "expected PGD, RFGSM or NFGSM with a random start" in str(
        run("finetune", source, photos, *options, "--attack", "fgsm").exception
    )
    done = run("finetune", source, photos, *options, "--attack", "rfgsm")
    assert done.exit_code == 0, (done.output, done.exception)
    method = load_model(tmp_path / "run" / "model").lineage["method"]
    assert (method["name"], method["beta"], method["num_blocks"]) == ("TRADES", 3.0, 2)
    assert (method["attack"]["name"], method["attack"]["eps"]) == ("RFGSM", pytest.approx(4 / 255))

    def measured():
        report = json.loads((tmp_path / "run" / "model" / "report.json").read_text())
        return next(iter(report["worst_case"])), report["curve"] is None

    assert measured() == ("Linf 4/255", True)  # what it was trained for, and no curve with quick
    assert run("finetune", source, photos, *options, "--attack", "rfgsm", "--report-eps", "2/255", "--curve").exit_code == 0
    assert measured() == ("Linf 2/255", False)
    assert not (tmp_path / "run" / "evaluation").exists()


def test_an_interrupted_report_goes_on(source, photos, tmp_path, monkeypatch):
    options = ["--num-blocks", 1, "--epochs", 1, "--precision", "fp32", "--output", tmp_path / "run", "--num-images", 2]
    options += ["--strength", "quick", "--no-checks"]
    search = PGD.search

    def interrupted(self, *args):
        if getattr(self, "steps", 20) == 20:  # not in validation
            raise KeyboardInterrupt
        return search(self, *args)

    monkeypatch.setattr(PGD, "search", interrupted)
    run("finetune", source, photos, *options)
    assert list((tmp_path / "run" / "evaluation").glob("*/*.safetensors"))  # what was done before: clean images and FGSM
    monkeypatch.setattr(PGD, "search", search)
    monkeypatch.setattr(FGSM, "search", interrupted)
    assert run("finetune", source, photos, *options).exit_code == 0
    assert not (tmp_path / "run" / "evaluation").exists()


def test_a_fresh_run(source, photos, tmp_path):
    options = ["--num-blocks", 1, "--epochs", 1, "--precision", "fp32", "--output", tmp_path / "run", "--num-images", 2]
    options += ["--strength", "quick", "--no-checks"]
    done = run("finetune", source, photos, *options)
    assert done.exit_code == 0, (done.output, done.exception)
    assert run("finetune", source, photos, *options, "--lr", 0.01, "--fresh").exit_code == 0
    lineage = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["cartl_hub"]["lineage"]
    assert lineage["arguments"]["lr"] == 0.01
    report = json.loads((tmp_path / "run" / "model" / "report.json").read_text())
    assert list(report["attacks"]) == ["FGSM", "PGD-20", "PGD-20 L2"]
    assert [check["name"] for check in report["checks"]] == ["second-verdict"]


@pytest.mark.parametrize(
    ("method", "option", "owner"),
    [
        ("lwf", ("--beta", "0.4"), "neft"),
        ("lwf", ("--num-blocks", "4"), "neft and finetune and adversarial and trades"),
        ("finetune", ("--convex-residual",), "neft"),
        ("neft", ("--eps", "4/255"), "adversarial and trades"),
        ("adversarial", ("--trades-weight", "3"), "trades"),
        ("neft", ("--weight", "1"), "lwf"),
        ("finetune", ("--adversarial-share", "0.3"), "adversarial"),
    ],
)
def test_option_of_another_method_is_an_error(method, option, owner):
    result = run("finetune", "wrn16_2.fdm4_cifar100", "no_data", "--method", method, *option)
    assert result.exit_code == 2
    assert f"{option[0]} is an option of {owner}" in " ".join(result.output.replace("│", " ").split())


def test_a_gate_does_not_open_on_an_unfinished_measurement(source, photos):
    options = ["--strength", "quick", "--no-checks", "--output", source.parent / "report", "--fail-under", 0]
    assert run("evaluate", source, photos, *options).exit_code == 0
    cut = run("evaluate", source, photos, *options, "--budget", 1e-6)
    assert cut.exit_code == 1
    assert "Left out for the budget, so that robust accuracy may be lower: " in cut.output


def test_a_folder_that_cannot_be_written_is_found_before_the_measurement(source, photos, tmp_path):
    (tmp_path / "file").write_text("")
    refused = run("evaluate", source, photos, "--output", tmp_path / "file" / "report")
    assert refused.exit_code == 2
    assert "expected a folder that can be written for the output" in words(refused)


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("evaluate", ["--resume", "kept batches"], "Finished batches were kept; this resumes after them: {again}"),
        ("evaluate", [], "Nothing was kept; with this, finished batches are: {again} --resume FOLDER"),
        ("finetune", ["--epochs", "3"], "last checkpoint was kept, if it has reached one; this goes on: {again}"),
        ("blocks", None, "Interrupted.\n"),
    ],
)
def test_interruption_says_what_was_kept(command, options, said, monkeypatch, capsys):
    def stop(*arguments, **settings):
        raise KeyboardInterrupt

    for name in ("list_blocks", "load_test_split", "RobustFineTuner"):
        monkeypatch.setattr(cartl_hub, name, stop, raising=False)
    given = [command, "wrn16_2.fdm4_cifar100", *([] if options is None else ["my photos", *options])]
    monkeypatch.setattr(sys, "argv", ["cartl-hub", *given])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said.format(again=shlex.join(["cartl-hub", *given])) in error


def test_sources_without_a_network(monkeypatch):
    """What is here is shown, then the reason why there is no more; nobody who answers is asked three times."""
    asked = []

    def refused(self, **arguments):
        asked.append(arguments)
        raise type("ConnectError", (HTTPError,), {})("nobody there")

    monkeypatch.setattr("cartl_hub.hub.HfApi.list_models", refused)
    result = run("sources", "--hub")
    assert "wrn16_2.fdm4_cifar100" in result.output
    assert isinstance(result.exception, ModelError)
    assert "the list of models can't be had from the Hub: ConnectError" in str(result.exception)
    assert len(asked) == 1


def test_ids_are_whole_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setattr("rich.console.Console.__init__", partialmethod(Console.__init__, width=80))
    assert "wrn16_2.natural_cifar100" in run("sources").output


def test_set_reaches_every_part_of_a_run(photos, monkeypatch):
    class Reached(Exception):
        pass

    def look(*args, **kwargs):
        given.update(kwargs)
        raise Reached

    given = {}
    monkeypatch.setattr(cartl_hub, "RobustFineTuner", look)
    changes = ["training.weight_decay=1e-3", "method.sigma=operator", "bn.submodel_affine=frozen", "data.validation_share=1/4"]
    result = run("finetune", "wrn16_2.fdm4_cifar100", photos, *(part for change in changes for part in ("--set", change)))
    assert isinstance(result.exception, Reached)
    assert given["arguments"].weight_decay == 0.001
    assert given["method"] == cartl_hub.NEFT(num_blocks=4, sigma="operator")
    assert given["bn"].submodel_affine == "frozen"
    assert given["data_arguments"].validation_share == 0.25
    refused = run("finetune", "wrn16_2.fdm4_cifar100", photos, "--set", "weight_decay=1")
    assert "expected NAME=VALUE for --set, with a name in method., bn., training., data., got 'weight_decay=1'" in words(refused)
    refused = run(
        "pretrain", Path(__file__).parents[1] / "model_cards/wrn16_2.fdm4_cifar100/recipe.yaml", "--set", "training.max_steps=2"
    )
    assert "say where it goes with --folder" in words(refused)


def test_norms_of_a_model(tmp_path):
    table = run("blocks", "wrn16_2.fdm4_cifar100-neft4-cifar10", "--norms").output
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in table.splitlines() if line.startswith("│")]
    trained = [row for row in rows if row[0] in "1234" and row[2]]
    assert len(trained) == 6
    assert {row[2] for row in trained} == {"0.400"}  # beta, as the model was fine-tuned with
    assert {row[1] for row in rows if row[4]} >= {"stages.0.0.norm1", "stages.2.1.norm2"}


def test_a_radius_that_was_set_is_the_one_of_the_report(source, photos, tmp_path):
    options = ["--method", "adversarial", "--attack", "fgsm", "--num-blocks", 1, "--epochs", 1, "--precision", "fp32"]
    options += ["--set", "method.attack.eps=4/255", "--num-images", 2, "--strength", "quick", "--no-checks"]
    done = run("finetune", source, photos, *options, "--output", tmp_path / "run")
    assert done.exit_code == 0, (done.output, done.exception)
    report = json.loads((tmp_path / "run" / "model" / "report.json").read_text())
    assert next(iter(report["worst_case"])) == "Linf 4/255"
    assert report["curve"] is None
