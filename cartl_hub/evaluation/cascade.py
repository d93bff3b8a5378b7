"""Attacks in stages over all images, the cheapest first, each expensive one on what the earlier ones left."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attacks import APGD, APGDT, FABT, PGD, Attack, Square, Transfer
from ..processes import gather, rank_and_world
from ..randomness import permutation
from ..ranges import check_number, check_whole
from ..report import threat_text
from .journal import Entry, Journal
from .subject import Subject
from .verdict import PassCounter

logger = logging.getLogger(__name__)

ON_SURVIVORS = (APGD, APGDT, FABT, Square, Transfer)
NUM_SAMPLES = 8
BAR = "{{desc}}{{percentage:3.0f}}%|{{bar}}| {{elapsed}} passed{left}{{postfix}}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of an evaluation. It ends with the batch, or the check, in which the first of these is spent.

    Args:
        minutes: Wall time, over all runs that resumed it.
        passes: Number of images that go through the evaluated model, with or without a gradient.

    Raises:
        ValueError: On a budget that isn't above 0, or passes that aren't whole.
    """

    minutes: float | None = None
    passes: int | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None:
            check_number("minutes", self.minutes, (">", 0))
        if self.passes is not None:
            check_whole("passes", self.passes, (">", 0))

    def spent(self, seconds: float, passes: int) -> bool:
        return seconds >= 60 * (self.minutes or math.inf) or passes >= (self.passes or math.inf)


@dataclass(eq=False)
class Stage:
    """An attack, or clean images, and the outcome.

    Args:
        key: Name of its files in the journal.
        name: Name to show.
        attack: Attack of the stage; None for clean images.
        entering: Images that the stage is for, bool [N]; None before it has begun.
        entries: Finished batches.
        again: Second verdicts on the images that it broke.
    """

    key: str
    name: str
    attack: Attack | None = None
    entering: np.ndarray | None = None
    entries: list[Entry] = field(default_factory=list)
    again: list[Entry] = field(default_factory=list)

    @property
    def threat(self) -> str | None:
        """Threat model, e.g. "Linf 8/255"."""
        return None if self.attack is None else threat_text(self.attack.norm, self.attack.eps)

    @property
    def attacked(self) -> np.ndarray:
        """Images that it ran on, bool [N]."""
        return _at(self.entries, self._num, lambda entry: entry.positions)

    @property
    def broken(self) -> np.ndarray:
        """Images that it broke, bool [N]: by the first verdict and, if there is one, by the second."""
        return _at(self.entries, self._num, lambda entry: entry.positions[entry.broken]) & ~self.unconfirmed

    @property
    def unconfirmed(self) -> np.ndarray:
        """Images whose break the second verdict did not confirm, bool [N]."""
        return _at(self.again, self._num, lambda entry: entry.positions[~entry.broken])

    @property
    def standing(self) -> np.ndarray:
        """Surviving images: those that it was for and did not break, bool [N]."""
        assert self.entering is not None
        return self.entering & ~self.broken

    @property
    def begun(self) -> bool:
        return self.entering is not None and (bool(self.entries) or not self.entering.any())

    @property
    def finished(self) -> bool:
        return self.entering is not None and bool((self.attacked == self.entering).all())

    @property
    def _num(self) -> int:
        assert self.entering is not None
        return len(self.entering)


def _at(entries: Sequence[Entry], num: int, chosen: Callable[[Entry], Tensor]) -> np.ndarray:
    flags = np.zeros(num, dtype=bool)
    for entry in entries:
        flags[chosen(entry).numpy()] = True
    return flags


# Which attack runs when, and on what


def planned(attacks: Mapping[str, Attack]) -> list[Stage]:
    """A stage for each attack: those that run on every image first, then those for survivors, each time the cheapest first."""
    order = sorted(attacks.items(), key=lambda item: (isinstance(item[1], ON_SURVIVORS), planned_passes(item[1])))
    return [Stage(f"{place:03d}", name, attack) for place, (name, attack) in enumerate(order, 1)]


def planned_passes(attack: Attack | None) -> int:
    """Passes of one image that survives to the end; 1 for attacks of an unknown kind."""
    numbers = (getattr(attack, name, 1) for name in ("steps", "passes_per_step", "restarts", "num_targets", "queries", "samples"))
    return math.prod(numbers) if not isinstance(attack, Transfer) else planned_passes(attack.attack)


