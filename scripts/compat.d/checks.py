"""The checks: one line each, `ok` or `FAILED`, and comparisons of what two programs print."""

import contextlib
import hashlib
import os
import traceback

from lab import Trouble


def expect(good, detail):
    """Raises unless something is as it must be."""
    if not good:
        raise Trouble(detail() if callable(detail) else detail)


class Checks:
    """Counts and prints the checks. `section` is where the following ones belong."""

    def __init__(self):
        self.passed, self.failures, self.section = 0, [], ""

    @contextlib.contextmanager
    def step(self, what):
        """One check: it passes if its body raises nothing. What the body puts into `note[0]` is printed with it."""
        note = [""]
        try:
            yield note
        except Exception as e:
            if not isinstance(e, Trouble):
                traceback.print_exc()
            detail = str(e) if isinstance(e, Trouble) else f"{type(e).__name__}: {e}"
            detail = " ".join(detail.split())
            self.failures.append(f"{self.section}: {what}: {detail}")
            print(f"FAILED  {self.section}: {what}: {detail}", flush=True)
        else:
            self.passed += 1
            print(f"ok      {self.section}: {what}{f' ({note[0]})' if note[0] else ''}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Values: what a program wrote before is there afterwards


def changes(before, after, path=""):
    """Where `after` lacks or changes something of `before`; more fields are no change."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key, value in before.items():
            here = f"{path}.{key}" if path else key
            found += changes(value, after[key], here) if key in after else [f"{here} is missing"]
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [c for i, (b, a) in enumerate(zip(before, after)) for c in changes(b, a, f"{path}[{i}]")]
    return [] if before == after else [f"{path}: {before!r} became {after!r}"]


def same(before, after):
    found = changes(before, after)
    expect(not found, lambda: "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: the fields and types of JSON


def shape(value, path="$", found=None):
    """{path of a field: its types}, with all elements of a list together."""
    found = {} if found is None else found
    kind = {dict: "object", list: "list", str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}[type(value)]
    found.setdefault(path, set()).add(kind)
    for key, inner in value.items() if isinstance(value, dict) else ():
        shape(inner, f"{path}.{key}", found)
    for inner in value if isinstance(value, list) else ():
        shape(inner, f"{path}[]", found)
    return found


def narrower(old, new):
    """Where the JSON of NEW lacks a field of OLD, or has it with another type."""
    before, after = shape(old), shape(new)
    found = []
    for path, types in before.items():
        if path not in after:
            found.append(f"{path} is missing")
            continue
        was, now = types - {"null"}, after[path] - {"null"}
        if "number" in was:
            now = {"number" if t == "integer" else t for t in now}
        if was and now - was:
            found.append(f"{path}: {'/'.join(sorted(was))} became {'/'.join(sorted(now))}")
        elif was and not now:
            found.append(f"{path}: {'/'.join(sorted(was))} became null")
    return found


def same_shape(old, new):
    found = narrower(old, new)
    expect(not found, lambda: "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Trees


def tree(root):
    """{relative path: what is there} of a file or a folder: kind, permission bits and hash, or target."""
    found = {}

    def look(path, rel):
        if os.path.islink(path):
            found[rel] = ("link", os.readlink(path))
        elif os.path.isdir(path):
            found[rel] = ("folder",)
            for name in os.listdir(path):
                look(os.path.join(path, name), f"{rel}/{name}" if rel else name)
        else:
            with open(path, "rb") as f:
                found[rel] = ("file", os.stat(path).st_mode & 0o777, hashlib.file_digest(f, "sha256").hexdigest())

    look(root, "")
    return found


def same_tree(source, place):
    """Raises unless a delivered artifact is what was published. A single file is delivered as a folder with that file."""
    if os.path.isfile(source):
        place = os.path.join(place, os.path.basename(source))
    expect(os.path.lexists(place), f"{place} does not exist")
    before, after = tree(source), tree(place)
    differ = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    expect(not differ, lambda: f"{place} differs at {differ[0]!r}: {before.get(differ[0])} became {after.get(differ[0])} ({len(differ)} in all)")
