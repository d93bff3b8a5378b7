"""The few-line facade over the parts."""

import copy
import difflib
import logging
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import timm
import torch
from huggingface_hub import CommitInfo
from torch import nn

from .batchnorm import BatchNormPolicy, batch_norms, is_new
from .blocks import last_blocks, list_blocks
from .card import render_card
from .evaluation import EvaluationOptions, default_attacks, default_curve, evaluate
from .folder import ModelError, check_rebuilt, check_target, check_weights, read_report, read_untrained, save_model
from .hub import bundled_models, find_model, open_folder, untrained_recipes
from .lineage import lineage
from .loading import AnyData, DataArguments, Splits, load_splits
from .methods import NEFT, Method
from .models import Classifier, create_model
from .processes import is_main_process
from .publishing import PublishError, check_publishable, publish
from .report import Report
from .training import Result, TrainingArguments, train
from .weights import weights_sha256

logger = logging.getLogger(__name__)


class RobustFineTuner:
    """Fine-tune a source on a data set so that its robustness survives, measure it, save it.

    Source, data, labels, method and folder are checked here, before any long work.

    Args:
        source: Id of a bundled model, Hub id "org/name", local model folder, name of a timm model (with timm's pretrained
            weights), or a model.
        data: ``datasets`` object, Hub id, folder of images or of parquet files; or the result of :func:`cartl_hub.load_splits`
            with this source's image policy.
        method: Fine-tuning method; NEFT of the last 4 blocks by default.
        bn: Batch-norm policy.
        arguments: Training arguments.
        data_arguments: Arguments for reading the data.
        output_dir: Folder for checkpoints, logs and the model; by default ``runs/`` and the model's name.
        name: Name of the new model; by default architecture, method and data.
        license: License of the new weights, for card and config, e.g. "mit"; by default none is stated, as it depends on the
            licenses of the source and of your data.
        revision: Commit, branch or tag of a source on the Hub.
        push_to_hub: Publish the model whenever :meth:`save` writes it. Token, rights and card are checked here.
        hub_model_id: "org/name" to publish as; by default the model's name, in the user's own namespace.
        hub_token: Token of the Hub; by default the stored one.
        hub_private_repo: Whether a new repository is private; by default what the organisation has set. An existing one must
            already have this visibility.

    Raises:
        ModelError: If the source can't be loaded.
        PublishError: With ``push_to_hub``, if the model could not be published.
        DataError: If the data can't be used.
        ValueError: If method, policy or arguments don't fit the model or the data.
    """

    def __init__(
        self,
        source: "str | Path | Classifier | nn.Module | Source",
        data: AnyData | Splits,
        *,
        method: Method | None = None,
        bn: BatchNormPolicy | None = None,
        arguments: TrainingArguments | None = None,
        data_arguments: DataArguments | None = None,
        output_dir: str | Path | None = None,
        name: str | None = None,
        license: str | None = None,
        revision: str | None = None,
        push_to_hub: bool = False,
        hub_model_id: str | None = None,
        hub_token: str | None = None,
        hub_private_repo: bool | None = None,
    ):
        self.method = method or NEFT(num_blocks=4, beta=0.4)
        self.bn, self.arguments = bn or BatchNormPolicy(), arguments or TrainingArguments()
        kinds = {"method": Method, "bn": BatchNormPolicy, "arguments": TrainingArguments}
        for option, kind in kinds.items():
            value = getattr(self, option)
            if not isinstance(value, kind):
                raise ValueError(f"expected {kind.__name__}(...) as {option}, got {value!r:.200}.")
        opened = open_source(source, revision)
        self.model, self.source, self._source_report = opened.model, opened.origin, opened.report
        check_weights(self.model)  # they would be trained for hours and then not be saved
        if not self.method.uses_labels:
            raise ValueError(
                f"expected a method that learns from labels, got {type(self.method).__name__}; pretrain a source with it "
                "(cartl-hub pretrain), then fine-tune that."
            )
        self._note_random_blocks()
        self.splits = self._splits(data, data_arguments)
        self.arguments.num_steps(self.splits.train)
        self._same_task = self.model.label_names == self.splits.label_names
        if not self._same_task:
            self.model.reset_head(self.splits.label_names, seed=self.arguments.seed)
        self.method.adapt(self.model)
        check_rebuilt(self.model)
        self.model.stored_as = torch.float32  # a source of half precision makes none of a model that is trained from it
        data_id = re.sub(r"[^\w.-]+", "_", str(self.splits.train.description.get("id", "data")).rsplit("/", 1)[-1])
        self.name = name or f"{self.model.architecture}.{self.method.tag}_{data_id}"
        if not re.fullmatch(r"[\w][\w.-]*", self.name):
            raise ValueError(f"expected a name of letters, digits, '.', '_' and '-', got {self.name!r}.")
        self.output_dir = Path(output_dir) if output_dir is not None else Path("runs") / self.name
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"expected a folder for output_dir, got the file {self.output_dir}.")
        check_target(self.output_dir / "model")
        self._start = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        self.result: Result | None = None
        self.report: Report | None = None
        of_source = self.model.lineage.get("license") or self.model.backbone.pretrained_cfg.get("license")
        self.source, self._license = self.source | ({"license": of_source} if of_source else {}), license
        self.model.lineage = self._lineage(None)
        self.commit: CommitInfo | None = None  # of the last time that it was published
        self.hub_model_id, self._hub_token, self._push = hub_model_id, hub_token, push_to_hub
        self._private = hub_private_repo
        if push_to_hub:
            self.hub_model_id = check_publishable(
                hub_model_id or self.name, render_card(self.model), private=hub_private_repo, token=hub_token
            )

    def _note_random_blocks(self) -> None:
        """Warn of frozen blocks that were never trained: their batch norm has the statistics of a new network."""
        trained = last_blocks(self.model, self.method.trained_blocks)
        frozen = batch_norms(layer for block in list_blocks(self.model)[: -len(trained)] for layer in block.layers())
        if frozen and all(map(is_new, frozen)) and is_main_process():
            logger.warning(
                "the blocks of this %s that stay frozen look untrained: batch norm there has the statistics of a new network. "
                "Pass a model with weights, or train the whole network.",
                self.model.architecture,
            )

    def _splits(self, data: AnyData | Splits, arguments: DataArguments | None) -> Splits:
        policy = self.model.image_policy
        if not isinstance(data, Splits):
            return load_splits(data, policy, arguments)
        if arguments is not None:
            raise ValueError("expected data_arguments for data that are to be read, got them with splits; pass one of the two.")
        if data.train.policy != policy:
            raise ValueError(f"expected splits of images read by {policy}, as the source sees them, got {data.train.policy}.")
        return data

    @property
    def notes(self) -> list[str]:
        """Decisions made for the user about data and classifier."""
        head = (
            "the source's classifier is kept: its classes are those of the data"
            if self._same_task
            else (f"a new classifier for {len(self.splits.label_names)} classes, drawn from seed {self.arguments.seed}")
        )
        return [*self.splits.notes, head]

    def train(self, *, resume: bool = True) -> Result:
        """Train; the last weights, or the best by validation with ``load_best``, are then in ``self.model``.

        Checkpoints go into ``output_dir``. Called again with the same arguments, source and data, it resumes where it was
        interrupted, or returns at once if it had finished; the weights are those of a run that was not interrupted.

        Args:
            resume: Continue an interrupted run. If False, start over from the source: checkpoints in ``output_dir`` are removed.

        Raises:
            ValueError: If ``output_dir`` holds a run with other arguments, and with ``resume``.
            TrainingError: If the loss becomes NaN or infinite; the last good checkpoint is kept.
        """
        self.report = None  # it was one of other weights
        model = self.model
        if not resume:
            model = copy.deepcopy(model)  # what is trained already stays until this run has ended
            model.load_state_dict(self._start)
        result = train(
            model,
            self.method,
            self.splits.train,
            validation=self.splits.validation,
            bn=self.bn,
            arguments=self.arguments,
            output_dir=self.output_dir,
            resume=resume,
        )
        if model is not self.model:
            self.model.to(model.mean.device).eval().load_state_dict(model.state_dict())
        self.result = result
        self.model.lineage = self._lineage(self.result)
        return self.result

    def evaluate(self, **options: Unpack[EvaluationOptions]) -> Report:
        """Measure clean and robust accuracy on the test split, as :func:`cartl_hub.evaluate` does.

        The default attacks are in the ball of the method's training attack, if it has one.

        Args:
            options: Options of :func:`cartl_hub.evaluate`: ``strength``, ``num_images``, ``attacks``, ``checks``, ``budget``, ...
        """
        context: dict[str, Any] = {
            "id": self.name,
            "notes": [*self.splits.notes, *([] if self.result else ["the model is not trained yet"])],
            "source": self.source,
        }
        options["context"] = context | dict(options.get("context") or {})
        trained = getattr(self.method, "attack", None)
        if trained is not None and options.get("attacks") is None:
            strength = options.pop("strength", None) or "standard"
            options["attacks"] = default_attacks(trained.eps, norm=trained.norm, strength=strength)
            if options.get("curve", "auto") == "auto":
                options["curve"] = default_curve(strength)
        self.report = evaluate(
            self.model.eval(),
            self.splits.test,
            source_report=self._source_report,
            **options,
        )
        return self.report

    def save(self, folder: str | Path | None = None) -> Path:
        """Write a publishable model folder: weights, config, card, and the report if there is one.

        With ``push_to_hub`` it is published too.

        Args:
            folder: Folder to write; by default ``model`` in ``output_dir``.

        Raises:
            PublishError: If it could not be published; the model is in the folder then.
        """
        target = self._save(folder)
        if self._push and is_main_process():
            self.commit = publish(target, str(self.hub_model_id), private=self._private, token=self._hub_token)
        return target

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> CommitInfo | None:
        """Publish the model folder in one commit; it stays in ``output_dir`` whatever happens.

        Of several processes the first one publishes; the others get None.

        Args:
            repo_id: "org/name", created if it doesn't exist; by default the ``hub_model_id`` of the fine-tuner.
            private: Whether a new repository is private; by default the ``hub_private_repo`` of the fine-tuner.
            revision: Branch to push to; created if it doesn't exist.
            create_pr: Open a pull request instead.
            commit_message: Message of the commit; "Upload" and the name by default.
            token: Token of the Hub; by default the stored one.

        Raises:
            PublishError: If it could not be published; the message holds the command that tries again.
        """
        repo_id = repo_id or self.hub_model_id
        if repo_id is None:
            raise PublishError("expected a Hub id 'org/name' to publish as, got none; pass repo_id.")
        if not is_main_process():
            return None
        self.commit = publish(
            self._save(),
            repo_id,
            private=self._private if private is None else private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {self.name}",
            token=self._hub_token if token is None else token,
        )
        return self.commit

    def _save(self, folder: str | Path | None = None) -> Path:
        target = Path(folder) if folder is not None else self.output_dir / "model"
        return save_model(self.model, target, report=self.report, card=render_card(self.model, report=self.report))

    def _lineage(self, result: Result | None) -> dict[str, Any]:
        record = lineage(
            method=self.method,
            bn=self.bn,
            arguments=self.arguments,
            result=result,
            data=self.splits.train.description,
            source=self.source,
            notes=self.notes,
        )
        return record | {"name": self.name, "tag": self.name.partition(".")[2], "license": self._license}


