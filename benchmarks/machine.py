"""What a benchmark ran on."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def describe(device: str) -> dict[str, object]:
    """Processor or GPU, threads and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, object] = {
        "processor": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name()
    else:
        import numba

        found["numba"] = numba.__version__
    return found
