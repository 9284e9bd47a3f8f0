#!/usr/bin/env python3
"""Prints the class of one box on one image."""

import argparse

from adc import features, model, png


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--box", required=True, help="X,Y,W,H in pixels")
    args = parser.parse_args()
    box = [float(v) for v in args.box.split(",")]
    print(model.Model.load(args.model).classify(features.of(png.read(args.image), box)))


if __name__ == "__main__":
    main()
