"""The machine as Linux describes it: its name, what its caches hold, and the memory that is free.
Elsewhere these are unknown."""

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")
UNKNOWN_CACHES = 256 << 20
UNITS = {"K": 10, "M": 20, "G": 30}


def read(path: Path) -> str:
    """What a file of the system says, without the end of its line; empty where there is none."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def cpu_name() -> str:
    for line in read(PROC / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def caches() -> int:
    """Bytes that all caches hold of the CPUs that this process may run on. A server has an L3 for
    every few cores, and may have a gigabyte in all of them."""
    sizes = {}
    for cpu in usable_cpus():
        for cache in (CPUS / cpu / "cache").glob("index*"):
            kind = read(cache / "type")
            shared = read(cache / "shared_cpu_list") or cpu
            if kind != "Instruction":
                sizes[read(cache / "level"), kind, shared] = size_of(read(cache / "size"))
    return sum(sizes.values()) or UNKNOWN_CACHES


def usable_cpus() -> list[str]:
    if hasattr(os, "sched_getaffinity"):
        return [f"cpu{number}" for number in os.sched_getaffinity(0)]
    return []


def size_of(text: str) -> int:
    """Bytes, of such as 32768K; 0 of anything else."""
    number, unit = text[:-1], text[-1:]
    return int(number) << UNITS[unit] if number.isdecimal() and unit in UNITS else 0


def free_memory() -> float:
    """Bytes that can be had without harm: those that are free or can be freed, and no more than the
    control groups leave, as those of a container; infinite where nobody says."""
    free = [math.inf]
    for line in read(PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) << 10)
    for limit, used in limits():
        if limit.isdecimal() and used.isdecimal():  # and not "max"
            free.append(max(int(limit) - int(used), 0))
    return min(free)


def limits() -> Iterator[tuple[str, str]]:
    """The memory that each control group of this process may use, and what it uses; of both
    versions of them."""
    for line in read(PROC / "self" / "cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        top, names = GROUPS, ("memory.max", "memory.current")
        if kinds:
            top, names = GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if kinds and "memory" not in kinds.split(","):
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield read(group / names[0]), read(group / names[1])