def continues(attack: Attack | None, shorter: Attack | None) -> bool:
    """Whether ``attack`` is ``shorter`` with more steps.

    An image's random start depends on its key alone and no step depends on the number of steps, so the longer attack passes
    through the shorter one's iterates. It breaks what that breaks and needs to run on the survivors only.
    """
    if not (isinstance(attack, PGD) and type(attack) is type(shorter) is PGD) or attack.restarts > 1:
        return False
    return attack.steps > shorter.steps and replace(attack, steps=shorter.steps) == shorter


def entering(attack: Attack, earlier: Sequence[Stage], correct: np.ndarray) -> tuple[np.ndarray, bool]:
    """Images that an attack is to run on, and whether its figure is its own.

    Args:
        earlier: Stages that ran before.
        correct: Images that are classified correctly, bool [N].
    """
    shorter = [stage for stage in earlier if stage.finished and continues(attack, stage.attack)]
    if shorter:
        return shorter[-1].standing, True
    if not isinstance(attack, ON_SURVIVORS):
        return correct, True
    inner = [stage.standing for stage in earlier if lies_in(stage.attack, attack.norm, attack.eps) and stage.begun]
    return np.logical_and.reduce([correct, *inner]), not inner


def lies_in(attack: Attack | None, norm: str, eps: float) -> bool:
    """Whether the attack's ball is a part of this one."""
    return attack is not None and attack.norm == norm and attack.eps <= eps


# The work


class _Found(NamedTuple):
    """Outcome of one batch: classes, where they are wrong, how many images left the threat model, and those that broke."""

    predicted: Tensor
    broken: Tensor
    rejected: int = 0
    adversarial: Tensor | None = None