@dataclass(frozen=True)
class Source:
    """An opened source.

    Args:
        model: Copy of the model, to be trained.
        origin: Origin of the model, as a lineage records it.
        report: Report on these weights, if there is one.
    """

    model: Classifier
    origin: dict[str, Any]
    report: Report | None = None


def open_source(source: str | Path | nn.Module | Source, revision: str | None = None) -> Source:
    """Open a source model of any kind; one that is already open is returned.

    Raises:
        ModelError: If there is no such model, or its weights can't be obtained.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, nn.Module):
        if revision is not None:
            raise ModelError(f"expected no revision for a model that is given, got {revision!r}; load it with that revision.")
        own = copy.deepcopy(source).float()
        model = own if isinstance(own, Classifier) else Classifier(own)
        return Source(model, _origin_of(model))
    try:
        folder, origin = find_model(source, revision)
    except ModelError as error:
        name = str(source)
        if name in untrained_recipes() or not timm.is_model(name):
            raise ModelError(f"{error}{_similar(name)}") from error
        if revision is not None:
            raise ModelError(f"expected no revision for {name!r}, which is one of timm's models, got {revision!r}.") from error
        return _open_timm(name)
    model = open_folder(folder, origin)
    return Source(model, origin, _report_of(folder, model))


def _origin_of(model: Classifier) -> dict[str, Any]:
    """Origin of a given model: where it was loaded from, unless it was trained since."""
    loaded = model.lineage.get("loaded_from")
    if loaded is None:
        return {"id": model.lineage.get("name") or model.architecture, "weights": "given"}
    return loaded if loaded.get("weights_sha256") == weights_sha256(model) else {"id": model.architecture, "weights": "given"}


def _report_of(folder: Path, model: Classifier) -> Report | None:
    """The report in a model's folder, unless it is damaged or belongs to other weights."""
    try:
        report = read_report(folder)
    except ValueError as error:
        logger.warning("the source's report is left out: %s", error)
        return None
    return report if report is not None and report.is_of(weights_sha256(model)) else None


