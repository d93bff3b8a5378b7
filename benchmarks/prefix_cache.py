"""What the cache of the frozen blocks' features is worth, beside the bound.

python benchmarks/prefix_cache.py --model model_cards/wrn16_2.fdm4_cifar100 --data ../shared/data/cifar10 --num-images 1024 \\
    --threads 1 --output benchmarks/results/prefix_cache.json

NEFT (beta 0.4) on natural images without augmentation, fp32, batch 128, channels last. For each number of tuned blocks k, whole
training steps with and without the cache and bare passes take turns; times are medians. An epoch has ``num_images // 128`` steps.

- bound: epochs of prefix and tail, over one prefix and epochs of tail. "prefix": the frozen blocks' forward pass without a graph.
  "tail": forward, backward and optimiser of the tuned blocks on features that lie ready, in a bare loop.
- speed-up: epochs of whole steps without the cache, over its building and epochs of whole steps with it. The building is all of
  it: finding the cut, checking it, the passes.
- run: both trainings from start to end through ``train``, for ``--run-epochs``, and whether their weights are the same bits.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from cartl_hub import NEFT, BatchNormPolicy, FeatureCache, ImageData, TrainingArguments, load_model, load_test_split
from cartl_hub.training import loop, train
from cartl_hub.training.cache import FrozenPrefix

BATCH_SIZE = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or id of a model")
    parser.add_argument("--data", required=True, help="what load_test_split reads; nothing but time is measured on it")
    parser.add_argument("--num-images", type=int, default=1024)
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--repeats", type=int, default=7, help="steps of each kind, after one that isn't counted")
    parser.add_argument("--run-epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    data = load_test_split(options.data, model.image_policy)[0].subset(range(options.num_images))
    data = ImageData(data.labels, data.label_names, data.get(torch.arange(len(data))), data.policy)
    model.reset_head(data.label_names)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "model": options.model,
        "data": options.data,
        "num_images": options.num_images,
        "batch_size": BATCH_SIZE,
        "dtype": "fp32",
        "threads": options.threads,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("cartl-hub", "torch", "timm", "numpy")},
        "hardware": hardware(),
        "rows": [],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for num_blocks in options.num_blocks:
        row = measure(model, data, num_blocks, options)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def measure(model: torch.nn.Module, data: ImageData, num_blocks: int, options: argparse.Namespace) -> dict:
    """The row of one k."""
    seconds = steps(model, data, num_blocks, options.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    per_epoch = data.steps_per_epoch(BATCH_SIZE)
    passes = -(-len(data) // BATCH_SIZE)
    rows = {}
    for epochs in options.epochs:
        bare = epochs * per_epoch * (medians["prefix"] + medians["tail"])
        bound = bare / (passes * medians["prefix"] + epochs * per_epoch * medians["tail"])
        cached = medians["building"] + epochs * per_epoch * medians["cached"]
        speed_up = epochs * per_epoch * medians["uncached"] / cached
        rows[epochs] = {"bound": round(bound, 2), "speed_up": round(speed_up, 2), "achieved": round(speed_up / bound, 3)}
    return {
        "num_blocks": num_blocks,
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "medians": {name: round(value, 4) for name, value in medians.items()},
        "epochs": rows,
        "run": whole_runs(model, data, num_blocks, options.run_epochs),
    }


def arguments(epochs: int, cache: FeatureCache | None) -> TrainingArguments:
    return TrainingArguments(epochs=epochs, batch_size=BATCH_SIZE, precision="fp32", augmentation=None, cache=cache)


def steps(model: torch.nn.Module, data: ImageData, num_blocks: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of the building and of each kind of step, taking turns."""
    seconds: dict[str, list[float]] = {"building": [], "prefix": [], "tail": [], "uncached": [], "cached": []}
    method = NEFT(num_blocks=num_blocks)

    class Measured(loop._Run):
        """A run that takes turns in place of training."""

        def _fit(self, task: loop.Task) -> dict:
            trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
            optimizer, self.average = self._optimizer(trained), None
            drawn = next(self.data.training_batches(batch_size=BATCH_SIZE, seed=0, start=0, stop=1))
            images = self._see(drawn.images, drawn.indices)
            self._cache(task, 0)
            prefix, features = task.prefix, self.features
            assert isinstance(prefix, FrozenPrefix)
            rows = prefix(images)

            def building() -> None:
                self._cache(task, 0)

            def tail() -> None:
                with prefix.skipped():
                    F.cross_entropy(task.model(rows), drawn.labels).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            def step(cached: bool) -> None:
                task.prefix, self.features = (prefix, features) if cached else (None, None)
                images = torch.empty(len(drawn.indices), 0) if cached else self.data.get(drawn.indices)
                self._step(task, task, optimizer, trained, drawn._replace(images=images), 0)

            kinds: dict[str, Callable[[], object]] = {
                "prefix": lambda: prefix(images),
                "tail": tail,
                "uncached": lambda: step(False),
                "cached": lambda: step(True),
            }
            for turn in range(repeats + 1):
                task.prefix, self.features = None, None
                if turn % 3 == 1:
                    seconds["building"].append(_seconds(building))
                    prefix, features = task.prefix, self.features
                for name, run in kinds.items():
                    task.train()
                    taken = _seconds(run)
                    if turn:
                        seconds[name].append(taken)
            return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    begun = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = Measured(model, method, data, None, BatchNormPolicy(), arguments(1, FeatureCache()), None, False)
    with torch.random.fork_rng():
        run()
    model.load_state_dict(begun)
    return seconds


def whole_runs(model: torch.nn.Module, data: ImageData, num_blocks: int, epochs: int) -> dict:
    """Both trainings through ``train``."""
    begun = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taken, states = {}, []
    for name, cache in (("uncached", None), ("cached", FeatureCache())):
        model.load_state_dict(begun)
        chosen = arguments(epochs, cache)
        taken[name] = _seconds(lambda chosen=chosen: train(model, NEFT(num_blocks=num_blocks), data, arguments=chosen))
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    model.load_state_dict(begun)
    return {
        "epochs": epochs,
        "seconds": {name: round(value, 2) for name, value in taken.items()},
        "speed_up": round(taken["uncached"] / taken["cached"], 2),
        "same_weights": all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()),
    }


def hardware() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
