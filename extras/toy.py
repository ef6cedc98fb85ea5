"""The built-in set (ours), without a download: twelve pictograms in six colours, drawn at random."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from data import ImageSet

TOY_SIZE = 20
PALETTE = {"red": "#d43f3a", "orange": "#f08c28", "yellow": "#edc02a", "green": "#4c9f50", "blue": "#3a78c2",
           "purple": "#8b57b2"}
PAPER, BROWN, IVORY, INK = "#fbf6e9", "#7b5233", "#e3c89b", "#33302e"


def arc(x, y, rx, ry, start=0, stop=360, n=20):
    """n points of an ellipse around (x, y), angles in degrees, clockwise from the right (y points down)."""
    a = np.radians(np.linspace(start, stop, n))
    return np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1)


def turn(points, degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.asarray(points) @ np.array([[c, s], [-s, c]])


def pictograms():
    """Name -> list of (polygon in [-1, 1]^2, colour), painted in order; colour None is the image's own."""
    a = np.radians(np.arange(0, 360, 12))
    y = -13 * np.cos(a) + 5 * np.cos(2 * a) + 2 * np.cos(3 * a) + np.cos(4 * a)
    heart = np.stack([16 * np.sin(a) ** 3, y], 1)
    a, r = np.pi * (np.arange(10) / 5 - 0.5), np.where(np.arange(10) % 2, 0.45, 1.0)
    star = np.stack([r * np.cos(a), r * np.sin(a)], 1)
    crescent = np.concatenate([arc(0, 0, 0.95, 0.95, 50, 310, 24), arc(0.42, 0, 0.74, 0.74, 285, 75, 20)])
    rays = [(turn([(0.62, -0.13), (1.0, -0.09), (1.0, 0.09), (0.62, 0.13)], 45 * i), None) for i in range(8)]
    petals = [(turn(arc(0.58, 0, 0.42, 0.38), 72 * i - 90), None) for i in range(5)]
    canopy = np.concatenate([arc(0, 0.05, 1, 0.95, 180, 360, 20)]
                            + [arc(x, 0.05, 1 / 3, 0.22, 0, -180, 7) for x in (2 / 3, 0, -2 / 3)])
    return {
        "heart": [(heart / 16, None)],
        "star": [(star, None)],
        "moon": [(crescent, None)],
        "sun": [(arc(0, 0, 0.5, 0.5), None), *rays],
        "flower": [*petals, (arc(0, 0, 0.32, 0.32), BROWN)],
        "tree": [([(-0.17, 0.5), (0.17, 0.5), (0.17, 1), (-0.17, 1)], BROWN),
                 ([(0, -0.3), (0.8, 0.62), (-0.8, 0.62)], None),
                 ([(0, -1), (0.6, -0.05), (-0.6, -0.05)], None)],
        "house": [([(-0.7, -0.1), (0.7, -0.1), (0.7, 0.9), (-0.7, 0.9)], IVORY),
                  ([(0, -0.95), (1, 0.02), (-1, 0.02)], None),
                  ([(-0.2, 0.3), (0.2, 0.3), (0.2, 0.9), (-0.2, 0.9)], BROWN)],
        "fish": [(arc(-0.2, 0, 0.78, 0.55), None), ([(0.35, 0), (1, -0.55), (0.85, 0), (1, 0.55)], None),
                 (arc(-0.58, -0.12, 0.13, 0.13, n=10), INK)],
        "boat": [([(-0.95, 0.4), (0.95, 0.4), (0.6, 0.9), (-0.6, 0.9)], BROWN),
                 ([(-0.04, -0.95), (-0.04, 0.28), (-0.8, 0.28)], None),
                 ([(0.08, -0.7), (0.75, 0.28), (0.08, 0.28)], None)],
        "mushroom": [([(-0.25, 0), (0.25, 0), (0.34, 0.92), (-0.34, 0.92)], IVORY),
                     (arc(0, 0.1, 0.98, 1.0, 180, 360), None), (arc(-0.4, -0.3, 0.17, 0.17, n=10), PAPER),
                     (arc(0.3, -0.5, 0.17, 0.17, n=10), PAPER)],
        "cat": [(arc(0, 0.2, 0.88, 0.74), None), ([(-0.86, 0.1), (-0.8, -0.92), (-0.1, -0.4)], None),
                ([(0.86, 0.1), (0.8, -0.92), (0.1, -0.4)], None), (arc(-0.36, 0.12, 0.13, 0.17, n=10), INK),
                (arc(0.36, 0.12, 0.13, 0.17, n=10), INK)],
        "umbrella": [([(-0.08, -0.1), (0.08, -0.1), (0.08, 0.95), (-0.08, 0.95)], INK), (canopy, None)],
    }


def draw_toy(n, seed, size=TOY_SIZE):
    """(pixels (n, 3, size, size) uint8, labels (n,)): class i mod 12, all else uniform, by the seed."""
    rng, scale = np.random.default_rng(seed), 4 * size / 2
    shapes, colours = list(pictograms().values()), list(PALETTE.values())
    pixels = np.empty((n, size, size, 3), np.uint8)
    labels = np.arange(n) % len(shapes)
    for i in range(n):
        colour = colours[rng.integers(len(colours))]
        (dx, dy), radius, angle = rng.uniform(-0.14, 0.14, 2), rng.uniform(0.62, 0.84), rng.uniform(-14, 14)
        c, s = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
        flip = rng.integers(2) * 2 - 1
        matrix, offset = scale * np.array([[flip * c, flip * s], [-s, c]]), scale * (1 + np.array([dx, dy]))
        image = Image.new("RGB", (4 * size, 4 * size), PAPER)
        pen = ImageDraw.Draw(image)
        for points, own_colour in shapes[labels[i]]:
            pen.polygon((np.asarray(points) @ matrix + offset).ravel().tolist(), fill=own_colour or colour)
        pixels[i] = np.asarray(image.reduce(4))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


class Toy:
    """The built-in set. The same images on every machine for one version of Pillow."""
    name, dataset, n_train, n_test, skipped = "toy", "toy", 18000, 1800, {}
    class_names, sides = list(pictograms()), (TOY_SIZE,) * 3

    def sizes(self):
        return self.sides

    def counts(self):
        return self.n_train, self.n_test

    def describe(self):
        return (f"toy: {self.n_train:,} images + {self.n_test:,} held out, {len(self.class_names)} classes "
                f"({', '.join(self.class_names)}), drawn at the size asked for")

    def load(self, size=TOY_SIZE, skipped=None):
        drawn = [draw_toy(n, seed, size) for n, seed in ((self.n_train, 0), (self.n_test, 1))]
        return tuple(ImageSet(labels, self.class_names, size, pixels) for pixels, labels in drawn)
