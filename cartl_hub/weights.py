"""Weights as the bytes of a file, and their hash."""

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from .models import Classifier


def plain_state(model: Classifier) -> dict[str, Tensor]:
    """Weights of the backbone as they are saved: in the dtype of ``stored_as`` if it holds them exactly, as it no longer does
    once they were trained."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.backbone.state_dict().items()}
    stored = {name: tensor.to(model.stored_as) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return stored if all(torch.equal(stored[name].to(tensor.dtype), tensor) for name, tensor in state.items()) else state


def round_weights(model: Classifier, dtype: torch.dtype) -> None:
    """Round the weights to those that a file of another dtype can hold, and store them so; the model computes as before.

    Measurements made afterwards then apply to the weights in the file.

    Args:
        model: Model whose weights are rounded in place.
        dtype: Dtype of the file, e.g. ``torch.float16``.

    Raises:
        ValueError: If a weight is too large for the dtype; the weights are unchanged then.
    """
    rounded = {name: tensor.to(dtype) for name, tensor in model.backbone.state_dict().items() if tensor.is_floating_point()}
    if large := [name for name, tensor in rounded.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"expected weights that {dtype} can hold, got larger ones in {', '.join(large[:3])}; store float32.")
    model.backbone.load_state_dict(rounded, strict=False)
    model.stored_as = dtype


def stored_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """Dtype of the weights in a file; float32 if they have several dtypes."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def weights_bytes(model: Classifier) -> bytes:
    """Content of ``model.safetensors``."""
    return serialise(plain_state(model), {"format": "pt"})  # one entry: several come in random order


def weights_sha256(model: Classifier) -> str:
    """Hash of ``model.safetensors``, by which a report names the weights that it is about."""
    return hashlib.sha256(weights_bytes(model)).hexdigest()


def content_hash(tensors: Mapping[str, Tensor], record: str = "") -> str:
    """Hash of names, types, shapes and values, and of a record that goes with them, regardless of order, device and layout."""
    digest = hashlib.sha256(record.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
