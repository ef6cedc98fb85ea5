"""A form of data: CIFAR-10's batches, python (pickles) or binary, in a folder or in the .tar.gz as it comes.

A pickle may run any program, so only arrays, numbers and text are unpickled.
"""

import gzip
import io
import itertools
import os
import pickle
import pickletools
import tarfile

import numpy as np

from engine.validate import reading
from extras.data_arrays import as_images, join_splits

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MAX_STEPS = 1_000_000  # of a pickle; a batch has 60,000
MAX_BYTES = 512 << 20  # of the unpacked archive, which has 186 MB


class ArraysOnly(pickle._Unpickler):
    """Refuses all but arrays. The unpickler in C would take memory for any number that a file names."""

    allowed = {"numpy.ndarray": None, "numpy.dtype": np.dtype,
               "_codecs.encode": lambda text, _: text.encode("latin-1"),
               # An array begins empty; its shape comes with its bytes, and numpy compares the two.
               "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, "b")}

    def find_class(self, module, name):
        return self.allowed[f"{module}.{name}".replace("numpy._core", "numpy.core")]


def read_cifar(path):
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
        return join_splits(path, train, (images[5], labels[5]), CLASSES)
