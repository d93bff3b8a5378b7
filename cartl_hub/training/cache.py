"""Input of the trained blocks, computed once: behind frozen blocks it is a function of the image alone."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from tqdm.auto import tqdm

from ..batchnorm import BatchNormPolicy, batch_norms
from ..blocks import last_blocks, list_blocks
from ..data import Data, ImageData
from ..files import remove_stale
from ..methods import Method
from ..models import Classifier
from ..modules import eval_mode, hooked
from ..randomness import kept_generators
from ..weights import content_hash
from .arguments import FeatureCache
from .checkpoint import TrainingError

logger = logging.getLogger(__name__)

NOT_CACHED = "Train with cache=None."
_DIGEST = hashlib.sha256().digest_size  # bytes, behind the features in their file
TOLERANCE = 1e-3  # of the features' spread: other kernels for another batch, not another function


def check_cache(model: Classifier, method: Method, bn: BatchNormPolicy, data: Data, num_processes: int) -> None:
    """Refuse settings that make the features depend on more than the image.

    Raises:
        ValueError: If they do; the message says what was expected.
    """
    if not method.natural or method.trained_blocks is None:
        raise ValueError(
            "expected a method that passes natural images through frozen blocks, as the cache holds what these give "
            f"(FineTuning or NEFT with num_blocks), got {method!r}. {NOT_CACHED}"
        )
    if not isinstance(data, ImageData):
        raise ValueError(
            f"expected a data set of known size for the cache, got a stream. Load it without streaming, or: {NOT_CACHED}"
        )
    if num_processes > 1:
        raise ValueError(f"expected one process with the cache, which is held by one, got {num_processes}. {NOT_CACHED}")
    frozen = list_blocks(model)[: -len(last_blocks(model, method.trained_blocks))]
    if bn.extractor_statistics == "target" and batch_norms(layer for block in frozen for layer in block.layers()):
        raise ValueError(
            "expected extractor_statistics='source' with the cache, got 'target', with which features depend on the other images "
            f"of the batch. {NOT_CACHED}"
        )


@dataclass(frozen=True, eq=False)
class _Known:
    """A frozen module whose output is known: while the rest of the model runs, it returns that output.

    Args:
        name: Name in the backbone.
        module: The module.
        shape: Shape of its output for one image.
        order: Order of the output's dimensions in memory, from 1.
        dtype: Dtype of its output.
        used: Whether anything behind the prefix uses the output; else a placeholder without memory is returned.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    used: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape) if self.used else 0

    def pack(self, output: Tensor) -> Tensor:
        """Pack outputs into rows, [B, *shape] -> [B, size], in memory order."""
        return output.detach().permute(0, *self.order).reshape(len(output), -1)

    def unpack(self, rows: Tensor) -> Tensor:
        """Unpack rows into outputs, [B, size] -> [B, *shape], with their original strides."""
        if not self.used:
            return torch.zeros((), dtype=self.dtype, device=rows.device).expand(len(rows), *self.shape)
        lying = rows.contiguous().view(len(rows), *(self.shape[dim - 1] for dim in self.order))
        return lying.permute(0, *(1 + self.order.index(dim) for dim in range(1, len(self.order) + 1))).to(self.dtype)


class _Reached(Exception):
    """The first trained module is about to run."""


