"""Accuracy on validation images, which chooses the best weights."""

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from ..attacks import Attack
from ..data import ImageData
from ..models import Classifier
from ..randomness import image_keys
from ..sampling import stratified_sample


class Validator:
    """Accuracies of a plain model on the same images each time: all, or a sample with each class in proportion.

    Args:
        data: Validation images.
        num_images: Largest number of images.
        batch_size: Number of images per batch in one process.
        see: Function from uint8 images as stored in the data to floats on the device.
        accelerator: Accelerator of the run; each process takes its part.
    """

    def __init__(
        self, data: ImageData, num_images: int, batch_size: int, see: Callable[[Tensor], Tensor], accelerator: Accelerator
    ):
        self.data, self.batch_size, self.see, self.accelerator = data, batch_size, see, accelerator
        self.indices = stratified_sample(data.labels, num_images, seed=0)

    def accuracies(self, model: Classifier, attacks: Mapping[str, Attack]) -> dict[str, float]:
        """Accuracies of ``model``, which is put into eval mode: "clean", and under each attack; over all processes."""
        model.eval()
        correct = dict.fromkeys(["clean", *attacks], 0)
        for indices in self.indices[self.accelerator.process_index :: self.accelerator.num_processes].split(self.batch_size):
            images = self.see(self.data.get(indices))
            labels = self.data.labels[indices].to(images.device)
            keys = image_keys(0, 0, indices.to(images.device))
            for name in correct:
                inputs = images if name == "clean" else attacks[name](model, images, labels, keys, until_broken=True)
                with torch.inference_mode():
                    correct[name] += int((model(inputs).argmax(1) == labels).sum())
        counts = torch.tensor(list(correct.values()), device=self.accelerator.device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        return {name: count / len(self.indices) for name, count in zip(correct, counts.tolist(), strict=True)}
