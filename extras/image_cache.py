"""Decoded images in one memory-mapped file: of a run, until its tokens are there; of data.py --save."""

import contextlib
import hashlib
import shutil

import numpy as np

from data import Source, decode_all
from engine.process import write_json
from engine.validate import UserError, read_array
from extras.data_arrays import HELD_OUT, TRAINING, Arrays, TokenFile, read_saved

CACHE = "images.npy"  # in a run's directory


def save_images(source, size, path):
    """Decodes the images that an earlier call has not. -> {title: why not} of those left out."""
    items, partial = np.concatenate([source.train, source.test]), path.with_suffix(".part.npy")
    if path.exists():
        path.replace(partial)
    try:
        rows = open_rows(source, size, partial, "r+")
    except UserError:
        partial.unlink(missing_ok=True)
        rows = np.lib.format.open_memmap(partial, "w+", row_type(source, size, items), items.shape)
        rows["label"] = source.labels[items]
    splits = np.repeat([TRAINING, HELD_OUT], source.counts())
    todo = np.flatnonzero(rows["split"] == 0)

    def store(at, image):
        rows["image"][todo[at]] = image
        rows["split"][todo[at]] = splits[todo[at]]

    bad = decode_all(source.read, items[todo], size, store, progress=True)
    rows.flush()
    partial.replace(path)
    return {source.title(items[todo[at]]): reason for at, reason in bad.items()}


def row_type(source, size, items):
    """dtype of a row. Its first field has a title, as numpy calls it: a hash of names, labels and split."""
    facts = "\n".join(map(source.title, items)).encode() + source.labels.tobytes() + items.tobytes()
    title = f"images {hashlib.sha256(facts).hexdigest()[:16]}"
    return np.dtype([((title, "image"), np.uint8, (3, size, size)), ("label", np.int32), ("split", np.uint8)])


def open_rows(source, size, path, mode="r"):
    rows, items = read_array(path, mode), np.concatenate([source.train, source.test])
    if rows.dtype != row_type(source, size, items) or rows.shape != items.shape:
        raise UserError(f"{path} holds something else: take it away, or choose another name")
    return rows


def plan_cache(source, size, out):
    """(is a run to have a cache, a line that says what it takes). It may fill half of the free space."""
    decoded = isinstance(source, Arrays) and source.read(0).shape[:2] == (size, size)
    if decoded or isinstance(source, TokenFile) or not isinstance(source, Source):
        return False, ""
    needed = sum(source.counts()) * (3 * size ** 2 + 5)
    free = shutil.disk_usage(next(p for p in (out, *out.resolve().parents) if p.is_dir())).free
    space = f"{needed / 1e9:.2f} GB of {free / 1e9:.2f} GB that are free"
    if needed > free / 2:
        return False, f"images: decoded whenever they are needed; {out / CACHE} would take {space}"
    return True, f"images: decoded once into {out / CACHE}, {space} (--no-cache: not)"


def load_through_cache(source, size, skipped, path, make):
    """source.load(size, skipped), from the cache if it is there and of these images. make: write it first."""
    if make:
        source.skipped = skipped = save_images(source, size, path)
    with contextlib.suppress(ValueError):  # it is not there, of other images, or has too few
        return read_saved(path, open_rows(source, size, path), source.class_names).load(size, {})
    return source.load(size, skipped)


def remove_cache(out):
    with contextlib.suppress(OSError):  # a system that keeps open files: the next start deletes it
        (out / CACHE).with_suffix(".part.npy").unlink(missing_ok=True)
        (out / CACHE).unlink(missing_ok=True)


def save_for_runs(source, size, path):
    """data.py --save photos.npy: the file, and photos.json with its classes."""
    if size is None or path.suffix != ".npy" or not isinstance(source, Source):
        raise UserError(f"--save {path}: needs a name that ends in .npy, --size, and images in files")
    if path.exists():
        open_rows(source, size, path)
    source.skipped = save_images(source, size, path)
    write_json(path.with_suffix(".json"), {"classes": source.class_names})
    print(f"wrote {path}, and a .json beside it. Train: python train.py --data {path} --size {size}")
    return read_saved(path, read_array(path))
