"""Training arguments, common to all methods."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..attacks import NFGSM, PGD, Attack
from ..data import Augmentation, Data
from ..randomness import SEEDS
from ..ranges import check_bool, check_number, check_whole


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the run, as a factor of its peak.

    Args:
        warmup: Share of the run, in [0, 1], in which the learning rate rises linearly from 0.
        decay: Decay after that: "linear" or "cosine" to 0, "exponential" to ``gamma``, "steps" at the milestones, or "constant".
        milestones: Shares of the run, in (0, 1), at which "steps" multiplies the learning rate by ``gamma``.
        gamma: Factor at each milestone, >= 0, or for "exponential" at the end of the run, > 0.

    Raises:
        ValueError: On values out of range.
    """

    warmup: float = 0.1
    decay: Literal["linear", "cosine", "exponential", "steps", "constant"] = "linear"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.2

    def __post_init__(self) -> None:
        if self.decay not in ("linear", "cosine", "exponential", "steps", "constant"):
            raise ValueError(f"decay must be linear, cosine, exponential, steps or constant, got {self.decay!r}.")
        if not isinstance(self.milestones, (tuple, list)):
            raise ValueError(f"milestones must be a tuple of shares of the run, such as (0.5, 0.75), got {self.milestones!r}.")
        check_number("warmup", self.warmup, (">=", 0), ("<=", 1))
        for milestone in self.milestones:
            check_number("each of milestones", milestone, (">", 0), ("<", 1))
        check_number("gamma", self.gamma, (">" if self.decay == "exponential" else ">=", 0))

    def factor(self, step: int, num_steps: int) -> float:
        """Factor at ``step``, counted from 0."""
        warm = self.warmup * num_steps
        if step + 1 < warm:
            return (step + 1) / warm
        if self.decay == "constant":
            return 1.0
        if self.decay == "steps":
            return self.gamma ** sum(step >= milestone * num_steps for milestone in self.milestones)
        left = min(1.0, (num_steps - step) / max(num_steps - warm, 1))
        if self.decay == "exponential":
            return self.gamma ** (1 - left)
        return left if self.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """Compute the frozen blocks' output for each image once, and train the other blocks on it.

    For methods that train the last blocks on natural images, with the source's batch-norm statistics in the frozen ones, in one
    process. Without augmentation it changes nothing but the training time.

    Args:
        views: Number of augmented views of each image, >= 1; epoch e shows view e modulo ``views``. None without augmentation.
        dtype: Type in which features are kept, "fp32" or "bf16"; with the latter, half the size, they are rounded unless the
            frozen blocks give bfloat16, as those of most convolutional networks do in a run whose precision is "bf16".
        folder: Folder for a memory-mapped file of the features; runs with the same frozen weights, data, views and batch size
            share it, unless the data are too large for memory, so that their pictures can't be compared: then each run computes
            it anew. None: in memory.

    Raises:
        ValueError: On values out of range.
    """

    views: int | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    folder: str | Path | None = field(default=None, repr=False)  # not of the run, but of this machine

    def __post_init__(self) -> None:
        if self.views is not None:
            check_whole("views", self.views, (">=", 1))
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype must be 'fp32' or 'bf16', got {self.dtype!r}.")
        if not isinstance(self.folder, str | Path | None):
            raise ValueError(f"folder must be a path or None, got {self.folder!r}.")


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """Training arguments, common to all methods.

    Args:
        epochs: Number of passes over the data.
        max_steps: Number of steps, instead of epochs; needed for a streaming data set.
        batch_size: Number of images per step over all processes.
        optimizer: Optimizer: "sgd" with momentum, or "adamw".
        lr: Peak learning rate, > 0.
        schedule: Learning-rate schedule.
        momentum: Momentum of SGD, in [0, 1).
        nesterov: Use Nesterov momentum.
        weight_decay: Weight decay on every trained parameter, >= 0.
        clip_grad_norm: Largest 2-norm of the gradient, > 0; None for no bound.
        precision: Precision of the forward passes: "fp32", "bf16" (autocast), or "auto": bf16 if the hardware has matrix units
            for it (CUDA from Ampere on, CPUs with AMX), else fp32. A run resumed on another machine keeps its precision.
        ema: Decay, in (0, 1), of an exponential moving average of the weights, which is then the result; None for none.
        augmentation: Augmentation of the training images; None for none.
        cache: Cache of the frozen blocks' outputs, instead of computing them in each step; None for none.
        seed: Seed of order, augmentation, random starts and dropout; any 64-bit number.
        validate_every: Number of epochs between validations.
        validation_attack: Attack whose robust accuracy chooses the best checkpoint; with None clean accuracy does, for sources
            that aren't robust. A training attack of a single step is besides compared with PGD in its own ball, and training
            stops if it was overfitted to.
        validation_images: Largest number of validation images that the attack is run on.
        patience: Number of validations without a better robust accuracy after which training stops; None for never.
        load_best: Return the best weights by validation robust accuracy rather than the last.
        checkpoint_every: Number of epochs between checkpoints.
        checkpoint_minutes: Minutes between checkpoints, if that is sooner; None for epochs alone.
        sync_batchnorm: Share batch statistics between GPUs. Otherwise, and on CPUs, each process uses its own part of the batch.
        channels_last: Use the channels-last memory layout for images and weights; faster for convolutions.
        log_with: Tracker of accelerate, e.g. "tensorboard"; it writes into the output folder.

    Raises:
        ValueError: On values out of range.
    """

    epochs: int = 20
    max_steps: int | None = None
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    schedule: Schedule = field(default_factory=Schedule)
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    clip_grad_norm: float | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    ema: float | None = None
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    cache: FeatureCache | None = None
    seed: int = 0
    validate_every: int = 1
    validation_attack: Attack | None = PGD(eps=8 / 255, step_size=2 / 255, steps=10)
    validation_images: int = 512
    patience: int | None = None
    load_best: bool = False
    checkpoint_every: int = 1
    checkpoint_minutes: float | None = 10.0
    sync_batchnorm: bool = False
    channels_last: bool = True
    log_with: str | None = None

    def __post_init__(self) -> None:
        for name in ("nesterov", "load_best", "sync_batchnorm", "channels_last"):
            check_bool(name, getattr(self, name))
        for name in ("epochs", "batch_size", "validate_every", "validation_images", "checkpoint_every"):
            check_whole(name, getattr(self, name), (">=", 1))
        check_whole("seed", self.seed, (">=", SEEDS[0]), ("<=", SEEDS[1]))
        check_number("lr", self.lr, (">", 0))
        check_number("momentum", self.momentum, (">=", 0), ("<", 1))
        check_number("weight_decay", self.weight_decay, (">=", 0))
        if self.max_steps is not None:
            check_whole("max_steps", self.max_steps, (">=", 1))
        if self.patience is not None:
            check_whole("patience", self.patience, (">=", 1))
        if self.clip_grad_norm is not None:
            check_number("clip_grad_norm", self.clip_grad_norm, (">", 0))
        if self.ema is not None:
            check_number("ema", self.ema, (">", 0), ("<", 1))
        if self.checkpoint_minutes is not None:
            check_number("checkpoint_minutes", self.checkpoint_minutes, (">=", 0))
        for name, allowed in (("precision", ("auto", "fp32", "bf16")), ("optimizer", ("sgd", "adamw"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if not isinstance(self.schedule, Schedule):
            raise ValueError(f"schedule must be a Schedule, such as Schedule(decay='linear'), got {self.schedule!r}.")
        if not isinstance(self.augmentation, Augmentation | None):
            raise ValueError(f"augmentation must be an Augmentation or None, got {self.augmentation!r}.")
        if not isinstance(self.cache, FeatureCache | None):
            raise ValueError(f"cache must be a FeatureCache or None, got {self.cache!r}.")
        if self.cache is not None and self.max_steps is None and (self.cache.views or 1) > self.epochs:
            raise ValueError(
                f"expected at most one view in the cache for each epoch, got {self.cache.views} views and {self.epochs} epochs."
            )
        if self.cache is not None and (self.cache.views is None) != (self.augmentation is None):
            raise ValueError(
                "cache needs the number of augmented views of each image, such as FeatureCache(views=8), got none; or use "
                "augmentation=None."
                if self.cache.views is None
                else f"cache has {self.cache.views} augmented views, got augmentation=None; leave the views out."
            )
        if not isinstance(self.validation_attack, Attack | None):
            raise ValueError(f"validation_attack must be an attack, such as PGD(...), or None, got {self.validation_attack!r}.")
        if isinstance(self.validation_attack, NFGSM):
            raise ValueError("validation_attack must stay in its ball, and NFGSM does not; use PGD.")

    def num_steps(self, data: Data) -> int:
        """Number of steps of the whole run on ``data``."""
        per_epoch = data.steps_per_epoch(self.batch_size)
        if self.max_steps is not None:
            return self.max_steps
        if per_epoch is None:
            raise ValueError("expected max_steps for a streaming data set, whose length is unknown; got None.")
        return self.epochs * per_epoch
