"""What a measurement was taken on and with, and the median of repeated ones."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from budgetvlm.profiling.results.measurements import LatencyRecord

PACKAGES = ("torch", "transformers", "numpy", "pillow")


def hardware(device: str = "cpu") -> dict[str, Any]:
    """Describe what influences a latency: processor, usable cores, torch's threads, memory, accelerator."""
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def this_machine(device: str = "cpu") -> tuple[str, dict[str, Any]]:
    """Return this machine's name and its hardware."""
    return platform.node(), hardware(device)


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def median_run(runs: Sequence[LatencyRecord]) -> LatencyRecord:
    """Return the run with the median total time (the lower of two), so that its stages still add up to its total."""
    return sorted(runs, key=lambda run: run.T_total_ms)[(len(runs) - 1) // 2]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
