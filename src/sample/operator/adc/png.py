"""Reads 8-bit greyscale PNG files."""

import struct
import zlib


def read(path):
    """The rows of an image, as bytes."""
    with open(path, "rb") as file:
        data = file.read()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path}: not a PNG file")
    at, packed, width, height = 8, b"", 0, 0
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            if (depth, colour) != (8, 0):
                raise ValueError(f"{path}: not 8-bit greyscale")
        elif kind == b"IDAT":
            packed += body
        at += 12 + length
    raw = zlib.decompress(packed)
    rows, above = [], bytes(width)
    for y in range(height):
        start = y * (width + 1)
        above = _unfilter(raw[start], raw[start + 1 : start + 1 + width], above)
        rows.append(above)
    return rows


def _unfilter(kind, line, above):
    if kind == 0:
        return line
    out, left = bytearray(line), 0
    for x, value in enumerate(line):
        if kind == 1:
            guess = left
        elif kind == 2:
            guess = above[x]
        elif kind == 3:
            guess = (left + above[x]) // 2
        else:
            corner = above[x - 1] if x else 0
            guess = min((left, above[x], corner), key=lambda v: abs(left + above[x] - corner - v))
        left = out[x] = (value + guess) & 255
    return bytes(out)
