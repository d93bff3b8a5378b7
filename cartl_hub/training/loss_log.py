"""The losses of a run, as its log and its tracker have them."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

HELD = 25  # steps whose losses stay on an accelerator, as bringing them to the host waits for the step


class LossLog:
    """Losses and training accuracies of the steps, averaged over processes, in ``losses.csv`` and in a tracker.

    Args:
        folder: Folder of the file; None writes none.
        accelerator: Accelerator of the run, with its tracker if it has one.
        lr: Function from a step to its learning rate.
    """

    def __init__(self, folder: Path | None, accelerator: Accelerator, lr: Callable[[int], float]):
        self.path = None if folder is None else folder / "losses.csv"
        self.accelerator, self.lr = accelerator, lr
        self.newest: tuple[float, float] | None = None
        self._held: list[tuple[int, Tensor, Tensor]] = []

    def open(self, start: int) -> None:
        """Keep the rows of an earlier part of the run, up to the step at which it resumes."""
        if self.path is None or not self.accelerator.is_main_process:
            return
        kept = []
        if start and self.path.exists():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit()]
            kept = [row for row in rows if int(row[0]) < start and len(row) == 3]
        with open(self.path, "w", newline="") as file:
            csv.writer(file).writerows([("step", "loss", "accuracy"), *kept])

    def add(self, step: int, loss: Tensor, accuracy: Tensor) -> None:
        """Hold the loss of a step, on its device."""
        self._held.append((step, loss, accuracy))

    @property
    def full(self) -> bool:
        """Whether it is time to :meth:`write` the losses."""
        return self.accelerator.device.type == "cpu" or len(self._held) >= HELD

    def write(self) -> tuple[int, float] | None:
        """Copy losses to the host and write them; returns the first step with a non-finite loss, which is not written."""
        if not self._held:
            return None
        values = torch.stack([torch.stack([loss.float(), acc.to(loss.device).float()]) for _, loss, acc in self._held])
        values = self.accelerator.reduce(values, reduction="mean").cpu()
        rows = [(step, *value) for (step, _, _), value in zip(self._held, values.tolist(), strict=True)]
        self._held.clear()
        bad = next(((step, loss) for step, loss, _ in rows if not math.isfinite(loss)), None)
        rows = [row for row in rows if bad is None or row[0] < bad[0]]
        if rows and self.accelerator.is_main_process:
            self._write(rows)
        return bad

    def _write(self, rows: list[tuple[int, float, float]]) -> None:
        step, loss, accuracy = rows[-1]
        self.newest = loss, accuracy
        if self.path is not None:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerows((s, f"{one:.6g}", f"{other:.4g}") for s, one, other in rows)
        if self.accelerator.trackers:
            shown = {"train/loss": loss, "train/accuracy": accuracy, "train/lr": self.lr(step)}
            self.accelerator.log({name: value for name, value in shown.items() if math.isfinite(value)}, step=step)
