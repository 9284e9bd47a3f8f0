#!/usr/bin/env python3
"""Trains the classifier on three quarters of the boxes, tests it on the rest, and writes the model."""

import argparse
import json
import os

from adc import features, labels, model, png


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="the dataset's folder")
    parser.add_argument("--labels", required=True, help="COCO JSON or annotations.jsonl")
    parser.add_argument("--out", required=True, help="where the model goes")
    args = parser.parse_args()

    examples, seen, rows = [], None, None
    for path, box, name in labels.read(args.labels):
        if path != seen:
            seen, rows = path, png.read(os.path.join(args.images, path))
        examples.append((features.of(rows, box), name))

    trained = model.Model.train([e for i, e in enumerate(examples) if i % 4])
    tests = examples[::4]
    right = sum(trained.classify(f) == name for f, name in tests)
    trained.save(args.out)
    print(json.dumps({"boxes": len(examples), "tested": len(tests), "accuracy": round(right / max(1, len(tests)), 3)}))


if __name__ == "__main__":
    main()
