"""Stages, survivors, budgets, and evaluations that are killed, resumed, and divided between processes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_script import ATTACKS, SETTINGS, measured
from known_models import EPS, FloatData, curved_case, linear_case
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import cartl_hub.evaluation.journal as journal
from cartl_hub.attacks import APGD, APGDT, FGSM, PGD, Attack, Noise, Square, Transfer
from cartl_hub.data import Drawn, ImageData
from cartl_hub.evaluation import default_attacks, evaluate
from cartl_hub.evaluation.cascade import Budget, planned
from cartl_hub.evaluation.pool import read_pool
from cartl_hub.files import BusyError, locked

HERE = Path(__file__).parent


def looks(num: int, *, resumed: bool = False) -> int:
    """Passes before the first stage: a few images five times, eight of them four times more and twice to resume, one with a
    gradient."""
    return 5 * num + (6 if resumed else 4) * min(num, 8) + 1


def attacked(monkeypatch, model, data, attacks, **changes):
    """A report, and the number of images that each attack was called with."""
    calls = {}
    run = Attack.__call__

    def counted(self, model, images, labels, keys=None, *, until_broken=False):
        calls[self] = calls.get(self, 0) + len(images)
        return run(self, model, images, labels, keys, until_broken=until_broken)

    monkeypatch.setattr(Attack, "__call__", counted)
    settings = {"curve": None, "checks": False, "progress": False, "batch_size": 16} | changes
    report = evaluate(model, data, attacks=attacks, **settings)
    return report, {name: calls.get(attack, 0) for name, attack in attacks.items()}


# Which attack runs on what


def test_dear_attacks_run_on_survivors_of_their_ball_and_the_others_on_every_image(monkeypatch):
    model, data = curved_case()
    attacks = {
        "Square": Square(eps=EPS, queries=4),
        "APGD-T": APGDT(eps=EPS, steps=3, num_targets=2),
        "APGD in a smaller ball": APGD(eps=EPS / 2, steps=3),
        "APGD L2": APGD(eps=0.1, steps=3, norm="L2"),
        "noise": Noise(eps=EPS, samples=2),
        "PGD-4": PGD(eps=EPS, step_size=EPS / 4, steps=4),
        "PGD-2": PGD(eps=EPS, step_size=EPS / 4, steps=2),
        "FGSM": FGSM(eps=EPS),
    }
    report, calls = attacked(monkeypatch, model, data, attacks)
    correct = report.verdicts.correct
    assert list(report.attacks) == [
        *("FGSM", "noise", "PGD-2", "PGD-4"),
        *("APGD in a smaller ball", "APGD L2", "Square", "APGD-T"),
    ]
    assert calls["FGSM"] == calls["noise"] == calls["PGD-2"] == calls["APGD in a smaller ball"] == calls["APGD L2"] == len(data)
    assert calls["PGD-4"] == correct["PGD-2"].sum()
    before = np.logical_and.reduce([correct[name] for name in ("FGSM", "noise", "PGD-2", "PGD-4", "APGD in a smaller ball")])
    assert calls["Square"] == before.sum() < len(data)
    assert calls["APGD-T"] == (before & correct["Square"]).sum() < calls["Square"] + 1
    assert {name: result.attacked for name, result in report.attacks.items()} == calls
    assert [name for name, result in report.attacks.items() if not result.alone] == ["Square", "APGD-T"]
    np.testing.assert_array_equal(correct["APGD-T"] & ~before, False)
    assert report.robust.correct == correct["APGD-T"].sum()
    assert report.worst_case["Linf 4/255"].attacks == ("APGD in a smaller ball",)


def test_dear_attack_breaks_survivors_as_it_breaks_them_alone():
    model, data = curved_case()
    dear = {"APGD-T": APGDT(eps=EPS, steps=10, num_targets=3)}
    settings = {"curve": None, "checks": False, "progress": False}
    alone = evaluate(model, data, attacks=dear, **settings)
    after = evaluate(model, data, attacks={"FGSM": FGSM(eps=EPS / 2)} | dear, batch_size=7, **settings)
    assert (alone.attacks["APGD-T"].alone, after.attacks["APGD-T"].alone) == (True, False)
    assert 0 < after.attacks["APGD-T"].attacked < alone.attacks["APGD-T"].attacked
    np.testing.assert_array_equal(after.verdicts.correct["APGD-T"], alone.verdicts.correct["APGD-T"])


def test_the_cheapest_runs_first():
    full = default_attacks(strength="full")
    order = [stage.name for stage in planned({name: full[name] for name in reversed(full)})]
    assert order == ["FGSM", "PGD-20 L2", "PGD-20", "PGD-100", "APGD-CE", "APGD-T", "FAB-T", "Square"]
    transfer = Transfer(source=nn.Identity(), source_name="x", attack=PGD(eps=EPS, step_size=EPS, steps=7))
    assert [s.name for s in planned({"apgd": APGD(eps=EPS, steps=8), "transfer": transfer})] == ["transfer", "apgd"]


def test_passes_are_those_of_the_model():
    model, data = curved_case()
    report = evaluate(model, data, attacks={"FGSM": FGSM(eps=EPS)}, curve=None, checks=False, progress=False)
    broken = len(data) - report.attacks["FGSM"].correct
    # to find what is right already, a gradient, a verdict, and the second one
    assert report.attacks["FGSM"].passes == 3 * len(data) + broken
    assert model.seen == report.attacks["FGSM"].passes + looks(64) + len(data)
    assert report.attacks["FGSM"].seconds >= 0


# Verdicts


@dataclass(frozen=True, kw_only=True)
class Claims(Attack):
    """Shows the model images that it calls adversarial, while a switch is on that makes the model see them so."""

    def perturb(self, model, images, labels, keys):
        model.tricked = True
        assert (model(images).argmax(1) != labels).all()
        model.tricked = False
        return images


class Tricked(nn.Module):
    """Wrong about everything while ``tricked``, and about some images the first time it sees them after ``fooled`` passes."""

    def __init__(self, fooled=()):
        super().__init__()
        self.tricked, self.fooled, self.seen = False, fooled, 0

    def forward(self, images):
        self.seen += len(images)
        right = (images[:, 0, 0, 0] > 0.5).long()
        wrong = torch.tensor([round(float(x) * 255) in self.fooled for x in images[:, 0, 0, 1]])
        seen = right ^ (wrong & (self.seen in self.when if self.fooled else False)) ^ self.tricked
        return nn.functional.one_hot(seen, 2).float() + 0 * images.sum()


def tricked_case(num=12):
    images = torch.zeros(num, 1, 2, 2, dtype=torch.uint8)
    images[::2, 0, 0, 0] = 255
    images[:, 0, 0, 1] = torch.arange(num)
    return ImageData((images[:, 0, 0, 0] > 127).long(), ("a", "b"), images)


def test_verdict_is_taken_apart_from_the_attack():
    report = evaluate(
        Tricked().eval(), tricked_case(), attacks={"claims": Claims(eps=1.0)}, curve=None, checks=False, progress=False
    )
    assert report.attacks["claims"].correct == 12
    assert report.checks[0].figures["second verdicts"] == 0


@dataclass(frozen=True, kw_only=True)
class Nothing(Attack):
    """Gives images back, and makes the next pass see images 3 and 7 wrongly."""

    def perturb(self, model, images, labels, keys):
        model.when = (model.seen + len(images),)
        return images

    search = perturb


def test_what_breaks_once_and_not_again_stands():
    model = Tricked(fooled=(3, 7)).eval()
    model.when = ()
    report = evaluate(model, tricked_case(), attacks={"Nothing": Nothing(eps=0.0)}, curve=None, checks=False, progress=False)
    assert report.attacks["Nothing"].correct == 12
    (check,) = report.checks
    assert (check.name, check.figures["second verdicts"], check.figures["not confirmed"]) == ("second-verdict", 2, 2)
    assert check.status == "pass"  # 2 of 12 may be chance


@pytest.mark.parametrize("batch_size", [20, 80])
def test_second_verdict_is_of_other_batches(batch_size, monkeypatch):
    again, read = [], journal.Journal.images
    monkeypatch.setattr(journal.Journal, "images", lambda self, *args: again.append(args[2].tolist()) or read(self, *args))
    settings = {"curve": None, "checks": False, "progress": False, "batch_size": batch_size}
    report = evaluate(*curved_case(), attacks={"FGSM": FGSM(eps=0.5)}, **settings)
    *batches, _samples = again
    assert sorted(chain(*batches)) == np.flatnonzero(~report.verdicts.correct["FGSM"]).tolist()
    assert len(batches) > 1
    for positions in batches:
        first = positions[0] // batch_size * batch_size
        assert sorted(positions) != list(range(first, first + batch_size))


# Data


def test_what_is_not_in_memory_is_read_once_and_spooled():
    _, data, _ = linear_case()
    reads = []

    class Counted(FloatData):
        def batches(self, batch_size):
            reads.append(batch_size)
            yield from super().batches(batch_size)

    lazy = Counted(data.images / 255, data.labels)
    with read_pool(lazy, 50, 16) as pool:
        assert isinstance(pool.images, np.memmap)
        assert (pool.images.dtype, len(pool), pool.complete) == (np.float32, 50, False)
        chosen = torch.tensor([49, 0, 17])
        torch.testing.assert_close(pool.get(chosen, torch.device("cpu")), data.images[chosen] / 255, rtol=0, atol=0)
    assert reads == [16]
    decoded = ImageData(data.labels, data.label_names, lambda indices: data.images[list(indices)])
    with read_pool(decoded, None, 7) as pool, read_pool(data, None, 60) as held:
        assert (pool.images.dtype, pool.digest) == (np.uint8, held.digest)
        assert held.images is data.images
        assert np.array_equal(pool.images, data.images.numpy())


@pytest.mark.parametrize("other", [torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)])
def test_images_of_several_kinds_are_refused(other):
    class Mixed(FloatData):
        def batches(self, batch_size):
            yield from super().batches(batch_size)
            yield Drawn(other, torch.zeros(2, dtype=torch.int64), torch.tensor([9, 10]), 0)

    with (
        pytest.raises(ValueError, match=r"expected images of one shape and dtype, got .* from index 9; resize"),
        read_pool(Mixed(torch.zeros(3, 3, 4, 4), torch.zeros(3, dtype=torch.int64)), None, 2),
    ):
        pass


def test_model_is_tried_before_the_rest_is_read():
    class Endless(FloatData):
        def batches(self, batch_size):
            while True:
                yield from super().batches(batch_size)

    with pytest.raises(ValueError, match=r"expected logits \[4, 2\]"):
        evaluate(
            nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval(),
            Endless(torch.zeros(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64)),
            progress=False,
        )


# Resume


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def killed_at(monkeypatch, number, moment):
    """Die in the given write of the journal: before it, in the middle, or behind it."""
    write, count = journal.write_file, iter(range(1000))

    def write_or_die(path, content, **how):
        dying = next(count) == number
        if dying and moment == "before":
            raise Killed
        if dying and moment == "in":
            data = content if isinstance(content, bytes) else content.encode()
            path.with_name(f"{path.name}.{os.getpid()}.partial").write_bytes(data[: len(data) // 2])
            raise Killed
        write(path, content, **how)
        if dying:
            raise Killed

    monkeypatch.setattr(journal, "write_file", write_or_die)


@pytest.fixture(scope="module")
def whole():
    """The evaluation of the script, uninterrupted."""
    return evaluate(*curved_case(60), **SETTINGS)


def test_interrupted_anywhere_it_ends_with_the_same_report(tmp_path, monkeypatch):
    settings = SETTINGS | {"checks": ["determinism"], "curve": (0, EPS)}
    whole, writes = measured(evaluate(*curved_case(20), **settings)), 0
    while True:
        folder, moment = tmp_path / str(writes), ("before", "in", "behind")[writes % 3]
        with monkeypatch.context() as patched:
            killed_at(patched, writes, moment)
            try:
                evaluate(*curved_case(20), **settings, resume=folder)
                break
            except Killed:
                pass
        assert measured(evaluate(*curved_case(20), **settings, resume=folder)) == whole, (writes, moment)
        assert json.loads((folder / "identity.json").read_text())["finished"]
        writes += 1
    assert writes > 25


def test_finished_batches_are_not_run_again(tmp_path):
    model, data = curved_case(60)
    evaluate(model, data, **SETTINGS, resume=tmp_path, keep=True)
    before, model.seen = model.seen, 0
    again = evaluate(model, data, **SETTINGS, resume=tmp_path, keep=True)
    assert (model.seen, before > 20 * looks(8)) == (looks(8, resumed=True), True)
    assert again.clean.num_images == 60
    with pytest.raises(ValueError, match="expected resume=, the folder to keep"):
        evaluate(model, data, keep=True)


def start(*options, processes=1, wait=True):
    command = [sys.executable, str(HERE / "evaluate_script.py"), *map(str, options)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if wait:
        process.output, _ = process.communicate(timeout=600)
    return process


def test_killed_process_goes_on(whole, tmp_path):
    draw = random.Random(5)
    killed = start(tmp_path / "folder", tmp_path / "out", "--die-in-write", draw.randint(10, 25))
    assert killed.returncode == -signal.SIGKILL, killed.output
    assert list((tmp_path / "folder").glob("*.partial"))
    found = len(list((tmp_path / "folder").glob("*.safetensors")))
    running = start(tmp_path / "folder", tmp_path / "out", "--slow", "0.02", wait=False)
    while len(list((tmp_path / "folder").glob("*.safetensors"))) < found + draw.randint(2, 12) and running.poll() is None:
        time.sleep(0.01)
    time.sleep(draw.random() / 10)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert measured(evaluate(*curved_case(60), **SETTINGS, resume=tmp_path / "folder")) == measured(whole)


def test_two_processes_give_the_report_of_one(whole, tmp_path):
    two = start(tmp_path / "folder", tmp_path / "out", processes=2)
    assert two.returncode == 0, two.output
    first, second = (json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    one = measured(whole)
    rows = [np.array([list(row) for row in found["per_image"]["correct"].values()]) for found in (one, first)]
    assert (rows[0] == rows[1]).mean() >= 0.999
    assert first["checks"] == one["checks"]
    assert json.loads((tmp_path / "folder" / "identity.json").read_text())["finished"]


def test_damaged_file_is_measured_again(whole, tmp_path, caplog):
    evaluate(*curved_case(60), **SETTINGS, resume=tmp_path, keep=True)
    path = sorted(tmp_path.glob("002.*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:300])
    assert measured(evaluate(*curved_case(60), **SETTINGS, resume=tmp_path)) == measured(whole)
    assert f"{path} is damaged" in caplog.text


def test_flipped_bit_is_noticed(whole, tmp_path, caplog):
    evaluate(*curved_case(60), **SETTINGS, resume=tmp_path, keep=True)
    entry, check = sorted(tmp_path.glob("002.*.safetensors"))[2], next(tmp_path.glob("check.*.json"))
    content = load_file(entry)
    place = entry.read_bytes().rindex(content["predicted"].numpy().tobytes())
    for path, at in ((entry, place), (check, check.read_bytes().index(b'"passes": ') + len('"passes": '))):
        damaged = bytearray(path.read_bytes())
        damaged[at] ^= 1
        path.write_bytes(damaged)
    assert measured(evaluate(*curved_case(60), **SETTINGS, resume=tmp_path)) == measured(whole)
    assert f"{entry} is damaged (its content has another hash than it states)" in caplog.text
    assert f"{check} is damaged (its content has another hash than it states)" in caplog.text


def test_files_without_a_hash_are_taken_as_they_are(whole, tmp_path, caplog):
    evaluate(*curved_case(60), **SETTINGS, resume=tmp_path, keep=True)
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            figures = file.metadata()["figures"]
        save_file(load_file(path), path, {"figures": figures})
    for path in tmp_path.glob("check.*.json"):
        content = json.loads(path.read_bytes())
        del content["sha256"]
        path.write_text(json.dumps(content))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    report = evaluate(*curved_case(60), **SETTINGS, resume=tmp_path, keep=True)
    assert measured(report) == measured(whole)
    assert "damaged" not in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == before  # nothing was measured again


def test_other_batch_size_goes_on_too(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        killed_at(patched, 30, "behind")
        with pytest.raises(Killed):
            evaluate(*curved_case(60), **SETTINGS, resume=tmp_path)
    report = evaluate(*curved_case(60), **SETTINGS | {"batch_size": 13}, resume=tmp_path)
    assert measured(report)["per_image"] == measured(whole)["per_image"]
    assert {name: result.attacked for name, result in report.attacks.items()} == {
        name: result.attacked for name, result in whole.attacks.items()
    }


OTHERS = {
    "weights": lambda model, data, settings: model.layers[1].bias.data.add_(1e-3),
    "label_names": lambda model, data, settings: setattr(data, "label_names", tuple("abce")),
    "attacks": lambda model, data, settings: settings.update(attacks=ATTACKS | {"FGSM": FGSM(eps=EPS / 2)}),
    "curve": lambda model, data, settings: settings.update(curve=None),
    "curve_images": lambda model, data, settings: settings.update(curve_images=21),
    "check_images": lambda model, data, settings: settings.update(check_images=13),
    "transfer_source": lambda model, data, settings: settings.update(transfer_source=curved_case(1)[0]),
    "seed": lambda model, data, settings: settings.update(seed=4),
    "images": lambda model, data, settings: data.images[59, 0, 0].add_(1),
    "labels": lambda model, data, settings: data.labels[59].add_(1).remainder_(4),
    "num_images": lambda model, data, settings: settings.update(num_images=59),
}


@pytest.mark.parametrize("other", OTHERS)
def test_folder_of_another_evaluation_is_refused(other, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        killed_at(patched, 3, "behind")
        with pytest.raises(Killed):
            evaluate(*curved_case(60), **SETTINGS, resume=tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    (model, data), settings = curved_case(60), dict(SETTINGS)
    OTHERS[other](model, data, settings)
    differs = "images" if other in ("labels", "num_images") else other
    with pytest.raises(ValueError, match=rf"with one of another: {differs} differ. Use another folder, or the same model"):
        evaluate(model, data, **settings, resume=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"expected an empty folder, or that of an evaluation.*with other files"):
        evaluate(*curved_case(60), **SETTINGS, resume=tmp_path)
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(ValueError, match=r"identity.json of an evaluation in .*, got a damaged one"):
        evaluate(*curved_case(60), **SETTINGS, resume=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_files_beside_the_journal_survive_it(tmp_path):
    model, data = curved_case(60)
    data.labels[50] = 9
    with pytest.raises(ValueError, match="labels"):
        evaluate(model, data, **SETTINGS, resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nothing had begun
    evaluate(*curved_case(60), **SETTINGS, resume=tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    evaluate(*curved_case(20), **SETTINGS, resume=tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_finished_evaluation_is_returned_at_once_and_makes_way_for_another(whole, tmp_path):
    """A report that could not be written costs nothing; nor does the folder, for another evaluation."""
    model, data = curved_case(60)
    evaluate(model, data, **SETTINGS, resume=tmp_path)
    model.seen = 0
    assert measured(evaluate(model, data, **SETTINGS, resume=tmp_path)) == measured(whole)
    assert model.seen == looks(8, resumed=True)
    other = evaluate(*curved_case(20), **SETTINGS, resume=tmp_path)
    assert measured(other) == measured(evaluate(*curved_case(20), **SETTINGS))


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    evaluate(*curved_case(20), **SETTINGS, resume=tmp_path)
    with locked(tmp_path / "evaluation.lock"), pytest.raises(BusyError, match="got another thread of this process"):
        evaluate(*curved_case(20), **SETTINGS, resume=tmp_path)


def test_successes_are_kept_as_images(tmp_path):
    model, data = curved_case(60)
    report = evaluate(model, data, **SETTINGS, resume=tmp_path, keep=True)
    files = sorted(tmp_path.glob("003.*.safetensors"))
    tensors = [load_file(path) for path in files]
    positions = torch.cat([found["at"] for found in tensors])
    images = torch.cat([found["images"] for found in tensors])
    assert torch.equal(positions, torch.cat([found["positions"][found["broken"]] for found in tensors]))
    assert len(files) > 1
    with torch.no_grad():
        assert (model(images).argmax(1) != data.labels[positions]).all()
    assert (images - data.images[positions] / 255).abs().max() <= EPS + 1e-6
    stage = report.verdicts.correct["PGD-10"] & ~report.verdicts.correct["PGD-5"]
    assert not stage.any()


def test_other_images_go_after_their_second_verdict(tmp_path):
    report = evaluate(*curved_case(60), **SETTINGS, budget=Budget(passes=1500), resume=tmp_path)
    assert report.dropped
    for stage in ("001", "002"):
        left = [load_file(path)["images"] for path in sorted(tmp_path.glob(f"{stage}.*.safetensors"))]
        assert len(left) > 3
        assert sum(map(len, left)) == 8
    assert len(evaluate(*curved_case(60), **SETTINGS, resume=tmp_path).samples) == 8


def test_attacks_of_the_same_cost_in_another_order_are_another_evaluation(tmp_path):
    attacks = {"a": FGSM(eps=EPS), "b": FGSM(eps=EPS / 2)}
    settings = {"curve": None, "checks": False, "progress": False, "resume": tmp_path, "keep": True}
    evaluate(*curved_case(20), attacks=attacks, **settings)
    with pytest.raises(ValueError, match="attacks differ"):
        evaluate(*curved_case(20), attacks=dict(reversed(attacks.items())), **settings)


# Budget


def test_budget_stops_at_a_batch_and_says_what_was_left_out():
    model, data = curved_case(60)
    settings = SETTINGS | {"checks": ["determinism", "logit-range"]}
    everything = evaluate(model, data, **settings)
    total, model.seen = model.seen, 0
    reports = []
    for passes in (1, *range(150, total, 150)):
        model.seen = 0
        reports.append(evaluate(model, data, **settings, budget=Budget(passes=passes)))
        least = 60 + 60 * 3 + 60  # clean images and FGSM
        batch_and_second_verdicts = 8 * 22 + 60
        assert model.seen <= max(passes, least) + looks(8) + batch_and_second_verdicts
    least = reports[0]
    assert least.clean == everything.clean
    assert least.attacks == {"FGSM": everything.attacks["FGSM"]}
    assert (least.robust.attacks, least.curve) == (("FGSM",), None)
    assert least.dropped == (
        *("PGD-5: not run", "PGD-10: not run", "APGD-T: not run", "Square: not run"),
        *("checks: determinism, logit-range not made", "curve: not measured"),
    )
    assert [check.status for check in least.checks] == ["skipped", "skipped", "pass"]
    assert everything.dropped == ()
    for smaller, larger in pairwise([*reports, everything]):
        assert len(smaller.dropped) >= len(larger.dropped)
        assert smaller.robust.correct >= larger.robust.correct
        for name, row in smaller.verdicts.correct.items():
            assert not (~row & larger.verdicts.correct[name]).any(), "what broke stays broken"
    for report in reports:
        for line in report.dropped:
            if " of " in line:
                name, rest = line.split(": run on ")
                done, all_ = map(int, rest.removesuffix(" images").split(" of "))
                assert 0 < done < all_
                assert done % 8 == 0
                assert (report.attacks[name].attacked, report.attacks[name].alone) == (done, False)
    lines = {line for report in reports for line in report.dropped}
    assert {"curve: not measured beyond 8/255", "APGD-T: not run"} <= lines
    assert any(": run on " in line for line in lines)


def test_order_under_a_budget_is_that_of_the_documentation():
    model, data = curved_case(60)
    last = ["FGSM", "PGD-5", "PGD-10", "checks", "curve", "APGD-T", "Square"]
    total = sum(result.passes for result in evaluate(model, data, **SETTINGS).attacks.values())
    for share in (0.2, 0.4, 0.6, 0.8):
        report = evaluate(model, data, **SETTINGS, budget=Budget(passes=int(share * total)))
        dropped = {line.partition(":")[0] for line in report.dropped}
        assert dropped == set(last[len(last) - len(dropped) :])


def test_spent_budget_goes_on_with_a_larger_one(whole, tmp_path):
    model, data = curved_case(60)
    cut = evaluate(model, data, **SETTINGS, budget=Budget(passes=1500), resume=tmp_path)
    assert cut.dropped
    assert any(tmp_path.iterdir())  # left, as it isn't done
    model.seen = 0
    same = evaluate(model, data, **SETTINGS, budget=Budget(passes=1500), resume=tmp_path)
    assert (measured(same), model.seen) == (measured(cut), looks(8, resumed=True))
    assert measured(evaluate(model, data, **SETTINGS, resume=tmp_path)) == measured(whole)
    assert json.loads((tmp_path / "identity.json").read_text())["finished"]


def test_minutes_add_up_over_resumes(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("cartl_hub.evaluation.cascade.time.perf_counter", lambda: clock[0])

    def slow(module, args):
        clock[0] += 0.5

    def run(minutes):
        model, data = curved_case(60)
        model.register_forward_pre_hook(slow)
        return evaluate(model, data, **SETTINGS | {"checks": False}, budget=Budget(minutes=minutes), resume=tmp_path)

    first = run(0.8)
    assert 48 <= first.environment["seconds"] < 70
    clock[0] = 1e6  # another process
    second = run(1.5)
    assert 90 <= second.environment["seconds"] < 112
    assert 0 < len(second.dropped) < len(first.dropped)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"minutes": 0}, "minutes must be > 0, got 0"),
        ({"passes": -1}, "passes must be > 0, got -1"),
        ({"minutes": math.nan}, "minutes must be a finite number"),
        ({"passes": 1.5}, "passes must be a whole number"),
    ],
)
def test_budget_is_above_zero(values, message):
    with pytest.raises(ValueError, match=message):
        Budget(**values)


def test_figures_of_an_attack_that_runs_twice_on_an_image_are_one():
    """A longer PGD alone has the figure that it has behind the shorter one, whatever runs between them."""
    model, data = curved_case()
    long = PGD(eps=EPS, step_size=EPS / 4, steps=12)
    attacks = {"short": replace(long, steps=3), "APGD": APGD(eps=EPS, steps=5), "long": long}
    settings = {"curve": None, "checks": False, "progress": False}
    both, alone = evaluate(model, data, attacks=attacks, **settings), evaluate(model, data, attacks={"long": long}, **settings)
    np.testing.assert_array_equal(both.verdicts.correct["long"], alone.verdicts.correct["long"])
    assert both.attacks["long"].alone
