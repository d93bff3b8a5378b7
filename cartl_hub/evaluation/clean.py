"""Accuracy without an attack."""

import numpy as np
import torch
from torch import nn

from ..data import Data
from .verdict import check_model, classify, measuring


def classified_correctly(model: nn.Module, data: Data, *, batch_size: int = 128) -> np.ndarray:
    """Whether each image is classified correctly, in fp32 and on the model's device: bool [N].

    Raises:
        ValueError: If the model is in train mode or not in fp32, or its logits have another shape or aren't finite.
    """
    check_model(model)
    correct = []
    with measuring(model, None) as (device, _):
        for images, labels, indices, _ in data.batches(batch_size):
            predicted = classify(model, images.to(device).float() / 255, indices, len(data.label_names), "clean images")
            correct.append(predicted.cpu() == labels.cpu())
    return torch.cat(correct).numpy()
