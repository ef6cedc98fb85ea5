"""Data: every image collection becomes the same thing, uint8 tensors (B, 3, S, S) with integer labels.

    python data.py toy --out data.png          prints what is there and draws a page of it
    python data.py FOLDER --size 64
    python data.py ffhq --root /datasets       what --data ffhq would find, or how to get it

`find` turns the word after --data into a source: `toy`, drawn by this file; one of the names in DATASETS; or a path,
whose form is found by looking: a folder of images, a zip of them, LSUN's LMDB, CIFAR-10's batches, MNIST's idx files,
arrays in .npy or .npz, or a token file that train.py made. A folder is searched to any depth; its sub-folders are
classes if at least two hold images, no image lies beside them and they are more than a numbering (00000, 01000, ...).
Where there are train/ and test/ (or val/), those are the splits; elsewhere every 20th image is held out (at most about
2,000). Whatever the form, pixels are made in one place, `load_image`, for training and evaluation alike.
"""

import argparse
import difflib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import stat
import struct
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from extras.archives import LARGEST_IMAGE, open_npz, read_gzip, read_json, read_npz_array, read_tar

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS and the like, which start other programs
IN_MEMORY_BYTES = 2 << 30  # a set that is smaller than this is decoded once; a larger one image by image, each time
WORKERS = min(16, os.cpu_count() or 4)
MAX_PIXELS = 50_000_000  # decoded, per image; JPEG files may be larger, since they are decoded at a fraction
MIN_SIDE = 4  # a 1x1 file is a tracking pixel or a placeholder, not a picture
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit counts a JPEG before it is reduced; ours replaces it


class DataError(ValueError):
    """What is wrong with the data, where, and what to do: one line, or a few for a named set that is not there."""


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
            pixels[at] = self.stand_in(indices[at], reason)
        return torch.from_numpy(pixels)

    def stand_in(self, i, reason):
        """Pixels (3, S, S) for image i, which has become unreadable since it was checked: a run under way goes on.

        The next image that can be read takes its place. Images are sorted by class, so the label mostly holds.
        """
        tqdm.write(f"{self.source.title(self.items[i])}: {reason}; it was sound before. Its neighbour takes its place")
        for other in range(i + 1, i + 100):
            try:
                return load_image(self.source.read(self.items[other % len(self)]), self.size)
            except Exception:  # whatever kept it from being read
                continue
        raise DataError(f"{self.source.title(self.items[i])} and the 99 images after it can no longer be read "
                        f"({reason}): is the disk still there?")


# ----------------------------------------------------------------------------
# From a file to pixels: one path.

def load_image(source, size=None):
    """Path, bytes of an image file, or uint8 array (H, W[, 1, 3 or 4]) -> (3, size, size) uint8 array.

    Upright (EXIF), RGB, over white, first frame, centre square, antialiased resize (ours). With size None it keeps its
    own size, (3, H, W). DataError says why not.
    """
    try:
        if isinstance(source, np.ndarray):
            opened = Image.fromarray(source.squeeze(2) if source.shape[2:] == (1,) else source)
        else:
            if not isinstance(source, bytes) and stat.S_ISFIFO(os.stat(source).st_mode):
                raise ValueError("a pipe, no file")  # opening it would wait for ever
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        with opened as image:
            if size:
                image.draft("RGB", (2 * size, 2 * size))  # a JPEG may be decoded smaller, never below twice the size
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            if min(image.size) < MIN_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels, a side of less than {MIN_SIDE}")
            image.load()
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except Exception:  # damaged EXIF data, of whatever kind, beside sound pixels
                pass
            if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
                image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype("u1"))
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


