"""Where a run ran: versions and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    names = ("tersor", "torch", "onnxruntime", "onnx", "accelerate", "numpy")
    found = []
    for name in names:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def versions() -> dict[str, str]:
    """Versions of Tersor and of what its numbers depend on."""
    return dict(_versions())


def environment() -> dict[str, str]:
    """Versions, processor, cores and threads, as short strings."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "git": _commit(),
        **versions(),
    }


def _cpu() -> str:
    """The processor's name, with the integer and bfloat16 instructions that int8 speed depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    known = [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8") if flag in flags
    ]
    return f"{facts.get('model name', platform.processor())} ({', '.join(known) or 'no vector extensions named'})"


def _commit() -> str:
    """The commit of the checkout that Tersor runs from, or "" where it is installed from a package."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        asked = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip()
