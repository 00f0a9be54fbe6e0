"""What sums of floating-point numbers depend on, so that digests are compared only where they have to be equal."""

from __future__ import annotations

import platform
import zlib
from importlib.metadata import version
from pathlib import Path

import torch

_IDENTITY = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size")


def here() -> dict[str, str]:
    """Return the type of processor and the versions of what computes; equal ones give equal digests.

    Libraries choose their instructions, and how they divide a matrix, by all of what a processor says of itself.
    """
    known = _cpuinfo()
    said = "; ".join(known[name] for name in _IDENTITY if name in known) or platform.processor()
    flags = zlib.crc32(" ".join(sorted(known.get("flags", "").split())).encode())
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": f"{said}; flags {flags:08x}; PyTorch takes it for {capability}",
        "torch": torch.__version__,
        "numpy": version("numpy"),
    }


def is_named(text: str) -> bool:
    """Return whether a page of results names this processor and PyTorch: 'AMD EPYC', without AVX-512 unless it says so.

    Where it names none, nobody knows.
    """
    known = _cpuinfo()
    wide = "avx512f" in known.get("flags", "").split()
    mine = "AMD EPYC with AVX-512" if wide else "AMD EPYC"
    named = "AMD EPYC with AVX-512" if "(AMD EPYC with AVX-512)" in text else "AMD EPYC" if "(AMD EPYC)" in text else ""
    same = known.get("model name", "").startswith("AMD EPYC") and named == mine
    return same and f"PyTorch {'.'.join(torch.__version__.split('.')[:2])}." in text


def _cpuinfo() -> dict[str, str]:
    """Return what Linux says of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
