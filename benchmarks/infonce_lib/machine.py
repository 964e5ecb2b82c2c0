"""What this machine is, what others do on it, and how much memory a process took. Reads Linux's /proc."""

import os
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def busy_seconds() -> tuple[float, int]:
    """CPU seconds of all cores since boot, time taken by a hypervisor included; and the number of cores."""
    lines = Path("/proc/stat").read_text().splitlines()
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(word) for word in lines[0].split()[1:9])
    cores = sum(line.startswith("cpu") for line in lines) - 1
    return (user + nice + system + irq + softirq + steal) / TICKS, cores


class ForeignUse:
    """Share of the machine that other processes used since this was made."""

    def __init__(self) -> None:
        self.busy, self.own, self.wall = busy_seconds()[0], time.process_time(), time.perf_counter()

    def share(self) -> float:
        """0 to 1. The kernel counts in hundredths of a second: look after a tenth at least."""
        busy, cores = busy_seconds()
        wall = time.perf_counter() - self.wall
        foreign = busy - self.busy - (time.process_time() - self.own)
        return min(1.0, max(0.0, foreign / (wall * cores)))


def wait_for_quiet(limit: float, patience: float) -> float:
    """Wait until others use at most `limit` of the machine, `patience` seconds at most; returns the seconds waited."""
    began = time.perf_counter()
    while (waited := time.perf_counter() - began) < patience:
        use = ForeignUse()
        time.sleep(0.2)
        if use.share() <= limit:
            return waited
    return waited


def memory_of_process(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS now, VmHWM at its highest, VmData what may be written."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}; this benchmark needs Linux.")


def reset_peak() -> None:
    """Let VmHWM start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def free_memory() -> int:
    """Bytes that programs can still take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo has no MemAvailable; this benchmark needs Linux.")


def processor() -> str:
    """Name of the processor and the number of cores that may be used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    name = fields.get("model name", os.uname().machine)
    widest = next(
        (flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in fields.get("flags", "")), ""
    )
    return f"{len(os.sched_getaffinity(0))} cores of {name} (family {fields.get('cpu family', '?')}, {widest})"
