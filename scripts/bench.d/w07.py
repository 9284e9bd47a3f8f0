"""W7: 1,000,000 files of 1 KB, and one file of 20 GiB: done within memory, in time that grows with the size only."""

import os
import shutil

import data
import lab
from lab import GIB, MIB, ROOT, Farm, Trouble, at_end, landed, median, remove, same_content, scaled

FILES = scaled(1_000_000, 10)
BYTES = scaled(20 * GIB, 10)
LIMIT = 256 * MIB


def room(need):
    """A folder with that much room: tmpfs where it fits, else a disk (BENCH_DISK, /var/tmp)."""
    for base in (ROOT, os.environ.get("BENCH_DISK", "/var/tmp")):
        if shutil.disk_usage(base).free > need and (base != ROOT or free_memory() > need):
            where = os.path.join(base, f"packhorse-bench-w7.{os.getpid()}")
            os.makedirs(where, exist_ok=True)
            at_end(lambda: shutil.rmtree(where, ignore_errors=True))
            return where
    raise Trouble(f"W7 needs {need / GIB:.0f} GiB of room, in memory or at BENCH_DISK")


def free_memory():
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable:"))


def once(kind, make, need):
    """Publishes and delivers once; seconds of both, and the peaks of hub and site."""
    where = room(need)
    source = os.path.join(where, "src")
    make(source)
    farm = Farm("W7", where=os.path.join(where, "farm"))
    site = farm.site("s")
    published, _ = farm.hub.publish(source, f"{kind}/w7:v1")
    delivered, _ = farm.hub.deliver(f"{kind}/w7:v1", "s")
    peaks = farm.hub.peak(), site.peak()
    same_content(source, landed(site, f"{kind}/w7:v1"))
    farm.close()
    remove(where)
    return published, delivered, peaks, where


def run(results):
    # All that the whole uses, before the tenth as well: growth is that of the program.
    usual, lab.touched_bytes = lab.touched_bytes, scaled(12 * GIB)
    try:
        measure_all(results)
    finally:
        lab.touched_bytes = usual


def measure_all(results):
    # A tenth goes where the whole goes, for else it would be compared with another disk.
    def files(count):
        # A file of 1 KB takes a page in memory and two inodes' worth of names.
        return once("dataset", lambda path: data.tiny_files(path, count), FILES * 14_000)

    def bulk(size):
        return once("model", lambda path: data.random_file(os.path.join(path, "model.bin"), size, "w7"), int(BYTES * 3.1))

    for what, measure, full in ((f"{FILES:,} files of 1 KB", files, FILES), (f"one file of {BYTES / GIB:.1f} GiB", bulk, BYTES)):
        # The tenth takes few seconds, of which any hiccup is much: three times, and the median counts.
        tenths, whole = [measure(full // 10) for _ in range(3)], measure(full)
        tenth = [median([one[i] for one in tenths]) for i in range(2)]
        where = "" if whole[3].startswith(ROOT) else f", in {os.path.dirname(whole[3])}"
        for i, name in enumerate(("publish", "deliver")):
            growth = whole[i] / tenth[i]
            results.add("W7", f"{what}: {name}{where}", f"{whole[i]:.1f} s", f"a tenth: {tenth[i]:.1f} s", f"{growth:.1f} ×", "≤ 11 ×", growth <= 11)
        hub, site = whole[2]
        results.add("W7", f"{what}: peak memory", f"hub {hub / MIB:.0f} MiB, site {site / MIB:.0f} MiB", "-", "-", "≤ 256 MiB", max(hub, site) <= LIMIT)
