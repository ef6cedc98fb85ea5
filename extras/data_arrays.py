"""Forms of data in arrays: .npy, .npz, MNIST's idx files, and rows that data.py --save or train.py wrote."""

import gzip
import math
import zipfile

import numpy as np

from data import MIN_SIDE, Source
from engine.validate import UserError, check_file, check_unpacked, printable, read_array, read_json, reading

IMAGES = ("images", "train_images", "x_train", "data", "x", "arr_0")  # what an .npz may call them
TRAINING, HELD_OUT = 1, 2  # of a saved row; 0: the image could not be decoded


class Arrays(Source):
    """Images in a uint8 array (n, H, W[, C]). Without class names, those of labels are their numbers."""

    def __init__(self, path, images, labels, train, test=None, class_names=None):
        if labels is None:
            labels, class_names = np.zeros(len(images)), []
        labels, class_names = check_labels(path, labels, len(images), class_names)
        self.images = images
        super().__init__(path, class_names, labels, train, test)

    def read(self, i):
        return np.asarray(self.images[i])


def check_labels(where, labels, n, class_names=None):
    """n labels, whole numbers from 0 -> ((n,) int64, class names: those given, or the numbers)."""
    labels = np.ravel(labels)
    most = 100_000 if class_names is None else max(len(class_names), 1)
    whole = labels.dtype.kind in "biuf" and (labels == np.round(labels)).all()
    if not n or len(labels) != n or not whole or labels.min() < 0 or labels.max() >= most:
        raise UserError(f"{where}: {len(labels):,} labels for {n:,} images, like {str(labels[:3])[:99]}: "
                        f"expected one each, whole numbers from 0 to {most - 1:,}")
    labels = labels.astype(np.int64)
    return labels, [str(c) for c in range(labels.max() + 1)] if class_names is None else class_names


def as_images(array, where):
    """(n, H, W), (n, H, W, C) or (n, C, H, W) uint8, C of 1, 3 or 4 -> the first or the second of these."""
    if array.ndim == 4 and array.shape[3] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    channels = array.shape[3] if array.ndim == 4 else 1
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or channels not in (1, 3, 4) or (
            not len(array) or min(array.shape[1:3]) < MIN_SIDE):
        raise UserError(f"{where} has shape {array.shape} of {array.dtype}: expected uint8 of (n, H, W), "
                        f"(n, H, W, C) or (n, C, H, W), C of 1, 3 or 4 colours, {MIN_SIDE} pixels or more")
    return array


def join_splits(path, train, test, class_names=None):
    """Arrays of two splits, each (images, labels or None); the second is held out."""
    labels = None if train[1] is None else np.concatenate([np.ravel(train[1]), np.ravel(test[1])])
    n, total = len(train[0]), len(train[0]) + len(test[0])
    return Arrays(path, np.concatenate([train[0], test[0]]), labels, range(n), range(n, total), class_names)


def read_npz(path):
    """Images and perhaps labels and test images, under common names."""
    with reading(path), zipfile.ZipFile(check_file(path)) as archive:
        check_unpacked(path, sum(member.file_size for member in archive.infolist()), path.stat().st_size)
    with reading(path), np.load(path, allow_pickle=False) as arrays:
        def first_of(*names):
            return next((arrays[name] for name in names if name in arrays.files), None)

        images, test_images = first_of(*IMAGES), first_of("test_images", "x_test")
        if images is None:
            raise UserError(f"{path} holds {', '.join(arrays.files)[:200]}: expected images, and perhaps "
                            "labels, test_images and test_labels")
        images = as_images(images, path)
        labels = first_of("labels", "train_labels", "y_train", "y", "arr_1")
        if test_images is None:
            return Arrays(path, images, labels, range(len(images)))
        return join_splits(path, (images, labels), (test_images, first_of("test_labels", "y_test")))


