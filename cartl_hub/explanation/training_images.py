"""Influence functions: the training images that a prediction rests on."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..blocks import recorded_input
from ..data import Data
from ..models import Classifier
from ..modules import check_dtype, check_finite, double, eval_mode
from ..ranges import check_number

EXACT = 4096  # parameters up to which the Hessian is built: 128 MiB
TOLERANCE = 1e-8  # of the residual of conjugate gradients, as a share of the right-hand side
MOST_STEPS = 3000  # of conjugate gradients
_AT_ONCE = 1 << 24  # numbers in one intermediate result


@dataclass(frozen=True, eq=False)
class ClassifierLoss:
    """Training loss as a function of the classifier, a linear layer, alone: mean cross-entropy over the training images plus
    ``weight_decay`` / 2 times the squared norm of weight and bias, as SGD's weight decay has it. In fp64.

    Args:
        inputs: Inputs of the classifier for the training images, with a last column of ones for the bias, if it has one.
        labels: Classes of the training images.
        parameters: Weight, with the bias as the last column.
        weight_decay: Weight decay, >= 0.

    Shape:
        inputs [N, D], labels [N], parameters [K, D].
    """

    inputs: Tensor
    labels: Tensor
    parameters: Tensor
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        check_number("weight_decay", self.weight_decay, (">=", 0))

    @classmethod
    def from_model(
        cls, model: Classifier, train: Data, *, weight_decay: float = 5e-4, batch_size: int = 128, progress: bool = False
    ) -> Self:
        """Loss of a model's classifier on training images, whose inputs are computed once.

        Raises:
            ValueError: As :func:`classifier_inputs`.
        """
        inputs, labels = classifier_inputs(model, train, batch_size=batch_size, progress=progress)
        head: Any = model.head
        columns = [head.weight] if head.bias is None else [head.weight, head.bias[:, None]]
        return cls(inputs, labels, double(torch.cat(columns, 1).detach()), weight_decay)

    @property
    def num_parameters(self) -> int:
        return self.parameters.numel()

    @property
    def solver(self) -> str:
        """Name of the solver. "exact": the Hessian is built and factorised; "conjugate gradients": it is only multiplied with."""
        return "exact" if self.num_parameters <= EXACT else "conjugate gradients"

    @cached_property
    def probabilities(self) -> Tensor:
        """Probability of each class for each training image, [N, K]."""
        return (self.inputs @ self.parameters.T).softmax(1)

    def residuals(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each image's cross-entropy in its logits, [B, D], [B] -> [B, K]; that in the parameters is the outer
        product with the image's inputs."""
        return (inputs @ self.parameters.T).softmax(1) - F.one_hot(labels, len(self.parameters))

    def value(self, parameters: Tensor | None = None) -> Tensor:
        """The loss, here or at other parameters, as a number."""
        at = self.parameters if parameters is None else parameters
        return F.cross_entropy(self.inputs @ at.T, self.labels) + self.weight_decay / 2 * at.square().sum()

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss in the parameters, [K, D]."""
        mean = self.residuals(self.inputs, self.labels).T @ self.inputs / len(self.inputs)
        return mean + self.weight_decay * self.parameters

    def excess(self, damping: float = 0.0) -> float:
        """Approximate excess of the loss over its minimum, by Newton's method: 0 if the classifier has converged, as the theory
        of influence assumes.

        Args:
            damping: Damping, as for :meth:`solve`. It makes the excess look smaller, and is used if there is no inverse without.
        """
        gradient = self.gradient
        try:
            step = self.solve(gradient[None])[0]
        except ValueError:
            if not damping:
                raise
            step = self.solve(gradient[None], damping)[0]
        above = float((gradient * step).sum().clamp(min=0)) / 2
        return min(above, float(self.value()))  # far from the minimum Newton's method overshoots

    def refitted(self) -> Self:
        """The loss with its parameters at the minimum, from zero by L-BFGS.

        Raises:
            ValueError: Without weight decay: classes that can be told apart have no minimum.
        """
        if not self.weight_decay > 0:
            raise ValueError("expected weight_decay > 0 to fit a classifier to convergence, got 0: there may be no minimum.")
        found = torch.zeros_like(self.parameters, requires_grad=True)
        search = torch.optim.LBFGS(
            [found], max_iter=2000, history_size=20, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def closure() -> float:
            search.zero_grad()
            loss = self.value(found)
            loss.backward()
            return loss.item()

        with torch.enable_grad():
            search.step(closure)
        return replace(self, parameters=found.detach())

    @torch.no_grad()
    def put_into(self, model: Classifier) -> None:
        """Set a model's classifier to these parameters."""
        head: Any = model.head
        depth = head.in_features
        head.weight.copy_(self.parameters[:, :depth])
        if head.bias is not None:
            head.bias.copy_(self.parameters[:, depth])

    def hessian(self) -> Tensor:
        """Hessian of the loss, [K * D, K * D]: mean of (diag(p) - p p^T) kron (z z^T), plus weight decay on the diagonal."""
        (number, depth), classes = self.inputs.shape, len(self.parameters)
        blocks = self.inputs.new_empty(classes, depth, classes, depth)
        for row in range(classes):
            for column in range(row + 1):
                weights = self.probabilities[:, row] * (float(row == column) - self.probabilities[:, column]) / number
                block = (self.inputs * weights[:, None]).T @ self.inputs
                blocks[row, :, column] = block
                blocks[column, :, row] = block
        hessian = blocks.view(self.num_parameters, -1)
        hessian.diagonal().add_(self.weight_decay)
        return hessian

    def hessian_product(self, vectors: Tensor) -> Tensor:
        """The Hessian times each vector, without building it: [M, K, D] -> [M, K, D]."""
        number = len(self.inputs)
        scores = (self.inputs @ vectors.flatten(0, 1).T).view(number, *vectors.shape[:2])
        shares = self.probabilities[:, None]
        weighted = shares * (scores - (shares * scores).sum(2, keepdim=True)) / number
        return (weighted.flatten(1).T @ self.inputs).view_as(vectors) + self.weight_decay * vectors

    def solve(self, vectors: Tensor, damping: float = 0.0) -> Tensor:
        """The inverse of (Hessian + ``damping``) times each vector; with neither damping nor weight decay the pseudo-inverse.

        Shape:
            [M, K, D] -> [M, K, D].

        Raises:
            ValueError: If a classifier of more than 4,096 parameters has neither, or the numbers are too far apart for fp64.
        """
        check_number("damping", damping, (">=", 0))
        return self._factorised(vectors, damping) if self.solver == "exact" else self._conjugate_gradients(vectors, damping)

    def _factorised(self, vectors: Tensor, damping: float) -> Tensor:
        hessian, right = self.hessian(), vectors.flatten(1).T
        if damping + self.weight_decay == 0:
            return (torch.linalg.pinv(hessian, hermitian=True) @ right).T.reshape(vectors.shape)
        hessian.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            raise ValueError(
                f"expected a Hessian that fp64 can invert, got a damping of {damping:g} that is too small; raise it."
            )
        return torch.cholesky_solve(right, factor).T.reshape(vectors.shape)

    def _conjugate_gradients(self, vectors: Tensor, damping: float) -> Tensor:
        """Solve for all vectors at once, preconditioned with the Hessian's diagonal."""
        if damping + self.weight_decay == 0:
            raise ValueError(
                f"expected damping or weight_decay > 0 for a classifier of {self.num_parameters:,} parameters, got 0: its "
                f"Hessian may have no inverse then; a pseudo-inverse is computed up to {EXACT:,} parameters."
            )
        shares = self.probabilities
        curvature = (shares * (1 - shares)).T @ self.inputs.square() / len(self.inputs)
        diagonal = curvature + self.weight_decay + damping
        aim = TOLERANCE * vectors.flatten(1).norm(dim=1)
        found, residual = torch.zeros_like(vectors), vectors.clone()
        direction = residual / diagonal
        slope = _dot(residual, direction)
        for _ in range(MOST_STEPS):
            if (residual.flatten(1).norm(dim=1) <= aim).all():
                return found
            product = self.hessian_product(direction) + damping * direction
            curve = _dot(direction, product)
            step = torch.where(curve > 0, slope / curve.clamp(min=1e-300), 0)  # a vector of zeros is solved by zero
            found += step * direction
            residual -= step * product
            scaled = residual / diagonal
            steeper = _dot(residual, scaled)
            direction = scaled + torch.where(slope > 0, steeper / slope.clamp(min=1e-300), 0) * direction
            slope = steeper
        raise ValueError(
            f"conjugate gradients did not converge in {MOST_STEPS:,} steps with damping {damping:g} and weight_decay "
            f"{self.weight_decay:g}; raise the damping."
        )


