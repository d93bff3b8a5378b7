"""Default timm config of a network for 32x32 images."""

from typing import Any


def cifar_config(*, first_conv: str, classifier: str, pool_size: tuple[int, int]) -> dict[str, Any]:
    """Default config with the normalisation of CIFAR-100.

    Args:
        first_conv: Name of the layer that reads the image.
        classifier: Name of the last layer.
        pool_size: Height and width of the last feature maps.
    """
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": pool_size,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.5071, 0.4865, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "mit",
    }
