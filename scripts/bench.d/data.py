"""The data of every workload, made from the seed: the same bytes on every machine."""

import hashlib
import io
import json
import os
import tarfile

from lab import MIB, rng

# Letters of skewed frequency: with the repeats of `code_like`, zstd makes half of it, as of libraries.
_LETTERS = b"eeeeeeeetttttaaaaaooooiiinnnsssrrrhhldcumfpgwy .,;:(){}=_\n\t01"
_SKEWED = bytes(_LETTERS[i * len(_LETTERS) // 256] for i in range(256))
_STEP = 8 * MIB


def random_file(path, size, *name):
    """A file of incompressible bytes."""
    gen = rng("file", *name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        while size > 0:
            n = min(size, _STEP)
            f.write(gen.randbytes(n))
            size -= n
    return path


def code_like(gen, n):
    """Bytes that compress like code: letters of skewed frequency, with repeats of earlier lines."""
    fresh = gen.randbytes(max(1, n * 2 // 3)).translate(_SKEWED)
    out = bytearray(fresh)
    while len(out) < n:
        at = gen.randrange(max(1, len(fresh) - 200))
        out += fresh[at : at + gen.randrange(20, 200)]
    return bytes(out[:n])


def photo_sizes(gen, count):
    """Log-normal around 40 KB with a mean of 60 KB, as photos of small parts are."""
    from math import log

    return [max(1024, min(4 * MIB, int(gen.lognormvariate(log(40_000), 0.9)))) for _ in range(count)]


def photo_name(i):
    return f"line{i % 8}/day{i % 97:02}/img_{i:07}.jpg"


def photos(root, count, *name):
    """A dataset of many incompressible files; the bytes of all of them."""
    gen = rng("photos", *name)
    total = 0
    for i, size in enumerate(photo_sizes(gen, count)):
        path = os.path.join(root, photo_name(i))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(gen.randbytes(size))
        total += size
    return total


def tiny_files(root, count, size=1000):
    """Many files of the same small size, a thousand a folder."""
    gen = rng("tiny")
    for base in range(0, count, 1000):
        here = os.path.join(root, f"d{base // 1000:05}")
        os.makedirs(here)
        n = min(1000, count - base)
        block = gen.randbytes(n * size)
        for i in range(n):
            with open(os.path.join(here, f"f{i:03}"), "wb", buffering=0) as f:
                f.write(block[i * size : (i + 1) * size])


# ---------------------------------------------------------------------------------------------------------------------
# Images, as OCI layouts


def layer_files(gen, count, mean):
    """Files of a layer, with content that compresses like code and libraries."""
    return {f"usr/lib/app/m{i % 37:02}/f{i:05}.so": code_like(gen, max(200, int(gen.expovariate(1 / mean)))) for i in range(count)}


def layer_tar(files):
    """An uncompressed layer, as `docker save` writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(files[name]), 1_700_000_000, 0o644
            tar.addfile(info, io.BytesIO(files[name]))
    return out.getvalue()


def oci_layout(root, layers, tag="v1", gzipped=False):
    """Writes an OCI layout of these uncompressed layers."""
    import gzip

    blobs = os.path.join(root, "blobs", "sha256")
    os.makedirs(blobs)

    def put(content, media):
        digest = hashlib.sha256(content).hexdigest()
        with open(os.path.join(blobs, digest), "wb") as f:
            f.write(content)
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(content)}

    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {
        "created": "2024-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": "2024-01-01T00:00:00Z", "created_by": f"layer {i}"} for i in range(len(layers))],
    }
    media = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if gzipped else "")
    stored = [gzip.compress(layer, 6, mtime=0) if gzipped else layer for layer in layers]
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [put(layer, media) for layer in stored],
    }
    entry = put(json.dumps(manifest).encode(), manifest["mediaType"])
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    with open(os.path.join(root, "index.json"), "w") as f:
        json.dump({"schemaVersion": 2, "manifests": [entry]}, f)
    with open(os.path.join(root, "oci-layout"), "w") as f:
        f.write('{"imageLayoutVersion": "1.0.0"}')
    return sum(len(layer) for layer in stored)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def coco(path, annotations, per_image=10, classes=80):
    """A COCO file with boxes and small polygons, written as a stream."""
    gen = rng("coco")
    images = max(1, annotations // per_image)
    with open(path, "w") as f:
        f.write('{"images":[')
        for i in range(images):
            f.write(f'{"," if i else ""}{{"id":{i + 1},"file_name":"{photo_name(i)}","width":1920,"height":1080}}')
        f.write('],"categories":[')
        f.write(",".join(f'{{"id":{c + 1},"name":"defect-{c:02}","supercategory":"panel"}}' for c in range(classes)))
        f.write('],"annotations":[')
        for a in range(annotations):
            w, h = gen.randrange(4, 200), gen.randrange(4, 200)
            x, y = gen.randrange(0, 1920 - w), gen.randrange(0, 1080 - h)
            f.write(
                f'{"," if a else ""}{{"id":{a + 1},"image_id":{a % images + 1},"category_id":{gen.randrange(classes) + 1},'
                f'"bbox":[{x},{y},{w},{h}],"area":{w * h},"iscrowd":0,'
                f'"segmentation":[[{x},{y},{x + w},{y},{x + w},{y + h},{x},{y + h}]]}}'
            )
        f.write("]}")
    return images
