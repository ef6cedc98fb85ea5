"""Data: every image collection becomes the same thing, uint8 tensors (B, 3, S, S) with integer labels.

    python data.py toy --out data.png          prints what is there and draws a page of it
    python data.py FOLDER --size 64
    python data.py ffhq --root /datasets       what --data ffhq would find, or how to get it

This file has the path from a file to pixels, the same for training and evaluation (`load_image`), a set of
images to take batches from (`ImageSet`), and what every form of data must provide (`Source`). The forms
themselves, from a folder to LSUN's LMDB, are subclasses of Source in extras/data_*.py. extras/datasets.py
turns the word after --data into one of them.

A new form takes two methods: __init__ lists the images, names them in self.names and calls Source.__init__;
read(i) returns one of them, as a path, bytes or an array, and is called by several threads. Then
extras/datasets.detect_format has to recognise it. Zip in extras/data_forms.py is an example.
"""

import contextlib
import functools
import io
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from engine.validate import UserError, printable, reason_of

IN_MEMORY_BYTES = 2 << 30  # a smaller set is decoded once; a larger one image by image, each time
WORKERS = min(16, os.cpu_count() or 4)
MIN_SIDE = 4  # a 1x1 file is a tracking pixel or a placeholder, not a picture
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, which starts another program
MAX_FILE_BYTES = 256 << 20  # of an image file
MAX_PIXELS = int(os.environ.get("VQLCMD_MAX_PIXELS", 50_000_000))  # of an image when it is decoded
Image.MAX_IMAGE_PIXELS = 5 * MAX_PIXELS  # Pillow refuses twice this; a large JPEG is decoded smaller
LARGE_PIXELS = 8_000_000
ONE_LARGE = threading.Lock()  # larger images are decoded one at a time: threads share the memory


# ----------------------------------------------------------------------------
# From a file to pixels: one path.

def open_image(source, size=None):
    """Path, bytes of an image file, or uint8 array (H, W[, C]) -> a Pillow image of at most MAX_PIXELS.

    Only the header is read. size: a JPEG may be decoded smaller, but no smaller than twice this.
    """
    if isinstance(source, np.ndarray):
        check_pixels(source.shape[1], source.shape[0])  # it is copied next
        return Image.fromarray(source.squeeze(2) if source.shape[2:] == (1,) else source)
    if isinstance(source, bytes):
        n_bytes = len(source)
        source = io.BytesIO(source)
    else:
        mode = os.stat(source).st_mode
        if not stat.S_ISREG(mode):  # a pipe would keep the program waiting
            raise ValueError("a directory, no file" if stat.S_ISDIR(mode) else "a pipe or a device, no file")
        n_bytes = os.path.getsize(source)
    if not 0 < n_bytes <= MAX_FILE_BYTES:
        raise ValueError("too large, 256 MB or more" if n_bytes else "empty, 0 bytes")
    image = Image.open(source, formats=FORMATS)
    # The decoder keeps all of a progressive JPEG, however small the result.
    if size and not (image.info.get("progressive") and image.width * image.height > MAX_PIXELS):
        image.draft("RGB", (2 * size, 2 * size))
    check_pixels(image.width, image.height)
    return image


def check_pixels(width, height):
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,} (VQLCMD_MAX_PIXELS)")


def load_image(source, size=None):
    """Path, bytes of an image file, or uint8 array (H, W[, 1, 3 or 4]) -> (3, size, size) uint8 array.

    Upright (EXIF), RGB, over white, first frame, centre square, antialiased resize (ours). With size None it
    keeps its own size, (3, H, W). UserError says why not.
    """
    try:
        if isinstance(source, np.ndarray) and size and size >= MIN_SIDE and source.shape == (size, size, 3):
            return source.transpose(2, 0, 1)  # nothing is left to do
        with contextlib.ExitStack() as exit_stack:
            image = exit_stack.enter_context(open_image(source, size))
            if image.width * image.height > LARGE_PIXELS:
                exit_stack.enter_context(ONE_LARGE)
            if min(image.size) < MIN_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels, a side of less than {MIN_SIDE}")
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF data, of whatever kind, beside sound pixels
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
                grey = np.asarray(image, dtype=np.float32) / 257
                image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if size:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                resample = Image.Resampling.LANCZOS if side > size else Image.Resampling.BICUBIC
                image = image.resize((size, size), resample, box=(left, top, left + side, top + side))
            return np.array(image).transpose(2, 0, 1)
    except Exception as error:  # decoders raise a dozen types on damaged files; all mean the same
        if isinstance(error, FileNotFoundError) and os.path.islink(source):
            raise UserError("a link to nothing") from error
        raise UserError(why_not(error)) from error


def why_not(error):
    """A few words for skipped.txt."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a format that is known"
    return getattr(error, "strerror", None) or reason_of(error)  # without the path


@functools.cache
def decoders():
    """Threads, not processes: Pillow decodes and resizes outside Python's lock."""
    return ThreadPoolExecutor(WORKERS, "decode")


