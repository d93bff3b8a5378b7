"""One training loop for every method.

Order of the images, augmentation, random starts and dropout depend on (seed, epoch, image) or on (seed, step) alone, so that
a run that was killed and resumed ends with the weights of one that was not, bit for bit on a CPU.
"""

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast, broadcast_object_list
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks import FGSM, NFGSM, PGD, RFGSM, Attack
from ..attacks.attack import Norm
from ..batchnorm import BatchNormPolicy, FollowingStatistics
from ..blocks import last_blocks, list_blocks
from ..config import to_dict
from ..data import Data, DataError, ImageData, listed
from ..files import locked
from ..methods import Batch, Method
from ..methods.method import Images
from ..models import Classifier
from ..processes import bar_interval, default_precision, gather, rank_and_world
from ..randomness import image_keys, kept_generators, seed_generators, step_seed
from ..spectral import plain_state_dict
from ..weights import content_hash
from .arguments import TrainingArguments
from .cache import CachedFeatures, FrozenPrefix, cached_features, check_cache
from .checkpoint import (
    BEST,
    CHECKPOINT,
    TrainingError,
    load_optimizer_state,
    optimizer_state,
    read_checkpoint,
    read_fitting_checkpoint,
    under,
    write_checkpoint,
)
from .fingerprint import fingerprint
from .loss_log import LossLog
from .result import Result, Validation
from .validation import Validator

logger = logging.getLogger(__name__)

SINGLE_STEP = (FGSM, RFGSM, NFGSM)
CLOCK_STEPS = 25  # after which several processes agree on the time
OVERFITTING_GAP = 0.15  # FGSM accuracy above PGD-10 accuracy that means catastrophic overfitting