def printable(text):
    """File names may hold line breaks, or bytes that are no UTF-8; neither may break a list or a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
# Forms. Each lists its images when it is made, and reads one by its number; the rest they share.

class Source:
    """A collection of images, listed but not decoded.

    name: for the run directory. class_names: list. labels: (n,) of all its images. train, test: (n,) numbers of the
    images of each split. dataset: its name in DATASETS, if found by that. skipped: {title: why not}, after load.
    """
    dataset, note, sides, skipped = None, "", None, {}

    def __init__(self, path, class_names, labels, train, test=None):
        self.path, self.class_names, self.labels = Path(path), class_names, np.asarray(labels, np.int64)
        self.name = printable(self.path.resolve().stem if self.path.is_file() else self.path.resolve().name)
        self.total = len(train)  # as publishers count them
        if test is None:
            if len(train) < 2:
                raise DataError(f"one image in {path}: at least two are needed, one of them to hold out")
            every = max(20, len(train) // 2000)  # sorted by class: every 20th is also every 20th of a class
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
            expected = DATASETS[self.dataset]["count"]
            verdict = "as published" if self.total == expected else f"but {expected:,} are published: is it complete?"
            lines.append(f"  {self.dataset}: {self.total:,} images, {verdict}")
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])

    def load(self, size, skipped=None):
        """-> (train, test) ImageSets of the images that can be decoded.

        skipped: {title: why not} as an earlier load found them; None: find out, by decoding every image once.
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
                pixels[at] = images.stand_in(at, reason)
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
    if not isinstance(image, bytes) and stat.S_ISFIFO(os.stat(image).st_mode):
        raise ValueError("a pipe, no file")
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
        return min(opened.size)


def arrange(names, where):
    """Names like "train/cat/1.png", sorted -> class names, labels (n,), numbers of train and test (or None), a note."""
    def top(name):
        return name.split("/", 1)[0] if "/" in name else ""

    def classes_of(names):
        tops = {top(name) for name in names}
        return [] if "" in tops or len(tops) < 2 or all(re.fullmatch(r"\d{5}", t) for t in tops) else sorted(tops)

    while len({top(name) for name in names}) == 1 and top(names[0]):  # one folder around everything says nothing
        names = [name.split("/", 1)[1] for name in names]
    tops = {t.lower(): t for t in {top(name) for name in names}}
    split = next((tops[t] for t in ("test", "val", "valid", "validation") if t in tops), None)
    train, test, note = range(len(names)), None, ""
    if "train" in tops:
        train = [i for i, name in enumerate(names) if top(name) == tops["train"]]
        if split is not None:
            test = [i for i, name in enumerate(names) if top(name) == split]
        names = [name.split("/", 1)[-1] for name in names]
    class_names = classes_of([names[i] for i in train])
    if test is not None and class_names:
        found = {top(names[i]) for i in test}
        unknown = sorted(found - set(class_names))
        if found == {""}:  # as ImageNet's val/ comes
            test, note = None, f"{split}/ has no class sub-folders and is left alone; held-out images are of train/"
        elif unknown:
            raise DataError(f"{where}/{split} has the class {unknown[0]!r}, {where}/{tops['train']} does not: both "
                            "must have the same sub-folders")
    numbers = {name: i for i, name in enumerate(class_names)}
    return [printable(c) for c in class_names], [numbers.get(top(name), 0) for name in names], train, test, note


def stylegan_labels(text, names, where):
    """dataset.json of StyleGAN's dataset_tool -> class names and labels (n,); no classes where its labels are null."""
    try:
        numbers = json.loads(text)["labels"]
        if numbers is None:
            return [], [0] * len(names)
        numbers = {name: int(label) for name, label in numbers}
        return [str(c) for c in range(max(numbers.values()) + 1)], [numbers[name] for name in names]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}/dataset.json has no whole-number label for every image ({error}): make it again "
                        "with dataset_tool, or take it away") from error


def no_images(where, others):
    endings = sorted({os.path.splitext(name)[1].lower() or os.path.basename(name) for name in others})
    held = f"only files like {printable(', '.join(endings[:4]))}" if endings else "no files"
    return DataError(f"no images in {where}: it holds {held}; expected files that end in "
                     f"{', '.join(sorted(EXTENSIONS))}")