def influence(loss: ClassifierLoss, inputs: Tensor, labels: Tensor, *, damping: float = 0.0) -> Tensor:
    """Influence of each training image on the cross-entropy of each query (Koh and Liang, ICML 2017), on the classifier alone:
    g_query^T H^-1 g_train, with H the Hessian of the training loss.

    Positive: removing the training image raises the query's loss, to first order by this number divided by N. (It is minus
    the paper's influence of upweighting.)

    Args:
        loss: Loss on the training images.
        inputs: Inputs of the classifier for the queries, from :func:`classifier_inputs`.
        labels: Classes of the queries.
        damping: Number added to the Hessian's diagonal, >= 0.

    Shape:
        inputs [M, D], labels [M] -> [M, N], fp64.

    Raises:
        ValueError: As :meth:`ClassifierLoss.solve`.
    """
    own = loss.residuals(loss.inputs, loss.labels)
    gradients = loss.residuals(inputs, labels)[:, :, None] * inputs[:, None]
    at_once = max(1, _AT_ONCE // own.numel())
    if loss.solver == "exact":
        solved = loss.solve(gradients, damping).split(at_once)
    else:
        solved = tuple(loss.solve(part, damping) for part in gradients.split(at_once))
    parts = []
    for part in solved:
        scores = (loss.inputs @ part.flatten(0, 1).T).view(len(own), *part.shape[:2])
        parts.append((scores * own[:, None]).sum(2).T)
    return torch.cat(parts)


@torch.no_grad()
def classifier_inputs(model: Classifier, data: Data, *, batch_size: int = 128, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs of a model's classifier, with a last column of ones if it has a bias; meanwhile the model is in eval mode.

    Args:
        model: Model whose classifier is a linear layer that gives the logits.
        data: Data from :func:`cartl_hub.load_splits`.
        batch_size: Number of images per forward pass.
        progress: Show a progress bar.

    Returns:
        Inputs [N, D] in fp64, and labels [N].

    Raises:
        ValueError: If there are no images, the classifier is something else, or weights aren't finite or not in fp32.
    """
    head = model.head
    check_dtype(model)
    check_finite(model.state_dict())
    if not isinstance(head, nn.Linear):
        raise ValueError(f"expected a linear layer as the classifier of {model.architecture}, got {type(head).__name__}.")
    device = head.weight.device
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    with eval_mode(model), recorded_input(model, [head]) as recorded:
        batches = tqdm(data.batches(batch_size), desc="features", unit="batch", disable=not progress, leave=False)
        for drawn in batches:
            logits = model(drawn.images.to(device) / 255)
            entered = recorded.pop()
            if not inputs and (entered.ndim != 2 or not torch.allclose(head(entered), logits, rtol=1e-3, atol=1e-3)):
                raise ValueError(
                    f"expected logits that are the output of the classifier of {model.architecture}, got others: influence on it "
                    "would say nothing about them."
                )
            inputs.append(double(entered))
            labels.append(drawn.labels.to(inputs[-1].device))
    if not any(map(len, labels)):
        raise ValueError("expected at least one image, got none.")
    features = torch.cat(inputs)
    if head.bias is not None:
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    return features, torch.cat(labels)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of each pair, [M, K, D], [M, K, D] -> [M, 1, 1]."""
    return (a * b).flatten(1).sum(1).view(-1, 1, 1)