class Task(nn.Module):
    """A model under a method: ``forward`` is the training step, which is what DDP wraps."""

    def __init__(self, model: Classifier, method: Method, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.model, self.method, self.extras = model, method, nn.ModuleDict(modules)
        self.precision = "fp32"
        self.prefix: FrozenPrefix | None = None  # whose rows ``batch.images`` are, where they are cached

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast context in which the model runs."""
        if self.precision == "fp32":
            return nullcontext()
        # a cast that was made for a pass without gradients must not serve the training pass, as it does in older torch
        return torch.autocast(self.model.mean.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with self.autocast(), nullcontext() if self.prefix is None else self.prefix.skipped():
            return self.method.losses(self.model, batch, **self.extras)


def train(
    model: Classifier,
    method: Method,
    data: Data,
    *,
    validation: ImageData | None = None,
    bn: BatchNormPolicy | None = None,
    arguments: TrainingArguments | None = None,
    output_dir: str | Path | None = None,
    resume: bool = True,
) -> Result:
    """Train ``model`` in place and leave it in eval mode; it changes only when this returns, so an error leaves it as it was.

    Runs unchanged in several processes (``torchrun``, ``accelerate launch``): each takes its part of every batch, gradients
    are averaged, files are written once. Batch statistics are those of each process unless ``sync_batchnorm``.

    Args:
        model: Classifier for the classes of ``data``.
        method: Training method, which says what is trained and minimised.
        data: Training images.
        validation: Images on which the best checkpoint is chosen; never those that are reported on. Unused by a method that
            learns without labels, as it trains no classifier.
        bn: Batch-norm policy; by default the source's statistics and trained affine maps.
        arguments: Training arguments.
        output_dir: Folder for checkpoints and logs; None writes nothing.
        resume: Resume from the checkpoint in ``output_dir`` if there is one. The model must have the weights with which that run
            began, or those with which it ended: then, as for every finished run, its result is returned at once. If False,
            start over; checkpoints of an earlier run are removed before the first step.

    Raises:
        ValueError: On arguments that don't fit the data, the model or the run to continue, before the first step.
        TrainingError: If the loss becomes NaN or infinite, or a file of the run is damaged or can't be written; the last good
            checkpoint is kept.
        BusyError: If another run trains in ``output_dir``.
        DataError: If an image can't be read; a checkpoint of the step before is written first.
    """
    run = _Run(model, method, data, validation, bn or BatchNormPolicy(), arguments or TrainingArguments(), output_dir, resume)
    with run.alone(), kept_generators(run.accelerator.device):
        return run()


class _Run:
    """One call of :func:`train`."""

    def __init__(
        self,
        model: Classifier,
        method: Method,
        data: Data,
        validation: ImageData | None,
        bn: BatchNormPolicy,
        arguments: TrainingArguments,
        output_dir: str | Path | None,
        resume: bool,
    ):
        self.given, self.model = model, copy.deepcopy(model)  # what is given changes at the very end
        self.method, self.data = method, data
        self.validation = validation if method.uses_labels else None
        self.bn, self.arguments, self.resume = bn, arguments, resume
        self.folder = None if output_dir is None else Path(output_dir)
        self.num_steps = arguments.num_steps(data)
        self.per_epoch = data.steps_per_epoch(arguments.batch_size)
        self.period = self.per_epoch or max(1, self.num_steps // 10)  # what stands for an epoch of a streaming data set
        if len(data.label_names) != model.num_classes:
            raise ValueError(
                f"expected a model for the {len(data.label_names)} classes of the data, got one for {model.num_classes}; "
                "call model.reset_head(data.label_names) first."
            )
        if not method.uses_labels:
            self._check_without_labels()
        self._check_validation()
        self.accelerator = _accelerator(arguments, self.folder)
        few = self.per_epoch is not None and self.per_epoch < 5 and self.num_steps < 100
        if few and isinstance(data, ImageData) and self.accelerator.is_main_process:
            smaller = max(8, 2 ** int(math.log2(max(1, len(data) // 5))))  # five steps an epoch
            remedy = f"a batch_size of {smaller}" if smaller < arguments.batch_size else "a larger number of epochs"
            logger.warning(
                "%d images in batches of %d: %d steps an epoch, %d in all; %s makes more",
                *(len(data), arguments.batch_size, self.per_epoch, self.num_steps, remedy),
            )
        world = self.accelerator.num_processes
        if arguments.batch_size % world:
            raise ValueError(f"batch_size must be a multiple of the {world} processes, got {arguments.batch_size}.")
        if isinstance(data, ImageData) and len(data) < world:
            raise ValueError(f"expected at least one training image per process, got {len(data)} for {world}.")
        if arguments.log_with and self.folder is None:
            raise ValueError("log_with needs an output_dir to write to, got None.")
        if arguments.log_with and not self.accelerator.log_with:
            raise ValueError(f"expected a tracker that is installed as log_with, got {arguments.log_with!r}; pip install it.")
        self._note_other_radius()
        method.adapt(self.model)
        if arguments.cache is not None:
            check_cache(self.model, method, bn, data, world)
        self.features: CachedFeatures | None = None
        self.result = Result(num_steps=self.num_steps, device=_device_name(self.accelerator.device))
        self.fingerprint = fingerprint(method, bn, arguments, data, self.validation, self.model)
        self.checkpoint: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.losses = LossLog(self.folder, self.accelerator, self._lr)
        self.validator = None
        if self.validation is not None:
            at_once = max(1, min(128, arguments.batch_size // world))
            self.validator = Validator(self.validation, arguments.validation_images, at_once, self._to_float, self.accelerator)
        self.stale = 0  # validations since the best one

    def _check_without_labels(self) -> None:
        name = type(self.method).__name__
        if self.arguments.augmentation is not None:
            raise ValueError(f"expected augmentation=None, as {name} draws its own views, got {self.arguments.augmentation}.")
        for option in ("patience", "load_best"):
            if value := getattr(self.arguments, option):
                raise ValueError(f"{option}={value} needs accuracies, and {name} learns without labels; leave it out.")
        logger.info("no validation: %s learns without labels and trains no classifier", name)

    def _check_validation(self) -> None:
        if self.validation is None:
            for name in ("patience", "load_best"):
                if value := getattr(self.arguments, name):
                    raise ValueError(f"{name}={value} needs validation images, got validation=None.")
            return
        if not len(self.validation):
            raise ValueError("expected validation images, got 0 of them; pass some, or validation=None.")
        if self.validation.label_names != self.data.label_names:
            raise ValueError(
                f"expected validation images of the classes {listed(self.data.label_names)}, as in training, got "
                f"{listed(self.validation.label_names)}."
            )

    def _note_other_radius(self) -> None:
        """Say that the weights are chosen in another ball than they are trained in."""
        chosen, trained = self.arguments.validation_attack, getattr(self.method, "attack", None)
        if self.validation is None or chosen is None or trained is None or not self.accelerator.is_main_process:
            return
        if (chosen.norm, chosen.eps) != (trained.norm, trained.eps):
            logger.warning(
                "the attack on validation images (validation_attack), which chooses the best weights, has the radius %.4g in %s, "
                "that of training %.4g in %s",
                *(chosen.eps, chosen.norm, trained.eps, trained.norm),
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuse a folder in which another process trains."""
        if self.folder is None or not self.accelerator.is_main_process:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "training.lock"):
            yield

    def __call__(self) -> Result:
        self.checkpoint = self._read_checkpoint() if self.resume else None
        if self.checkpoint is not None and self.checkpoint[1]["end_weights"] == self.fingerprint["weights"]:
            self._restore_result()
            self._give(self.model.state_dict())
        else:
            self._give(self._train())
        return self.result

    def _give(self, state: dict[str, Tensor]) -> None:
        self.method.adapt(self.given)
        self.given.to(self.accelerator.device)
        self.given.load_state_dict(state)
        self.given.eval()

    def _train(self) -> dict[str, Tensor]:
        """All that the run holds; returns the plain state of the result."""
        device = self.accelerator.device
        self.model.to(device)
        working = copy.deepcopy(self.model)  # ``self.model`` stays plain: it validates
        if self.arguments.channels_last:
            working.to(memory_format=torch.channels_last)
        if self.arguments.sync_batchnorm and device.type == "cuda" and self.accelerator.num_processes > 1:
            from timm.layers import convert_sync_batchnorm

            working.backbone = convert_sync_batchnorm(working.backbone)
        if isinstance(self.data, ImageData):
            self.data = self.data.to(device)
        tuned = {id(layer) for block in last_blocks(working, self.method.trained_blocks) for layer in block.layers()}
        layers = [layer for block in list_blocks(working) for layer in block.layers()]
        submodel = [layer for layer in layers if id(layer) in tuned]
        extractor = [layer for layer in layers if id(layer) not in tuned]
        if self.accelerator.is_main_process:
            logger.info(self.bn.describe(extractor, submodel))
        self.statistics = FollowingStatistics(submodel if extractor else [])  # a whole network changes slowly, or is new
        seed_generators(step_seed(self.arguments.seed, -1, 0), device)  # of what the method draws: the same in every process
        with self.method.setup(working, self._known_images()) as modules, self.bn.hold(extractor, submodel):
            task = Task(working, self.method, modules).to(device)
            return self._fit(task)

    def _known_images(self) -> Images | None:
        data = self.data
        if not isinstance(data, ImageData) or self.arguments.augmentation is not None:
            return None
        return Images(len(data), lambda indices: self._to_float(data.get(indices)))

    def _to_float(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise DataError(f"expected uint8 images from the data, got {images.dtype}; training divides them by 255.")
        images = images.to(self.accelerator.device, non_blocking=True).float() / 255
        return images.contiguous(memory_format=torch.channels_last) if self.arguments.channels_last else images

    def _see(self, images: Tensor, keys: Tensor) -> Tensor:
        """Turn images as stored in the data into the model's input."""
        images = images.to(self.accelerator.device, non_blocking=True)
        if self.arguments.augmentation is not None:
            images = self.arguments.augmentation(images, keys)
        return self._to_float(images)

    def _cache(self, task: Task, start: int) -> ImageData:
        """Compute the frozen blocks' outputs; returns the data without their images, which are not read again."""
        arguments, data, device = self.arguments, self.data, self.accelerator.device
        assert arguments.cache is not None
        assert isinstance(data, ImageData)
        assert self.method.trained_blocks is not None
        views = arguments.cache.views or 1

        def see(images: Tensor, indices: Tensor, epoch: int) -> Tensor:
            return self._see(images, image_keys(arguments.seed, epoch % views, indices.to(device)))

        first = next(data.training_batches(batch_size=arguments.batch_size, seed=arguments.seed, start=start, stop=start + 1))
        batch = see(first.images, first.indices, first.epoch)
        with task.autocast():
            prefix = FrozenPrefix(task.model, self.method.trained_blocks, batch[torch.arange(3) % len(batch)])
            rows = prefix.check(batch)
            self.features = cached_features(
                arguments.cache,
                prefix,
                data,
                see,
                batch_size=len(batch),
                record={
                    "views": arguments.cache.views,
                    "augmentation": None if arguments.augmentation is None else to_dict(arguments.augmentation),
                    "seed": None if arguments.augmentation is None else arguments.seed,
                    "batch_size": len(batch),
                    "precision": task.precision,
                    "channels_last": arguments.channels_last,
                    "device": self.result.device,
                },
                device=device,
                progress=self.accelerator.is_main_process,
            )
            self.features.check(rows, first.indices, first.epoch)
        task.prefix = prefix
        return ImageData(data.labels, data.label_names, lambda indices: torch.empty(len(indices), 0), data.policy)

    def _fit(self, task: Task) -> dict[str, Tensor]:
        """Run the steps; returns the plain state of the result."""
        arguments, accelerator, main = self.arguments, self.accelerator, self.accelerator.is_main_process
        trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("no parameter is left to train: the batch-norm policy freezes all that the method would train.")
        optimizer = self._optimizer(trained)
        self.average = {name: t.clone() for name, t in plain_state_dict(task.model).items()} if arguments.ema else None
        start = self._restore(task, optimizer)
        task.precision = self.result.precision = self._precision()
        saved_at = begun = time.monotonic()
        ended = start == self.num_steps or self.result.stopped is not None
        data = self.data if arguments.cache is None or ended else self._cache(task, start)
        wrapped = accelerator.prepare_model(task).train()
        if not self.resume:
            self._forget()
        self.losses.open(start)
        if arguments.log_with:
            accelerator.init_trackers("tracker")
        batches = data.training_batches(
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            start=start,
            stop=self.num_steps,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        seconds = self.result.seconds
        bar = tqdm(
            total=self.num_steps, initial=start, disable=not main, unit="step", dynamic_ncols=True, mininterval=bar_interval()
        )
        done = start
        if start and main and not ended:
            bar.write(f"the run in {self.folder} goes on at step {start} of {self.num_steps}")
        with bar:
            for step in range(start, start if self.result.stopped else self.num_steps):
                try:
                    drawn = next(batches)
                except StopIteration:
                    self.result.stopped = f"the data ended after {step} of {self.num_steps} steps"
                    break
                except DataError as error:
                    # the other processes have read theirs, and don't come to the collectives of a checkpoint
                    where = self._save(task, optimizer, step) if accelerator.num_processes == 1 else self._where()
                    raise DataError(f"{error} Training stopped at step {step}{where}") from error
                self._step(wrapped, task, optimizer, trained, drawn, step)
                self.result.seconds = seconds + time.monotonic() - begun
                if self.losses.newest is not None:
                    loss, accuracy = self.losses.newest
                    shown = {} if math.isnan(accuracy) else {"acc": f"{accuracy:.0%}"}
                    bar.set_postfix(loss=f"{loss:.3f}", **shown, refresh=False)
                bar.update()
                done = step + 1
                epoch_end = done % self.period == 0 or done == self.num_steps
                if self.validation is not None and (
                    done == self.num_steps or done % (self.period * arguments.validate_every) == 0
                ):
                    self._write_losses()
                    self._validate(task, done, bar)
                if self.result.stopped:
                    break
                due = epoch_end and (done // self.period) % arguments.checkpoint_every == 0
                if done < self.num_steps and (due or self._late(done, saved_at)):
                    self._save(task, optimizer, done)
                    saved_at = time.monotonic()
        self._write_losses()
        self.result.steps = done
        in_batch = min(arguments.batch_size, len(data)) if isinstance(data, ImageData) else arguments.batch_size
        self.result.images_per_second = self.result.steps * in_batch / max(self.result.seconds, 1e-9)
        for tracker in accelerator.trackers:  # accelerate's end_training would also end the process group
            tracker.finish()
        self._settle_best()
        state = self._final_state(task)
        if self.checkpoint is None or self.checkpoint[1]["end_weights"] is None:
            self._save(task, optimizer, done, end_weights=content_hash(state))
        accelerator.wait_for_everyone()
        return state

    def _late(self, done: int, saved_at: float) -> bool:
        """Whether the minutes between checkpoints are over, by the main process's clock."""
        minutes = self.arguments.checkpoint_minutes
        if minutes is None or self.folder is None:
            return False
        late = time.monotonic() - saved_at > 60 * minutes
        if self.accelerator.num_processes == 1:
            return late
        if done % CLOCK_STEPS:
            return False
        (late,) = broadcast_object_list([late])
        return late

    def _step(self, wrapped, task: Task, optimizer, trained: list[nn.Parameter], drawn, step: int) -> None:
        arguments, device = self.arguments, self.accelerator.device
        self.statistics.begin_step(step)
        seed_generators(step_seed(arguments.seed, step, self.accelerator.process_index), device)
        labels, indices = drawn.labels.to(device), drawn.indices.to(device)
        keys = image_keys(arguments.seed, drawn.epoch, indices)
        images = self._see(drawn.images, keys) if self.features is None else self.features(drawn.indices, drawn.epoch)
        batch = Batch(images, labels, indices, keys, step / self.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = self._lr(step)
        if not task.model.training:  # setting it takes as long as a small step
            wrapped.train()
        outputs = wrapped(batch)
        outputs["loss"].backward()  # accelerate's backward divides by what the environment says of accumulation
        logits = outputs.get("logits")
        accuracy = torch.tensor(math.nan) if logits is None else (logits.detach().argmax(1) == labels).float().mean()
        self.losses.add(step, outputs["loss"].detach(), accuracy)
        if self.losses.full:
            self._write_losses()
        if arguments.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, arguments.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.average is not None and arguments.ema is not None:
            _update_average(self.average, plain_state_dict(task.model, converged=False), arguments.ema, step)

    # What is measured on the way

    def _write_losses(self) -> None:
        """Write the losses; one that is not finite ends the run before its weights are saved."""
        if (bad := self.losses.write()) is None:
            return
        step, loss = bad
        saved = self.folder is not None and self._checkpoint_path.exists()
        kept = f"the last good checkpoint is {self._checkpoint_path}" if saved else "nothing was saved"
        raise TrainingError(
            f"the loss became {loss} at step {step} of {self.num_steps}; {kept}. Lower lr (now {self.arguments.lr}), "
            "set clip_grad_norm=1.0, or use precision='fp32'."
        )

    def _validate(self, task: Task, step: int, bar: tqdm) -> None:
        """Measure the plain model on validation images and keep it if it is the best so far."""
        state = self._current_state(task)
        self.model.load_state_dict(state)
        attack, radius = self.arguments.validation_attack, self._overfitting_radius(step)
        attacks: dict[str, Attack] = {} if attack is None else {"robust": attack}
        multi_step = "robust"  # what FGSM is compared with, in the ball in which the training attack moved
        if radius is not None:
            eps, norm = radius
            attacks["fgsm"] = FGSM(eps=eps, norm=norm)
            if attack is None or getattr(attack, "steps", 1) == 1 or (attack.eps, attack.norm) != radius:
                multi_step = "pgd"
                attacks[multi_step] = PGD(eps=eps, norm=norm, step_size=eps / 4, steps=10)
        assert self.validator is not None
        accuracy = self.validator.accuracies(self.model, attacks)
        found = Validation(step, accuracy["clean"], accuracy.get("robust"), accuracy.get("fgsm"))
        self.result.validations.append(found)
        best = self.result.best
        self.stale += 1
        if radius is not None and accuracy["fgsm"] - accuracy[multi_step] > OVERFITTING_GAP:
            kept = "the best weights before it are kept"
            if best is None:
                kept = "these weights are kept, as there was no validation before it"
            self.result.stopped = (
                f"catastrophic overfitting at step {step}: FGSM accuracy {accuracy['fgsm']:.1%} is more than "
                f"{OVERFITTING_GAP:.0%} above PGD accuracy {accuracy[multi_step]:.1%}; {kept}. Train with PGD, or a smaller eps"
            )
        elif best is None or found.order > best.order:
            self.result.best, self.stale = found, 0
            self.best_state = {name: tensor.detach().clone() for name, tensor in state.items()}
            if self.folder is not None and self.accelerator.is_main_process:
                write_checkpoint(self.folder / BEST, self.best_state, {"validation": vars(found)})
        elif self.arguments.patience is not None and self.stale >= self.arguments.patience:
            self.result.stopped = f"accuracy on validation has not risen for {self.stale} validations"
        if self.accelerator.is_main_process:
            words = ", ".join(f"{name} {value:.1%}" for name, value in accuracy.items())
            bar.write(f"step {step}: validation accuracy {words}")
            if self.arguments.log_with:
                self.accelerator.log({f"validation/{name}_accuracy": value for name, value in accuracy.items()}, step=step)

    @property
    def _single_step(self) -> bool:
        attack = getattr(self.method, "attack", None)
        return isinstance(attack, SINGLE_STEP) or (isinstance(attack, PGD) and attack.steps == 1)

    def _overfitting_radius(self, step: int) -> tuple[float, Norm] | None:
        """Radius and norm, at this step, of a training attack of a single step, to which a network can overfit."""
        if not self._single_step:
            return None
        attack: Attack = self.method.attack  # type: ignore[attr-defined]
        schedule = getattr(self.method, "eps_schedule", None)
        factor = 1.0 if schedule is None else schedule.factor((step - 1) / self.num_steps)
        return (attack.eps * factor, attack.norm) if factor else None

    # What the run starts from and ends with

    def _optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        arguments = self.arguments
        if arguments.optimizer == "adamw":
            return torch.optim.AdamW(trained, lr=arguments.lr, weight_decay=arguments.weight_decay)
        nesterov = arguments.nesterov and arguments.momentum > 0
        return torch.optim.SGD(
            trained, lr=arguments.lr, momentum=arguments.momentum, nesterov=nesterov, weight_decay=arguments.weight_decay
        )

    def _precision(self) -> str:
        if self.checkpoint is not None:
            return self.result.precision  # on whatever machine it goes on
        chosen = self.arguments.precision
        (choice,) = broadcast_object_list([default_precision(self.accelerator.device) if chosen == "auto" else chosen])
        return choice

    def _lr(self, step: int) -> float:
        return self.arguments.lr * self.arguments.schedule.factor(step, self.num_steps)

    def _current_state(self, task: Task) -> dict[str, Tensor]:
        """The main process's state, in every process: each has batch statistics of its own part of the batches."""
        state = plain_state_dict(task.model) if self.average is None else self.average
        if self.accelerator.num_processes == 1:
            return state
        return broadcast({name: tensor.detach().clone() for name, tensor in state.items()})

    def _final_state(self, task: Task) -> dict[str, Tensor]:
        overfitted = (self.result.stopped or "").startswith("catastrophic")
        if (self.arguments.load_best or overfitted) and self.result.best is not None:
            assert self.best_state is not None
            self.result.weights = "best"
            return self.best_state
        return {name: tensor.detach().clone() for name, tensor in self._current_state(task).items()}

    # Files

    def _settle_best(self) -> None:
        """Take the best weights from their file if an attempt that was killed, and not repeated to the bit, left better ones."""
        if self.checkpoint is None or self.folder is None or self.result.best is None:
            return
        self.accelerator.wait_for_everyone()  # the main process may be writing it
        if not (self.folder / BEST).exists():
            return
        state, record = read_checkpoint(self.folder / BEST)
        if record["validation"]["step"] != self.result.best.step:
            self.best_state, self.result.best = state, Validation(**record["validation"])

    @property
    def _checkpoint_path(self) -> Path:
        assert self.folder is not None
        return self.folder / CHECKPOINT

    def _save(self, task: Task, optimizer: torch.optim.Optimizer, step: int, *, end_weights: str | None = None) -> str:
        """Write a checkpoint from which the run resumes at ``step``; returns a description of where it is.

        Args:
            end_weights: Hash of the result, if the run has ended.
        """
        self._write_losses()
        if self.folder is None:
            return self._where()
        buffers = self._buffers_of_processes(task)
        if self.accelerator.is_main_process:
            tensors = {f"task.{name}": tensor for name, tensor in task.state_dict().items()} | buffers
            tensors |= {f"average.{name}": tensor for name, tensor in (self.average or {}).items()}
            moments, scalars = optimizer_state(optimizer)
            tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
            result = vars(self.result) | {
                "steps": step,
                "validations": [vars(found) for found in self.result.validations],
                "best": None if self.result.best is None else vars(self.result.best),
            }
            progress = {"step": step, "stale": self.stale, "result": result, "optimizer": scalars}
            record = {"progress": progress, "fingerprint": self.fingerprint, "end_weights": end_weights}
            write_checkpoint(self._checkpoint_path, tensors, record)
        return self._where()

    def _buffers_of_processes(self, task: Task) -> dict[str, Tensor]:
        """Buffers of the other processes: batch statistics of their parts of the batches, which their attacks see."""
        if self.accelerator.num_processes == 1:
            return {}
        learnt = dict(task.named_parameters(remove_duplicate=False))
        own = {name: tensor.cpu() for name, tensor in task.state_dict().items() if name not in learnt}
        return {
            f"process{rank}.{name}": tensor for rank, found in enumerate(gather(own)) if rank for name, tensor in found.items()
        }

    def _where(self) -> str:
        """Description of what a run that ends here can be resumed from."""
        if self.folder is None:
            return "; nothing was saved, as there is no output_dir."
        if not self._checkpoint_path.exists():
            return "; there is no checkpoint yet."
        return f"; run it again to continue from {self._checkpoint_path}."

    def _read_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.folder is None or not self._checkpoint_path.exists():
            return None
        return read_fitting_checkpoint(self._checkpoint_path, self.fingerprint, self.num_steps)

    def _forget(self) -> None:
        """Remove the checkpoints of an earlier run, from which nobody should resume once this one has begun."""
        if self.folder is not None and self.accelerator.is_main_process:
            for name in (CHECKPOINT, BEST):
                (self.folder / name).unlink(missing_ok=True)

    def _restore(self, task: Task, optimizer: torch.optim.Optimizer) -> int:
        if self.checkpoint is None:
            return 0
        tensors, record = self.checkpoint
        progress = record["progress"]
        device = self.accelerator.device
        task.load_state_dict(under("task.", tensors) | under(f"process{self.accelerator.process_index}.", tensors))
        if self.average is not None:
            self.average = {name: tensor.to(device) for name, tensor in under("average.", tensors).items()}
        load_optimizer_state(optimizer, under("optimizer.", tensors) | progress["optimizer"])
        self._restore_result()
        if self.result.best is not None and (self.arguments.load_best or self._single_step):
            assert self.folder is not None
            state, record = read_checkpoint(self.folder / BEST)
            if record["validation"]["step"] == self.result.best.step:  # else an attempt that was killed got further
                self.best_state = state
        return int(progress["step"])

    def _restore_result(self) -> None:
        assert self.checkpoint is not None
        progress = self.checkpoint[1]["progress"]
        result = dict(progress["result"])
        result["validations"] = [Validation(**found) for found in result["validations"]]
        result["best"] = None if result["best"] is None else Validation(**result["best"])
        self.result = Result(**result | {"device": self.result.device})
        self.stale = progress["stale"]


def _update_average(average: dict[str, Tensor], state: dict[str, Tensor], decay: float, step: int) -> None:
    """Update the exponential moving average; in the first steps with a smaller decay, so that it forgets the start."""
    decay = min(decay, (1 + step) / (10 + step))
    floats = [name for name, tensor in average.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in floats], [state[name] for name in floats], 1 - decay)
    for name in average.keys() - floats:
        average[name].copy_(state[name])


def _accelerator(arguments: TrainingArguments, folder: Path | None) -> Accelerator:
    rank_and_world()  # joins the processes, and leaves them when this one ends
    try:
        return Accelerator(
            mixed_precision="no",  # the step casts by itself: accelerate fixes one precision for a whole process
            log_with=arguments.log_with,
            project_dir=None if folder is None else str(folder),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
        )
    except ValueError as error:
        if "mixed_precision" not in str(error):
            raise
        raise ValueError(
            "expected a process without an Accelerator of another precision, as accelerate has one precision per process, got "
            f"one made before. Make it with mixed_precision='no' (training casts by itself: precision={arguments.precision!r}), "
            "or train in another process."
        ) from error


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type.upper()
    return f"CPU, {torch.get_num_threads()} threads"
