"""What sums of floating-point numbers depend on, so that digests are compared only where they have to be equal."""

from __future__ import annotations

import platform
import re
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


_WIDE = {"avx512f": "AVX-512", "amx_bf16": "AMX"}


def is_named(text: str) -> bool:
    """Return whether a page of results names this processor and PyTorch for its first table.

    The type is such as 'Intel Xeon with AVX-512 and AMX'; what a page does not say, a processor of its does not have.
    Where a page names no type, nobody knows.
    """
    known = _cpuinfo()
    model = known.get("model name", "").replace("(R)", "")
    vendor = next((name for name in ("AMD EPYC", "Intel Xeon") if model.startswith(name)), "")
    wide = [name for flag, name in _WIDE.items() if flag in known.get("flags", "").split()]
    mine = f"{vendor} with {' and '.join(wide)}" if wide else vendor
    machine = re.search(r"^Machine: .*(?:\n.+)*", text, re.MULTILINE)
    said = machine[0] if machine else ""
    return bool(vendor) and f"({mine})" in said and f"PyTorch {'.'.join(torch.__version__.split('.')[:2])}." in said


def _cpuinfo() -> dict[str, str]:
    """Return what Linux says of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
