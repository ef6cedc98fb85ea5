"""Forms of data in arrays: .npy, .npz, MNIST's and CIFAR-10's files, rows that data.py or train.py wrote."""

import contextlib
import gzip
import io
import itertools
import math
import os
import pickle
import pickletools
import tarfile
import zipfile

import numpy as np

from data import MIN_SIDE, Source
from engine.validate import UserError, check_file, check_unpacked, printable, read_array, read_json, reading

IMAGES = ("images", "train_images", "x_train", "data", "x", "arr_0")  # what an .npz may call them
TRAINING, HELD_OUT = 1, 2  # of a saved row; 0: the image could not be decoded
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MAX_STEPS = 1_000_000  # of a pickle; a batch of CIFAR-10 has 60,000
MAX_BYTES = 512 << 20  # of its unpacked archive, which has 186 MB


class Arrays(Source):
    """Images in a uint8 array (n, H, W[, C])."""

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
        raise UserError(f"{where} is {array.dtype} {array.shape}: give uint8 (n, H, W[, C]) or (n, C, H, W), "
                        f"C of 1, 3 or 4, H and W of {MIN_SIDE} or more")
    return array


def join_splits(path, train, test, class_names=None):
    """Arrays of two splits, each (images, labels or None); the second is held out."""
    labels = None if train[1] is None else np.concatenate([np.ravel(train[1]), np.ravel(test[1])])
    n, total = len(train[0]), len(train[0]) + len(test[0])
    return Arrays(path, np.concatenate([train[0], test[0]]), labels, range(n), range(n, total), class_names)


@contextlib.contextmanager
def open_npz(path):
    """The arrays of an .npz that does not unpack to a full memory."""
    with reading(path):
        with zipfile.ZipFile(check_file(path)) as archive:
            check_unpacked(path, sum(member.file_size for member in archive.infolist()), path.stat().st_size)
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays


def read_npz(path):
    """Images and perhaps labels and test images, under common names."""
    with open_npz(path) as arrays:
        def first_of(*names):
            return next((arrays[name] for name in names if name in arrays.files), None)

        images, test_images = first_of(*IMAGES), first_of("test_images", "x_test")
        if images is None:
            raise UserError(f"{path} holds {', '.join(arrays.files)[:200]}: expected images, perhaps labels")
        images = as_images(images, path)
        labels = first_of("labels", "train_labels", "y_train", "y", "arr_1")
        if test_images is None:
            return Arrays(path, images, labels, range(len(images)))
        return join_splits(path, (images, labels), (test_images, first_of("test_labels", "y_test")))


def read_idx(folder):
    """MNIST's four files, gzipped or not: two zeros, 8 for uint8, rank; sizes, 4 bytes each; the values."""
    arrays = []
    for stem, rank in (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1)):
        path = min(folder.glob(f"{stem}?idx{rank}-ubyte*"), default=folder / f"{stem}-idx{rank}-ubyte.gz")
        open_file = gzip.open if path.suffix == ".gz" else open
        with reading(path, "fetch it again"), open_file(check_file(path), "rb") as file:
            if file.read(4) != bytes([0, 0, 8, rank]):
                raise ValueError("it has another header")
            shape = np.frombuffer(file.read(4 * rank), ">u4").tolist()
            check_unpacked(path, math.prod(shape), path.stat().st_size)
            content = file.read(math.prod(shape) + 1)  # one more: it must end there
            arrays.append(np.frombuffer(content, np.uint8).reshape(shape))
    images, labels, test_images, test_labels = arrays
    with reading(folder):
        return join_splits(folder, (as_images(images, folder), labels), (test_images, test_labels))


class ArraysOnly(pickle._Unpickler):
    """A pickle may run any program, and make the one in C fill the memory: this one reads arrays and text."""

    allowed = {"numpy.ndarray": None, "numpy.dtype": np.dtype,
               "_codecs.encode": lambda text, _: text.encode("latin-1"),
               # An array begins empty; its shape comes with its bytes, and numpy compares the two.
               "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, "b")}

    def find_class(self, module, name):
        return self.allowed[f"{module}.{name}".replace("numpy._core", "numpy.core")]


def read_cifar(path):
    """CIFAR-10's batches, python (pickles) or binary, in a folder or in the .tar.gz as it comes."""
    with reading(path, "fetch CIFAR-10 again"):
        if path.is_dir():
            files = {p.name: p.read_bytes() for p in path.iterdir() if "_batch" in p.name and p.is_file()}
        else:
            with gzip.open(path) as file:  # in memory: no link is followed, nothing is written
                content = io.BytesIO(file.read(MAX_BYTES))
            with tarfile.open(fileobj=content, mode="r:") as archive:
                members = [m for m in archive if m.isreg() and not m.issparse() and "_batch" in m.name]
                files = {os.path.basename(m.name): archive.extractfile(m).read() for m in members}
        ending = ".bin" if "test_batch.bin" in files else ""
        images, labels = [], []
        for name in [f"data_batch_{i}{ending}" for i in range(1, 6)] + ["test_batch" + ending]:
            if ending:  # rows of a label and 3,072 values
                rows = np.frombuffer(files[name], np.uint8).reshape(-1, 3073)
                x, y = rows[:, 1:], rows[:, 0]
            else:
                if next(itertools.islice(pickletools.genops(files[name]), MAX_STEPS, None), None):
                    raise ValueError(f"{name} has more than {MAX_STEPS:,} steps")
                batch = ArraysOnly(io.BytesIO(files[name]), encoding="bytes").load()
                x, y = batch[b"data"], batch[b"labels"]
            images.append(as_images(x.reshape(-1, 3, 32, 32), f"{path}: {name}"))
            labels.append(y)
        train = np.concatenate(images[:5]), np.concatenate(labels[:5])
        return join_splits(path, train, (images[5], labels[5]), CIFAR_CLASSES)


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
    used = np.isin(rows[column][::1 + len(rows) // 1000], values).any()  # a look before all of it is read
    splits = [np.flatnonzero(rows[column] == value) for value in values if used]
    if found != types or not splits or not all(map(len, splits)):
        raise ValueError("it is not complete, or of another program")
    return splits


def classes_beside(path, labels, file):
    """Class names of labels: `classes` in the JSON file, if it is there, or else their numbers."""
    classes = read_json(file).get("classes") if file.exists() else None
    names = None if classes is None else [printable(name) for name in classes]
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
        return (f"{self.path}: {self.tokens_per_image} tokens of each of {len(self.train):,} images + "
                f"{len(self.test):,} held out, {len(self.class_names)} classes")

    def load(self, size, skipped=None):
        raise UserError(f"{self.path} holds tokens, not images: give the images")
