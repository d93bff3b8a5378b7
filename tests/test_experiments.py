import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_model
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from typer.testing import CliRunner

from cartl_hub import (
    FGSM,
    NEFT,
    PGD,
    BatchNormPolicy,
    FeatureCache,
    FineTuning,
    LwF,
    ModelError,
    TrainingArguments,
    load_model,
    save_model,
)
from cartl_hub.blocks import count_blocks, list_blocks
from cartl_hub.cli import app
from cartl_hub.data import DataError
from cartl_hub.experiments import (
    Cell,
    CellResult,
    ExperimentError,
    Pair,
    Plan,
    Sweep,
    load_plan,
    make_tables,
    run_cell,
    run_cells,
    run_sweep,
    save_results,
)
from cartl_hub.experiments import cell as cell_module
from cartl_hub.experiments import run as run_module
from cartl_hub.experiments.cell import WORST, Measured, code_commit
from cartl_hub.experiments.results import Point, area_under, claim_text, differences, pareto_front, render_results
from cartl_hub.experiments.run import find_result, result_path, state
from cartl_hub.experiments.sweep import saved_epochs, saved_images
from cartl_hub.experiments.sweep_page import _best, _counted, _interval, against_images, difference_from
from cartl_hub.experiments.tables import ABLATION, BATCH_NORM, CASES, NAMES
from cartl_hub.recipe import RecipeData
from cartl_hub.weights import weights_sha256

ROOT = Path(__file__).parents[1]
PLAN = ROOT / "model_cards" / "results" / "plan.yaml"
QUICK = {"PGD-100": PGD(eps=8 / 255, step_size=8 / 255, steps=1)}
TRAINING = TrainingArguments(epochs=1, batch_size=8, precision="fp32", validation_attack=None)