class Cascade:
    """Runs stages over the images of a pool, batch by batch, and keeps each finished batch.

    Each process takes every ``world``-th batch; after each round all of them know all verdicts.
    """

    def __init__(self, subject: Subject, journal: Journal, counter: PassCounter, bar: tqdm, *, budget: Budget, keep_images: bool):
        self.subject, self.journal, self.counter, self.bar = subject, journal, counter, bar
        self.budget, self.keep_images = budget, keep_images
        self._attacked = False
        self.rank, self.world = rank_and_world()
        self.passes, self.seconds = 0, 0.0
        for entry in (entry for entries in journal.entries.values() for entry in entries):
            self._spend(entry.passes, entry.elapsed)
        for content in journal.checks.values():
            self._spend(content["passes"], content["elapsed"])
        self._before, self._begun = self.seconds, time.perf_counter()

    def _spend(self, passes: int, elapsed: float) -> None:
        self.passes += passes
        self.seconds = max(self.seconds, elapsed)

    @property
    def _spent(self) -> bool:
        return self.budget.spent(self.seconds, self.passes)

    @property
    def elapsed(self) -> float:
        """Elapsed seconds, over all runs."""
        return self._before + time.perf_counter() - self._begun

    def run(self, stage: Stage, images: np.ndarray, *, always: bool = False, later: int = 0) -> None:
        """Run a stage on some images until they are done or the budget is spent, and judge what broke a second time.

        Args:
            images: Images to run on, bool [N].
            always: Run regardless of the budget.
            later: Passes that other stages may take after this one, to estimate the time left.
        """
        stage.entering = images
        self.bar.set_description(stage.name, refresh=False)
        self.bar.bar_format = BAR.format(left=", at most {remaining} left" if self._attacked else "")
        self.bar.total = self.bar.n + int(images.sum()) * planned_passes(stage.attack) + later
        at_once = self.subject.batch_size
        self._work(stage.key, stage.entries, _positions(images), at_once, lambda part: self._attack(stage, part), stage, always)
        if stage.attack is None:
            return
        self._attacked = True  # what came before says nothing of how fast attacks are
        broken = _positions(stage.broken)
        mixed = broken[permutation(self.subject.seed, 0, len(broken))]
        size = max(1, min(at_once, len(broken) // 2))  # at least two batches: an image's neighbours are other ones
        self._work(f"{stage.key}again", stage.again, mixed, size, lambda part: self._judge_again(stage, part))
        if not self.keep_images:  # those of large images in every stage would fill a disk
            kept = few_of_each_class(stage.broken, self.subject.pool.labels)
            self.journal.thin_out(stage.key, stage.entries[self.rank :: self.world], kept)

    def check(self, names: Sequence[str], make: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Make checks that the journal doesn't hold, until the budget is spent; their content by name."""
        found = {name: content for name, content in self.journal.checks.items() if name in names}
        left = [name for name in names if name not in found]
        for start in range(0, len(left), self.world):
            if self._spent:
                break
            new: dict[str, dict[str, Any]] = {}
            for name in left[start : start + self.world][self.rank : self.rank + 1]:
                self.bar.set_description(f"check of {name}")
                before = self.counter.passes
                new[name] = {"check": make(name), "passes": self.counter.passes - before, "elapsed": self.elapsed}
                self.journal.write_check(name, new[name])
            for name, content in (item for part in gather(new) for item in part.items()):
                found[name] = content
                self._spend(content["passes"], content["elapsed"])
        return {name: content["check"] for name, content in found.items()}

    def _work(
        self,
        key: str,
        entries: list[Entry],
        positions: Tensor,
        batch_size: int,
        act: Callable[[Tensor], _Found],
        shown: Stage | None = None,
        always: bool = True,
    ) -> None:
        """Process the positions that have no entry yet."""
        entries += self.journal.entries.get(key, [])
        self._show(shown, entries)
        done = torch.cat([entry.positions for entry in entries]) if entries else positions[:0]
        left = positions[~torch.isin(positions, done)]
        batches = left.split(batch_size) if len(left) else ()
        for start in range(0, len(batches), self.world):
            if self._spent and not always:
                return
            mine = batches[start : start + self.world][self.rank : self.rank + 1]
            new = [entry for found in gather([self._entry(key, part, act) for part in mine]) for entry in found]
            entries += new
            for entry in new:
                self._spend(entry.passes, entry.elapsed)
            self._show(shown, new)

    def _entry(self, key: str, positions: Tensor, act: Callable[[Tensor], _Found]) -> Entry:
        begun, before = time.perf_counter(), self.counter.passes
        found = act(positions)
        entry = Entry(
            positions,
            found.predicted.cpu(),
            found.broken.cpu(),
            found.rejected,
            passes=self.counter.passes - before,
            seconds=(time.perf_counter() - begun) / self.world,  # processes work side by side
            elapsed=self.elapsed,
        )
        at = None if found.adversarial is None else entry.positions[entry.broken]
        self.journal.write(key, entry, at, found.adversarial)
        return entry

    def _attack(self, stage: Stage, positions: Tensor) -> _Found:
        subject = self.subject
        images, labels, indices = subject.load(positions)
        if stage.attack is None:
            predicted = subject.classify(images, indices, stage.name)
            return _Found(predicted, predicted != labels)
        adversarial = stage.attack(subject.model, images, labels, subject.keys(indices), until_broken=True)
        # an attack may search as it likes, the verdict is taken here
        verdict = subject.judge(images, adversarial, stage.attack, indices, f"the images of {stage.name}")
        broken, rejected = verdict.breaks(labels), int(verdict.rejected.sum())
        if rejected and not any(entry.rejected for entry in stage.entries):
            logger.warning(
                "%s: %s moved images out of [0, 1] or its ball; they do not count as broken.", stage.name, stage.attack
            )
        return _Found(verdict.predicted, broken, rejected, verdict.images[broken])

    def _judge_again(self, stage: Stage, positions: Tensor) -> _Found:
        assert stage.attack is not None
        images, labels, indices = self.subject.load(positions)
        adversarial = self.journal.images(stage.key, stage.entries, positions).to(self.subject.device)
        verdict = self.subject.judge(images, adversarial, stage.attack, indices, f"the images of {stage.name}")
        return _Found(verdict.predicted, verdict.breaks(labels))

    def _show(self, stage: Stage | None, new: Sequence[Entry]) -> None:
        if stage is not None:
            self.bar.set_postfix_str(f"{stage.standing.sum():,} standing", refresh=False)
            self.bar.update(sum(len(entry.positions) for entry in new) * planned_passes(stage.attack))


def few_of_each_class(broken: np.ndarray, labels: Tensor) -> Tensor:
    """Positions of a few images, bool [N], to look at: of different classes as far as possible, first ones first."""
    positions = _positions(broken)
    order = labels[positions].numpy()
    _, first = np.unique(order, return_index=True)
    others = np.setdiff1d(np.arange(len(positions)), first)
    return positions[np.sort(np.concatenate([np.sort(first), others])[:NUM_SAMPLES])]


def _positions(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.flatnonzero(images))
