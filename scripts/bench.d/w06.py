"""W6: publish W1, W2 and a system tree, against `restic backup` into a local repository."""

import os

import data
from lab import GIB, RUNS, SCALE, Farm, folder, median, rate, remove, run as command, say, scaled, scratch, tree_bytes
from peers import Restic

TREE = os.environ.get("BENCH_TREE", "/usr/lib" if SCALE >= 1 else "/usr/lib/python3")


def run(results):
    one = data.random_file(scratch("w6", "w1", "model.bin"), scaled(2 * GIB), "w1")
    measure(results, "W1's file", "model", os.path.dirname(one))
    remove(folder("w6", "w1"))
    many = scratch("w6", "w2")
    data.photos(many, scaled(20_000), "w2")
    measure(results, "W2's files", "dataset", many)
    remove(many)
    # Without links: some of a system's point out of the tree, which is refused in an artifact.
    tree = folder("w6", "tree")
    command(["rsync", "-a", "--no-links", "--no-devices", "--no-specials", f"{TREE}/", tree])
    measure(results, TREE, "operator", tree)
    remove(folder("w6"))


def measure(results, what, kind, path):
    size = tree_bytes(path)
    ours, again, theirs, store, store_theirs, cpu = [], [], [], [], [], []
    for i in range(RUNS):
        farm = Farm(f"W6-{i}")
        before = farm.hub.cpu()
        ours.append(farm.hub.publish(path, f"{kind}/w6:v1")[0])
        cpu.append(farm.hub.cpu() - before)
        store.append(tree_bytes(f"{farm.hub.data}/store"))
        again.append(farm.hub.publish(path, f"{kind}/w6:v2")[0])
        farm.close()
        restic = Restic(str(i))
        theirs.append(restic.backup(path))
        store_theirs.append(tree_bytes(restic.repo))
        remove(restic.repo)
    say(f"W6 {what}: {size / 1e6:.0f} MB; again {rate(size, again)}; processor time {median(cpu):.2f} s")
    ratio = median(theirs) / median(ours)
    results.add("W6", f"publish {what}", rate(size, ours), rate(size, theirs), f"{ratio:.2f} ×", "≥ 3 ×", ratio >= 3)
    kept = median(store) / median(store_theirs)
    results.add("W6", f"store of {what}", f"{median(store) / 1e6:.1f} MB", f"{median(store_theirs) / 1e6:.1f} MB", f"{kept:.3f} ×", "≤ 1 ×", kept <= 1)
