"""What a defect looks like, as a few numbers."""

import math

# Pixels around a box that tell what the panel looks like without the defect.
MARGIN = 4
# Grey levels beside the background that count as bright or dark.
CONTRAST = 18


def of(rows, box):
    """The features of the defect inside `box` (x, y, width, height in pixels)."""
    x0, y0, w, h = (int(round(v)) for v in box)
    inside = [v for row in rows[y0 : y0 + h] for v in row[x0 : x0 + w]]
    top, left = max(0, y0 - MARGIN), max(0, x0 - MARGIN)
    around = [v for row in rows[top : y0 + h + MARGIN] for v in row[left : x0 + w + MARGIN]]
    ring = (sum(around) - sum(inside)) / max(1, len(around) - len(inside))
    bright = sum(v > ring + CONTRAST for v in inside) / max(1, len(inside))
    dark = sum(v < ring - CONTRAST for v in inside) / max(1, len(inside))
    long, short = max(w, h), max(1, min(w, h))
    return [math.log(w * h + 1), math.log(long / short), bright, dark, (sum(inside) / max(1, len(inside)) - ring) / 32]