@pytest.fixture
def target(tmp_path):
    """24 training and 10 test pictures of two classes, in parquet files."""
    features = Features({"image": Image(), "label": ClassLabel(names=["bright", "dark"])})
    for split, number in (("train", 24), ("test", 10)):
        shades = [200 + k if k % 2 == 0 else 50 + k for k in range(number)]
        pictures = [PILImage.new("RGB", (32, 32), (shade, 90, shade)) for shade in shades]
        content = {"image": pictures, "label": [k % 2 for k in range(number)]}
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict(content, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    return RecipeData(id="toy/shades", local=str(tmp_path / "data"))


@pytest.fixture
def source(tmp_path):
    return str(save_model(make_model("wrn10_1"), tmp_path / "models" / "wrn10_1.at_toy"))


@pytest.fixture
def make_cell(source, target):
    def make(**changes):
        chosen = {"source": source, "target": target, "method": FineTuning(num_blocks=1), "bn": BatchNormPolicy()}
        return Cell(**chosen | {"training": TRAINING, "attacks": QUICK} | changes)

    return make


# Cells


def test_a_cell_is_what_changes_its_result(make_cell, target):
    cell = make_cell()
    same = [
        make_cell(target=replace(target, local="elsewhere")),
        make_cell(training=replace(TRAINING, precision="auto", checkpoint_every=5)),
    ]
    assert {other.key for other in same} == {cell.key}
    plain = make_cell(training=replace(TRAINING, augmentation=None))
    exact, rounded = (make_cell(training=replace(plain.training, cache=FeatureCache(dtype=dtype))) for dtype in ("fp32", "bf16"))
    assert (exact.key, exact.to_json()) == (plain.key, plain.to_json())
    assert rounded.key != plain.key
    others = [
        make_cell(training=replace(TRAINING, seed=1)),
        make_cell(method=FineTuning(num_blocks=2)),
        make_cell(method=NEFT(num_blocks=1)),
        make_cell(method=NEFT(num_blocks=1, beta=0.6)),
        make_cell(bn=BatchNormPolicy(submodel_affine="frozen")),
        make_cell(num_images=5),
        make_cell(target=replace(target, read=replace(target.read, train_images=8))),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 1 + len(others)
    assert re.fullmatch(r"[\w.]+-finetuning1-shades-seed0-[0-9a-f]{10}", cell.key)


def test_an_option_that_is_added_changes_no_key(make_cell, monkeypatch):
    cell = make_cell()
    key, stated = cell.key, cell.to_json()
    monkeypatch.setattr(cell_module, "fields", lambda kind: [entry for entry in fields(kind) if entry.name != "momentum"])
    assert cell.key == key
    del stated["training"]["momentum"]
    assert cell.agrees(stated)
    assert not cell.agrees({"training": {"lr": 0.5}})
    assert not cell.agrees(stated | {"attacks": stated["attacks"] | {"another": {}}})
    assert not cell.agrees(stated | {"attacks": {}})


def test_verdicts_survive_their_file():
    verdict = np.arange(13) % 3 == 0
    measured = Measured(7, {"clean": verdict, WORST: verdict & (np.arange(13) > 5)})
    content = json.loads(json.dumps(measured.to_json()))
    again = Measured.from_json(content)
    assert again.step == 7
    assert all(np.array_equal(again.verdicts[name], measured.verdicts[name]) for name in ("clean", WORST))
    assert again.accuracy("clean").correct == 5
    content["correct"]["clean"] = 6
    with pytest.raises(ValueError, match=r"expected 6 correct verdicts for clean, .* got 5"):
        Measured.from_json(content)
    content = measured.to_json() | {"num_images": 130}
    with pytest.raises(ValueError, match="expected verdicts on 130 images for clean, got 2 bytes"):
        Measured.from_json(content)
    with pytest.raises(ValueError, match="expected a worst case"):
        Measured.from_json(Measured(7, {"clean": verdict, "PGD-20": ~verdict & False, WORST: verdict}).to_json())


def test_a_cell_with_attacks_in_two_balls_is_read_again(make_cell, tmp_path):
    """An image may withstand all in the ball of the headline and fall in another."""
    two = {"FGSM": FGSM(eps=0.0), "FGSM L2": FGSM(eps=60.0, norm="L2")}
    cell = make_cell(attacks=two)
    result = run_cell(cell, tmp_path / "run")
    result.save(tmp_path / "results" / f"{cell.key}.json")
    verdicts = find_result(cell, tmp_path / "results").last.verdicts
    assert (verdicts[WORST] & ~verdicts["FGSM L2"]).any()
    assert np.array_equal(verdicts[WORST], verdicts["FGSM"])
    content = result.last.to_json() | {"worst_case": ["FGSM", "FGSM L2"]}
    with pytest.raises(ValueError, match="expected a worst case"):
        Measured.from_json(content)


def test_commit_says_whether_the_code_has_changed(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)

    assert code_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / ".gitignore").write_text(".venv\n")
    (tmp_path / ".venv").mkdir()
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = code_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    assert code_commit(tmp_path / ".venv") is None  # the user's commit says nothing of what is installed there
    (tmp_path / "code.py").write_text("2\n")
    assert code_commit(tmp_path) == f"{clean}+"


def test_run(make_cell, tmp_path, monkeypatch):
    cell = make_cell(training=replace(TRAINING, epochs=2))
    (found,) = run_cells([cell, cell], results=tmp_path / "results", runs=tmp_path / "runs", command="this").values()
    assert found.made["command"] == "this"
    assert found.source["weights_sha256"] == weights_sha256(load_model(cell.source))
    assert found.data["test"]["num_images"] == 10
    assert found.last.step == 4
    assert found.best.step in (2, 4)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == f"{cell.key}-{found.source['weights_sha256'][:8]}"  # other weights run in another folder
    model = load_model(folder / "model")
    assert found.made["weights_sha256"] == weights_sha256(model)
    assert "Measured by: `this`" in (folder / "model" / "README.md").read_text()
    assert model.lineage["name"] == cell.model_name == "wrn10_1.at_toy-finetuning1-shades"
    images = torch.stack([torch.full((3, 32, 32), (200 + k if k % 2 == 0 else 50 + k) / 255) for k in range(10)])
    images[:, 1] = 90 / 255
    assert np.array_equal(found.last.verdicts["clean"], model(images).argmax(1).numpy() == np.arange(10) % 2)
    assert found.last.accuracy(WORST).correct <= found.last.accuracy("clean").correct

    monkeypatch.setattr(run_module, "run_cell", None)  # what is done is not run again
    again = run_cells([cell], results=tmp_path / "results", runs=tmp_path / "runs")
    assert again[cell.key].to_json() == found.to_json()


def test_clean_accuracy_alone(make_cell, tmp_path):
    cell = make_cell(training=replace(TRAINING, epochs=2))
    attacked, clean = run_cells([cell, replace(cell, attacks={})], results=tmp_path / "r", runs=tmp_path / "runs").values()
    assert list(clean.last.verdicts) == ["clean"]
    assert np.array_equal(clean.last.verdicts["clean"], attacked.last.verdicts["clean"])
    assert clean.last.accuracy("clean").correct > 0
    read = CellResult.load(tmp_path / "r" / f"{replace(cell, attacks={}).key}.json")
    assert np.array_equal(read.last.verdicts["clean"], clean.last.verdicts["clean"])


def test_best_weights_are_measured_beside_the_last(make_cell, tmp_path, monkeypatch):
    accuracies = iter([{"clean": 0.9}, {"clean": 0.1}, {"clean": 0.2}])
    monkeypatch.setattr("cartl_hub.training.validation.Validator.accuracies", lambda self, model, attacks: next(accuracies))
    cell = make_cell(training=replace(TRAINING, epochs=3, lr=0.5), method=FineTuning(num_blocks=3))
    (found,) = run_cells([cell], results=tmp_path / "results", runs=tmp_path / "runs").values()
    assert (found.best.step, found.last.step) == (2, 6)
    assert [one["clean_acc"] for one in found.validations] == [0.9, 0.1, 0.2]


def test_one_cell_that_fails_stops_no_other(make_cell, tmp_path):
    bad = make_cell(method=FineTuning(num_blocks=40))
    good = make_cell()
    with pytest.raises(ExperimentError, match=r"1 of 2 cells failed; .*\n.*num_blocks must be in \[1, 5\]"):
        run_cells([bad, good], results=tmp_path / "results", runs=tmp_path / "runs", keep=False)
    assert find_result(good, tmp_path / "results") is not None
    assert [folder.name[: len(bad.key)] for folder in (tmp_path / "runs").iterdir()] in ([], [bad.key])  # keep=False


def test_a_cell_that_another_process_runs_is_left_to_it(make_cell, tmp_path, caplog):
    cells = [make_cell(attacks={}), make_cell(attacks={}, training=replace(TRAINING, seed=1))]
    folder = tmp_path / "runs" / f"{cells[0].key}-{weights_sha256(load_model(cells[0].source))[:8]}"
    folder.mkdir(parents=True)
    script = (
        "import sys; from pathlib import Path; from cartl_hub.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(folder / "cell.lock")]
    folders = {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert run_cells(cells, **folders).keys() == {cells[1].key}
        assert "1 cells are run by another process" in caplog.text
        other.stdin.close()
    assert len(run_cells(cells, **folders)) == 2


def test_what_nobody_thought_of_stops_no_other_cell(make_cell, tmp_path, monkeypatch):
    run_cell = run_module.run_cell

    def odd(cell, *args, **kwargs):
        if cell.training.seed:
            raise KeyError("odd")
        return run_cell(cell, *args, **kwargs)

    monkeypatch.setattr(run_module, "run_cell", odd)
    cells = [make_cell(training=replace(TRAINING, seed=seed)) for seed in (1, 0)]
    with pytest.raises(ExperimentError, match="1 of 2 cells failed"):
        run_cells(cells, results=tmp_path / "results", runs=tmp_path / "runs")
    assert find_result(cells[1], tmp_path / "results") is not None


def test_last_and_best_weights_are_kept_apart(make_cell):
    with pytest.raises(ValueError, match="expected load_best=False in a cell"):
        make_cell(training=replace(TRAINING, load_best=True))
    with pytest.raises(ValueError, match="num_images must be >= 1, got 0"):
        make_cell(num_images=0)


def test_some_test_images_are_of_every_class(make_cell, tmp_path):
    (found,) = run_cells([make_cell(num_images=4)], results=tmp_path / "results", runs=tmp_path / "runs").values()
    assert found.data["test"]["num_images"] == len(found.last.verdicts["clean"]) == 4
    report = json.loads(next((tmp_path / "runs").glob("*/model/report.json")).read_text())
    assert [row["num_images"] for row in report["per_class"]] == [2, 2]


def test_several_processes(make_cell, tmp_path):
    cells = [make_cell(), make_cell(training=replace(TRAINING, seed=1))]
    assert set(run_cells(cells, results=tmp_path / "results", runs=tmp_path / "runs", jobs=2)) == {c.key for c in cells}


def test_results_of_other_weights_settings_data_or_damaged_files(make_cell, target, tmp_path):
    cell, results = make_cell(), tmp_path / "results"
    run_cells([cell], results=results, runs=tmp_path / "runs")
    path = result_path(cell, results)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"cell": content["cell"] | {"num_images": 3}}))
    assert find_result(cell, results) is None
    path.write_text(json.dumps(content))
    assert find_result(cell, results) is not None
    for damaged in (path.read_text()[:100], "", json.dumps(content | {"data": {}}), json.dumps(content | {"made": {}})):
        path.write_text(damaged)
        assert find_result(cell, results) is None
        with pytest.raises(ValueError, match="expected the result of a cell in"):
            CellResult.load(path)
    path.write_text(json.dumps(content))
    assert find_result(cell, results) is not None
    (Path(target.local) / "more.parquet").write_bytes(b"more")
    assert find_result(cell, results) is None
    (Path(target.local) / "more.parquet").unlink()
    shutil.rmtree(cell.source)
    other = make_model("wrn10_1")
    other.head.bias.data += 1
    save_model(other, cell.source)
    assert find_result(cell, results) is None


