"""Pointing the Hub's client at another address."""

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

_SETTINGS = ("huggingface_hub.constants", "datasets.config")  # modules that read the environment when they are imported
_WAITING = ("huggingface_hub.utils._http", "huggingface_hub.file_download")  # modules that sleep before they try again


def client_environment(endpoint: str, cache: Path, token: str | None, xet: bool) -> dict[str, str]:
    """Variables that make a process use ``endpoint``, without the user's token and cache."""
    hosts = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(cache / "hub"),
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_XET_CACHE": str(cache / "xet"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "HF_TOKEN": token or "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else datasets asks a server of Amazon's
        "NO_PROXY": hosts,
        "no_proxy": hosts,
    }


@contextmanager
def connected(environment: Callable[[Path], Mapping[str, str]], cache: str | Path | None, backoff: bool) -> Iterator[Path]:
    """Have the client in this process behave as if it had been imported with this environment.

    Args:
        environment: Function from a cache folder to the variables.
        cache: Cache folder; None makes a temporary one.
        backoff: Whether the client waits before it tries again.
    """
    from huggingface_hub.hf_api import api
    from huggingface_hub.hf_file_system import HfFileSystem, hffs
    from huggingface_hub.utils import _http, _xet

    with ExitStack() as stack:
        folder = Path(cache or stack.enter_context(TemporaryDirectory(prefix="hub-cache-", ignore_cleanup_errors=True)))
        known = {name for name in _SETTINGS if name in sys.modules}
        stack.callback(_reread, set(_SETTINGS) - known)
        stack.enter_context(patch.dict(os.environ, environment(folder)))
        for name in known:
            stack.enter_context(_patched_settings(name))
        for shared in (api, hffs, hffs._api):  # made when they were imported
            stack.enter_context(patch.object(shared, "endpoint", os.environ["HF_ENDPOINT"]))
        for name in () if backoff else _WAITING:
            hasty = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
            stack.enter_context(patch.object(importlib.import_module(name), "time", hasty))
        caches = (_xet.XET_CONNECTION_INFO_CACHE.clear, HfFileSystem.clear_instance_cache, hffs.invalidate_cache)
        for forget in (_http.close_session, *caches):  # an address may come back with another hub behind it
            forget()
            stack.callback(forget)
        yield folder


@contextmanager
def _patched_settings(name: str) -> Iterator[None]:
    """Give a module of settings, and the modules that copied some, the values of the present environment."""
    before = dict(vars(sys.modules[name]))
    inside = {key: value for key, value in _read_settings(name).items() if before[key] != value}
    outside = {key: before[key] for key in inside}
    _replace(name, outside, inside)
    try:
        yield
    finally:
        _replace(name, inside, outside)  # also in modules that were imported meanwhile


def _replace(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Replace settings in the whole package of ``name`` where they have the old values."""
    package = name.split(".")[0]
    for module_name, module in list(sys.modules.items()):
        if module is not None and module_name.split(".")[0] == package:
            for key in old.keys() & vars(module).keys():
                if vars(module)[key] == old[key]:
                    vars(module)[key] = new[key]


def _read_settings(name: str) -> dict[str, Any]:
    """Values that a module of settings would hold if it were imported now."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds = (str, int, Path, frozenset, type(None))
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and isinstance(value, kinds)}


def _reread(names: set[str]) -> None:
    """Give modules of settings that were first imported inside the block the values of the environment outside."""
    for name in names:
        if name in sys.modules:
            vars(sys.modules[name]).update(_read_settings(name))
