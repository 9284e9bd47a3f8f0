"""A nearest-neighbour classifier over scaled features."""

import json
from collections import Counter

# How many of the nearest examples vote.
NEIGHBOURS = 3


class Model:
    def __init__(self, examples, scale):
        self.examples = examples
        self.scale = scale

    @classmethod
    def train(cls, examples):
        """From (features, class name) pairs."""
        scale = []
        for column in zip(*(features for features, _ in examples)):
            mean = sum(column) / len(column)
            spread = (sum((v - mean) ** 2 for v in column) / len(column)) ** 0.5
            scale.append(spread or 1.0)
        return cls([[list(features), name] for features, name in examples], scale)

    def classify(self, features):
        def distance(example):
            return sum(((a - b) / s) ** 2 for a, b, s in zip(features, example[0], self.scale))

        nearest = sorted(self.examples, key=distance)[:NEIGHBOURS]
        return Counter(name for _, name in nearest).most_common(1)[0][0]

    def save(self, path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"format": "adc-1", "scale": self.scale, "examples": self.examples}, file)

    @classmethod
    def load(cls, path):
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        return cls(data["examples"], data["scale"])