# Tables


@pytest.fixture
def plan():
    target = RecipeData(id="uoft-cs/cifar10")
    return Plan(network="wrn34_10", source_data="cifar100", target=target, data_sizes=(100, 200), seeds=(0, 1))


def test_tables_have_the_papers_figures_and_the_right_sources(plan):
    (cases,) = make_tables(plan, ["cases"])
    rows = {row.label: row for row in cases.rows}
    assert rows["FDM + NEFT"].paper == {
        "k = 4": "paper's case 4: 85.51 / 28.47",
        "k = 6": "paper's case 6: 87.79 / 30.94",
        "k = 8": "paper's case 8: 91.30 / 29.34",
    }
    for k in (4, 6, 8):
        cells = rows["FDM + NEFT"].cells[f"k = {k}"]
        assert [cell.source for cell in cells] == [f"wrn34_10.fdm{k}_cifar100"] * 2
        assert [cell.training.seed for cell in cells] == [0, 1]
        assert all(cell.method == NEFT(num_blocks=k, beta=0.4) for cell in cells)
        assert {cell.source for cell in rows["AT + TL"].cells[f"k = {k}"]} == {"wrn34_10.at_cifar100"}
    weights = {cell.source for cell in make_tables(plan, ["ablation"])[0].cells}
    assert "wrn34_10.fdm8w1.28_cifar100" in weights
    sizes = make_tables(plan, ["datasize"])[0]
    assert [cells[0].target.read.train_images for cells in sizes.rows[0].cells.values()] == [100, 200]
    elsewhere = replace(plan, target=RecipeData(id="org/other"))  # the paper's figures are on CIFAR-10
    assert not any(row.paper for table in make_tables(elsewhere, ["cases", "ablation", "bn", "ssl"]) for row in table.rows)
    assert CASES["AT + TL"][8] == (90.82, 18.54)
    assert ABLATION[1.28, 0.4][4] == (85.64, 28.40)
    assert BATCH_NORM["source", "frozen"] == (90.84, 18.54)


