"""Forms of data in arrays: .npy and .npz, MNIST's idx files, what data.py --save wrote, and tokens of an
earlier run. Called by extras/datasets.py; CIFAR-10's batches are in extras/data_cifar.py.
"""

import gzip
import math
import zipfile

import numpy as np

from data import MIN_SIDE, Source
from engine.validate import UserError, check_file, check_unpacked, printable, read_array, read_json, reading

MAX_CLASSES = 100_000
MAX_ROWS = 10_000_000  # of a file whose rows are all looked at; a file of holes may claim any number
IMAGES = ("images", "train_images", "x_train", "data", "x", "arr_0")  # what an .npz may call them
SAVED = ("image", "label", "split")  # fields of a row of data.py --save
TRAINING, HELD_OUT = 1, 2  # values of split; 0 if the image could not be decoded


def check_labels(where, labels, n, class_names=None):
    """n labels, whole numbers from 0 -> ((n,) int64, class names: those given, or the numbers)."""
    labels = np.ravel(labels)
    most = MAX_CLASSES if class_names is None else max(len(class_names), 1)
    whole = labels.dtype.kind in "biuf" and (labels == np.round(labels)).all()
    if not n or len(labels) != n or not whole or labels.min() < 0 or labels.max() >= most:
        raise UserError(f"{where}: {len(labels):,} labels for {n:,} images, like "
                        f"{printable(labels[:3])[:99]}: expected one each, whole numbers from 0 to "
                        f"{most - 1:,}")
    labels = labels.astype(np.int64)
    return labels, [str(c) for c in range(labels.max() + 1)] if class_names is None else class_names


def classes_beside(path, labels, facts):
    """Class names of labels: `classes` in the JSON file `facts`, if it is there, or else their numbers."""
    names = read_json(facts).get("classes") if facts.exists() else None
    if names is not None:
        with reading(f"{facts}: classes"):
            names = [printable(name) for name in names]
    _, class_names = check_labels(f"{path} and {facts.name}", labels, len(labels), names)
    return class_names if names is not None or len(class_names) > 1 else []


# ----------------------------------------------------------------------------
# Images.

class Arrays(Source):
    """Images that come as uint8 arrays. splits: one or two of (array (n, H, W[, C]), labels (n,) or None)."""

    def __init__(self, path, splits, class_names=None):
        self.arrays = [array for array, _ in splits]
        n = [len(array) for array in self.arrays]
        labelled = splits[0][1] is not None
        if not labelled:
            class_names = []
        with reading(path):
            labels = [np.zeros(len(a), int) if given is None else np.ravel(given) for a, given in splits]
            labels, class_names = check_labels(path, np.concatenate(labels), sum(n), class_names)
        super().__init__(path, class_names, labels, range(n[0]), range(n[0], sum(n)) if len(n) == 2 else None)

    def read(self, i):
        n = len(self.arrays[0])
        return np.asarray(self.arrays[0][i] if i < n else self.arrays[1][i - n])

    def title(self, i):
        return f"image {i}"


def as_images(array, where):
    """(n, H, W), (n, H, W, C) or (n, C, H, W) uint8, C of 1, 3 or 4 -> the first or the second of these."""
    if array.ndim == 4 and array.shape[3] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    channels = array.shape[3] if array.ndim == 4 else 1
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or channels not in (1, 3, 4):
        raise UserError(f"{where} has shape {array.shape} of {array.dtype}: expected uint8 of (n, H, W), "
                        "(n, H, W, C) or (n, C, H, W) with C of 1, 3 or 4 colours")
    if not len(array) or min(array.shape[1:3]) < MIN_SIDE:
        raise UserError(f"{where} has {len(array):,} images of {array.shape[2]} x {array.shape[1]} pixels: "
                        f"expected some, of at least {MIN_SIDE} a side")
    return array


def read_arrays(path):
    """.npy (memory-mapped), or .npz with images and perhaps labels and test images, under common names."""
    if path.suffix == ".npz":
        return read_npz(path)
    loaded = read_array(path)
    if loaded.dtype.names:
        return (SavedImages if loaded.dtype.names == SAVED else TokenFile)(path, loaded)
    return Arrays(path, [(as_images(loaded, path), None)])


