"""What ``fedkd doctor`` looks at."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FLOWER_SWITCH = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fine`` is None for what is optional."""

    fine: bool | None
    what: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Yield the findings, from what everything needs to what is optional."""
    yield from packages()
    ray = importlib.util.find_spec("ray") is not None
    yield Finding(
        ray, "Ray", _version("ray"), "" if ray else "pip install 'flwr[simulation]'; until then --engine inline works"
    )
    yield _gpu()
    yield _flower_switch()
    yield from _data()
    yield _cache()
    yield _writable("results", Path.cwd() / "runs", "this folder cannot be written; use --out")


def packages() -> Iterator[Finding]:
    """Yield the findings about Python and what fedkd stands on."""
    python = sys.version.split()[0]
    yield Finding(sys.version_info >= (3, 11), "Python", python, "" if sys.version_info >= (3, 11) else "3.11 or newer")
    for name in ("fedkd", "flwr", "torch", "flwr-datasets", "datasets"):
        yield _package(name, needed=True)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _package(name: str, needed: bool) -> Finding:
    found = _version(name)
    missing = found == "not installed"
    return Finding(not missing if needed else None, name, found, f"pip install {name}" if missing else "")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding(True, "GPU", names)
    advice = "runs on the CPU"
    if torch.version.cuda is None:
        advice += "; for a GPU install a CUDA build of torch"
    return Finding(None, "GPU", "none that PyTorch can use", advice)


def _flower_switch() -> Finding:
    fine = os.environ.get(FLOWER_SWITCH) == "1"
    advice = f"before `flwr run .` say: export {FLOWER_SWITCH}=1, else Flower installs torch anew for every run"
    return Finding(True if fine else None, f"{FLOWER_SWITCH}", "1" if fine else "not set", "" if fine else advice)


def _data() -> Iterator[Finding]:
    from fedkd.data.images import SOURCES, local_folder
    from fedkd.places import cache_root

    yield Finding(True, "data: digits", "embedded in scikit-learn")
    cached = {path.name.rsplit("-", 1)[0] for path in cache_root().glob("*-*")} if cache_root().is_dir() else set()
    for name in SOURCES:
        if name == "digits":
            continue
        folder = local_folder(name, "")
        if name in cached:
            yield Finding(True, f"data: {name}", f"decoded in {cache_root()}")
        elif folder is not None:
            yield Finding(True, f"data: {name}", str(folder))
        else:
            advice = "set data.root to a folder with its Parquet files; without one the hub is asked"
            if name == "fashion_mnist":
                advice += "; Debian has it as dataset-fashion-mnist"
            yield Finding(None, f"data: {name}", "not on this machine", advice)


def _cache() -> Finding:
    from fedkd.places import cache_root

    return _writable("cache", cache_root(), "set FEDKD_CACHE to a folder that can be written")


def _writable(what: str, folder: Path, advice: str) -> Finding:
    from fedkd.errors import UserError
    from sims.launch import writable

    try:
        writable(folder)
    except UserError:
        return Finding(False, what, str(folder), advice)
    return Finding(True, what, str(folder))