def test_tables_of_other_targets(plan):
    training = TrainingArguments(epochs=60, lr=0.05)
    svhn = Pair(source_data="cifar100", target=RecipeData(id="ufldl-stanford/svhn"), num_blocks=6, training=training)
    plain = Pair(source_data="gtsrb", target=svhn.target, num_blocks=4)
    own, same = make_tables(replace(plan, sources=("at", "fdm6"), pairs=(svhn, plain)), ["targets"])
    column, other = own.columns
    assert (column, other) == ("cifar100 -> svhn, k = 6", "gtsrb -> svhn, k = 4")
    rows = {row.label: row for row in own.rows}
    assert rows["CARTL"].paper == {column: "paper: 93.96 / 22.21", other: "paper: 94.07 / 15.26"}
    assert [row.paper for row in same.rows] == [{}] * 3
    cartl, lwf, tl = (rows[name].cells[column] for name in ("CARTL", "LwF", "TL"))
    assert [cell.training.seed for cell in cartl] == [0, 1]
    assert {cell.source for cell in cartl} == {"wrn34_10.fdm6_cifar100"}
    assert {cell.source for cell in (*lwf, *tl)} == {"wrn34_10.at_cifar100"}
    assert {cell.source for cell in same.cells} == {"wrn34_10.fdm6_cifar100", "wrn34_10.fdm6_gtsrb"}
    assert cartl[0].method == NEFT(num_blocks=6, beta=0.4)
    assert cartl[0].training == tl[0].training == training
    assert (lwf[0].training.epochs, lwf[0].training.lr) == (60, plan.lwf_training.lr)
    assert rows["CARTL"].cells[other][0].source == "wrn34_10.fdm4_gtsrb"
    assert rows["CARTL"].cells[other][0].training == plan.training


def test_self_supervised_tables(plan):
    shares, tasks = make_tables(replace(plan, pretexts=("simclr", "rotation"), label_shares=(0.1, 0.3, 1.0)), ["ssl"])
    assert shares.attack == tasks.attack == "FGSM"
    turned = make_tables(replace(plan, pretexts=("simclr",), label_shares=(1.0, 0.3, 0.1)), ["ssl"])[0]
    assert [row.label for row in turned.rows] == [row.label for row in shares.rows]
    assert turned.claims == shares.claims
    assert (shares.claims[1].better, shares.claims[1].worse) == ("100% of the labels", "10% of the labels")
    rows = {row.label: row for row in shares.rows}
    first = rows["supervised, from the start"]
    assert first.paper == {"clean images": "paper: 68 / 23", "adversarial images added": "paper: 66 / 36"}
    assert {cell.source for cells in first.cells.values() for cell in cells} == {"untrained:wrn34_10"}
    clean, added = (cells[0] for cells in rows["10% of the labels"].cells.values())
    assert (clean.method, added.method.adversarial_share) == (FineTuning(num_blocks=1), 1.0)
    assert clean.target.read.train_share == 0.1
    assert rows["10% of the labels"].paper["adversarial images added"] == "paper: 60 / 36"
    assert tasks.rows[1].paper == {"adversarial images added": "paper: 25 under FGSM"}
    assert tasks.rows[1].cells["clean images"][0].source == "wrn34_10.rotation_cifar100"
    whole = make_tables(replace(plan, pretexts=("rotation",), label_shares=(0.1, 1.0)), ["ssl"])[1]  # without the paper's 30 %
    assert whole.title.startswith("Pretext tasks, 100% of the labels")
    assert whole.rows[0].paper == {}


def test_a_network_trained_from_the_start(make_cell, tmp_path):
    cells = [make_cell(source="untrained:wrn10_1", method=FineTuning(), training=replace(TRAINING, seed=s)) for s in (0, 1)]
    found = run_cells(cells, results=tmp_path / "results", runs=tmp_path / "runs")
    assert len({result.source["weights_sha256"] for result in found.values()}) == 2