def read_npz(path):
    with reading(path), zipfile.ZipFile(check_file(path)) as archive:
        check_unpacked(path, sum(member.file_size for member in archive.infolist()), path.stat().st_size)
    with reading(path), np.load(path, allow_pickle=False) as arrays:
        def first_of(*names):
            return next((arrays[name] for name in names if name in arrays.files), None)

        images, test_images = first_of(*IMAGES), first_of("test_images", "x_test")
        if images is None:
            raise UserError(f"{path} holds {printable(', '.join(arrays.files))[:200]}: expected images, and "
                            "perhaps labels, test_images and test_labels")
        splits = [(as_images(images, path), first_of("labels", "train_labels", "y_train", "y", "arr_1"))]
        if test_images is not None:
            splits.append((as_images(test_images, path), first_of("test_labels", "y_test")))
    return Arrays(path, splits)


def read_idx(folder):
    """MNIST's four files, gzipped or not."""
    arrays = []
    for stem in ("train-images?idx3", "train-labels?idx1", "t10k-images?idx3", "t10k-labels?idx1"):
        found = sorted(folder.glob(stem + "-ubyte")) + sorted(folder.glob(stem + "-ubyte.gz"))
        if not found:
            raise UserError(f"{folder} lacks {stem.replace('?', '-')}-ubyte(.gz): put all four files there")
        with reading(found[0], "fetch it again"):
            arrays.append(read_idx_file(found[0], rank=int(stem[-1])))
    return Arrays(folder, [(as_images(arrays[i], folder), arrays[i + 1]) for i in (0, 2)])


def read_idx_file(path, rank):
    """The uint8 array in an idx file: two zeros, 8 for uint8, the rank; sizes, 4 bytes each; the values."""
    with (gzip.open if path.suffix == ".gz" else open)(check_file(path), "rb") as file:
        if file.read(4) != bytes([0, 0, 8, rank]):
            raise ValueError("it has another header")
        shape = np.frombuffer(file.read(4 * rank), ">u4").tolist()
        check_unpacked(path, math.prod(shape), path.stat().st_size)
        content = file.read(math.prod(shape) + 1)  # one more: it must end there
    return np.frombuffer(content, np.uint8).reshape(shape)


class SavedImages(Source):
    """What data.py --save wrote: rows of image (3, S, S) uint8, label, split. NAME.json names the classes."""

    def __init__(self, path, rows):
        fields = [(rows.dtype[name].base, rows.dtype[name].shape) for name in SAVED]
        size = max(fields[0][1], default=0)
        if rows.ndim != 1 or len(rows) > MAX_ROWS or size < MIN_SIDE or (
                fields != [(np.uint8, (3, size, size)), (np.int32, ()), (np.uint8, ())]):
            raise UserError(f"{path} is no file of data.py --save: make it again")
        splits = [np.flatnonzero(rows["split"] == split) for split in (TRAINING, HELD_OUT)]
        if not all(map(len, splits)):
            raise UserError(f"{path} is not complete: give the command again that makes it")
        class_names = classes_beside(path, rows["label"], path.with_suffix(".json"))
        self.images = rows["image"]
        super().__init__(path, class_names, rows["label"], *splits)

    def read(self, i):
        return self.images[i].transpose(1, 2, 0)

    def title(self, i):
        return f"image {i}"


# ----------------------------------------------------------------------------
# Tokens.

def check_rows(path, rows):
    """rows, if they are tokens of train.py: (n,) of x (N,) uint16, label int32, test bool, of both splits."""
    fields = {name: (rows.dtype[name].base, rows.dtype[name].ndim) for name in rows.dtype.names or ()}
    expected = {"x": (np.uint16, 1), "label": (np.int32, 0), "test": (np.bool_, 0)}
    valid = rows.ndim == 1 and len(rows) <= MAX_ROWS and fields == expected and rows["x"].size
    if not valid or not rows["test"].any() or rows["test"].all() or rows["label"].min() < 0:
        raise UserError(f"{path} is no complete token file of train.py: finish its run first")
    return rows


class TokenFile(Source):
    """tokens.npy of an earlier run: no images, so its tokenizer is needed. config.json names the classes."""

    def __init__(self, path, rows):
        check_rows(path, rows)
        class_names = classes_beside(path, rows["label"], path.parent / "config.json")
        splits = [np.flatnonzero(rows["test"] == test) for test in (False, True)]
        super().__init__(path, class_names, rows["label"], *splits)
        self.name = f"{path.resolve().parent.name}-tokens"
        self.tokens_per_image = rows["x"].shape[1]

    def describe(self):
        classes = f"{len(self.class_names)} classes" if self.class_names else "no classes"
        return (f"{self.path}: {self.tokens_per_image} tokens of each of {len(self.train):,} images + "
                f"{len(self.test):,} held out, {classes}")

    def load(self, size, skipped=None):
        raise UserError(f"{self.path} holds tokens, not images: give the images")
