"""What is published: one small artifact of each kind in two versions, and large ones to interrupt."""

import os
import shutil

import data
from lab import MIB, rng

KINDS = ("dataset", "labels", "operator", "image", "model")


def write(path, content, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(content)
    os.chmod(path, mode)


class Sources:
    """Folders and files below `where`; each is made once."""

    def __init__(self, where):
        self.where = where
        os.makedirs(where)

    def _path(self, name):
        path = os.path.join(self.where, name)
        return path, os.path.exists(path)

    def dataset(self, name, version=1, files=60):
        path, made = self._path(f"{name}-{version}")
        if made:
            return path
        if version > 1:
            shutil.copytree(self.dataset(name, version - 1, files), path, symlinks=True)
            write(os.path.join(path, f"新/added-{version}.bin"), rng(name, version).randbytes(90_000))
            os.unlink(os.path.join(path, f"line1/图 {3 * version + 1:03}.bin"))
            return path
        for i in range(files):
            write(os.path.join(path, f"line{i % 3}/图 {i:03}.bin"), rng(name, i).randbytes(2_000 + 997 * i), 0o600 if i % 7 == 0 else 0o644)
        write(os.path.join(path, "tools/show.sh"), b"#!/bin/sh\n", 0o755)
        write(os.path.join(path, "empty"), b"")
        os.symlink("../line0/图 000.bin", os.path.join(path, "tools/first"))
        os.mkdir(os.path.join(path, "nothing"))
        return path

    def labels(self, name, version=1, rows=300):
        """CSV rows of the samples of `dataset(name, version)`."""
        path, made = self._path(f"{name}-labels-{version}.csv")
        if not made:
            root = self.dataset(name, version)
            samples = sorted(f"{line}/{f}" for line in ("line0", "line1", "line2") for f in os.listdir(os.path.join(root, line)))
            gen = rng(name, "labels", version)
            lines = ["sample_path,class,x,y,w,h"]
            for i in range(rows + version):
                box = ",".join(str(gen.randrange(1, 400)) for _ in range(4))
                lines.append(f"{samples[i % len(samples)]},{gen.choice(['dent', 'bubble', '划痕'])},{box}")
            write(path, ("\n".join(lines) + "\n").encode())
        return path

    def operator(self, name, version=1):
        path, made = self._path(f"{name}-operator-{version}")
        if not made:
            write(os.path.join(path, "main.py"), f"print({version})\n".encode() * 50, 0o755)
            write(os.path.join(path, "conf/缺陷.toml"), b"threshold = 0.5\n")
            write(os.path.join(path, "README.md"), rng(name).randbytes(3000).hex().encode())
        return path

    def image(self, name, version=1, large=0):
        path, made = self._path(f"{name}-image-{version}")
        if not made:
            layers = [data.layer_tar(data.layer_files(rng(name, "layer", n), 12, 20_000)) for n in (0, version)]
            if large:
                layers.append(data.layer_tar({"opt/weights": rng(name, "large").randbytes(large)}))
            data.oci_layout(path, layers, gzipped=not large)
        return path

    def model(self, name, size=4 * MIB, version=1):
        path, made = self._path(f"{name}-{version}.safetensors")
        if not made:
            data.random_file(path, size, name)
            if version > 1:
                with open(path, "r+b") as f:
                    f.seek(size // 2)
                    f.write(rng(name, version).randbytes(100_000))
        return path

    def many(self, name, files, size):
        path, made = self._path(name)
        if not made:
            gen = rng(name)
            for i in range(files):
                write(os.path.join(path, f"d{i % 20}/f{i:05}"), gen.randbytes(size))
        return path

    def one_of_each(self, name, version=1):
        """{reference: (source, options of publish)}, in an order in which they can be published."""
        tag = f"{name}:v{version}"
        return {
            f"dataset/{tag}": (self.dataset(name, version), ()),
            f"labels/{tag}": (self.labels(name, version), ("--for", f"dataset/{tag}")),
            f"operator/{tag}": (self.operator(name, version), ()),
            f"image/{tag}": (self.image(name, version), ()),
            f"model/{tag}": (self.model(name, version=version), ()),
        }


def publish_all(node, sources, *more):
    """Publishes everything of `one_of_each`; the answers."""
    return {ref: node.publish(source, ref, *options, *more) for ref, (source, options) in sources.items()}
