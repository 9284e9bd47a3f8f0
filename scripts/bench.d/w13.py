"""W13: a new image of 250 MB into docker-registry at a site, against skopeo copying it from an OCI layout beside the registry."""

import data
from lab import MIB, RUNS, Farm, folder, median, remove, rng, say, scaled, scratch, seconds, span
from peers import Registry


def run(results):
    gen = rng("w13")
    layers = [gen.randbytes(scaled(n * MIB)) for n in (28, 60, 150)]
    layers = [data.layer_tar({f"opt/app/part{i}.bin": body}) for i, body in enumerate(layers)]
    size = data.oci_layout(scratch("w13", "image"), layers, gzipped=True)
    farm = Farm("W13")
    farm.hub.publish(scratch("w13", "image"), "image/w13:v1")
    ours, own, theirs = [], [], []
    for i in range(RUNS):
        registry = Registry(f"w13-{i}")
        site = farm.site(f"s{i}", f'[sink.images]\nurl = "http://127.0.0.1:{registry.port}/bench"\n')
        took, (transfer,) = farm.hub.deliver("image/w13:v1", site.name)
        ours.append(took)
        own.append(span(transfer))
        arrived = registry.digest("bench/w13:v1")
        farm.drop(site)
        registry.close()
        remove(registry.data)
        other = Registry(f"w13-peer-{i}")
        theirs.append(other.copy(scratch("w13", "image"), "v1", "bench/w13:v1"))
        if other.digest("bench/w13:v1") != arrived:
            say("W13: skopeo's digest differs from Packhorse's")
        other.close()
        remove(other.data)
    say(f"W13: {size / 1e6:.0f} MB; own times {median(own):.2f} s")
    ratio = median(ours) / median(theirs)
    results.add("W13", f"an image of {size / 1e6:.0f} MB, skopeo copy", seconds(ours), seconds(theirs), f"{ratio:.2f} ×", "≤ 1.0 ×", ratio <= 1)
    farm.close()
    remove(folder("w13"))
