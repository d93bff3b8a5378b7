"""Content of an explanation, as data, and as JSON, which ``explanation.schema.json`` describes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

MOST = 100  # influential images up to which classes are compared
RESAMPLES = 2000  # of the bootstrap
SCHEMA = "urn:cartl-hub:schema:explanation:1"  # the "$id" of explanation.schema.json


@dataclass(frozen=True)
class Match:
    """Share of the k most influential training images that are of the query's class, for k = 1, 2, ...: mean over queries, with
    the 95% interval of a bootstrap over them, in [0, 1].

    Args:
        shares: Share for each k.
        low: Lower ends of the intervals.
        high: Upper ends of the intervals.
        chance: Expected share of training images drawn at random.
        num_images: Number of queries.
    """

    shares: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    chance: float
    num_images: int

    @classmethod
    def of(
        cls, influences: np.ndarray, labels: np.ndarray, train_labels: np.ndarray, own: np.ndarray | None = None, seed: int = 0
    ) -> "Match":
        """Compute the match from influences.

        Args:
            influences: Influence of each training image on each query, [M, N].
            labels: Classes of the queries, [M].
            train_labels: Classes of the training images, [N].
            own: Position of each query among the training images, [M]: an image isn't one of its own influential images.
            seed: Seed of the bootstrap.
        """
        same = train_labels[None] == labels[:, None]
        candidates = np.full(len(labels), len(train_labels))
        if own is not None:
            rows = np.arange(len(labels))
            influences, same, candidates = influences.copy(), same.copy(), candidates - 1
            influences[rows, own], same[rows, own] = -np.inf, False
        most = min(MOST, int(candidates[0]))
        hits = np.take_along_axis(same, ranked(influences, most), 1)
        shares = hits.cumsum(1) / np.arange(1, most + 1)
        drawn = np.random.default_rng(seed).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), RESAMPLES)
        low, high = np.quantile(drawn @ shares / len(labels), [0.025, 0.975], axis=0)
        if len(labels) == 1:  # of which nothing can be said about others
            low, high = np.zeros(most), np.ones(most)
        chance = float((same.sum(1) / candidates).mean())
        return cls(tuple(shares.mean(0).tolist()), tuple(low.tolist()), tuple(high.tolist()), chance, len(labels))


def ranked(influences: np.ndarray, most: int) -> np.ndarray:
    """Positions of the most influential training images, the highest influence first; ties go to the first.

    Shape:
        [M, N] -> [M, most].
    """
    return np.argsort(-influences, axis=1, kind="stable")[:, :most]


@dataclass(frozen=True, eq=False)
class ModelExplanation:
    """Findings for one model.

    Args:
        name: Name to show.
        weights_sha256: Hash of the model's weights as given.
        refitted: Whether its classifier was fitted to the training images first.
        num_parameters: Number of parameters of the classifier.
        solver: Method by which the Hessian was inverted.
        loss: Loss of the classifier on the training images, weight decay included.
        excess: Approximate excess of that loss over its minimum.
        predicted: Class of each test image, [T].
        maps: Saliency, SmoothGrad and integrated gradients of the shown images, each [S, C, H, W].
        top: Positions of the most influential training images of each test image, [T, K].
        values: Influences of those training images, [T, K].
        match: Match by kind of queries, "test" and "train".
    """

    name: str
    weights_sha256: str
    refitted: bool
    num_parameters: int
    solver: str
    loss: float
    excess: float
    predicted: np.ndarray
    maps: dict[str, np.ndarray]
    top: np.ndarray
    values: np.ndarray
    match: dict[str, Match]

    @property
    def far_from_minimum(self) -> bool:
        """Whether its classifier's loss lies more than 1 % above its minimum, where influence is defined."""
        return self.excess > 0.01 * self.loss


@dataclass(frozen=True, eq=False)
class Findings:
    """Content of an explanation; the first model is the one in question.

    Args:
        models: Explanations of one or more models.
        label_names: Name of each class.
        indices: Positions of the test images in the test split, [T].
        labels: Classes of the test images, [T].
        shown: Positions of the shown images among the test images, [S].
        images: Shown test images, in [0, 1], [S, C, H, W].
        train_indices: Positions of the training images in the training split, [N].
        train_labels: Classes of the training images, [N].
        train_images: Shown training images, in [0, 1], [C, H, W], by their number in ``train_indices``.
        settings: Settings chosen; JSON.
        data: Descriptions of "train" and "test"; JSON.
        notes: Remarks that a reader must know.
        context: Information from the caller, e.g. "command"; JSON.
        environment: Versions, device, date; JSON.
    """

    models: tuple[ModelExplanation, ...]
    label_names: tuple[str, ...]
    indices: np.ndarray
    labels: np.ndarray
    shown: np.ndarray
    images: np.ndarray
    train_indices: np.ndarray
    train_labels: np.ndarray
    train_images: Mapping[int, np.ndarray] = field(repr=False)
    settings: dict[str, Any]
    data: dict[str, Any]
    notes: tuple[str, ...]
    context: dict[str, Any]
    environment: dict[str, Any]

    @property
    def sentence(self) -> str:
        """One sentence on what was explained."""
        names = " and ".join((", ".join(model.name for model in self.models[:-1]), self.models[-1].name)).removeprefix(" and ")
        data = self.data["test"].get("id", "the data")
        return (
            f"{names} on {len(self.labels):,} test image{'s' * (len(self.labels) > 1)} of {data}, with the influence of "
            f"{len(self.train_labels):,} of its training images."
        )

    def to_json(self) -> dict[str, Any]:
        """Everything except pictures and maps, as JSON."""
        return {
            "$schema": SCHEMA,
            "schema_version": 1,
            "context": self.context,
            "settings": self.settings,
            "data": self.data,
            "notes": self.notes,
            "environment": self.environment,
            "label_names": self.label_names,
            "models": [
                {key: value for key, value in vars(model).items() if not isinstance(value, (np.ndarray, dict))}
                | {"match": {queries: asdict(match) for queries, match in model.match.items()}}
                for model in self.models
            ],
            "test_images": [
                {
                    "index": int(self.indices[row]),
                    "class": int(self.labels[row]),
                    "models": {model.name: self._found(model, row) for model in self.models},
                }
                for row in range(len(self.labels))
            ],
        }

    def _found(self, model: ModelExplanation, row: int) -> dict[str, Any]:
        top = model.top[row]
        return {
            "predicted": int(model.predicted[row]),
            "most_influential": self.train_indices[top].tolist(),
            "classes": self.train_labels[top].tolist(),
            "influence": model.values[row].tolist(),
        }
