"""W3: W1 again with a change: (a) 1 % in one run, (b) 1,000 scattered 4 KiB writes, (c) one byte put in at the front."""

import os
import shutil

import data
from lab import GIB, RUNS, Farm, folder, landed, median, remove, rng, same_content, scaled, scratch, seconds
from peers import RsyncDaemon

SIZE = scaled(2 * GIB)


def one_run(path):
    gen = rng("w3a")
    n = SIZE // 100
    with open(path, "r+b") as f:
        f.seek(gen.randrange(SIZE - n))
        f.write(gen.randbytes(n))


def scattered(path):
    # The share of the file that is touched stays the same at every scale.
    gen = rng("w3b")
    with open(path, "r+b") as f:
        for _ in range(scaled(1000)):
            f.seek(gen.randrange(SIZE - 4096))
            f.write(gen.randbytes(4096))


def front(path):
    with open(path, "rb") as old, open(path + ".new", "wb") as new:
        new.write(b"!")
        shutil.copyfileobj(old, new, 8 << 20)
    os.replace(path + ".new", path)


CASES = (("a", "1 % in one run", one_run, 0.011), ("b", "1,000 × 4 KiB scattered", scattered, 0.08), ("c", "one byte at the front", front, 0.001))


def run(results):
    old = data.random_file(scratch("w3", "old", "model.bin"), SIZE, "w1")
    for letter, what, change, share_max in CASES:
        new = scratch("w3", "new", "model.bin")
        shutil.copyfile(old, new)
        change(new)
        measure(results, f"W3{letter}", what, old, new, share_max)
        remove(new)
    remove(folder("w3"))


def measure(results, label, what, old, new, share_max):
    farm = Farm(label)
    farm.hub.publish(old, "model/w3:v1")
    farm.hub.publish(new, "model/w3:v2")
    rsyncd = RsyncDaemon(label, os.path.dirname(new))
    ours, wire, theirs, line = [], [], [], []
    for i in range(RUNS):
        site = farm.site(f"s{i}")
        farm.hub.deliver("model/w3:v1", site.name)
        took, (transfer,) = farm.hub.deliver("model/w3:v2", site.name)
        ours.append(took)
        wire.append(transfer["bytes"]["wire"])
        if i == 0:
            same_content(new, f"{landed(site, 'model/w3:v2')}/model.bin")
        farm.drop(site)
        into = folder("w3", "into")
        shutil.copyfile(old, f"{into}/model.bin")
        # Without whole-file copies rsync sends only what its old file lacks; -I because the times may be the same.
        took, moved = rsyncd.pull(into, "--no-whole-file", "-I")
        theirs.append(took)
        line.append(moved)
        remove(into)
    share, share_theirs = median(wire) / SIZE, median(line) / SIZE
    met = share <= share_max and median(wire) <= median(line)
    results.add(label, f"{what}: bytes on the wire", f"{share:.3%}", f"{share_theirs:.3%}", f"{share / share_theirs:.2f} ×", f"≤ {share_max:.1%}, ≤ rsync's", met)
    ratio = median(ours) / median(theirs)
    results.add(label, f"{what}: time", seconds(ours), seconds(theirs), f"{ratio:.2f} ×", "< 1 ×", ratio < 1)
    rsyncd.close()
    farm.close()
