"""Data: every image collection becomes the same thing, uint8 tensors (B, 3, S, S) with integer labels.

    python data.py toy --out data.png          prints what is there and draws a page of it
    python data.py FOLDER --size 64

`find` turns the word after --data into a source: `toy`, drawn by this file, or a folder of images. A folder is searched
to any depth. Its immediate sub-folders are classes if at least two hold images and no image lies beside them. Where
it has train/ and test/ (or val/), those are the splits; elsewhere every 20th image is held out (at most about 2,000).
Image files become pixels in one place, `load_image`, for training and evaluation alike.
"""

import argparse
import difflib
import io
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
IN_MEMORY_BYTES = 2 << 30  # a set that is smaller than this is decoded once; a larger one file by file, each time


class DataError(ValueError):
    """One line: what is wrong with the data, where, and what to do."""


class ImageSet:
    """N labelled images of S x S pixels.

    pixels: (N, 3, S, S) uint8 tensor, or None and then paths, decoded when asked for. labels: (N,) int64, all 0
    where there are no classes. class_names: list, empty where there are none.
    """

    def __init__(self, labels, class_names, size, pixels=None, paths=None):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names, self.size, self.pixels, self.paths = class_names, size, pixels, paths
        if pixels is None and len(paths) * 3 * size ** 2 <= IN_MEMORY_BYTES:
            self.pixels = decode_all(paths, size, progress=True)

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """Sequence of indices -> images (B, 3, S, S) uint8."""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(indices)]
        return decode_all([self.paths[int(i)] for i in indices], self.size)


# ----------------------------------------------------------------------------
# Image files. One path from file to pixels.