class Folder(Source):
    """Image files below a folder, at any depth; hidden ones and __MACOSX are left out, links are followed."""

    def __init__(self, path):
        self.names, others, seen = [], [], set()
        for directory, subfolders, files in os.walk(path, followlinks=True):
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:  # a link back up would never end
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(d for d in subfolders if not d.startswith((".", "__MACOSX")))
            base = os.path.relpath(directory, path).replace(os.sep, "/") + "/"
            base = "" if base == "./" else base
            found = [base + f for f in files if not f.startswith(".")]
            images = [name for name in found if os.path.splitext(name)[1].lower() in EXTENSIONS]
            self.names += images
            others += found if not images else []
            if not files and not subfolders and os.path.splitext(directory)[1].lower() in EXTENSIONS:
                self.names.append(base[:-1])  # an empty directory x.png: somebody took it for an image
        if not self.names:
            raise no_images(path, others)
        self.names.sort(key=lambda name: name.replace("/", "\0"))  # folder by folder
        class_names, labels, train, test, self.note = arrange(self.names, path)
        if os.path.exists(os.path.join(path, "dataset.json")):
            text = Path(path, "dataset.json").read_text()
            class_names, labels = stylegan_labels(text, self.names, path)
        super().__init__(path, class_names, labels, train, test)

    def read(self, i):
        return os.path.join(self.path, self.names[i])


class Zip(Source):
    """Images in a zip, read without unpacking; StyleGAN's dataset_tool puts labels beside them."""

    def __init__(self, path):
        labelled = None
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if not m.is_dir() and "__MACOSX" not in m.filename
                           and not os.path.basename(m.filename).startswith(".")]
                images = [m for m in members if os.path.splitext(m.filename)[1].lower() in EXTENSIONS]
                if "dataset.json" in archive.namelist():
                    if archive.getinfo("dataset.json").file_size > LARGEST_IMAGE:
                        raise DataError(f"{path}: its dataset.json unpacks to more than {LARGEST_IMAGE:,} bytes")
                    labelled = archive.read("dataset.json")
        except (OSError, zipfile.BadZipFile, RuntimeError) as error:
            raise DataError(f"{path} cannot be read as a zip ({error}): fetch or make it again") from error
        if not images:
            raise no_images(path, [m.filename for m in members])
        if any(m.flag_bits & 1 for m in images):
            raise DataError(f"{path} is encrypted: unpack it and give the folder")
        images.sort(key=lambda m: m.filename.replace("/", "\0"))
        self.names = [m.filename for m in images]
        # Five numbers an image, not zipfile's objects: a million of those would be a gigabyte.
        self.places = np.array([(m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC)
                                for m in images], np.int64)
        class_names, labels, train, test, self.note = arrange(self.names, path)
        if labelled is not None:
            class_names, labels = stylegan_labels(labelled, self.names, path)
        super().__init__(path, class_names, labels, train, test)

    def read(self, i):
        offset, packed, size, method, checksum = self.places[i].tolist()
        if max(packed, size) > LARGEST_IMAGE:
            raise DataError(f"it unpacks to {size:,} bytes, more than {LARGEST_IMAGE:,}")
        with open(self.path, "rb") as file:  # its own handle: threads read side by side
            file.seek(offset)
            lengths = struct.unpack("<HH", file.read(30)[26:])  # of the name and of the extra field
            file.seek(sum(lengths), os.SEEK_CUR)
            content = file.read(packed)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-15).decompress(content, size + 1)
        elif method != zipfile.ZIP_STORED:
            raise DataError(f"packed by method {method}, neither stored nor deflated")
        if zlib.crc32(content) != checksum:
            raise DataError("its checksum in the zip differs")
        return content


@functools.cache
def open_lmdb(path):
    """Read-only and without a lock file: it may lie on a medium that cannot be written. One per process and path."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError(f"{path} is an LMDB and the package lmdb is not installed: pip install lmdb") from error
    try:
        return lmdb.open(path, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"{path} cannot be opened as an LMDB ({error}): fetch or unpack it again") from error


class Lmdb(Source):
    """LSUN's own archives: a directory NAME_lmdb with data.mdb, in which keys are names and values image files."""

    def __init__(self, path, test_path=None):
        paths = [path] if test_path is None else [path, test_path]
        self.parts = [open_lmdb(str(p.resolve())) for p in paths]
        self.names, ends = [], []
        for part in self.parts:
            with part.begin() as transaction:
                self.names += transaction.cursor().iternext(keys=True, values=False)
            ends.append(len(self.names))
        if not ends[0] or ends[-1] == ends[0] and test_path is not None:
            raise DataError(f"{path} is an empty LMDB: fetch or unpack it again")
        test = None if test_path is None else range(ends[0], ends[1])
        super().__init__(path, [], np.zeros(ends[-1]), range(ends[0]), test)

    def read(self, i):
        with self.parts[int(i >= self.total)].begin() as transaction:
            return transaction.get(self.names[i])

    def title(self, i):
        return printable(self.names[i].decode("utf-8", "backslashreplace"))


