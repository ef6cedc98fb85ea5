"""Forms of data in arrays: .npy and .npz, MNIST's idx files, CIFAR-10's batches; and tokens that an earlier run made.

Called by extras/datasets.py.
"""

import io
import pickle

import numpy as np

from data import MIN_SIDE, DataError, Source
from engine.read_back import (
    ReadError,
    UserError,
    at_most,
    open_npy,
    printable,
    read_bytes,
    read_json,
    read_names,
    reason_of,
    shown,
)
from extras.archives import open_npz, read_idx_array, read_npz_array, read_tar
from extras.image_cache import FIELDS, SavedImages


class Arrays(Source):
    """Images that come as uint8 arrays. splits: one or two of (array (n, H, W[, C]), labels (n,) or None)."""

    def __init__(self, path, splits, class_names=None):
        self.arrays = [array for array, _ in splits]
        n = [len(array) for array in self.arrays]
        labels = np.concatenate([np.zeros(len(a), np.int64) if given is None else whole_numbers(given, path)
                                 for a, given in splits])
        if not all(n) or len(labels) != sum(n) or labels.min() < 0:
            raise DataError(f"{path}: {len(labels):,} labels for {sum(n):,} images, or labels below 0: make it again")
        if class_names is not None and labels.max() >= len(class_names):
            raise DataError(f"{path}: the label {labels.max()} of {len(class_names)} classes: make it again")
        at_most(f"{path}: labels", labels.max() + 1, "VQLCMD_MAX_CLASSES")
        if class_names is None:
            class_names = [] if splits[0][1] is None else [str(c) for c in range(labels.max() + 1)]
        super().__init__(path, class_names, labels, range(n[0]), range(n[0], sum(n)) if len(n) == 2 else None)

    def read(self, i):
        n = len(self.arrays[0])
        return np.asarray(self.arrays[0][i] if i < n else self.arrays[1][i - n])

    def title(self, i):
        return f"image {i}"


def whole_numbers(given, path):
    """Labels, of whatever type, as int64 (n,)."""
    given = np.asarray(given).ravel()
    if given.dtype.kind not in "biuf" or given.dtype.kind == "f" and not (given == given.round()).all() or (
            len(given) and not abs(given.astype(np.float64)).max() < 1 << 62):
        raise DataError(f"{path}: labels must be whole numbers, are {shown(given)}, e.g. {shown(given[:1].tolist())}: "
                        "make it again")
    return given.astype(np.int64)


def as_images(array, where):
    """(n, H, W), (n, H, W, C) or (n, C, H, W) uint8 with C of 1, 3 or 4 -> the first or the second of these."""
    at_most(where, array.shape[0] if array.ndim else 0, "VQLCMD_MAX_IMAGES")
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(f"{where} has shape {array.shape} of {array.dtype}: expected uint8 of (n, H, W), (n, H, W, C) "
                        "or (n, C, H, W)")
    if array.ndim == 4 and array.shape[3] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    if min(array.shape[1:3]) < MIN_SIDE:
        raise DataError(f"{where} has images of {array.shape[2]} x {array.shape[1]} pixels, a side of less than "
                        f"{MIN_SIDE}")
    if array.ndim == 3 or array.shape[3] in (1, 3, 4):
        return array
    raise DataError(f"{where} has shape {array.shape}: none of its axes is 1, 3 or 4 colours")


IMAGES = ("images", "train_images", "x_train", "data", "x", "arr_0")  # what an .npz may call them


def read_arrays(path):
    """.npy (memory-mapped), or .npz with images and perhaps labels, and perhaps test images, under common names."""
    try:
        if path.suffix == ".npy":
            loaded = open_npy(path)
            if loaded.dtype.names == FIELDS:
                return SavedImages(path, loaded)
            return TokenFile(path, loaded) if loaded.dtype.names else Arrays(path, [(as_images(loaded, path), None)])
        with open_npz(path) as loaded:
            arrays = {name: read_npz_array(loaded, name) for name in loaded.files}
    except UserError:
        raise
    except Exception as error:  # of a damaged archive: half a dozen types
        raise DataError(f"{path} cannot be read as an array ({reason_of(error)}): make it again") from error
    splits = []
    for images, labels in ((IMAGES, ("labels", "train_labels", "y_train", "y", "arr_1")),
                           (("test_images", "x_test"), ("test_labels", "y_test"))):
        images, labels = (next((name for name in names if name in arrays), None) for names in (images, labels))
        if images is not None:
            splits.append((as_images(arrays[images], f"{path}: {images}"), arrays.get(labels)))
    if not splits or len(splits) == 1 and {"test_images", "x_test"} & arrays.keys():
        raise DataError(f"{path} holds {printable(', '.join(arrays))[:200]}: expected images, and perhaps labels, "
                        "test_images and test_labels")
    return Arrays(path, splits)