def load_image(path, size=None, content=None):
    """Image file -> (3, size, size) uint8 array: upright, RGB, over white, centre square, antialiased resize (ours).

    size None: the whole image, (3, H, W). content: the file's bytes, if it does not lie on the disk. DataError names
    a file that cannot be decoded.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            if size:
                image.draft("RGB", (2 * size, 2 * size))  # a JPEG may be decoded smaller, never below twice the size
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
                image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype("u1"))
            image = image.convert("RGB")
            if size:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                filters = Image.Resampling
                image = image.resize((size, size), filters.LANCZOS if side > size else filters.BICUBIC,
                                     box=(left, top, left + side, top + side))
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded ({error}): repair it or take it out of the folder") from error


def decode_all(paths, size, progress=False):
    """Files -> (N, 3, size, size) uint8 tensor, by a pool of threads. All unreadable files are named in one error."""
    pixels, bad = np.empty((len(paths), 3, size, size), np.uint8), []

    def decode(i):
        try:
            pixels[i] = load_image(paths[i], size)
        except DataError as error:
            bad.append(error)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 4)) as pool:
        work = pool.map(decode, range(len(paths)))
        for _ in tqdm(work, "decoding", len(paths), unit="img", leave=False, disable=None if progress else True):
            pass
    if bad:
        others = f" (and {len(bad) - 1} more: {', '.join(str(e).split(' cannot')[0] for e in bad[1:6])})"
        raise DataError(str(bad[0]) + (others if len(bad) > 1 else ""))
    return torch.from_numpy(pixels)


def image_paths(folder):
    """All image files below a folder, sorted; hidden ones and __MACOSX are left out, links are followed."""
    found = []
    for directory, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [d for d in subfolders if not d.startswith((".", "__MACOSX"))]
        found += [Path(directory, f) for f in files
                  if not f.startswith(".") and os.path.splitext(f)[1].lower() in EXTENSIONS]
    return sorted(found)


class Folder:
    """A folder of images. Cheap to make: it lists files and decodes nothing before load."""

    def __init__(self, path):
        self.path, self.name = Path(path), Path(path).resolve().name
        entries = {d.name.lower(): d for d in self.path.iterdir() if d.is_dir()}
        test_folder = next((entries[n] for n in ("test", "val", "valid", "validation") if n in entries), None)
        root = entries["train"] if "train" in entries else self.path
        paths = image_paths(root)
        if not paths:
            raise DataError(f"no images in {root}: it holds {self.other_files(root)}; "
                            f"expected files that end in {', '.join(sorted(EXTENSIONS))}")
        parts = [path.relative_to(root).parts for path in paths]
        names = sorted({p[0] for p in parts if len(p) > 1})
        self.class_names = names if len(names) >= 2 and all(len(p) > 1 for p in parts) else []
        if "train" in entries and test_folder is not None:
            test_paths = image_paths(test_folder)
            if not test_paths:
                raise DataError(f"no images in {test_folder}, the split beside {root}: fill it or take it away")
            self.train, self.test = (root, paths), (test_folder, test_paths)
            unknown = {self.class_of(p, test_folder) for p in test_paths} - set(self.class_names or [None])
            if unknown:
                raise DataError(f"{test_folder} has the class {sorted(map(str, unknown))[0]!r}, {root} does not: "
                                "both must have the same sub-folders")
        else:
            if len(paths) < 2:
                raise DataError(f"one image in {root}: at least two are needed, one of them to hold out")
            every = max(20, len(paths) // 2000)  # paths are sorted by class: every 20th is also every 20th of a class
            held_out = set(range(min(every, len(paths)) // 2, len(paths), every))
            self.train = root, [p for i, p in enumerate(paths) if i not in held_out]
            self.test = root, [p for i, p in enumerate(paths) if i in held_out]

    def class_of(self, path, root):
        return path.relative_to(root).parts[0] if self.class_names else None

    @staticmethod
    def other_files(folder):
        endings = sorted({p.suffix.lower() or p.name for p in folder.rglob("*") if p.is_file()})
        return f"only files like {', '.join(endings[:4])}" if endings else "no files"

    def sizes(self, at_most=200):
        """(smallest, median, largest) shorter side in pixels, from file headers of some images."""
        paths, sides = self.train[1], []
        for path in paths[::max(1, len(paths) // at_most)][:at_most]:
            try:
                with Image.open(path) as image:
                    sides.append(min(image.size))
            except (OSError, ValueError) as error:
                raise DataError(f"{path} is no image that can be read ({error}): repair it or take it out") from error
        return min(sides), int(np.median(sides)), max(sides)

    def counts(self):
        return len(self.train[1]), len(self.test[1])

    def describe(self):
        (n_train, n_test), (low, median, high) = self.counts(), self.sizes()
        names = ", ".join(self.class_names[:8]) + (", ..." if len(self.class_names) > 8 else "")
        classes = f"{len(self.class_names)} classes ({names})" if self.class_names else "no classes"
        pixels = f"{low} px" if low == high else f"{low} to {high} px, median {median}"
        return f"{self.path}: {n_train:,} images + {n_test:,} held out, {classes}, shorter side {pixels}"

    def load(self, size):
        """-> (train, test) ImageSets."""
        numbers = {name: i for i, name in enumerate(self.class_names or [None])}
        return tuple(ImageSet([numbers[self.class_of(p, root)] for p in paths], self.class_names, size, paths=paths)
                     for root, paths in (self.train, self.test))


# ----------------------------------------------------------------------------
# The built-in set: twelve kinds of pictogram in six colours, drawn at random places, sizes and angles (ours).

TOY_SIZE = 20
PALETTE = {"red": "#d43f3a", "orange": "#f08c28", "yellow": "#edc02a", "green": "#4c9f50", "blue": "#3a78c2",
           "purple": "#8b57b2"}
PAPER, BROWN, IVORY, INK = "#fbf6e9", "#7b5233", "#e3c89b", "#33302e"


def arc(x, y, rx, ry, start=0, stop=360, n=20):
    """n points of an ellipse around (x, y), angles in degrees, clockwise from the right (y points down)."""
    a = np.radians(np.linspace(start, stop, n))
    return np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1)


def spikes(n, inner, outer=1.0):
    """A star with n points, the first upwards."""
    a = np.pi * (np.arange(2 * n) / n - 0.5)
    r = np.where(np.arange(2 * n) % 2, inner, outer)
    return np.stack([r * np.cos(a), r * np.sin(a)], 1)


def turn(points, degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.asarray(points) @ np.array([[c, s], [-s, c]])


def pictograms():
    """Name -> list of (polygon in [-1, 1]^2, colour), painted in order; colour None is the image's own."""
    a = np.radians(np.arange(0, 360, 12))
    heart = np.stack([16 * np.sin(a) ** 3, -13 * np.cos(a) + 5 * np.cos(2 * a) + 2 * np.cos(3 * a) + np.cos(4 * a)], 1)
    crescent = np.concatenate([arc(0, 0, 0.95, 0.95, 50, 310, 24), arc(0.42, 0, 0.74, 0.74, 285, 75, 20)])
    rays = [(turn([(0.62, -0.13), (1.0, -0.09), (1.0, 0.09), (0.62, 0.13)], 45 * i), None) for i in range(8)]
    petals = [(turn(arc(0.58, 0, 0.42, 0.38), 72 * i - 90), None) for i in range(5)]
    canopy = np.concatenate([arc(0, 0.05, 1, 0.95, 180, 360, 20)]
                            + [arc(x, 0.05, 1 / 3, 0.22, 0, -180, 7) for x in (2 / 3, 0, -2 / 3)])
    return {
        "heart": [(heart / 16, None)],
        "star": [(spikes(5, 0.45), None)],
        "moon": [(crescent, None)],
        "sun": [(arc(0, 0, 0.5, 0.5), None), *rays],
        "flower": [*petals, (arc(0, 0, 0.32, 0.32), BROWN)],
        "tree": [([(-0.17, 0.5), (0.17, 0.5), (0.17, 1), (-0.17, 1)], BROWN),
                 ([(0, -0.3), (0.8, 0.62), (-0.8, 0.62)], None), ([(0, -1), (0.6, -0.05), (-0.6, -0.05)], None)],
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
    """(pixels (n, 3, size, size) uint8, labels (n,)): n pictograms, class i mod 12, drawn 4x and averaged down.

    Colour out of six, place within +-7 % of the width, size within +-15 %, angle within +-14 degrees, left-right flip:
    all independent and uniform, from the seed alone.
    """
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

    name, n_train, n_test = "toy", 18000, 1800
    class_names = list(pictograms())

    def sizes(self):
        return TOY_SIZE, TOY_SIZE, TOY_SIZE

    def counts(self):
        return self.n_train, self.n_test

    def describe(self):
        return (f"toy: {self.n_train:,} images + {self.n_test:,} held out, {len(self.class_names)} classes "
                f"({', '.join(self.class_names)}), drawn at the size asked for")

    def load(self, size=TOY_SIZE):
        sets = []
        for n, seed in ((self.n_train, 0), (self.n_test, 1)):
            pixels, labels = draw_toy(n, seed, size)
            sets.append(ImageSet(labels, self.class_names, size, pixels))
        return tuple(sets)


# ----------------------------------------------------------------------------
# From a word to a source, and pictures of images.

def find(name):
    """The source behind --data: an object with name, class_names, counts(), sizes(), describe() and load(size).

    Names of other formats belong here. DataError if there is nothing by this name.
    """
    path = Path(name).expanduser()
    if name == "toy":
        return Toy()
    if path.is_dir():
        return Folder(path)
    if path.exists():
        raise DataError(f"--data {name} is a file: give the folder that holds the images, or toy")
    parent = path.parent if path.parent.is_dir() else Path(".")
    near = difflib.get_close_matches(path.name, ["toy", *(p.name for p in parent.iterdir() if p.is_dir())], 1)
    near = "" if not near else " Did you mean toy?" if near[0] == "toy" else f" Did you mean {parent / near[0]}?"
    raise DataError(f"--data {name}: no such folder, and the only built-in name is toy.{near}")


def save_grid(images, path, columns, scale=None, row_labels=None):
    """Writes uint8 images (n, 3, H, W) as a PNG, row by row, 2 pixels apart; the old file stays until it is complete.

    scale: whole-number enlargement without smoothing (default: tiles of about 64 pixels). row_labels: one word a row.
    """
    n, _, height, width = images.shape
    scale = scale or max(1, round(64 / width))
    rows, tile_h, tile_w = -(-n // columns), height * scale + 2, width * scale + 2
    font = ImageFont.load_default(15)
    margin = 0 if not row_labels else 12 + max(int(font.getlength(str(word))) for word in row_labels)
    page = Image.new("RGB", (margin + 2 + columns * tile_w, 2 + rows * tile_h), "white")
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        page.paste(tile, (margin + 2 + i % columns * tile_w, 2 + i // columns * tile_h))
    for row, word in enumerate(row_labels or []):
        ImageDraw.Draw(page).text((6, 2 + (row + 0.5) * tile_h), str(word), fill="black", font=font, anchor="lm")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    page.save(partial, "png")
    partial.replace(path)


def main():
    parser = argparse.ArgumentParser(description="Show what --data would train on.")
    parser.add_argument("data", help="toy, or a folder of images")
    parser.add_argument("--size", type=int, help="pixels a side (default: the toy's own, or 64)")
    parser.add_argument("--out", default="data.png", help="the page of images to write")
    args = parser.parse_args()
    try:
        source = find(args.data)
        print(source.describe())
        images, _ = source.load(args.size or (TOY_SIZE if source.name == "toy" else 64))
    except DataError as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    names, columns = images.class_names[:16], 8
    rows = [torch.nonzero(images.labels == c).flatten()[:columns].tolist() for c in range(len(names))]
    if not rows or min(map(len, rows)) < columns:  # no classes, or too few images for a row of each
        rows, names = [list(range(min(len(images), 8 * columns)))], None
    save_grid(images.batch(sum(rows, [])), args.out, columns, row_labels=names)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
