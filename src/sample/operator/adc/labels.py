"""Reads boxes and their classes: COCO JSON, or JSON Lines with the classes beside them."""

import json
import os


def read(path):
    """Yields (image path, box, class name) in the order of the file."""
    if path.endswith(".jsonl"):
        yield from _lines(path)
    else:
        yield from _coco(path)


def _coco(path):
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    images = {image["id"]: image["file_name"] for image in data["images"]}
    names = {category["id"]: category["name"] for category in data["categories"]}
    for annotation in data["annotations"]:
        yield images[annotation["image_id"]], annotation["bbox"], names[annotation["category_id"]]


def _lines(path):
    with open(os.path.join(os.path.dirname(path), "classes.jsonl"), encoding="utf-8") as file:
        names = {row["id"]: row["name"] for row in map(json.loads, file)}
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["x"] is not None and row["class"] is not None:
                yield row["sample"], (row["x"], row["y"], row["w"], row["h"]), names[row["class"]]