def test_every_claim_is_on_rows_that_are_there(plan):
    for table in make_tables(replace(plan, sources=("at", "fdm4", "natural"), pretexts=("simclr",))):
        labels = [row.label for row in table.rows]
        assert len(set(labels)) == len(labels)
        assert all({claim.better, claim.worse} <= set(labels) for claim in table.claims)
    with pytest.raises(ValueError, match=r"expected tables among cases, ablation, .* got case"):
        make_tables(plan, ["case"])


def result_of(cell, clean, robust, test="same"):
    """A result with verdicts that are stated."""
    verdicts = {"clean": clean, "PGD-20": robust, "PGD-100": robust, WORST: robust}
    made = {"command": "cartl-hub reproduce cases", "commit": None, "device": "CPU", "precision": "fp32"}
    data = {"train": {"num_images": 9}, "validation": {}, "test": {"fingerprint": test}}
    source = {"id": cell.source, "weights_sha256": "0", "method": None}
    return CellResult(cell.to_json(), Measured(3, verdicts), None, source, data, [], made)


def test_claims_are_seen_only_where_the_interval_excludes_0(plan):
    (cases,) = make_tables(plan, ["cases"])
    rows, (claim, *_) = {row.label: row for row in cases.rows}, cases.claims
    better, worse = (rows[label].cells["k = 4"] for label in (claim.better, claim.worse))
    clean, low, high = np.ones(400, bool), np.arange(400) < 40, np.arange(400) < 80
    results = {}
    assert claim_text(claim, differences(cases, claim, results)) == "NEFT is more robust than TL from FDM: not run."
    results |= {better[0].key: result_of(better[0], clean, high), worse[0].key: result_of(worse[0], clean, low)}
    found = differences(cases, claim, results)
    assert found[0].middle == pytest.approx(0.1)
    assert "seen in all 1 pairs" in claim_text(claim, found)
    results |= {better[1].key: result_of(better[1], clean, low), worse[1].key: result_of(worse[1], clean, high)}
    text = claim_text(claim, differences(cases, claim, results))
    assert "seen in 1 of the 2 pairs of cells that were run; in 1 **the opposite** is" in text
    assert "k = 4, seed 1: -10.00 points" in text
    results[worse[0].key] = results[better[0].key]
    assert "**the opposite**" in claim_text(claim, differences(cases, claim, results))
    results[better[0].key] = result_of(better[0], clean, high, test="other images")
    assert [one.seed for one in differences(cases, claim, results)] == [1]  # other images are not paired


