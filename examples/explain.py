"""What a classifier of handwritten digits looks at on a robust and on a natural source; both classifiers are fitted here.

python examples/explain.py
"""

import argparse

from cartl_hub import DataArguments, explain, load_model
from cartl_hub.quickstart import digits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num-images", type=int, default=100, help="test images of the curve")
parser.add_argument("--train-images", type=int, default=500)
parser.add_argument("--output", default="runs/explain")
options = parser.parse_args()

explanation = explain(
    load_model("wrn16_2.fdm4_cifar100"),
    digits(),
    against={"natural": load_model("wrn16_2.natural_cifar100")},
    name="robust",
    num_images=options.num_images,
    train_images=options.train_images,
    data_arguments=DataArguments(id="sklearn_digits"),
    refit=True,  # the sources know no digits: each gets a classifier, fitted to convergence
)
explanation.save(options.output)
for model in explanation.models:
    found = model.match["test"]
    print(f"{model.name}: {found.shares[9]:.1%} of the 10 most influential images are of the image's own class")
print(f"to read: {options.output}/explain.html")
