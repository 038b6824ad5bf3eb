"""The host memory and the cores that this process may use, also inside containers and batch jobs."""

import os
from pathlib import Path

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
FILES = {  # of a control group, by its version: limit, use, and what of this is cache, which gives way
    "": ("memory.max", "memory.current", "inactive_file", "active_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
}


def available_cores():
    """-> cores that this process may use, which taskset, a container or a batch job may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory():
    """-> bytes that this process can still take: the machine's, or what is left of the tightest limit on the
    control groups (a container's, a Slurm job's) that it is in."""
    free = psutil.virtual_memory().available
    for line in OWN.read_text().splitlines() if OWN.is_file() else ():  # "0::/job" or "4:memory:/job"
        _, kind, path = line.split(":", 2)
        if kind not in FILES:
            continue
        limit, used, *cache = FILES[kind]
        group = GROUPS / kind / path.strip("/")  # which a container does not see: then its top is the limit
        for folder in (group, *group.parents):
            try:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / used).read_text()) - sum(int(stat[name]) for name in cache)
                free = min(free, int((folder / limit).read_text()) - taken)
            except (OSError, ValueError):  # not a group, or one without a limit: "max"
                continue
    return max(free, 0)
