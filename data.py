"""Data: every image collection becomes the same thing, uint8 tensors (B, 3, S, S) with integer labels.

    python data.py toy --out data.png          prints what is there and draws a page of it
    python data.py FOLDER --size 64
    python data.py ffhq --root /datasets       what --data ffhq would find, or how to get it

This file has the path from a file to pixels, the same for training and evaluation (`load_image`), a set of images to
take batches from (`ImageSet`), and what every form of data must provide (`Source`). The forms themselves, from a
folder to LSUN's LMDB, are subclasses of Source in extras/data_*.py; extras/datasets.py turns the word after --data into
one of them.

A new form takes two methods: __init__ lists the images, names them in self.names and calls Source.__init__; read(i)
returns one of them, as a path, bytes or an array, and is called by several threads. Then extras/datasets.detect_format
has to recognise it. Zip in extras/data_forms.py is an example.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from engine.read_back import UserError, printable
from extras.archives import one_large_at_a_time, open_image

IN_MEMORY_BYTES = 2 << 30  # a set that is smaller than this is decoded once; a larger one image by image, each time
WORKERS = min(16, os.cpu_count() or 4)
MIN_SIDE = 4  # a 1x1 file is a tracking pixel or a placeholder, not a picture


class DataError(UserError):
    """What is wrong with the data, where, and what to do: one line, or a few for a named set that is not there."""


# ----------------------------------------------------------------------------
# From a file to pixels: one path.

def load_image(source, size=None):
    """Path, bytes of an image file, or uint8 array (H, W[, 1, 3 or 4]) -> (3, size, size) uint8 array.

    Upright (EXIF), RGB, over white, first frame, centre square, antialiased resize (ours). With size None it keeps its
    own size, (3, H, W). DataError says why not.
    """
    try:
        if isinstance(source, np.ndarray) and size and size >= MIN_SIDE and source.shape == (size, size, 3):
            return source.transpose(2, 0, 1)  # nothing is left to do
        with open_image(source, size) as image, one_large_at_a_time(image):
            if min(image.size) < MIN_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels, a side of less than {MIN_SIDE}")
            image.load()
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except Exception:  # damaged EXIF data, of whatever kind, beside sound pixels
                pass
            if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
                image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype("u1"))
            elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if size:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                filters = Image.Resampling
                image = image.resize((size, size), filters.LANCZOS if side > size else filters.BICUBIC,
                                     box=(left, top, left + side, top + side))
            return np.array(image).transpose(2, 0, 1)
    except Exception as error:  # decoders raise a dozen types on damaged files; all mean the same
        raise DataError(why_not(error, source)) from error


def why_not(error, source):
    """A few words for skipped.txt."""
    if isinstance(error, UnidentifiedImageError):
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        return "no image of a format that is known" if size else "empty, 0 bytes"
    if isinstance(error, FileNotFoundError) and os.path.islink(source):
        return "a link to nothing"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(text.split())) or type(error).__name__


@functools.cache
def decoders():
    """Threads, not processes: Pillow decodes and resizes outside Python's lock (measured: experiments/loader.py)."""
    return ThreadPoolExecutor(WORKERS, "decode")


