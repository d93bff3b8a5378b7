"""Weights as the bytes of a file, and their hash."""

import hashlib

from safetensors.torch import save as serialise
from torch import Tensor

from .models import Classifier


def plain_state(model: Classifier) -> dict[str, Tensor]:
    """Weights of the backbone as they are saved."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.backbone.state_dict().items()}


def weights_bytes(model: Classifier) -> bytes:
    """Content of ``model.safetensors``."""
    return serialise(plain_state(model), {"format": "pt"})  # one entry: several come in random order


def weights_sha256(model: Classifier) -> str:
    """Of ``model.safetensors``, as a report names the weights that it is about."""
    return hashlib.sha256(weights_bytes(model)).hexdigest()
