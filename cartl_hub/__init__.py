"""Robust source models, robust fine-tuning, and a robustness report.

Names are imported when they are first used, so that the command line starts without torch. The architectures of this package
are registered with timm after ``import cartl_hub``, whichever of the two is imported first.
"""

import importlib

import lazy_loader
import wrapt

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

wrapt.register_post_import_hook(lambda timm: importlib.import_module("cartl_hub.models"), "timm.models")
