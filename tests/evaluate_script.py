"""A small evaluation as a process of its own: the tests kill it, resume it, and start it several times at once.

python tests/evaluate_script.py FOLDER OUTPUT [--die-in-write NUMBER] [--slow SECONDS]
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path

from known_models import EPS, curved_case

import cartl_hub.evaluation.journal as journal
from cartl_hub import evaluate
from cartl_hub.attacks import APGDT, FGSM, PGD, Square

ATTACKS = {
    "FGSM": FGSM(eps=EPS),
    "PGD-5": PGD(eps=EPS, step_size=EPS / 4, steps=5),
    "PGD-10": PGD(eps=EPS, step_size=EPS / 4, steps=10),
    "APGD-T": APGDT(eps=EPS, steps=5, num_targets=2),
    "Square": Square(eps=EPS, queries=20),
}
CHECKS = ("determinism", "attack-order")
SETTINGS = {
    "attacks": ATTACKS,
    "checks": CHECKS,
    "check_images": 12,
    "curve": (0, EPS, 2 * EPS),
    "curve_images": 20,
    "batch_size": 8,
    "seed": 3,
    "context": {"id": "toy"},
    "progress": False,
}


def measured(report) -> dict:
    """What of a report must not depend on interruptions."""
    content = json.loads(json.dumps(report.to_json()))
    del content["environment"]
    for result in content["attacks"].values():
        del result["seconds"]
    return content


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--die-in-write", type=int)
    parser.add_argument("--slow", type=float, default=0.0)
    options = parser.parse_args()
    write, count = journal.write_file, iter(range(1000))

    def write_or_die(path, content, **how):
        if next(count) == options.die_in_write:
            path.with_name(f"{path.name}.{os.getpid()}.partial").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content, **how)
        time.sleep(options.slow)

    journal.write_file = write_or_die
    report = evaluate(*curved_case(60), **SETTINGS, resume=options.folder)
    options.output.with_suffix(f".{os.environ.get('RANK', 0)}.json").write_text(json.dumps(measured(report)))


if __name__ == "__main__":
    main()
