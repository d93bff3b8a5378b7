"""The model card: README.md of a model folder, with every figure from its report."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from .blocks import list_blocks
from .hub import bundled_models, untrained_recipes
from .licenses import LICENSES
from .models import Classifier
from .report import NO_CHECK, Report, eps_text, few_made, printable

TEMPLATE = Path(__file__).parent / "card.md.j2"
NO_SCHEDULE = {"name": "EpsSchedule", "start": 0.0, "end": 0.0}  # the default of adversarial training
CITATIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("FDM", "NEFT"),
        """@inproceedings{chen2021cartl,
  title     = {CARTL: Cooperative Adversarially-Robust Transfer Learning},
  author    = {Chen, Dian and Hu, Hongxin and Wang, Qian and Li, Yinli and Wang, Cong and Shen, Chao and Li, Qi},
  booktitle = {International Conference on Machine Learning},
  year      = {2021}
}""",
    ),
    (
        ("LwF",),
        """@inproceedings{shafahi2020adversarially,
  title     = {Adversarially Robust Transfer Learning},
  author    = {Shafahi, Ali and Saadatpanah, Parsa and Zhu, Chen and Ghiasi, Amin and Studer, Christoph and Jacobs, David
               and Goldstein, Tom},
  booktitle = {International Conference on Learning Representations},
  year      = {2020}
}""",
    ),
    (
        ("SimCLR",),
        """@inproceedings{chen2020simple,
  title     = {A Simple Framework for Contrastive Learning of Visual Representations},
  author    = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {International Conference on Machine Learning},
  year      = {2020}
}""",
    ),
    (
        ("Rotation",),
        """@inproceedings{gidaris2018unsupervised,
  title     = {Unsupervised Representation Learning by Predicting Image Rotations},
  author    = {Gidaris, Spyros and Singh, Praveer and Komodakis, Nikos},
  booktitle = {International Conference on Learning Representations},
  year      = {2018}
}""",
    ),
    (
        ("Jigsaw",),
        """@inproceedings{noroozi2016unsupervised,
  title     = {Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles},
  author    = {Noroozi, Mehdi and Favaro, Paolo},
  booktitle = {European Conference on Computer Vision},
  year      = {2016}
}""",
    ),
    (
        ("TRADES",),
        """@inproceedings{zhang2019theoretically,
  title     = {Theoretically Principled Trade-off between Robustness and Accuracy},
  author    = {Zhang, Hongyang and Yu, Yaodong and Jiao, Jiantao and Xing, Eric P. and El Ghaoui, Laurent and Jordan, Michael I.},
  booktitle = {International Conference on Machine Learning},
  year      = {2019}
}""",
    ),
    (
        ("AdversarialTraining", "FDM"),
        """@inproceedings{madry2018towards,
  title     = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author    = {Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle = {International Conference on Learning Representations},
  year      = {2018}
}""",
    ),
)


def render_card(model: Classifier, *, report: Report | None = None, repo_id: str | None = None) -> str:
    """Text of a card; all that it says comes from the model's lineage and from the report.

    Args:
        model: Model with its lineage.
        report: Report on the model; without one the card says so.
        repo_id: Id on the Hub to show in the loading example; by default the name of a bundled model, or the path of the folder.
    """
    lineage = _one_line(model.lineage)
    name = lineage.get("name", model.architecture)
    data, source, method = lineage.get("data", {}), lineage.get("source"), lineage.get("method", {})
    loaded_as = name if name in bundled_models() | untrained_recipes() else "path/to/this/folder"
    needs_import = hasattr(model.backbone, "model_args")  # registered with timm by this package
    kind, chance = "transfer" if source else "source", 1 / model.num_classes
    low, high = report.robust.interval if report else (0.0, 1.0)
    trusted = report is None or not report.failed_checks
    robust = low > chance and trusted
    claims_robust = robust or (bool(lineage.get("threat_model")) and high > chance and trusted)
    card_data = ModelCardData(
        model_name=name,
        **_license_metadata(lineage.get("license")),
        library_name="cartl_hub" if needs_import else "timm",
        pipeline_tag="image-classification",
        tags=[
            *(["adversarial-robustness"] if claims_robust else []),
            *("image-classification", "timm", "cartl_hub", f"cartl_hub-{kind}"),
        ],
        datasets=[data["id"]] if _is_hub_id(data.get("id")) else None,
        base_model=next(filter(_is_hub_id, (source.get("hub_id"), source.get("id"))), None) if source else None,
        metrics=["accuracy"] if report else None,
        eval_results=_eval_results(report) if report else None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        model_id=repo_id or loaded_as,
        title=lineage.get("title") or _title(model, lineage),
        architecture=model.architecture,
        num_parameters=sum(parameter.numel() for parameter in model.backbone.parameters()),
        num_classes=model.num_classes,
        image_policy=model.image_policy,
        blocks=list_blocks(model),
        data=describe_data(data),
        method=describe_choice(method) or "unknown",
        tuned_blocks=_split(method) or 4,
        source=_source_line(source),
        needs_import=needs_import,
        report=report,
        robust=robust,
        sentence=_one_line(report.sentence) if report else None,
        command=_one_line((report.context.get("command") if report else None) or "cartl_hub.evaluate"),
        environment=_one_line(_environment(report)) if report else None,
        checks=_one_line(_checks_lines(report)) if report else [],
        pictures=report is not None and report.curve is not None,
        imported="imported" in lineage,
        classifier=describe_classifier(lineage),
        training=_training_lines(lineage),
        arguments=_plain_yaml(lineage.get("arguments")),
        lineage=_lineage_lines(lineage),
        notes=lineage.get("notes", []),
        license=lineage.get("license") or "not stated",
        source_license=(source or {}).get("license"),
        data_license=data.get("license", "that of the data set"),
        citations=[text for names, text in CITATIONS if not _names(method).isdisjoint(names)],
        logits_are_close=method.get("name") == "NEFT",
        percent=percent,
        plain=_one_line,
    )
    return card.content.rstrip() + "\n"


def is_repo_id(value: Any) -> bool:
    """Whether the Hub could have a repository of this id."""
    try:
        validate_repo_id(value)
    except ValueError:
        return False
    return True


def _is_hub_id(value: Any) -> bool:
    """Whether it can be "org/name" on the Hub."""
    return is_repo_id(value) and "/" in (value or "")


def _license_metadata(license: Any) -> dict[str, Any]:
    """License metadata for the Hub; a license without an identifier there is "other" with a name."""
    if not license:
        return {}
    if (slug := re.sub(r"[^a-z0-9.+]+", "-", str(license).lower()).strip("-")) in LICENSES:
        return {"license": slug}
    return {"license": "other"} | ({"license_name": slug} if slug else {})


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _split(method: Mapping[str, Any]) -> int | None:
    """Number of blocks behind the split of a source whose features were trained to be robust up to there."""
    blocks = method.get("num_blocks")
    return blocks if method.get("name") == "FDM" and isinstance(blocks, int) else None


def describe_choice(choice: Mapping[str, Any]) -> str:
    """A method or attack as one line: its name and its arguments."""
    parts = []
    for key, value in choice.items():
        if key == "name" or value is None or value == NO_SCHEDULE:
            continue
        if isinstance(value, Mapping):
            parts.append(f"{key.replace('_', ' ')} {describe_choice(value)}")
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            parts.append(f"{key.replace('_', ' ')} {' + '.join(map(describe_choice, value))}")
        else:
            parts.append(f"{key.replace('_', ' ')} {_value(key, value)}")
    return str(choice.get("name", "")) + (f" ({', '.join(parts)})" if parts else "")


def describe_classifier(lineage: Mapping[str, Any]) -> str | None:
    """Remark on the classifier of a network that learned without labels."""
    kind, method = lineage.get("classifier"), lineage.get("method", {}).get("name")
    if kind is None:
        return None
    if kind == "untrained":
        return (
            f"Its classifier is untrained, as {method} learns without labels and there was no linear probe: its predictions mean "
            "nothing and its accuracy was not measured. It is a source to fine-tune."
        )
    if (probe := lineage.get("probe")) is None:
        return None
    return (
        f"The network learned without labels ({method}). Its classifier is a linear probe, trained afterwards on the labels of "
        f"the training split for {probe['steps']} steps (lr {probe['arguments']['lr']:g}) while the network stayed as it was; "
        "every accuracy is that of the two together."
    )


def _names(choice: Any) -> set[str]:
    """Names of a choice and of those inside it."""
    if isinstance(choice, Mapping):
        return {str(choice.get("name"))}.union(*map(_names, choice.values()))
    return set().union(*map(_names, choice)) if isinstance(choice, (list, tuple)) else set()


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return eps_text("Linf", value) if key in ("eps", "step_size") else f"{value:g}"


def _plain_yaml(choice: Mapping[str, Any] | None) -> str | None:
    """A choice as in a recipe, without entries that are None."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return value

    return None if not choice else yaml.safe_dump(plain(choice), sort_keys=False).strip()


def describe_data(data: Mapping[str, Any]) -> str:
    """A data set as one phrase."""
    words = [str(data.get("id", "unknown data"))]
    if data.get("revision"):
        words.append(f"revision {str(data['revision'])[:12]}")
    if data.get("split"):
        words.append(f"{data['split']} split")
    return ", ".join(words)


def _one_line(value: Any) -> Any:
    """Somebody else's words, as plain text on one line of Markdown."""
    if isinstance(value, Mapping):
        return {key: _one_line(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_one_line(item) for item in value]
    if not isinstance(value, str):
        return value
    plain = printable(value).replace("`", "'")
    return plain.replace("<", "&lt;").replace("|", "\\|").replace("[", "\\[")


def _title(model: Classifier, lineage: Mapping[str, Any]) -> str:
    if lineage.get("imported"):
        return f"A {model.architecture} imported from `{lineage['imported']['file']}`."
    data = lineage.get("data", {}).get("id", "unknown data")
    source = lineage.get("source")
    method = lineage.get("method", {}).get("name", "an unknown method")
    if source and _is_untrained(lineage):
        return f"A {model.architecture} to be fine-tuned from `{source.get('id')}` on {data} with {method}; not trained yet."
    start = f"fine-tuned from `{source.get('id')}`" if source else "trained"
    return f"A {model.architecture} {start} on {data} with {method}."


def _is_untrained(lineage: Mapping[str, Any]) -> bool:
    """Whether it was saved before its training."""
    return bool(lineage.get("arguments") and not lineage.get("result"))


def _source_line(source: Mapping[str, Any] | None) -> str | None:
    if not source:
        return None
    return f"`{source.get('id')}`" + (f", revision {source['revision'][:12]}" if source.get("revision") else "")


def _environment(report: Report) -> str:
    environment = report.environment
    kept = [f"{key} {environment[key]}" for key in ("torch", "timm", "cartl_hub", "device") if environment.get(key)]
    return ", ".join(kept)


def _checks_lines(report: Report) -> list[str]:
    """Whether the figures can be trusted: how many checks passed, and what the others say."""
    made = report.made_checks
    passed = sum(check.status == "pass" for check in made)
    words = {"warn": "warning", "fail": "failed"}
    others = [f"{check.name} ({words[check.status]}): {check.meaning}" for check in made if check.status in words]
    few = few_made([check.num_images for check in made])
    lines = [f"{passed} of the {len(made)} checks that were made passed{few}.", *others]
    if not made:
        lines = [NO_CHECK] if any(check.status != "skipped" for check in report.checks) else []
    return [*filter(None, (report.guess, report.mistrust)), *lines]


def _training_lines(lineage: Mapping[str, Any]) -> list[str]:
    lines = [f"Method: {describe_choice(lineage['method'])}."] if lineage.get("method") else []
    if lineage.get("batch_norm"):
        lines.append(f"Batch norm: {describe_choice(lineage['batch_norm'])}.")
    if lineage.get("data"):
        data = lineage["data"]
        hashed = f", index hash {data['index_hash']}" if data.get("index_hash") else ""
        lines.append(f"Data: {describe_data(data)}{hashed}.")
    result = lineage.get("result")
    if _is_untrained(lineage):
        lines.append("Not trained yet.")
    if result:
        number, speed = (lineage.get("data") or {}).get("num_images"), result["images_per_second"]
        epoch = f"{number / speed:.0f} s an epoch, " if number and speed else ""
        lines.append(
            f"{result['steps']} steps in {result['seconds'] / 60:.1f} minutes ({speed:.0f} images/s, {epoch}"
            f"{result['precision']}, {result['device']}); the {result['weights']} weights"
            + (" (their moving average)" if (lineage.get("arguments") or {}).get("ema") else "")
            + "."
        )
        if result.get("stopped"):
            lines.append(f"Ended early: {result['stopped']}.")
    lines += lineage.get("remarks", [])
    if lineage.get("command"):
        lines.append(f"Made by `{lineage['command']}`.")
    return lines


def _lineage_lines(lineage: Mapping[str, Any]) -> list[str]:
    """Lines on the weights, data and software that a model comes from."""
    source, data = _source_line(lineage.get("source")), lineage.get("data", {})
    fingerprint = f", fingerprint {data['fingerprint']}" if data.get("fingerprint") else ""
    if imported := lineage.get("imported"):
        place = imported.get("url") or imported.get("repo_id")
        revision = f", revision {imported['revision'][:12]}" if imported.get("revision") else ""
        lines = [
            f"Weights: imported from `{imported['file']}`{f' of {place}' if place else ''}{revision}.",
            f"Its sha256 is {imported['sha256']}, its format that of {imported['format']}; {imported['num_dropped']} of its "
            "entries are no weights of the network.",
        ]
        if threat := lineage.get("threat_model"):
            lines.append(f"Trained for {threat['norm']} {eps_text(threat['norm'], threat['eps'])}, as the importer declared.")
        return lines
    trained = "trained from a random start" if lineage.get("method") or data else "origin unknown"
    lines = [
        f"Weights: {f'from {source}' if source else trained}.",
        f"Data: {describe_data(data)}{fingerprint}.",
    ]
    if lineage.get("versions"):
        lines.append(f"Software: {', '.join(f'{name} {version}' for name, version in lineage['versions'].items())}.")
    return lines


def _eval_results(report: Report) -> list[EvalResult]:
    """Results for the model-index of the Hub; the attack is part of the metric's name, as the Hub groups by data set.

    If checks failed, clean accuracy alone: no table may rank a robust accuracy that can't be trusted.
    """
    data = printable(str(report.data.get("id", "unknown")))
    measured = [("accuracy", report.clean.accuracy)]
    robust = [
        (f"robust accuracy, {name} ({result.threat}{'' if result.alone else ', cumulative'})", result.accuracy)
        for name, result in report.attacks.items()
    ]
    robust += [(f"robust accuracy, worst case ({threat})", result.accuracy) for threat, result in report.worst_case.items()]
    measured += [] if report.failed_checks else robust
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=data,
            dataset_name=data,
            dataset_split=printable(str(report.data.get("split", "test"))),
            metric_type="accuracy",
            metric_name=printable(name),
            metric_value=round(100 * accuracy, 2),
        )
        for name, accuracy in measured
    ]
