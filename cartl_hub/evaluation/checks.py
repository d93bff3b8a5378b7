"""Makes the checks of an evaluation, and their table."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..attacks.attack import DEFAULT_EPS, Norm, check_norm
from ..ranges import check_whole
from ..report import Check
from .given import AnyTestData, as_data, sampled
from .pool import read_pool
from .probes import CHECKS, REPORTED, SECOND_VERDICT, Probe
from .subject import Subject
from .trial import Comparison, Skipped, Trial, share
from .verdict import check_model, first_look, measuring


def make_check(name: str, trial: Trial) -> Check:
    """Run one of :data:`CHECKS`."""
    try:
        comparisons = CHECKS[name].measure(trial)
    except Skipped as reason:
        return Check(name, "skipped", {}, f"Not made: {reason}.", num_images=len(trial))
    return _judged(name, CHECKS[name], comparisons, len(trial))


def second_verdict(unconfirmed: dict[str, int], num_verdicts: int, num_images: int) -> Check:
    """Count the images that broke in the first verdict of an attack and not in the second.

    Args:
        unconfirmed: Number of those images by attack.
        num_verdicts: Number of second verdicts.
    """
    comparisons = [share(f"not confirmed, {name}", count, num_images) for name, count in unconfirmed.items() if count]
    comparisons = comparisons or [Comparison(0.0, 0.0, {})]
    check = _judged("second-verdict", SECOND_VERDICT, comparisons, num_images)
    counts = {"second verdicts": num_verdicts, "not confirmed": sum(unconfirmed.values())}
    return replace(check, figures=counts | check.figures)


def _judged(name: str, probe: Probe, comparisons: list[Comparison], num_images: int) -> Check:
    least = probe.threshold
    margins = [comparison.excess - max(least, 2 * comparison.error) for comparison in comparisons]
    worst = comparisons[int(np.argmax(margins))]
    figures = {key: value for comparison in comparisons for key, value in comparison.figures.items()}
    figures |= {"excess": worst.excess, "threshold": max(least, 2 * worst.error)}
    if max(margins) > 0:
        return Check(name, probe.flagged, figures, probe.suspicious, probe.remedy, num_images)
    return Check(name, "pass", figures, probe.honest, num_images=num_images)


def chosen_checks(names: bool | Iterable[str] | None) -> tuple[str, ...]:
    """Names of the checks to make, in their order: all for True or None, none for False, otherwise those given.

    Raises:
        ValueError: If there is no such check.
    """
    if names is None or isinstance(names, bool):
        return () if names is False else tuple(CHECKS)
    names = {names} if isinstance(names, str) else set(names)
    if unknown := sorted(names - CHECKS.keys()):
        raise ValueError(f"expected names of checks, got {', '.join(map(repr, unknown))}; there are {', '.join(CHECKS)}.")
    return tuple(name for name in CHECKS if name in names)


def run_checks(
    model: nn.Module,
    data: AnyTestData,
    *,
    names: Iterable[str] | None = None,
    num_images: int = 256,
    eps: float | None = None,
    norm: Norm = "Linf",
    transfer_source: nn.Module | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Check, ...]:
    """Look for signs that attacks on a model are misled.

    All checks together take at most about 800 passes for each image, of which 300 are Square's, without a gradient; an image
    that breaks early takes fewer.

    Args:
        model: Model, as for :func:`cartl_hub.evaluate`.
        data: Test data, as for :func:`cartl_hub.evaluate`.
        names: Names of the checks to make; all by default, except for that of a report's attacks.
        num_images: Number of images to make them on, evenly spaced; for a stream, the first ones.
        eps: Radius of the threat model, in pixel units of [0, 1]; by default 8/255 in Linf and 0.5 in L2.
        norm: Norm of the threat model.
        transfer_source: Another model, whose adversarial images are tried on this one; by its logits if it has the same
            number of classes, otherwise by its ``features``.
        batch_size: Number of images attacked at once.
        seed: Seed of the random starts.
        device: Device to run on; by default the model's. The model is moved back afterwards.
        progress: Show a progress bar.

    Raises:
        ValueError: If there is no such check, or as :func:`cartl_hub.evaluate` does for the model and the data.
    """
    chosen = [name for name in chosen_checks(names) if name != REPORTED]
    check_model(model)
    for name, number in (("num_images", num_images), ("batch_size", batch_size)):
        check_whole(name, number, (">=", 1))
    check_norm(norm)
    eps = DEFAULT_EPS[norm] if eps is None else eps
    test, left = sampled(as_data(data, model, batch_size), num_images, stratified=False)
    with ExitStack() as stack:
        device, _ = stack.enter_context(measuring(model, device))
        look = partial(first_look, model, len(test.label_names), device)
        pool = stack.enter_context(read_pool(test, left, batch_size, look))
        source = transfer_source
        if source is not None:
            stack.enter_context(measuring(source, device))
        subject = Subject(model, pool, len(test.label_names), seed, batch_size, device)
        trial = Trial(subject, num_images, eps=eps, norm=norm, source=source)
        bar = stack.enter_context(tqdm(chosen, unit="check", dynamic_ncols=True, **({} if progress else {"disable": True})))
        found = []
        for name in bar:
            bar.set_description(name)
            found.append(make_check(name, trial))
    return tuple(found)


def thresholds_table() -> str:
    """Table of the checks in Markdown, for the documentation."""
    lines = ["| check | an honest model | flagged from | result |", "|---|---|---|---|"]
    for name, probe in (CHECKS | {"second-verdict": SECOND_VERDICT}).items():
        threshold = "spread outside 0.01 to 1,000" if name == "logit-range" else f"{100 * probe.threshold:g} % {probe.unit}"
        lines.append(f"| `{name}` | {probe.honest} | {threshold} | {probe.flagged} |")
    return "\n".join(lines)