class Arrays(Source):
    """Images that come as uint8 arrays. splits: one or two of (array (n, H, W[, C]), labels (n,) or None)."""

    def __init__(self, path, splits, class_names=None):
        self.arrays = [array for array, _ in splits]
        n = [len(array) for array in self.arrays]
        labels = np.concatenate([np.zeros(len(a)) if given is None else np.asarray(given).ravel()
                                 for a, given in splits]).astype(np.int64)
        if not all(n) or len(labels) != sum(n) or labels.min() < 0:
            raise DataError(f"{path}: {len(labels):,} labels for {sum(n):,} images, or labels below 0: make it again")
        if class_names is None:
            class_names = [] if splits[0][1] is None else [str(c) for c in range(labels.max() + 1)]
        super().__init__(path, class_names, labels, range(n[0]), range(n[0], sum(n)) if len(n) == 2 else None)

    def read(self, i):
        n = len(self.arrays[0])
        return np.asarray(self.arrays[0][i] if i < n else self.arrays[1][i - n])

    def title(self, i):
        return f"image {i}"


def as_images(array, where):
    """(n, H, W), (n, H, W, C) or (n, C, H, W) uint8 with C of 1, 3 or 4 -> the first or the second of these."""
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(f"{where} has shape {array.shape} of {array.dtype}: expected uint8 of (n, H, W), (n, H, W, C) "
                        "or (n, C, H, W)")
    if array.ndim == 3 or array.shape[3] in (1, 3, 4):
        return array
    if array.shape[1] in (1, 3, 4):
        return array.transpose(0, 2, 3, 1)
    raise DataError(f"{where} has shape {array.shape}: none of its axes is 1, 3 or 4 colours")


def read_arrays(path):
    """.npy (memory-mapped), or .npz with images and perhaps labels, and perhaps test images, under common names."""
    try:
        if path.suffix == ".npy":
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
            return Tokens(path, loaded) if loaded.dtype.names else Arrays(path, [(as_images(loaded, path), None)])
        with open_npz(path) as loaded:
            arrays = {name: read_npz_array(loaded, name) for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as an array ({' '.join(str(error).split())}): make it again") from error
    splits = []
    for images, labels in ((("images", "x_train", "data", "x", "arr_0"), ("labels", "y_train", "y", "arr_1")),
                           (("test_images", "x_test"), ("test_labels", "y_test"))):
        images, labels = (next((name for name in names if name in arrays), None) for names in (images, labels))
        if images is not None:
            splits.append((as_images(arrays[images], f"{path}: {images}"), arrays.get(labels)))
    if not splits or "x_test" in arrays and len(splits) == 1:
        raise DataError(f"{path} holds {', '.join(arrays)}: expected images, and perhaps labels, test_images and "
                        "test_labels")
    return Arrays(path, splits)


def read_idx(folder):
    """MNIST's four files, gzipped or not: a header of two zeros, type 8 (uint8), the rank and the sizes; then bytes."""
    arrays = []
    for stem in ("train-images?idx3", "train-labels?idx1", "t10k-images?idx3", "t10k-labels?idx1"):
        path = next(iter(sorted(folder.glob(stem + "-ubyte")) + sorted(folder.glob(stem + "-ubyte.gz"))), None)
        if path is None:
            raise DataError(f"{folder} lacks {stem.replace('?', '-')}-ubyte(.gz): put MNIST's four files there")
        try:
            content = read_gzip(path, 1 << 30)
            shape = struct.unpack(f">{content[3]}I", content[4:4 + 4 * content[3]])
            if content[:3] != b"\0\0\x08" or content[3] != int(stem[-1]):
                raise ValueError("its header is another's")
            arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape))
        except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error) as error:
            raise DataError(f"{path} is no complete idx file ({error}): fetch it again") from error
    return Arrays(folder, [arrays[:2], arrays[2:]])


CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class ArraysOnly(pickle.Unpickler):
    """Unpickles CIFAR-10's dicts of arrays and refuses everything else, since a pickle may run any program."""
    allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
               **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0]
                  for core in ("core", "_core")}}

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return self.allowed[module, name]


def read_cifar(path):
    """CIFAR-10's five batches and test batch, python (pickles) or binary, in a folder or in the .tar.gz as it comes."""
    try:
        if path.is_dir():
            files = {p.name: p.read_bytes() for p in path.iterdir() if "_batch" in p.name and p.is_file()}
        else:
            files = read_tar(path, lambda name: "_batch" in name)
        ending = ".bin" if "test_batch.bin" in files else ""
        parts = []
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            content = files[name + ending]
            if ending:  # rows of a label and 3,072 bytes
                rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
                parts.append((rows[:, 1:], rows[:, 0]))
            else:
                batch = ArraysOnly(io.BytesIO(content), encoding="bytes").load()
                parts.append((batch[b"data"], np.asarray(batch[b"labels"])))
    except KeyError as error:
        raise DataError(f"{path} lacks {error}: fetch CIFAR-10 again") from error
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, pickle.UnpicklingError, TypeError) as error:
        raise DataError(f"{path} cannot be read as CIFAR-10's batches ({error}): fetch them again") from error
    images, labels = zip(*parts, strict=True)
    images = [np.asarray(part).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for part in images]
    return Arrays(path, [(np.concatenate(images[:5]), np.concatenate(labels[:5])), (images[5], labels[5])],
                  CIFAR_CLASSES)


class Tokens(Source):
    """tokens.npy of an earlier run: no images, so its tokenizer is needed too. config.json beside it names classes."""

    def __init__(self, path, rows):
        if rows.dtype.names != ("x", "label", "test") or (rows["label"] < 0).any():
            raise DataError(f"{path} is no complete token file of train.py: finish its run first")
        config = path.parent / "config.json"
        n_classes = int(rows["label"].max()) + 1
        class_names = [str(c) for c in range(n_classes)] if n_classes > 1 else []
        if config.exists():
            class_names = read_json(config)["classes"]
        super().__init__(path, class_names, rows["label"], *(np.flatnonzero(rows["test"] == t) for t in (False, True)))
        self.name, self.tokens_per_image = f"{path.resolve().parent.name}-tokens", rows["x"].shape[1]

    def describe(self):
        classes = f"{len(self.class_names)} classes" if self.class_names else "no classes"
        return (f"{self.path}: {self.tokens_per_image} tokens of each of {len(self.train):,} images + "
                f"{len(self.test):,} held out, {classes}")

    def load(self, size, skipped=None):
        raise DataError(f"{self.path} holds tokens, not images: give the images")


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
        sets = []
        for n, seed in ((self.n_train, 0), (self.n_test, 1)):
            pixels, labels = draw_toy(n, seed, size)
            sets.append(ImageSet(labels, self.class_names, size, pixels))
        return tuple(sets)


# ----------------------------------------------------------------------------
# Names. Facts about published sets; nothing of them is in this repository.

LSUN = dict(
    licence="none stated; its authors offer it for research, the pictures are their photographers'",
    where="https://www.yf.io/p/lsun")
