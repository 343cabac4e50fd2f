"""Disk and memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..config import Config
from ..errors import ConfigError, ModelError
from .finding import Finding, Found, Seen, Size

LIBRARY_BYTES = 500_000_000  # torch, transformers and peft in one process, before a model


def disk(folder: Path, runs: int, seen: Seen) -> Found:
    """Free bytes against two checkpoints and an adapter for each run, and as much for each site. ConfigError."""
    there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"{folder} can't be written, as {there} is not ours to write; choose another --out")
    size = seen.size
    need = 3 * size.adapter * runs * (1 + seen.sites) + size.download if size else 0
    free = shutil.disk_usage(there).free
    text = f"{_shown(free)} free at {there.resolve()}"
    if size:
        text += f", about {_shown(need)} needed (estimated)"
    if need > free:
        raise ConfigError(f"{text}; make room, or choose another --out")
    scarce = free < max(2 * need, 1_000_000_000)
    yield Finding("disk", "warning" if scarce else "ok", text + ("; that is scarce" if scarce else ""))


def memory(config: Config, size: Size, several: bool) -> Found:
    """Modelled bytes against those available. ModelError where it can't fit."""
    if config.device.startswith("cuda"):
        import torch

        available, total = torch.cuda.mem_get_info()
        need, processes, where = size.memory, 1, "GPU memory"
    else:
        available, total = _available()
        processes = min(config.room, len(config.frameworks) * len(config.seeds)) if several else 1
        need, where = processes * (size.memory + LIBRARY_BYTES), "memory"
    each = f" ({processes} processes; --jobs 1 needs {_shown(need // processes)})" if processes > 1 else ""
    text = f"{_shown(available)} of {_shown(total)} {where} available, about {_shown(need)} needed{each} (modelled)"
    if need // processes > total:
        raise ModelError(f"{text}; choose a smaller model, train.batch_size or train.max_length")
    if need > available:
        yield Finding("memory", "warning", f"{text}; end what else runs, or choose a smaller train.batch_size")
    else:
        yield Finding("memory", "ok", text)


def _available() -> tuple[int, int]:
    """Bytes of memory available and in all, to this process and its control group."""
    import psutil

    memory = psutil.virtual_memory()
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        left = limit - int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return memory.available, memory.total
    return min(memory.available, left), min(memory.total, limit)


def _shown(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
