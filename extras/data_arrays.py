"""Forms of data in arrays: .npy and .npz, MNIST's idx files, CIFAR-10's batches; and tokens that an earlier run made.

Called by extras/datasets.py.
"""

import io
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from data import DataError, Source
from extras.archives import open_npz, read_gzip, read_json, read_npz_array, read_tar


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
            return TokenFile(path, loaded) if loaded.dtype.names else Arrays(path, [(as_images(loaded, path), None)])
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


class TokenFile(Source):
    """tokens.npy of an earlier run: no images, so its tokenizer is needed too. config.json beside it names classes."""

    def __init__(self, path, rows):
        if rows.dtype.names != ("x", "label", "test") or (rows["label"] < 0).any():
            raise DataError(f"{path} is no complete token file of train.py: finish its run first")
        config = path.parent / "config.json"
        n_classes = int(rows["label"].max()) + 1
        class_names = [str(c) for c in range(n_classes)] if n_classes > 1 else []
        if config.exists():
            stored = read_json(config)
            class_names = stored.get("classes", class_names) if isinstance(stored, dict) else class_names
        super().__init__(path, class_names, rows["label"], *(np.flatnonzero(rows["test"] == t) for t in (False, True)))
        self.name, self.tokens_per_image = f"{path.resolve().parent.name}-tokens", rows["x"].shape[1]

    def describe(self):
        classes = f"{len(self.class_names)} classes" if self.class_names else "no classes"
        return (f"{self.path}: {self.tokens_per_image} tokens of each of {len(self.train):,} images + "
                f"{len(self.test):,} held out, {classes}")

    def load(self, size, skipped=None):
        raise DataError(f"{self.path} holds tokens, not images: give the images")