DATASETS = {
    "ffhq": dict(
        what="Flickr-Faces-HQ, 70,000 aligned portraits of 1024 x 1024 pixels", count=70000,
        licence="CC BY-NC-SA 4.0 (NVIDIA); each photograph under its own licence, see the set's ffhq-dataset-v2.json",
        where="https://github.com/NVlabs/ffhq-dataset",
        command="git clone https://github.com/NVlabs/ffhq-dataset && cd ffhq-dataset && "
                "python download_ffhq.py --images",
        layout="00000/00000.png to 69000/69999.png, or a zip of them, at 1024 pixels or smaller",
        also=("images1024x1024", "ffhq-dataset/images1024x1024", "ffhq.zip")),
    "lsun-churches": LSUN | dict(
        what="LSUN church_outdoor, 126,227 photographs of churches", count=126227,
        command="curl -LO http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip && "
                "unzip church_outdoor_train_lmdb.zip",
        layout="church_outdoor_train_lmdb/data.mdb (pip install lmdb), or the images in a folder or a zip",
        also=("church_outdoor_train_lmdb", "lsun/church_outdoor_train_lmdb", "lsun-churches.zip")),
    "lsun-bedrooms": LSUN | dict(
        what="LSUN bedroom, 3,033,042 photographs of bedrooms, 43 GB", count=3033042,
        command="curl -LO http://dl.yf.io/lsun/scenes/bedroom_train_lmdb.zip && unzip bedroom_train_lmdb.zip",
        layout="bedroom_train_lmdb/data.mdb (pip install lmdb), or the images in a folder or a zip",
        also=("bedroom_train_lmdb", "lsun/bedroom_train_lmdb", "lsun-bedrooms.zip")),
    "imagenet": dict(
        what="ImageNet (ILSVRC 2012), 1,281,167 photographs of 1,000 classes", count=1281167,
        licence="non-commercial research and education only, granted to those who register",
        where="https://image-net.org/download-images",
        command="mkdir train && cd train && tar xf ../ILSVRC2012_img_train.tar && "
                "for f in *.tar; do mkdir ${f%.tar} && tar xf $f -C ${f%.tar} && rm $f; done",
        layout="train/n01440764/n01440764_10026.JPEG and so on, 1,000 folders; val/ with the same may lie beside",
        also=("ILSVRC2012", "ILSVRC/Data/CLS-LOC", "imagenet.zip")),
    "cifar10": dict(
        what="CIFAR-10, 50,000 + 10,000 photographs of 32 x 32 pixels in 10 classes", count=50000,
        licence="none stated; its author asks for a citation (Krizhevsky 2009)",
        where="https://www.cs.toronto.edu/~kriz/cifar.html",
        layout="cifar-10-python.tar.gz or cifar-10-binary.tar.gz, as they come or unpacked",
        also=("cifar-10-python.tar.gz", "cifar-10-batches-py", "cifar-10-binary.tar.gz", "cifar-10-batches-bin"),
        urls=["https://www.cs.toronto.edu/~kriz/"],
        files={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}),  # MD5 as on the page named above
    "fashion-mnist": dict(
        what="Fashion-MNIST, 60,000 + 10,000 grey pictures of clothes, 28 x 28 pixels, 10 classes", count=60000,
        licence="MIT (Zalando)",
        where="https://github.com/zalandoresearch/fashion-mnist",
        layout="train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-..., .gz or not",
        also=("FashionMNIST/raw",),
        classes=["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"],
        urls=["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
        files={"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",  # MD5 as in its README
               "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
               "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
               "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}),
    "mnist": dict(
        what="MNIST, 60,000 + 10,000 grey handwritten digits, 28 x 28 pixels", count=60000,
        licence="CC BY-SA 3.0 (LeCun, Cortes)",
        where="http://yann.lecun.com/exdb/mnist",
        layout="train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-..., .gz or not",
        also=("MNIST/raw",),
        urls=["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
        files={"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",  # MD5 as in torchvision's mnist.py
               "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
               "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
               "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}),
}


def download(name):
    """Fetches the files of a set into $VQLCMD_DATA/NAME or data/NAME, those that are not there. -> the folder."""
    folder = Path(os.environ.get("VQLCMD_DATA", "data")).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, md5 in DATASETS[name]["files"].items():
        if not (folder / file).exists():
            fetch([url + file for url in DATASETS[name]["urls"]], folder / file, md5, "name their folder with --root")
    return folder


def fetch(urls, path, checksum, instead):
    """Downloads the first of some equal URLs that answers. What is there of path.part is not fetched again.

    path appears when it is complete and its checksum is right (MD5 or SHA-256, in hexadecimal). DataError otherwise,
    which ends with what to do instead; the part is kept unless it is wrong.
    """
    partial, tries = path.with_name(path.name + ".part"), 3
    for url in [url for url in urls for _ in range(tries)]:
        have = partial.stat().st_size if partial.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                if answer.status != 206:  # no part of it, but all
                    have = 0
                total = have + int(answer.headers.get("Content-Length", 0)) or None
                with open(partial, "ab" if have else "wb") as file, tqdm(
                        total=total, initial=have, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                    while block := answer.read(1 << 18):
                        file.write(block)
                        bar.update(len(block))
            if total is None or partial.stat().st_size >= total:
                break
            problem = "the connection broke"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing after the part: it is complete
                break
            problem = f"HTTP {error.code}"
        except (OSError, ValueError) as error:
            problem = str(error)
    else:
        raise DataError(f"cannot download {url} ({problem}): give the same command again, or fetch {path.name} "
                        f"elsewhere and put it into {path.parent}, or {instead}")
    digest = hashlib.new("md5" if len(checksum) == 32 else "sha256")
    with open(partial, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != checksum:
        partial.unlink()
        raise DataError(f"{url} has the checksum {digest.hexdigest()}, not {checksum}: it was damaged on the way, or "
                        f"changed; give the same command again, or put the right file into {path.parent}")
    partial.replace(path)


# ----------------------------------------------------------------------------
# From a word to a source.

def find(name, root=None):
    """The source behind --data: an object with name, class_names, counts(), sizes(), describe() and load(size).

    name: toy, a name in DATASETS, or a path. root: where named sets lie; either a folder of them or the set itself.
    DataError if there is nothing by this name, or nothing in it.
    """
    if name == "toy":
        return Toy()
    if name in DATASETS:
        return find_named(name, root)
    path = Path(name).expanduser()
    path = path if root is None or path.exists() else Path(root).expanduser() / path
    if path.exists():
        return look(path)
    parent = path.parent if path.parent.is_dir() else Path(".")
    near = difflib.get_close_matches(path.name, ["toy", *DATASETS, *(p.name for p in parent.iterdir())], 1)
    near = "" if not near else f" Did you mean {near[0] if near[0] in (*DATASETS, 'toy') else parent / near[0]}?"
    raise DataError(f"--data {name}: no such folder or file, and no name of a data set; there are toy, "
                    f"{', '.join(DATASETS)}.{near}")


def find_named(name, root):
    """A set of DATASETS: looked for below --root, $VQLCMD_DATA and data/, and here; else downloaded, or a message."""
    facts, places = DATASETS[name], []
    for base in [root] if root is not None else [os.environ.get("VQLCMD_DATA"), "data", "."]:
        if base is not None:
            places += [Path(base).expanduser() / word for word in (name, *facts["also"])]
    if root is not None:
        places.append(Path(root).expanduser())
    problem, source = None, None
    for path in places:
        if path.exists():
            try:
                source = look(path)
                break
            except DataError as error:  # an empty folder, or a download that is not complete
                problem = problem or error
    if source is None and "files" in facts and root is None:
        source = look(download(name))
    if source is None and problem is not None:
        raise problem
    if source is None:
        command = facts.get("command") or "the same command without --root downloads it"
        raise DataError("\n".join([
            f"--data {name}: not found in {', '.join(map(str, dict.fromkeys(places)))}",
            f"  what       {facts['what']}", f"  licence    {facts['licence']}",
            f"  published  {facts['where']}", f"  get it     {command}",
            f"  layout     {facts['layout']}", f"  then       --root FOLDER, or VQLCMD_DATA=FOLDER, or data/{name}"]))
    source.name = source.dataset = name
    source.class_names = facts.get("classes", source.class_names)
    return source


def look(path):
    """Path -> source, by what lies there."""
    archives = ["cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"]
    if path.is_file():
        if path.name in archives:
            return read_cifar(path)
        if path.suffix in (".npy", ".npz"):
            return read_arrays(path)
        if path.suffix == ".zip":
            return Zip(path)
        raise DataError(f"--data {path} is a file of no form that is known: give a folder of images, a .zip of them, "
                        ".npy, .npz, or the folder of an LMDB or of MNIST's or CIFAR-10's files")
    if (path / "data.mdb").is_file():
        test = path.with_name(path.name.replace("_train_", "_val_"))
        return Lmdb(path, test if test != path and (test / "data.mdb").is_file() else None)
    for inside in sorted(path.glob("*_train_lmdb")):
        return look(inside)
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        if (folder / "test_batch").is_file() or (folder / "test_batch.bin").is_file():
            return read_cifar(folder)
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        if any(folder.glob("train-images?idx3-ubyte*")):
            return read_idx(folder)
    inside = [p for p in path.iterdir() if p.suffix in (".zip", ".npz", ".npy") or p.name in archives]
    if len(inside) == 1 and len(list(path.iterdir())) == 1:
        return look(inside[0])
    return Folder(path)


def read_skipped(path):
    """skipped.txt -> {title: why not}; None if there is none, that is, if the images were not checked yet."""
    if path.exists():
        return dict(line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())


def write_skipped(path, skipped):
    """One line per image that cannot be used: where it lies, a tab, why not. Empty if all are sound."""
    path.write_text("".join(f"{title}\t{reason}\n" for title, reason in skipped.items()), encoding="utf-8")


# ----------------------------------------------------------------------------
# Pictures of images.

def contact_sheet(images, path, columns=8):
    """A page of an ImageSet: a row for each of up to 16 classes; or, without classes, 64 images from all over it."""
    names = images.class_names[:16]
    rows = [torch.nonzero(images.labels == c).flatten()[:columns].tolist() for c in range(len(names))]
    if not rows or min(map(len, rows)) < columns:  # no classes, or too few images for a row of each
        rows, names = [np.linspace(0, len(images) - 1, min(len(images), 8 * columns)).astype(int).tolist()], None
    save_grid(images.batch(sum(rows, [])), path, columns, row_labels=names)


def grid_page(images, columns, scale=None, row_labels=None, column_labels=None):
    """uint8 images (n, 3, H, W) on a page, a Pillow image, row by row, 2 pixels apart.

    scale: whole-number enlargement without smoothing (default: tiles of about 64 pixels). row_labels, column_labels:
    one word a row or column.
    """
    n, _, height, width = images.shape
    scale = scale or max(1, round(64 / width))
    rows, tile_h, tile_w = -(-n // columns), height * scale + 2, width * scale + 2
    font = ImageFont.load_default(15)
    margin = 0 if not row_labels else 12 + max(int(font.getlength(str(word))) for word in row_labels)
    top = 20 if column_labels else 0
    page = Image.new("RGB", (margin + 2 + columns * tile_w, top + 2 + rows * tile_h), "white")
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        page.paste(tile, (margin + 2 + i % columns * tile_w, top + 2 + i // columns * tile_h))
    pen = ImageDraw.Draw(page)
    for row, word in enumerate(row_labels or []):
        pen.text((6, top + 2 + (row + 0.5) * tile_h), str(word), fill="black", font=font, anchor="lm")
    for column, word in enumerate(column_labels or []):
        pen.text((margin + 2 + (column + 0.5) * tile_w, 12), str(word), fill="black", font=font, anchor="mm")
    return page


def save_grid(images, path, columns, **options):
    """Writes the page of grid_page, with its options, as a PNG; the old file stays until it is complete."""
    page, path = grid_page(images, columns, **options), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    page.save(partial, "png")
    partial.replace(path)


def main():
    parser = argparse.ArgumentParser(description="Show what --data would train on.")
    parser.add_argument("data", help=f"toy, {', '.join(DATASETS)}, or a path: folder, zip, LMDB, arrays")
    parser.add_argument("--root", help="where the named set lies (default: $VQLCMD_DATA, then data/)")
    parser.add_argument("--size", type=int, help="pixels a side (default: the toy's own, or 64)")
    parser.add_argument("--out", default="data.png", help="the page of images to write")
    args = parser.parse_args()
    try:
        source = find(args.data, args.root)
        print(source.describe())
        images, _ = source.load(args.size or (TOY_SIZE if source.name == "toy" else 64))
        contact_sheet(images, args.out)
    except DataError as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    for title, reason in source.skipped.items():
        print(f"cannot be used: {title}: {reason}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