def read_idx(folder):
    """MNIST's four files, gzipped or not."""
    arrays = []
    for stem in ("train-images?idx3", "train-labels?idx1", "t10k-images?idx3", "t10k-labels?idx1"):
        path = next(iter(sorted(folder.glob(stem + "-ubyte")) + sorted(folder.glob(stem + "-ubyte.gz"))), None)
        if path is None:
            raise DataError(f"{folder} lacks {stem.replace('?', '-')}-ubyte(.gz): put MNIST's four files there")
        try:
            arrays.append(read_idx_array(path, int(stem[-1])))
        except UserError:
            raise
        except Exception as error:  # of a damaged stream: half a dozen types
            raise DataError(f"{path} is no complete idx file ({reason_of(error)}): fetch it again") from error
        if arrays[-1].ndim == 3:
            as_images(arrays[-1], path)
    return Arrays(folder, [arrays[:2], arrays[2:]])


CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class ArraysOnly(pickle.Unpickler):
    """Unpickles CIFAR-10's dicts of arrays and refuses everything else, since a pickle may run any program.

    An array begins empty, whatever it claims; its shape comes with its bytes, and has to be of so many.
    """
    allowed = {("numpy", "ndarray"): None, ("numpy", "dtype"): np.dtype,
               ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),
               **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: np.empty(0, "b")
                  for core in ("core", "_core")}}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return self.allowed[module, name]


def read_batch(content):
    """(images (n, 3072) uint8, labels (n,)) of one of CIFAR-10's pickles."""
    file = io.BytesIO(content)
    batch = ArraysOnly(file, encoding="bytes").load()
    return batch[b"data"], np.asarray(batch[b"labels"])


def read_cifar(path):
    """CIFAR-10's five batches and test batch, python (pickles) or binary, in a folder or in the .tar.gz as it comes."""
    try:
        if path.is_dir():
            files = {p.name: read_bytes(p, "VQLCMD_MAX_IMAGE_BYTES") for p in path.iterdir()
                     if "_batch" in p.name and p.is_file()}
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
                parts.append(read_batch(content))
            if parts[-1][0].dtype != np.uint8 or parts[-1][0].shape != (len(parts[-1][1]), 3072):
                raise ValueError(f"{name}: expected uint8 of shape (n, 3072) and n labels, is {shown(parts[-1][0])}")
    except KeyError as error:
        raise DataError(f"{path} lacks {error}: fetch CIFAR-10 again") from error
    except (DataError, ReadError):
        raise
    except Exception as error:  # of a damaged archive or pickle: a dozen types
        raise DataError(f"{path} cannot be read as CIFAR-10's batches ({reason_of(error)}): fetch them "
                        "again") from error
    images, labels = zip(*parts, strict=True)
    images = [np.asarray(part).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for part in images]
    return Arrays(path, [(np.concatenate(images[:5]), np.concatenate(labels[:5])), (images[5], labels[5])],
                  CIFAR_CLASSES)


def check_rows(path, rows):
    """The rows of a token file, if they are what train.py writes: (n,) of x, label and test, both splits in them."""
    fields = {"x": (np.uint16, 1), "label": (np.int32, 0), "test": (np.bool_, 0)}
    if rows.ndim != 1 or rows.dtype.names != tuple(fields) or any(
            rows.dtype[name].base != kind or rows.dtype[name].ndim != rank for name, (kind, rank) in fields.items()):
        raise DataError(f"{path} is no complete token file of train.py: finish its run first")
    at_most(path, len(rows), "VQLCMD_MAX_IMAGES")
    if not rows.dtype["x"].shape[0] or not rows["test"].any() or rows["test"].all():
        raise DataError(f"{path} is no complete token file of train.py: it has {len(rows):,} rows, "
                        f"{np.count_nonzero(rows['test']):,} of them held out")
    if rows["label"].min() < 0:
        raise DataError(f"{path} is no complete token file of train.py: it has the label {rows['label'].min()}")
    at_most(f"{path}: labels", int(rows["label"].max()) + 1, "VQLCMD_MAX_CLASSES")
    return rows


class TokenFile(Source):
    """tokens.npy of an earlier run: no images, so its tokenizer is needed too. config.json beside it names classes."""

    def __init__(self, path, rows):
        check_rows(path, rows)
        config = path.parent / "config.json"
        n_classes = int(rows["label"].max()) + 1
        class_names = [str(c) for c in range(n_classes)] if n_classes > 1 else []
        if config.exists():
            class_names = read_names(f"{config}: classes", read_json(config).get("classes", class_names))
            if n_classes > max(len(class_names), 1):
                raise DataError(f"{path} has the label {n_classes - 1}, {config} has {len(class_names)} classes: they "
                                "do not belong together")
        super().__init__(path, class_names, rows["label"], *(np.flatnonzero(rows["test"] == t) for t in (False, True)))
        self.name, self.tokens_per_image = f"{path.resolve().parent.name}-tokens", rows["x"].shape[1]

    def describe(self):
        classes = f"{len(self.class_names)} classes" if self.class_names else "no classes"
        return (f"{self.path}: {self.tokens_per_image} tokens of each of {len(self.train):,} images + "
                f"{len(self.test):,} held out, {classes}")

    def load(self, size, skipped=None):
        raise DataError(f"{self.path} holds tokens, not images: give the images")