class FrozenPrefix:
    """The frozen modules of a model that run before its first trained one, as a function from images to rows of numbers.

    A row holds what the rest of the model takes from the prefix for one image: the outputs of the largest frozen modules that
    are used behind it, mostly one, several for a DenseNet or a cut inside a residual sum. What an architecture computes
    between these modules is left to its own ``forward``, so that none needs code here. Call it under the run's precision.

    Args:
        model: The model as it is trained.
        num_blocks: Number of trained blocks, counted from the classifier.
        images: A few images, [B, C, H, W] in [0, 1], B > 1, in the memory format of the training.

    Raises:
        ValueError: If something random or trained enters the prefix, or there is none.
    """

    def __init__(self, model: Classifier, num_blocks: int, images: Tensor):
        self.model = model
        blocks = last_blocks(model, num_blocks)
        self._trained = {layer for block in blocks for layer in block.layers()}
        self._image_shape = images.shape[1:]
        outputs = self._outputs_before(images)
        names = {module: name for name, module in model.backbone.named_modules()}
        found = {
            module: _Known(names[module], module, tuple(output.shape[1:]), _order(output), output.dtype, used=True)
            for module, output in outputs.items()
        }
        leaves = [output.detach().clone().requires_grad_() for output in outputs.values()]
        with eval_mode(model), torch.enable_grad(), _returning(found, [leaf.clone() for leaf in leaves]):
            logits = model(images)
        gradients = torch.autograd.grad(logits.float().sum(), leaves, allow_unused=True)
        self.known = [
            _Known(known.name, known.module, known.shape, known.order, known.dtype, gradient is not None)
            for known, gradient in zip(found.values(), gradients, strict=True)
        ]
        self.size = sum(known.size for known in self.known)

    def _outputs_before(self, images: Tensor) -> dict[nn.Module, Tensor]:
        """Outputs of the largest modules that have run before the first trained one, in this order."""
        finished: list[tuple[nn.Module, Any]] = []
        calls: Counter[nn.Module] = Counter()
        reached = False

        def begin(module: nn.Module, args: Any) -> None:
            nonlocal reached
            calls[module] += 1
            reached = reached or module in self._trained

        def end(module: nn.Module, args: Any, output: Any) -> None:
            if not reached:
                finished.append((module, output))

        modules = list(self.model.backbone.modules())
        handles = [module.register_forward_pre_hook(begin) for module in modules]
        handles += [module.register_forward_hook(end) for module in modules]
        with hooked(handles), eval_mode(self.model), torch.enable_grad():
            self.model(images)
        names = {module: name for name, module in self.model.backbone.named_modules()}
        outputs: dict[nn.Module, Tensor] = {}
        drawn: nn.Module | None = None
        for module, output in finished:
            if _is_random(module):
                drawn = module
            elif (
                isinstance(output, Tensor)
                and output.is_floating_point()
                and output.ndim
                and len(output) == len(images)
                and calls[module] == 1
            ):
                if drawn is not None:
                    raise ValueError(
                        "expected frozen blocks that give the same for an image each time, for the cache of what they give, got "
                        f"{names[drawn]} ({drawn}), which is random in training. Make the model without it, or: {NOT_CACHED}"
                    )
                if output.requires_grad:
                    raise ValueError(
                        "expected frozen blocks that take nothing from the trained ones, for the cache of what they give, got "
                        f"{names[module]}, which does. {NOT_CACHED}"
                    )
                outputs[module] = output
        inside = {inner for module in outputs for inner in module.modules() if inner is not module}
        outputs = {module: output for module, output in outputs.items() if module not in inside}
        if not reached or not outputs:
            raise ValueError(
                f"expected frozen modules before the first trained one of this {self.model.architecture}, for the cache of what "
                f"they give, got none. {NOT_CACHED}"
            )
        return outputs

    def __call__(self, images: Tensor) -> Tensor:
        """Rows of images, [B, C, H, W] in [0, 1] -> [B, size]; nothing behind the prefix runs."""
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[module] = output

        def stop(module: nn.Module, args: Any) -> None:
            raise _Reached

        used = [known for known in self.known if known.used]
        handles = [known.module.register_forward_hook(keep) for known in used]
        handles += [module.register_forward_pre_hook(stop) for module in self._trained]
        # not under no_grad: frozen parameters make no graph, and training would run the same kernels
        with hooked(handles), suppress(_Reached):
            self.model(images)
        return torch.cat([known.pack(outputs[known.module]) for known in used], 1)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Skip the prefix: inside the block ``model(rows)`` gives the logits, and runs only what is behind the prefix."""

        def forward(rows: Tensor) -> Tensor:
            if rows.ndim != 2 or rows.shape[1] != self.size or rows.requires_grad:
                raise ValueError(
                    f"expected the cached rows [B, {self.size}] as they are, got {list(rows.shape)}"
                    f"{', of which a gradient is taken' if rows.requires_grad else ''}; a method that does more with its images "
                    f"can't be natural. {NOT_CACHED}"
                )
            parts = rows.split([known.size for known in self.known], 1)
            outputs = [known.unpack(part) for known, part in zip(self.known, parts, strict=True)]
            image = torch.zeros((), device=rows.device).expand(len(rows), *self._image_shape)
            with _returning([known.module for known in self.known], outputs):
                return self.model.backbone(image)

        with _forward(self.model, forward):
            yield

    def check(self, images: Tensor) -> Tensor:
        """The rows of these images; refuses a prefix that isn't deterministic, or that with the rest isn't the model.

        Raises:
            ValueError: If it is refused; the message says what differs.
        """
        self.model.train()
        half = max(1, len(images) // 2)
        neighbours = torch.arange(len(images), device=images.device) % half  # other ones, in a batch of the same size
        with kept_generators(images.device):
            rows = self(images)
            again = self(images[neighbours])
        if not _close(rows[:half], again[:half]):
            raise ValueError(
                "expected frozen blocks that give the same for an image each time and in each batch, for the cache of what they "
                f"give, got a difference of up to {_difference(rows[:half], again[:half]):.2g}. {NOT_CACHED}"
            )
        with eval_mode(self.model), torch.no_grad():
            whole = self.model(images)
            try:
                with self.skipped():
                    rest = self.model(rows)
            except RuntimeError as error:  # e.g. an operation in place on a stand-in
                raise ValueError(
                    f"expected a {self.model.architecture} that runs from what its frozen blocks give, got an error ({error}). "
                    f"{NOT_CACHED}"
                ) from error
        # on a GPU two passes may take different kernels
        if not (torch.equal(whole, rest) or (whole.device.type != "cpu" and _close(whole, rest))):
            raise ValueError(
                f"expected a {self.model.architecture} to give the same logits from what its frozen blocks give, got a "
                f"difference of up to {_difference(whole, rest):.2g}. {NOT_CACHED}"
            )
        return rows

    def fingerprint(self, record: Mapping[str, Any]) -> str:
        """Hash of the frozen weights, of what is kept of them, and of ``record``."""
        own = [
            id(tensor)
            for layer in self._trained
            for tensor in chain(layer.parameters(recurse=False), layer.buffers(recurse=False))
        ]
        tensors = {
            name: tensor
            for name, tensor in chain(self.model.named_parameters(), self.model.named_buffers())
            if id(tensor) not in own
        }
        kept = [(known.name, known.shape, known.order, str(known.dtype)) for known in self.known if known.used]
        return content_hash(
            tensors, json.dumps([kept, self.model.architecture, self.model.model_args, record], sort_keys=True, default=str)
        )


class CachedFeatures:
    """Rows of a :class:`FrozenPrefix` for each view of each image.

    Args:
        rows: Rows, [views, N, size], on the CPU, in memory or mapped from a file.
        device: Device of the training.
    """

    def __init__(self, rows: Tensor, device: torch.device):
        self.rows, self.device = rows, device

    def __call__(self, indices: Tensor, epoch: int) -> Tensor:
        """Rows of the view of this epoch, [B] -> [B, size]."""
        return self.rows[epoch % len(self.rows)].index_select(0, indices.to("cpu")).to(self.device)

    def check(self, rows: Tensor, indices: Tensor, epoch: int) -> None:
        """Refuse features that aren't those of the images.

        Raises:
            TrainingError: If they aren't; the message gives the remedy.
        """
        kept = self(indices, epoch)
        if not (torch.equal(kept, rows.to(kept.dtype)) or _close(kept, rows)):
            raise TrainingError(
                "expected the cached features to be those of the images, got a difference of up to "
                f"{_difference(kept, rows):.2g}. Remove the file from the folder of the cache, or train with cache=None."
            )


def cached_features(
    choice: FeatureCache,
    prefix: FrozenPrefix,
    data: ImageData,
    see: Callable[[Tensor, Tensor, int], Tensor],
    *,
    batch_size: int,
    record: Mapping[str, Any],
    device: torch.device,
    progress: bool = True,
) -> CachedFeatures:
    """Compute the features of all images, or map those that are already in the folder.

    Args:
        choice: The user's choice of cache.
        prefix: Prefix of the model in the state in which it is trained.
        data: Training images.
        see: Function from images as stored in the data, their indices and a view, to the model's input.
        batch_size: Batch size of training: kernels, and so the last bits, may depend on it.
        record: Everything but the weights that the features depend on.
        device: Device of the training.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If they don't fit into memory or on the disk; nothing was computed then.
    """
    views = choice.views or 1
    dtype = torch.bfloat16 if choice.dtype == "bf16" else torch.float32
    shape = (views, len(data), prefix.size)
    needed = math.prod(shape) * dtype.itemsize

    def compute(rows: Tensor) -> None:
        with tqdm(total=views * len(data), disable=not progress, unit="view", desc="features", dynamic_ncols=True) as bar:
            for drawn in data.batches(batch_size):
                number, images, indices = len(drawn.indices), drawn.images, drawn.indices
                if number < batch_size:
                    first = torch.arange(batch_size - number)
                    images = torch.cat([images, data.get(first).to(images.device)])
                    indices = torch.cat([indices, first])
                for view in range(views):
                    rows[view, drawn.indices] = prefix(see(images, indices, view))[:number].to(rows.device, rows.dtype)
                    bar.update(number)

    prefix.model.train()
    if choice.folder is None:
        _check_room(needed, psutil.virtual_memory().available, shape, "memory", "a folder on a disk with more, ")
        rows = torch.empty(shape, dtype=dtype)
        compute(rows)
        return CachedFeatures(rows, device)
    folder = Path(choice.folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {**record, "shape": shape, "dtype": choice.dtype, "data": data.fingerprint(), "torch": torch.__version__}
    path = folder / f"features-{prefix.fingerprint(record)}.bin"
    # of images that are decoded when they are drawn only the labels are known
    if not (data.in_memory and _is_whole(path, needed)):
        remove_stale([path])
        _check_room(needed, shutil.disk_usage(folder).free, shape, f"space in {folder}", "another folder, ")
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # a mapped file that meets a full disk ends the process
                    os.posix_fallocate(file.fileno(), 0, needed + _DIGEST)
                else:
                    file.truncate(needed + _DIGEST)
            mapped = np.memmap(partial, np.uint8, "r+")
            compute(torch.from_numpy(mapped[:needed]).view(dtype).view(shape))
            mapped[needed:] = np.frombuffer(_digest(mapped[:needed]), np.uint8)
            mapped.flush()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return CachedFeatures(torch.from_numpy(np.memmap(path, np.uint8, "c")[:needed]).view(dtype).view(shape), device)


def _digest(content: np.ndarray) -> bytes:
    return hashlib.sha256(content.data).digest()


def _is_whole(path: Path, needed: int) -> bool:
    """Whether the features in a file are intact: their hash follows them."""
    if not path.exists():
        return False
    if path.stat().st_size == needed + _DIGEST:
        content = np.memmap(path, np.uint8, "r")
        if _digest(content[:needed]) == content[needed:].tobytes():
            return True
    logger.warning("the features in %s are damaged; they are computed again", path)
    return False


def _check_room(needed: int, free: int, shape: tuple[int, ...], where: str, other: str) -> None:
    if needed > free:
        views, number, size = shape
        raise ValueError(
            f"expected {needed / 1e9:.3g} GB of {where} for the cache ({number} images in {views} views, {size} numbers each), "
            f"got {free / 1e9:.3g} GB. Use fewer views, {other}dtype='bf16', or cache=None."
        )


def _is_random(module: nn.Module) -> bool:
    names = {_DropoutNd: "p", DropPath: "drop_prob", DropBlock2d: "drop_prob", PatchDropout: "prob"}
    return any(isinstance(module, kind) and bool(getattr(module, name)) for kind, name in names.items())


def _order(output: Tensor) -> tuple[int, ...]:
    """Dimensions from 1, the one with the largest stride first."""
    return tuple(sorted(range(1, output.ndim), key=lambda dim: -output.stride()[dim]))


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether numbers are equal up to rounding."""
    relative = torch.finfo(torch.bfloat16).eps if torch.bfloat16 in (a.dtype, b.dtype) else 0.0
    b = b.float()
    return bool(((a.float() - b).abs() <= relative * b.abs() + TOLERANCE * b.std(correction=0)).all())


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Call ``forward`` in place of the module's own."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


@contextmanager
def _returning(modules: Sequence[nn.Module] | Mapping[nn.Module, Any], outputs: Sequence[Tensor]) -> Iterator[None]:
    """Each module returns its output and does nothing."""
    with ExitStack() as stack:
        for module, output in zip(modules, outputs, strict=True):
            stack.enter_context(_forward(module, lambda *args, known=output, **kwargs: known))
        yield
