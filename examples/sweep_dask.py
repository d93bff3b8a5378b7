"""A sweep over sources and numbers of images, on a cluster of this machine.

python examples/sweep_dask.py my_photos --num-images 100 400

Result: runs/sweep_dask/sweep.csv and plots. Needs `pip install "dask[distributed]"`. For a cluster elsewhere give its address to
Client; all of its machines must see the folders. The Ray backend is used in the same way, after `register_ray()`.
"""

import argparse
from dataclasses import replace

import joblib
from dask.distributed import Client

from cartl_hub.experiments import Sweep, run_sweep
from cartl_hub.recipe import RecipeData


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of images, or Hub id")
    parser.add_argument("--sources", nargs="+", default=["wrn16_2.fdm4_cifar100", "wrn16_2.natural_cifar100"])
    parser.add_argument("--num-images", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--workers", type=int, default=2, help="processes on this machine")
    parser.add_argument("--address", help="of a scheduler; by default a cluster of this machine")
    parser.add_argument("--output", default="runs/sweep_dask")
    options = parser.parse_args()

    target = RecipeData(id=options.data, local=options.data)
    sweep = Sweep(
        sources=tuple(options.sources),
        target=target,
        blocks=tuple(options.blocks),
        num_images=tuple(options.num_images),
        seeds=tuple(options.seeds),
        test_images=options.test_images,
    )
    training = replace(sweep.training, epochs=options.epochs, validate_every=options.epochs)
    sweep = replace(sweep, training=training)
    here = {"n_workers": options.workers, "threads_per_worker": 1, "dashboard_address": None}
    with Client(options.address) if options.address else Client(**here) as client:
        print(client)
        with joblib.parallel_config(backend="dask"):
            table = run_sweep(sweep, options.output, jobs=-1)
    print(table.groupby(["source", "blocks", "num_images"])["clean"].mean())


if __name__ == "__main__":
    main()
