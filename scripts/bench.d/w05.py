"""W5: an image with (a) a new top layer, (b) small changes in a large layer; into docker-registry at the site."""

import subprocess

import data
from lab import MIB, RUNS, Farm, folder, median, remove, rng, say, scaled, scratch, seconds
from peers import Registry


def make():
    """The old image and both new ones; the bytes of the new layer, and of the changed files after zstd."""
    gen = rng("w5")
    base = data.layer_files(gen, scaled(300), 200_000)
    large = data.layer_files(gen, scaled(2_000), 100_000)
    top = data.layer_files(gen, scaled(100), 200_000)
    lower, big, upper = (data.layer_tar(files) for files in (base, large, top))
    data.oci_layout(scratch("w5", "old"), [lower, big])
    data.oci_layout(scratch("w5", "a"), [lower, big, upper])
    changed = {}
    for name in gen.sample(sorted(large), max(1, len(large) // 50)):
        body = bytearray(large[name])
        at = gen.randrange(len(body))
        body[at : at + 100] = data.code_like(gen, 120)
        changed[name] = bytes(body)
    data.oci_layout(scratch("w5", "b"), [lower, data.layer_tar(large | changed)])
    say(f"W5: layers of {len(lower) / MIB:.0f} and {len(big) / MIB:.0f} MiB, a new one of {len(upper) / MIB:.0f} MiB")
    return len(upper), zstd(data.layer_tar(changed))


def zstd(content):
    return len(subprocess.run(["zstd", "-q", "-3", "-c"], input=content, capture_output=True, check=True).stdout)


def run(results):
    layer, changed = make()
    farm = Farm("W5")
    for version in ("old", "a", "b"):
        farm.hub.publish(scratch("w5", version), f"image/w5:{version}")
    for version, what, fits, factor in (("a", "a new top layer", layer, 1.0), ("b", "small changes in a large layer", changed, 1.3)):
        ours, wire, theirs = [], [], []
        for i in range(RUNS):
            registry = Registry(f"{version}{i}")
            site = farm.site(f"{version}{i}", f'[sink.images]\nurl = "http://127.0.0.1:{registry.port}/bench"\n')
            farm.hub.deliver("image/w5:old", site.name)
            took, (transfer,) = farm.hub.deliver(f"image/w5:{version}", site.name)
            ours.append(took)
            wire.append(transfer["bytes"]["wire"])
            registry.digest(f"bench/w5:{version}")
            farm.drop(site)
            registry.close()
            remove(registry.data)
            other = Registry(f"peer-{version}{i}")
            other.copy(scratch("w5", "old"), "v1", "bench/w5:old")
            theirs.append(other.copy(scratch("w5", version), "v1", f"bench/w5:{version}"))
            other.close()
            remove(other.data)
        share = median(wire) / fits
        against = "the layer" if version == "a" else "the changed files by zstd -3"
        results.add(f"W5{version}", f"{what}: bytes on the wire", f"{median(wire) / 1e6:.2f} MB", f"{against}: {fits / 1e6:.2f} MB", f"{share:.2f} ×", f"≤ {factor} ×", share <= factor)
        ratio = median(ours) / median(theirs)
        results.add(f"W5{version}", f"{what}: time, skopeo copy", seconds(ours), seconds(theirs), f"{ratio:.2f} ×", "< 1 ×", ratio < 1)
    farm.close()
    remove(folder("w5"))
