"""Processes that work together (``torchrun``, ``accelerate launch``), and the devices that they run on."""

import atexit
import os
import platform
import shutil
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=1)  # with the other processes, one of which may attack a batch for hours or publish large weights


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes; joins the group that the launcher's environment names."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and dist.is_available() and not dist.is_initialized():
        from accelerate import PartialState  # chooses the backend and this process's device
        from accelerate.utils import parse_flag_from_env

        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        # without an accelerator whose processes can talk to each other they are on the CPU
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or accelerator is None or accelerator.type == "mps"
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        if state.backend == "gloo":
            # a process that ends with gloo's threads running is aborted now and then, and its launcher takes the run for failed
            atexit.register(_leave_group)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _leave_group() -> None:
    if dist.is_initialized():  # the user's code may have left it
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """Values of all processes, in the order of their ranks; waits for all of them."""
    _, world = rank_and_world()
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def is_main_process() -> bool:
    """Whether this process is the one that writes files."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank())


def bar_interval() -> float:
    """Seconds between two updates of a progress bar: a file or a log gets a line for each."""
    return 1.0 if sys.stderr.isatty() else 30.0


def remove_folder(folder: Path) -> None:
    """Remove a folder that all processes are done with; returns once it is gone."""
    gather(None)
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
    gather(None)


def default_device() -> torch.device:
    """This process's CUDA device, or else the CPU."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")


def default_precision(device: torch.device) -> str:
    """Default precision: "bf16" if the device has matrix units for it, else "fp32"; the same for every run on it."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def environment(device: torch.device, seconds: float) -> dict[str, Any]:
    """Environment of a computation, as reports state it."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "cartl_hub": version("cartl_hub"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "threads": torch.get_num_threads(),
        "processes": rank_and_world()[1],
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
