"""Training in processes of their own: killed and resumed, and several together."""

import csv
import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import toy_data
from safetensors.torch import load_file

HERE = Path(__file__).parent


def start(*options, processes=1):
    command = [sys.executable, str(HERE / "train_script.py"), *map(str, options)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def weights_hash(folder):
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("run", ["at", "neft", "cache", "lwf", "dropout"])
def test_killed_and_resumed_run_ends_with_the_same_file(run, tmp_path):
    assert start(tmp_path / "whole", run).returncode == 0
    draw = random.Random(run)
    kills = [("--die-at", draw.randint(5, 7)), ("--die-in-write", draw.randint(1, 2)), ("--die-at", draw.randint(9, 11))]
    for kill in kills if run == "at" else kills[:1]:
        killed = start(tmp_path / "killed", run, *kill)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = start(tmp_path / "killed", run)
    assert finished.returncode == 0, finished.stderr
    assert "goes on at step" in finished.stdout
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")
    assert (tmp_path / "killed" / "losses.csv").read_text() == (tmp_path / "whole" / "losses.csv").read_text()


def test_processes_that_are_killed_and_resumed_measure_the_same(tmp_path):
    """Each process has batch statistics of its own, of which the main process's are measured and saved."""
    assert start(tmp_path / "whole", "neft", processes=2).returncode == 0
    assert start(tmp_path / "killed", "neft", "--die-at", 6, processes=2).returncode != 0
    finished = start(tmp_path / "killed", "neft", processes=2)
    assert finished.returncode == 0, finished.stderr
    whole, killed = ((tmp_path / name / "validations.json").read_text() for name in ("whole", "killed"))
    assert whole == killed
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")


# Several processes


@pytest.mark.parametrize("run", ["head", "vit_blocks", "vit_at", "vit_multitask"])
def test_two_processes_with_half_the_batch_give_the_weights_of_one(run, tmp_path):
    assert start(tmp_path / "one", run).returncode == 0
    two = start(tmp_path / "two", run, processes=2)
    assert two.returncode == 0, two.stderr
    one = load_file(tmp_path / "one" / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "two" / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, one[name], atol=2e-5, rtol=1e-4, msg=name)
    logs = [csv.DictReader((tmp_path / name / "losses.csv").read_text().splitlines()) for name in ("one", "two")]
    losses = [[float(row["loss"]) for row in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[1]) == 12  # written once, not by each process


@pytest.mark.parametrize("run", ["at", "best"])
def test_runs_of_several_processes_go_on_as_they_were(run, tmp_path):
    """The attacks of a process see its own batch statistics, which a checkpoint must hold."""
    assert start(tmp_path / "whole", run, processes=2).returncode == 0
    assert start(tmp_path / "killed", run, "--die-at", 9, processes=2).returncode != 0
    assert start(tmp_path / "killed", run, processes=2).returncode == 0
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")


def test_processes_leave_their_group_at_the_end(tmp_path):
    """Else gloo's threads end some processes with an error."""
    two = start(tmp_path, "head", "--epochs", 1, processes=2)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("in a group at the end: False") == 2
    assert two.stdout.count("hours of patience: 24") == 2  # an attack or an upload of another process may take long


def test_processes_share_a_batch_without_duplicates():
    shards = [list(toy_data(8).training_batches(batch_size=4, seed=0, start=0, stop=2, rank=rank, world=2)) for rank in (0, 1)]
    drawn = torch.cat([batch.indices for shard in shards for batch in shard])
    assert sorted(drawn.tolist()) == list(range(8))