def test_page(plan, tmp_path):
    (tmp_path / "results").mkdir()
    text = render_results(plan, tmp_path / "results", tmp_path / "RESULTS.md")
    assert "| FDM + NEFT | not run<br>paper's case 4: 85.51 / 28.47 |" in text
    assert "0 of " in text
    rows = {row.label: row for row in make_tables(plan, ["cases"])[0].rows}
    clean, robust = np.arange(400) < 300, np.arange(400) < 30
    for cell in (rows["AT + TL"].cells["k = 4"][0], *rows["AT + NEFT"].cells["k = 4"]):
        result_of(cell, clean, robust).save(result_path(cell, tmp_path / "results"))
    save_results(plan, tmp_path / "results", tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| AT + TL | 75.00 / 7.50 / 7.50 (1 of 2 seeds)<br>paper's case 4: 83.22 / 25.23 |" in text
    assert "| AT + NEFT | 75.00 / 7.50 / 7.50<br>paper's case 4: 83.72 / 26.29 |" in text
    assert "NEFT is more robust than TL from AT: **not seen** in any of the 1 pairs" in text
    assert "](results/pareto.png)" in text
    assert (tmp_path / "results" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_pareto_front():
    found = [Point(*values) for values in (("a", 0.8, 0.1), ("b", 0.7, 0.2), ("c", 0.6, 0.15), ("d", 0.7, 0.1), ("e", 0.9, 0.02))]
    front = pareto_front(found)
    assert [point.label for point in front] == ["b", "a", "e"]
    assert area_under(front) == pytest.approx(0.7 * 0.2 + 0.1 * 0.1 + 0.1 * 0.02)


def test_plan_of_the_repository():
    plan = load_plan(PLAN)
    assert render_results(plan, PLAN.parent, ROOT / "RESULTS.md") == (ROOT / "RESULTS.md").read_text()
    listed = {cell.key for table in make_tables(plan, NAMES) for cell in table.cells}
    assert {path.stem for path in PLAN.parent.glob("*.json")} <= listed  # no result that the page leaves out


def test_plan_errors(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("network: wrn16_2\nsource_data: cifar100\ntarget: {id: a/b}\ncase: [4]\n")
    with pytest.raises(ValueError, match=r"plan.yaml: Plan has no 'case' \(did you mean 'cases'\?\)"):
        load_plan(path)
    path.write_text("network: wrn16_2\nsource_data: cifar100\ntarget: {id: a/b}\ncases: [4]\n")
    with pytest.raises(ValueError, match="expected one of paper_cases for each of cases"):
        load_plan(path)
    for entry, message in (
        ("seeds: [0, 0]", r"expected different entries in seeds, got \(0, 0\)"),
        ("seeds: [-1]", "each of seeds must be >= 0, got -1"),
        ("label_shares: []", "expected at least one entry in label_shares"),
        ("num_images: 0", "num_images must be >= 1, got 0"),
    ):
        path.write_text(f"network: wrn16_2\nsource_data: cifar100\ntarget: {{id: a/b}}\n{entry}\n")
        with pytest.raises(ValueError, match=message):
            load_plan(path)
    with pytest.raises(ValueError, match=r"expected a YAML file in .*, which does not exist"):
        load_plan(tmp_path / "missing.yaml")


def test_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "plan.yaml").write_text("network: nothing\nsource_data: toy\ntarget: {id: a/b}\nseeds: [0]\n")
    options = ["--plan", "results/plan.yaml", "--only", "neft4"]
    listed = CliRunner().invoke(app, ["reproduce", "cases", *options, "--dry-run"], terminal_width=200)
    assert listed.exit_code == 0
    assert "nothing.fdm4_toy-neft4-b-seed0-" in listed.output
    assert "2 cells: 0 done, 0 not run, 0 source not trained, 2 source not found" in listed.output
    none = CliRunner().invoke(app, ["reproduce", "cases", *options[:-1], "nosuch"])
    assert none.exit_code == 2
    assert "'nosuch'" in none.output
    failed = CliRunner().invoke(app, ["reproduce", "cases", *options])
    assert isinstance(failed.exception, ExperimentError)
    assert "2 of 2 cells failed" in str(failed.exception)
    assert (tmp_path / "RESULTS.md").exists()


# Sweeps


def test_residual_blocks_are_counted_without_norms():
    model = make_model("wrn10_1")
    names = [block.name for block in list_blocks(model)]
    assert [count_blocks(model, blocks) for blocks in (0, 1, 3)] == [1, 3, 5]
    assert len(names) == 6  # stem, three residual blocks, norm, classifier
    assert [count_blocks(make_model("test_vit"), blocks) for blocks in (0, 1)] == [1, 2]
    with pytest.raises(ValueError, match=r"expected at most the 3 residual blocks .* got 4"):
        count_blocks(model, 4)


def test_sweep_goes_on_and_gives_the_same_table(source, target, tmp_path, monkeypatch):
    other = str(save_model(make_model("wrn10_1"), tmp_path / "models" / "natural"))
    training = replace(TRAINING, epochs=2, augmentation=None, cache=FeatureCache())
    sweep = Sweep(
        sources=(source, other),
        target=target,
        blocks=(0,),
        num_images=(4, 8),
        seeds=(0, 1),
        training=training,
        attacks=QUICK,
    )
    whole = run_sweep(sweep, tmp_path / "sweep")
    assert len(whole) == 8
    assert set(whole["num_images"]) == {4, 8}
    assert {path.name for path in (tmp_path / "sweep").iterdir()} >= {
        *("sweep.csv", "sweep.parquet", "epochs.csv", "saved_images.csv", "saved_epochs.csv"),
        *("accuracy.png", "difference.svg", "epochs.png", "README.md"),
    }
    page = (tmp_path / "sweep" / "README.md").read_text()
    means = whole.groupby(["source", "num_images"])["clean"].mean()
    rows = [line for line in page.partition("## Clean accuracy, classifier")[2].splitlines() if line.startswith(f"| {source}")]
    assert all(f"{100 * means[source, number]:.1f}" in rows[0] for number in (4, 8))
    assert all(f"{100 * (means[source, number] - means[other, number]):+.1f}" in rows[1] for number in (4, 8))
    assert re.search(r"ahead of \S+ at (\d) of 2 depths and numbers of images, behind at \d, and at \d", page)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "sweep" / "sweep.parquet"), whole)
    epochs = pd.read_csv(tmp_path / "sweep" / "epochs.csv")
    assert sorted(set(epochs["epoch"])) == [1.0, 2.0]

    for path in sorted((tmp_path / "sweep" / "cells").iterdir())[::2]:
        path.unlink()
    ran, run_cell = [], run_module.run_cell
    monkeypatch.setattr(run_module, "run_cell", lambda cell, *args, **kw: ran.append(cell.key) or run_cell(cell, *args, **kw))
    pd.testing.assert_frame_equal(run_sweep(sweep, tmp_path / "sweep"), whole)
    assert len(ran) == 4

    uncached = replace(sweep, training=replace(training, cache=None))
    pd.testing.assert_frame_equal(run_sweep(uncached, tmp_path / "uncached"), whole)
    whole_network = next(iter(replace(sweep, blocks=(None,)).cells().values()))
    assert whole_network.training.cache is None


def test_a_sweep_of_which_a_cell_fails_has_its_table(source, target, tmp_path, monkeypatch):
    """Also where a number is that of all images."""
    run_cell = run_module.run_cell

    def fail(cell, *args, **kwargs):
        if cell.training.seed == 1:
            raise ValueError("expected no such seed")
        return run_cell(cell, *args, **kwargs)

    monkeypatch.setattr(run_module, "run_cell", fail)
    sweep = Sweep(sources=(source,), target=target, blocks=(0,), num_images=(22, None), training=TRAINING, attacks=QUICK)
    with pytest.raises(ExperimentError, match=r"2 of 6 cells failed(.*\n)*.*expected no such seed"):
        run_sweep(sweep, tmp_path / "sweep")
    table = pd.read_csv(tmp_path / "sweep" / "sweep.csv")
    assert list(table["num_images"]) == [22] * 2
    monkeypatch.setattr(run_module, "run_cell", None)
    assert len(run_sweep(sweep, tmp_path / "sweep", render=True)) == 2


