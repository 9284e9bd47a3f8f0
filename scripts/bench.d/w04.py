"""W4: W2 with 500 files added, 200 changed, 1,000 moved."""

import os
import shutil

import data
from lab import RUNS, Farm, folder, landed, median, remove, rng, run as command, same_content, scaled, scratch, seconds
from peers import RsyncDaemon

COUNT = scaled(20_000)
ADDED, CHANGED, MOVED = scaled(500), scaled(200), scaled(1_000)


def change(tree):
    """Changes the tree; the bytes that are new in it."""
    gen = rng("w4")
    new = 0
    picked = gen.sample(range(COUNT), CHANGED + MOVED)
    for i in picked[:CHANGED]:
        path = os.path.join(tree, data.photo_name(i))
        size = os.path.getsize(path)
        with open(path, "wb") as f:
            f.write(gen.randbytes(size))
        # rsync looks at times: a change in the same second must not hide from it.
        os.utime(path, (1_800_000_000, 1_800_000_000))
        new += size
    for i in picked[CHANGED:]:
        into = os.path.join(tree, f"moved/day{i % 13:02}")
        os.makedirs(into, exist_ok=True)
        os.rename(os.path.join(tree, data.photo_name(i)), os.path.join(into, f"renamed_{i}.jpg"))
    for i, size in enumerate(data.photo_sizes(gen, ADDED)):
        into = os.path.join(tree, f"line{i % 8}/new")
        os.makedirs(into, exist_ok=True)
        with open(os.path.join(into, f"added_{i}.jpg"), "wb") as f:
            f.write(gen.randbytes(size))
        new += size
    return new


def run(results):
    old, tree = scratch("w4", "old"), scratch("w4", "new")
    data.photos(old, COUNT, "w2")
    command(["cp", "-a", old, tree])
    new = change(tree)
    farm = Farm("W4")
    farm.hub.publish(old, "dataset/w4:v1")
    farm.hub.publish(tree, "dataset/w4:v2")
    rsyncd = RsyncDaemon("w4", tree)
    ours, wire, theirs, beside, line = [], [], [], [], []
    for i in range(RUNS):
        site = farm.site(f"s{i}")
        farm.hub.deliver("dataset/w4:v1", site.name)
        took, (transfer,) = farm.hub.deliver("dataset/w4:v2", site.name)
        ours.append(took)
        wire.append(transfer["bytes"]["wire"])
        if i == 0:
            same_content(tree, landed(site, "dataset/w4:v2"))
        farm.drop(site)
        into, second = folder("w4", "into"), folder("w4", "beside")
        command(["cp", "-a", f"{old}/.", into])
        # Beside the old version, as Packhorse does it; then over it, which leaves no old version.
        beside.append(rsyncd.pull(second, "--no-whole-file", f"--link-dest={into}")[0])
        took, moved = rsyncd.pull(into, "--no-whole-file", "--delete")
        theirs.append(took)
        line.append(moved)
        remove(into, second)
    share = median(wire) / new
    results.add("W4", f"bytes on the wire ({new / 1e6:.1f} MB are new)", f"{median(wire) / 1e6:.2f} MB", f"{median(line) / 1e6:.2f} MB", f"{share - 1:+.1%} of the new", "≤ +2 %", share <= 1.02)
    for name, times in (("rsync over the old version", theirs), ("rsync --link-dest beside it", beside)):
        ratio = median(ours) / median(times)
        results.add("W4", f"time, {name}", seconds(ours), seconds(times), f"{ratio:.2f} ×", "< 1 ×", ratio < 1)
    rsyncd.close()
    farm.close()
    shutil.rmtree(folder("w4"), ignore_errors=True)