def decode_all(read, items, size, pixels=None, progress=False):
    """Decodes read(i) for each i of items, into pixels (n, 3, size, size) if given. -> {position: why not}."""
    bad = {}

    def decode(positions):
        for at in positions:
            try:
                image = load_image(read(items[at]), size)
                if pixels is not None:
                    pixels[at] = image
            except Exception as error:  # load_image's, or the form's own on the way to the bytes
                bad[at] = str(error) if isinstance(error, DataError) else why_not(error, None)
        return len(positions)

    n, block = len(items), 4096  # block by block, so that a million images are not a million waiting jobs
    chunk = max(1, min(16, n // (4 * WORKERS)))
    with tqdm(total=n, desc="decoding", unit="img", leave=False, disable=None if progress else True) as bar:
        for first in range(0, n, block):
            last = min(first + block, n)
            for done in decoders().map(decode, [range(i, min(i + chunk, last)) for i in range(first, last, chunk)]):
                bar.update(done)
    return dict(sorted(bad.items()))


# ----------------------------------------------------------------------------
# A set of images.

class ImageSet:
    """N labelled images of S x S pixels.

    labels: (N,) int64, all 0 where there are no classes. class_names: list, empty where there are none. pixels:
    (N, 3, S, S) uint8 tensor, or None and then images are decoded when asked for: source.read(items[i]).
    """

    def __init__(self, labels, class_names, size, pixels=None, source=None, items=None):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names, self.size, self.pixels, self.source, self.items = class_names, size, pixels, source, items

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """Sequence of indices -> images (B, 3, S, S) uint8."""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(indices)]
        indices = [int(i) for i in indices]
        pixels = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        for at, reason in decode_all(self.source.read, self.items[indices], self.size, pixels).items():
            pixels[at] = self.replacement(indices[at], reason)
        return torch.from_numpy(pixels)

    def replacement(self, i, reason):
        """Pixels (3, S, S) for image i, which has become unreadable since it was checked: a run under way goes on.

        The next image of the same class that can be read takes its place.
        """
        tqdm.write(f"{self.source.title(self.items[i])}: {reason}; it was sound before. Its neighbour takes its place")
        alike = torch.nonzero(self.labels == self.labels[i]).flatten().tolist()
        at = alike.index(i)
        for other in (alike[at + 1:] + alike[:at])[:99]:
            try:
                return load_image(self.source.read(self.items[other]), self.size)
            except Exception:  # whatever kept it from being read
                continue
        raise DataError(f"{self.source.title(self.items[i])} and its neighbours can no longer be read ({reason}): is "
                        "the disk still there?")


class Source:
    """A collection of images, listed but not decoded.

    name: for the run directory. class_names: list. labels: (n,) of all its images. train, test: (n,) numbers of the
    images of each split. dataset, published: its name and how many images were published, if it was found by name
    (extras/datasets.py). skipped: {title: why not}, after load.
    """
    dataset, published, note, sides, skipped = None, None, "", None, {}  # skipped is replaced, never filled

    def __init__(self, path, class_names, labels, train, test=None):
        self.path, self.class_names, self.labels = Path(path), class_names, np.asarray(labels, np.int64)
        self.name = printable(self.path.resolve().stem if self.path.is_file() else self.path.resolve().name)
        self.total = len(train)  # as publishers count them
        if test is None:
            if len(train) < 2:
                raise DataError(f"one image in {path}: at least two are needed, one of them to hold out")
            every = max(20, len(train) // 2000)  # where images are sorted by class, it is every 20th of a class too
            held_out = np.arange(min(every, len(train)) // 2, len(train), every)
            train, test = np.delete(train, held_out), np.asarray(train)[held_out]
        self.train, self.test = np.asarray(train, np.int64), np.asarray(test, np.int64)

    def read(self, i):
        """Image number i in a form that load_image takes: path, bytes or array."""
        raise NotImplementedError

    def title(self, i):
        """Name of image number i within the set, for lists and messages; the same wherever the set lies."""
        return printable(self.names[i])

    def counts(self):
        return len(self.train), len(self.test)

    def sizes(self, at_most=200):
        """(smallest, median, largest) shorter side in pixels, from the headers of some images."""
        if self.sides is None:
            sides = []
            for i in self.train[::max(1, len(self.train) // at_most)][:at_most]:
                try:
                    sides.append(shorter_side(self.read(i)))
                except Exception:  # it will be on the list of bad files
                    continue
            if not sides:
                raise DataError(f"no image in {printable(str(self.path))} can be read, e.g. "
                                f"{self.title(self.train[0])}: repair them or take them out")
            self.sides = min(sides), int(np.median(sides)), max(sides)
        return self.sides

    def describe(self):
        """What was found, in a few lines."""
        (n_train, n_test), (low, median, high) = self.counts(), self.sizes()
        counts = np.bincount(self.labels[np.concatenate([self.train, self.test])], minlength=len(self.class_names))
        some = ", ".join(f"{name} ({count:,})" for name, count in zip(self.class_names[:8], counts, strict=False))
        more = ", ..." if len(self.class_names) > 8 else ""
        classes = f"{len(self.class_names)} classes: {some}{more}" if self.class_names else "no classes"
        pixels = f"{low} px" if low == high else f"{low} to {high} px, median {median}"
        lines = [f"{printable(str(self.path))}: {n_train:,} images + {n_test:,} held out, {classes}, shorter side "
                 f"{pixels}", f"  first: {printable(str(self.path))}/{self.title(self.train[0])}"]
        if self.dataset:
            verdict = "as published" if self.total == self.published else (
                f"but {self.published:,} are published: is it complete?")
            lines.append(f"  {self.dataset}: {self.total:,} images, {verdict}")
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])

    def load(self, size, skipped=None):
        """-> (train, test) ImageSets of the images that can be decoded.

        skipped: {title: why not} as an earlier load found them, perhaps empty; None: find out, by decoding every image.
        """
        self.skipped, sets = dict(skipped or {}), []
        for split in (self.train, self.test):
            if skipped:
                split = np.array([i for i in split if self.title(i) not in skipped], dtype=np.int64)
            in_memory = len(split) * 3 * size ** 2 <= IN_MEMORY_BYTES
            pixels = np.empty((len(split), 3, size, size), np.uint8) if in_memory else None
            bad = {}
            if in_memory or skipped is None:
                bad = decode_all(self.read, split, size, pixels, progress=True)
            if bad and skipped is None:
                self.skipped |= {self.title(split[at]): reason for at, reason in bad.items()}
                good = np.delete(np.arange(len(split)), list(bad))
                split, pixels, bad = split[good], pixels[good] if in_memory else None, {}
            images = ImageSet(self.labels[split], self.class_names, size, source=self, items=split)
            for at, reason in bad.items():
                pixels[at] = images.replacement(at, reason)
            images.pixels = torch.from_numpy(pixels) if in_memory else None
            sets.append(images)
        if not all(map(len, sets)):
            title, reason = next(iter(self.skipped.items()))
            raise DataError(f"{printable(str(self.path))}: too few images are left, {len(self.skipped):,} cannot be "
                            f"used, e.g. {title} ({reason}): repair them or take them out")
        return tuple(sets)


def shorter_side(image):
    """Of a path, bytes or array, in pixels; reads the header only."""
    if isinstance(image, np.ndarray):
        return min(image.shape[:2])
    with open_image(image) as opened:
        return min(opened.size)


if __name__ == "__main__":
    from extras.datasets import main
    main()
