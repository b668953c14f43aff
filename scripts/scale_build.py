"""Seconds and peak memory of `nnflow index`, as a process of its own; what it runs on."""

import argparse
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def build(options: argparse.Namespace) -> dict[str, Any]:
    """`nnflow index` without calibration as a process of its own: seconds, and its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nnflow", "index", str(options.build), str(Path(folder) / "index")]
        command += ["--size", str(options.size), "--memory", str(options.memory)]
        command += ["--calibration-seconds", "0"]
        log = Path(folder) / "log"
        began = time.perf_counter()
        opened = (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT, 0o600)
        child = os.posix_spawn(sys.executable, command, os.environ, file_actions=[opened])
        _, status, usage = os.wait4(child, 0)
        taken, told = time.perf_counter() - began, log.read_text()
    if status:
        raise SystemExit(f"bench_scale: nnflow index failed with status {status}:\n{told[-2000:]}")
    rss = usage.ru_maxrss * 1024
    return machine() | {"memory": options.memory, "stages": stages(told), "seconds": taken, "rss": rss}


def stages(told: str) -> dict[str, float]:
    """Seconds of each stage, off the last line of its bar: `indexing: 100%|###| 9/9 [00:31<00:00, ...]`."""
    found: dict[str, float] = {}
    for name, clock in re.findall(r"([^\r\n:|]+): +100%\|[^\r\n]*?\[([\d:]+)<", told):
        hours, minutes, last = ([0, 0, *map(int, clock.split(":"))])[-3:]
        found[name.strip()] = float(3600 * hours + 60 * minutes + last)
    return found