def _open_timm(name: str) -> Source:
    architecture = name.partition(".")[0]
    if not timm.is_model_pretrained(name):
        tags = [bundled for bundled in bundled_models() if bundled.partition(".")[0] == architecture]
        raise ModelError(
            f"expected a source with weights, got {name!r}, which is neither a bundled model nor one of timm's with weights."
            + _close(name, [*tags, *timm.list_pretrained(f"{architecture}.*")], cutoff=0.4)
            + f" An untrained network is cartl_hub.create_model({architecture!r})."
        )
    try:
        model = create_model(name, pretrained=True)
    except Exception as error:  # what the Hub client raises without a network
        raise ModelError(
            f"timm's pretrained weights of {name!r} can't be obtained: {str(error).rstrip('.')}. Without a network "
            f"pass a folder, or a model of your own weights: cartl_hub.create_model({name!r}, checkpoint_path=...)."
        ) from error
    hub_id = model.backbone.pretrained_cfg.get("hf_hub_id")
    return Source(model, {"id": f"timm/{name}", "hub_id": hub_id, "timm": timm.__version__})


def open_untrained(name: str) -> Classifier:
    """A model of any name for a look at its structure: weights of a timm model are not fetched."""
    try:
        folder, _ = find_model(name)
    except ModelError as error:
        if name not in untrained_recipes() and timm.is_model(name):
            with suppress(RuntimeError):  # timm's, of a tag that the architecture lacks
                return create_model(name)
        raise ModelError(f"{error}{_similar(name)}") from error
    return read_untrained(folder)


def _similar(name: str) -> str:
    """Suggestion for a name that is neither ours nor timm's."""
    if "/" in name or name in untrained_recipes():
        return ""
    return " It is no name of a timm model either." + _close(name, [*bundled_models(), *timm.list_models()])


def _close(name: str, names: list[str], cutoff: float = 0.6) -> str:
    """Names like this one, in words; nothing if there are none."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=cutoff)
    return f" Similar names: {', '.join(close)}." if close else ""
