"""A classifier with the methods that the Hub's ecosystem expects of a model."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo

from .card import render_card
from .folder import save_model
from .hub import load_model
from .models import Classifier
from .publishing import publish
from .report import Report


class RobustClassifier(Classifier):
    """A :class:`Classifier` with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.

    They are :func:`load_model`, :func:`save_model` and :func:`publish` under the names, arguments and returned values that
    ``huggingface_hub.PyTorchModelHubMixin`` has made usual. Unlike there, weights that do not fit are an error.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        device: str | torch.device = "cpu",
    ) -> "RobustClassifier":
        """Load a model, as :func:`load_model` does.

        Raises:
            ModelError: If there is no such model, or it is damaged.
        """
        model = load_model(
            pretrained_model_name_or_path,
            revision=revision,
            device=device,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        pretrained = cls(
            model.backbone,
            architecture=model.architecture,
            model_args=model.model_args,
            label_names=model.label_names,
            image_policy=model.image_policy,
            lineage=model.lineage,
        )
        pretrained.stored_as = model.stored_as
        return pretrained.to(device).eval()

    def save_pretrained(self, save_directory: str | Path, *, report: Report | None = None) -> Path:
        """Write a model folder with its card.

        Args:
            save_directory: Folder to write to; created if it doesn't exist.
            report: Report on these weights.
        """
        return save_model(self, save_directory, report=report, card=render_card(self, report=report))

    def push_to_hub(
        self, repo_id: str, *, folder: str | Path | None = None, report: Report | None = None, **kwargs: Any
    ) -> CommitInfo:
        """Write a model folder and publish it.

        Args:
            repo_id: "org/name", or a name in the user's own namespace.
            folder: Folder to write, which is kept; by default the last part of ``repo_id``.
            report: Report on these weights.
            kwargs: Arguments of :func:`publish`.

        Raises:
            PublishError: If it could not be published; the folder is kept.
        """
        target = self.save_pretrained(folder or Path(repo_id.rpartition("/")[2]), report=report)
        return publish(target, repo_id, **kwargs)