def test_a_sweep_of_another_method_over_named_columns(source, target, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_target", lambda wanted, policy: read.append(wanted.read) or target.load(policy))
    read = []
    command = ["sweep", source, "--data", target.location, "--method", "neft", "--beta", "0.6", "--blocks", "0", "--clean-only"]
    command += ["--num-images", "4", "--seeds", "0", "--epochs", "1", "--batch-size", "4", "--label-column", "label"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "sweep")])
    assert result.exit_code == 0, result.output
    (cell,) = (tmp_path / "sweep" / "cells").iterdir()
    method = json.loads(cell.read_text())["cell"]["method"]
    assert (method["name"], method["num_blocks"], method["beta"]) == ("NEFT", 1, 0.6)
    assert {one.label_column for one in read} == {"label"}
    assert "fine-tuned by NEFT (beta=0.6, " in (tmp_path / "sweep" / "README.md").read_text()
    refused = CliRunner().invoke(app, ["sweep", source, "--data", target.location, "--beta", "0.6"])
    assert refused.exit_code == 2
    assert "--method neft" in re.sub(r"\s+", " ", refused.output)


def test_one_seed_judges_nothing(source, target, tmp_path):
    other = save_model(load_model(source), tmp_path / "other")
    chosen = {"sources": (source, str(other)), "target": target, "blocks": (0,), "num_images": (22,), "seeds": (0,)}
    run_sweep(Sweep(training=TRAINING, attacks=QUICK, **chosen), tmp_path / "sweep")
    page = (tmp_path / "sweep" / "README.md").read_text()
    assert "one seed was run, which is not enough to say where" in page
    assert "the interval holds 0" not in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": (4, 500)}, "expected train_images from 2, .* got 500"),
        ({"target": RecipeData(id="toy", local="no/such/folder")}, "The local copy, 'no/such/folder', does not exist"),
    ],
)
def test_what_a_sweep_cannot_run_on_is_said_before_its_first_cell(source, target, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(run_module, "run_cell", None)
    chosen = {"target": target, "num_images": (4,)} | changes
    with pytest.raises(DataError, match=message):
        run_sweep(Sweep(sources=(source,), blocks=(0,), training=TRAINING, attacks=QUICK, **chosen), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_source_that_is_a_recipe_only(target, tmp_path):
    sweep = Sweep(sources=("wrn28_4.at_cifar100",), target=target)
    with pytest.raises(ModelError, match="of which there is a recipe only"):
        run_sweep(sweep, tmp_path / "sweep")


def test_epochs_saved():
    rows = [
        {"source": source, "blocks": "0", "num_images": 100, "seed": 0, "epoch": epoch, "clean": clean}
        for source, cleans in (("robust", (0.2, 0.4, 0.8)), ("natural", (0.1, 0.3, 0.5)))
        for epoch, clean in zip((1.0, 2.0, 4.0), cleans, strict=True)
    ]
    (saved,) = saved_epochs(pd.DataFrame(rows), "natural").to_dict("records")
    assert (saved["epochs"], saved["clean"]) == (4.0, 0.5)
    assert saved["needed"] == pytest.approx(2.5)
    assert saved["factor"] == pytest.approx(1.6)


def test_images_saved():
    rows = [
        {"source": source, "blocks": "0", "num_images": number, "seed": 0, "clean": clean}
        for source, cleans in (("robust", (0.4, 0.6, 0.7)), ("natural", (0.3, 0.5, 0.8)))
        for number, clean in zip((100, 200, 400), cleans, strict=True)
    ]
    saved = saved_images(pd.DataFrame(rows), "natural").set_index("num_images")
    assert saved.loc[100, "at_most"]
    assert saved.loc[100, "factor"] == 1.0
    assert saved.loc[200, "needed"] == pytest.approx(100 * 2**0.5)
    assert saved.loc[200, "factor"] == pytest.approx(2**0.5)
    assert np.isnan(saved.loc[400, "needed"])


def test_only_numbers_with_all_seeds_save_anything():
    """A sweep that was stopped: seed 1, which is better, is missing at 200 images."""
    rows = [
        {"source": source, "blocks": "0", "num_images": number, "seed": seed, "epoch": 1.0, "clean": clean + 0.2 * seed}
        for source in ("robust", "natural")
        for number, clean in ((50, 0.2), (100, 0.3), (200, 0.4))
        for seed in (0, 1)
        if (number, seed) != (200, 1)
    ]
    assert list(saved_images(pd.DataFrame(rows), "natural")["num_images"]) == [50, 100]
    assert list(saved_epochs(pd.DataFrame(rows), "natural")["num_images"]) == [50, 100]


def test_a_source_saves_nothing_against_itself():
    cleans = dict(zip((10, 20, 40), (0.5, 0.4, 0.45), strict=True))  # more images need not be better
    rows = [
        {"source": name, "blocks": "0", "num_images": number, "seed": 0, "clean": clean}
        for name in ("one", "same")
        for number, clean in cleans.items()
    ]
    assert set(saved_images(pd.DataFrame(rows), "same")["factor"]) == {1.0}
    epochs = pd.DataFrame([row | {"num_images": 10, "epoch": row["num_images"] / 10} for row in rows])
    assert set(saved_epochs(epochs, "same")["factor"]) == {1.0}


def test_page_of_one_source_and_of_savings(source, target, tmp_path):
    sweep = Sweep(sources=(source,), target=target, blocks=(0,), num_images=(4,), seeds=(0, 1), training=TRAINING, attacks={})
    run_sweep(sweep, tmp_path / "sweep")
    page = (tmp_path / "sweep" / "README.md").read_text()
    assert "difference" not in page.replace("saved_images", "")
    assert "ahead" not in page
    saved = pd.DataFrame({"source": ["a", "a"], "factor": [2.0, np.nan], "num_images": [20, 40]})
    assert _best(saved)["a"] == {"source": "a", "factor": 2.0, "num_images": 20, "reached": 1, "places": 2}
    assert _best(saved[1:]) == {}


def test_what_can_be_said_of_a_cell_before_it_is_run(make_cell, tmp_path):
    cell = make_cell()
    assert state(cell, tmp_path) == "not run"
    assert state(replace(cell, source="wrn16_2.fdm9_nothing"), tmp_path) == "source not found"
    assert state(replace(cell, source="wrn34_10.fdm6_cifar100"), tmp_path) == "source not trained"
    assert state(replace(cell, method=FineTuning(num_blocks=9)), tmp_path) == "source has 5 blocks"
    run_cells([cell], results=tmp_path, runs=tmp_path / "runs", keep=False)
    assert state(cell, tmp_path) == "done"


def test_intervals_and_verdicts_of_differences():
    values = np.array([0.10, 0.12, 0.14])  # 12 +- 4.303 * 2 / sqrt(3)
    assert _interval(values) == "12.0 (7.0 to 17.0)"
    assert _interval(-values, sign="+") == "-12.0 (-17.0 to -7.0)"
    assert _interval(values[:1], sign="+") == "+10.0"
    assert _interval(np.array([0.1, 0.9])) == "50.0 (0.0 to 100.0)"
    assert _counted((0, 0, 0), values) == (1, 0, 0)
    assert _counted((0, 0, 0), -values) == (0, 1, 0)
    assert _counted((0, 0, 0), values - 0.11) == (0, 0, 1)
    assert _counted((0, 0, 0), values[:1]) == (0, 0, 1)  # one seed decides nothing


def test_sweep_plots():
    rng = np.random.default_rng(0)
    rows = [
        {"source": source, "blocks": blocks, "num_images": number, "seed": seed, "clean": rng.random()}
        for source in ("robust", "natural")
        for blocks in ("0", "all")
        for number in (100, 200)
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows)
    figure = against_images(table, "clean")
    assert [axes.get_title() for axes in figure.axes] == ["classifier", "all blocks"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["100", "200"]
    for band in figure.axes[0].collections:  # of two seeds an interval can be wider than all accuracies
        heights = band.get_paths()[0].vertices[:, 1]
        assert 0 <= heights.min() <= heights.max() <= 100
    first = figure.axes[0].get_lines()[0]
    chosen = table[(table["source"] == "robust") & (table["blocks"] == "0")]
    assert np.allclose(first.get_ydata(), 100 * chosen.groupby("num_images")["clean"].mean())
    means = table[table["blocks"] == "0"].groupby(["source", "num_images"])["clean"].mean()
    line = difference_from(table, "natural", "clean").axes[0].get_lines()[1]
    assert np.allclose(line.get_ydata(), 100 * (means["robust"] - means["natural"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "expected different entries in seeds, at least one"),
        ({"blocks": (1, 1)}, "expected different entries in blocks"),
        ({"num_images": (0,)}, "each of num_images must be >= 1, got 0"),
        ({"method": LwF()}, "expected a method that trains the last num_blocks blocks, got LwF"),
        ({"method": NEFT(num_blocks=2)}, "NEFT: num_blocks must be a whole number, got None.* leave it out"),
        ({"attacks": {"clean": FGSM(eps=0.1)}}, "names of attacks that can be columns .* got 'clean'"),
        ({"attacks": {"seed": FGSM(eps=0.1)}}, "names of attacks that can be columns .* got 'seed'"),
        ({"attacks": {"a/b": FGSM(eps=0.1)}}, "names of attacks that can be columns .* got 'a/b'"),
    ],
)
def test_sweep_errors(changes, message, target):
    with pytest.raises(ValueError, match=message):
        Sweep(sources=("a",), target=target, **changes)