def decode_all(read, items, size, store=None, progress=False):
    """Decodes read(i) for each i of items, and calls store(position, pixels). -> {position: why not}."""
    bad = {}

    def decode(positions):
        for at in positions:
            try:
                image = load_image(read(items[at]), size)
                if store is not None:
                    store(at, image)
            except Exception as error:  # load_image's, or the form's own on the way to the bytes
                bad[at] = why_not(error)
        return len(positions)

    n, block = len(items), 4096  # block by block: a million images are not a million waiting jobs
    chunk = max(1, min(16, n // (4 * WORKERS)))
    with tqdm(total=n, desc="decoding", unit="img", leave=False, disable=None if progress else True) as bar:
        for first in range(0, n, block):
            last = min(first + block, n)
            jobs = [range(i, min(i + chunk, last)) for i in range(first, last, chunk)]
            for done in decoders().map(decode, jobs):
                bar.update(done)
    return dict(sorted(bad.items()))


# ----------------------------------------------------------------------------
# A set of images.

class ImageSet:
    """N labelled images of S x S pixels.

    labels: (N,) int64, all 0 where there are no classes. class_names: list, empty where there are none.
    pixels: (N, 3, S, S) uint8 tensor, or None, and then images are decoded when a batch needs them:
    source.read(items[i]).
    """

    def __init__(self, labels, class_names, size, pixels=None, source=None, items=None):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names, self.size = class_names, size
        self.pixels, self.source, self.items = pixels, source, items

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """Sequence of indices -> images (B, 3, S, S) uint8."""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(indices)]
        indices = [int(i) for i in indices]
        pixels = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        bad = decode_all(self.source.read, self.items[indices], self.size, pixels.__setitem__)
        for at, reason in bad.items():
            pixels[at] = self.replacement(indices[at], reason)
        return torch.from_numpy(pixels)

    def replacement(self, i, reason):
        """Pixels (3, S, S) for image i, which was sound when it was checked: the run goes on.

        The next image of the same class that can be read takes its place.
        """
        title = self.source.title(self.items[i])
        tqdm.write(f"{title}: {reason}; it was sound before. Its neighbour takes its place")
        alike = torch.nonzero(self.labels == self.labels[i]).flatten().tolist()
        at = alike.index(i)
        for other in (alike[at + 1:] + alike[:at])[:99]:
            with contextlib.suppress(Exception):  # whatever keeps this one from being read
                return load_image(self.source.read(self.items[other]), self.size)
        raise UserError(f"{title} and its neighbours can no longer be read ({reason}): is the disk there?")


class Source:
    """A collection of images, listed but not decoded.

    name: for the run directory. class_names: list. labels: (n,) of all its images. train, test: (n,) numbers
    of the images of each split. dataset, published: its name and how many images were published, if it was
    found by name (extras/datasets.py). skipped: {title: why not}, after load.
    """

    dataset, published, note, sides = None, None, "", None
    skipped = {}  # replaced, never filled

    def __init__(self, path, class_names, labels, train, test=None):
        self.path, self.class_names, self.labels = Path(path), class_names, np.asarray(labels, np.int64)
        self.name = printable(self.path.resolve().stem if self.path.is_file() else self.path.resolve().name)
        self.total = len(train)  # as publishers count them
        if test is None:
            if len(train) < 2:
                raise UserError(f"one image in {self.path}: at least two are needed, one of them to hold out")
            every = max(20, len(train) // 2000)  # where images are sorted by class, every 20th of a class too
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
            sides, reason = [], None
            for i in self.train[::max(1, len(self.train) // at_most)][:at_most]:
                try:
                    with open_image(self.read(i)) as image:
                        sides.append(min(image.size))
                except Exception as error:  # it will be on the list of bad files
                    reason = reason or f"{self.title(i)} ({why_not(error)})"
            if not sides:
                raise UserError(f"no image in {printable(self.path)} can be read, e.g. {reason}: "
                                "repair them or take them out")
            self.sides = min(sides), int(np.median(sides)), max(sides)
        return self.sides

    def describe(self):
        """What was found, in a few lines."""
        (n_train, n_test), (low, median, high) = self.counts(), self.sizes()
        where = printable(self.path)
        used = self.labels[np.concatenate([self.train, self.test])]
        counts = np.bincount(used, minlength=len(self.class_names))
        some = [f"{name} ({count:,})" for name, count in zip(self.class_names[:8], counts, strict=False)]
        some += ["..."] if len(self.class_names) > 8 else []
        classes = f"{len(self.class_names)} classes: {', '.join(some)}" if self.class_names else "no classes"
        pixels = f"{low} px" if low == high else f"{low} to {high} px, median {median}"
        lines = [f"{where}: {n_train:,} images + {n_test:,} held out, {classes}, shorter side {pixels}",
                 f"  first: {where}/{self.title(self.train[0])}"]
        if self.dataset:
            complete = self.total == self.published
            verdict = "as published" if complete else f"but {self.published:,} are published: is it complete?"
            lines.append(f"  {self.dataset}: {self.total:,} images, {verdict}")
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)

    def load(self, size, skipped=None):
        """-> (train, test) ImageSets of the images that can be decoded.

        skipped: {title: why not} of an earlier load, perhaps empty; None: find out, by decoding every image.
        """
        self.skipped, sets = dict(skipped or {}), []
        for split in (self.train, self.test):
            if skipped:
                split = np.array([i for i in split if self.title(i) not in skipped], dtype=np.int64)
            in_memory = len(split) * 3 * size ** 2 <= IN_MEMORY_BYTES
            pixels = np.empty((len(split), 3, size, size), np.uint8) if in_memory else None
            bad = {}
            if in_memory or skipped is None:
                store = pixels.__setitem__ if in_memory else None
                bad = decode_all(self.read, split, size, store, progress=True)
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
            raise UserError(f"{printable(self.path)}: too few images are left, {len(self.skipped):,} cannot "
                            f"be used, e.g. {title} ({reason}): repair them or take them out")
        return tuple(sets)


if __name__ == "__main__":
    from extras.datasets import main
    main()