def read_idx(folder):
    """MNIST's four files, gzipped or not: images and labels of both splits."""
    arrays = []
    for stem in ("train-images?idx3", "train-labels?idx1", "t10k-images?idx3", "t10k-labels?idx1"):
        files = sorted(folder.glob(stem + "-ubyte*"))
        if not files:
            raise UserError(f"{folder} lacks {stem.replace('?', '-')}-ubyte(.gz): put all four files there")
        with reading(files[0], "fetch it again"):
            arrays.append(read_idx_file(files[0], rank=int(stem[-1])))
    images, labels, test_images, test_labels = arrays
    with reading(folder):
        return join_splits(folder, (as_images(images, folder), labels), (test_images, test_labels))


def read_idx_file(path, rank):
    """The uint8 array in an idx file: two zeros, 8 for uint8, the rank; sizes, 4 bytes each; the values."""
    with (gzip.open if path.suffix == ".gz" else open)(check_file(path), "rb") as file:
        if file.read(4) != bytes([0, 0, 8, rank]):
            raise ValueError("it has another header")
        shape = np.frombuffer(file.read(4 * rank), ">u4").tolist()
        check_unpacked(path, math.prod(shape), path.stat().st_size)
        content = file.read(math.prod(shape) + 1)  # one more: it must end there
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_npy(path):
    """Images, or one row per image, of data.py --save or of train.py; memory-mapped."""
    array = read_array(path)
    names = array.dtype.names
    if names is None:
        return Arrays(path, as_images(array, path), None, range(len(array)))
    with reading(path, "make it again"):
        return TokenFile(path, array) if "x" in names else read_saved(path, array)


def find_splits(rows, types, column, values):
    """Numbers of the rows of each split, which has this value in this column. types: of all columns."""
    found = {name: (rows.dtype[name].base, rows.dtype[name].shape) for name in rows.dtype.names}
    splits = [np.flatnonzero(rows[column] == value) for value in values]
    if found != types or not all(map(len, splits)):
        raise ValueError("it is not complete, or of another program")
    return splits


def classes_beside(path, labels, file):
    """Class names of labels: `classes` in the JSON file, if it is there, or else their numbers."""
    names = read_json(file).get("classes") if file.exists() else None
    if names is not None:
        names = [printable(name) for name in names]
    _, class_names = check_labels(f"{path} and {file.name}", labels, len(labels), names)
    return class_names if names is not None or len(class_names) > 1 else []


def read_saved(path, rows, class_names=None):
    """What data.py --save wrote: rows of image (3, S, S), label, split. NAME.json names the classes."""
    size = max(rows.dtype["image"].shape[-1], MIN_SIDE)
    types = {"image": (np.uint8, (3, size, size)), "label": (np.int32, ()), "split": (np.uint8, ())}
    train, test = find_splits(rows, types, "split", (TRAINING, HELD_OUT))
    if class_names is None:
        class_names = classes_beside(path, rows["label"], path.with_suffix(".json"))
    return Arrays(path, rows["image"].transpose(0, 2, 3, 1), rows["label"], train, test, class_names)


class TokenFile(Source):
    """tokens.npy of an earlier run: no images, so its tokenizer is needed. config.json names the classes."""

    def __init__(self, path, rows):
        n = max(rows.dtype["x"].shape[-1], 1)
        types = {"x": (np.uint16, (n,)), "label": (np.int32, ()), "test": (np.bool_, ())}
        splits = find_splits(rows, types, "test", (False, True))
        class_names = classes_beside(path, rows["label"], path.parent / "config.json")
        super().__init__(path, class_names, rows["label"], *splits)
        self.name = f"{path.resolve().parent.name}-tokens"
        self.tokens_per_image = n

    def describe(self):
        classes = f"{len(self.class_names)} classes" if self.class_names else "no classes"
        return (f"{self.path}: {self.tokens_per_image} tokens of each of {len(self.train):,} images + "
                f"{len(self.test):,} held out, {classes}")

    def load(self, size, skipped=None):
        raise UserError(f"{self.path} holds tokens, not images: give the images")
