"""Decoded images in one file: every photograph is opened once, and streamed from a memory map after that.

    python data.py FOLDER --size 256 --save photos.npy      then, in any number of runs: train.py --data photos.npy

The file has one structured row per image: image (3, S, S) uint8, label int32, split uint8 (1 training, 2 held out, 0
if it could not be decoded); photos.json beside it names the classes. A run makes such a file of its own, images.npy in
its directory, while it looks at every image for the first time, and deletes it when the tokens are written. The pixels
are those that decoding at every step would give, bit for bit. Called by engine/prepare.py and extras/datasets.py.
"""

import contextlib
import hashlib
import os
import shutil

import numpy as np
from tqdm import tqdm

from data import IN_MEMORY_BYTES, MIN_SIDE, DataError, Source, decode_all
from engine.arrays import resumable_array
from engine.read_back import UserError, at_most, open_npy, read_json, read_names, shown
from engine.process import write_json
from engine.stored import CACHE

FIELDS = ("image", "label", "split")
NO_IMAGE, TRAINING, HELD_OUT = 0, 1, 2
BLOCK_BYTES = 64 << 20  # decoded between two writes to the disk


class SavedImages(Source):
    """A file of this module as a form of data. rows: its memory-mapped rows."""

    def __init__(self, path, rows):
        image, *numbers = (rows.dtype[name] for name in FIELDS)
        if rows.ndim != 1 or numbers != [np.int32, np.uint8] or image.base != np.uint8 or len(image.shape) != 3 or (
                image.shape[0] != 3 or image.shape[1] != image.shape[2] or image.shape[1] < MIN_SIDE or not len(rows)):
            raise DataError(f"{path} is no file that data.py --save wrote, rows of image (3, S, S) uint8, label int32, "
                            f"split uint8, but {shown(rows)}: make it again")
        at_most(path, len(rows), "VQLCMD_MAX_IMAGES")  # before all of them are looked at
        if rows["label"].min() < 0 or rows["split"].max() > HELD_OUT:
            raise DataError(f"{path}: label must be 0 or more, split 0, 1 or 2, are from {rows['label'].min()}, and up "
                            f"to {rows['split'].max()}: make it again")
        splits = [np.flatnonzero(rows["split"] == split) for split in (TRAINING, HELD_OUT)]
        if path.name.endswith(".part.npy") or not all(map(len, splits)):
            raise DataError(f"{path} is not complete: give the command again that makes it")
        facts, n_classes = path.with_suffix(".json"), int(rows["label"].max()) + 1
        at_most(f"{path}: labels", n_classes, "VQLCMD_MAX_CLASSES")
        class_names = [str(c) for c in range(n_classes)] if n_classes > 1 else []
        if facts.exists():
            class_names = read_names(f"{facts}: classes", read_json(facts).get("classes"))
            if n_classes > max(len(class_names), 1):
                raise DataError(f"{facts} does not name the {n_classes} classes of {path}: make both again")
        self.images = rows["image"]
        super().__init__(path, class_names, rows["label"], *splits)

    def read(self, i):
        return self.images[i].transpose(1, 2, 0)

    def title(self, i):
        return f"image {i}"


def row_type(source, size):
    """The dtype of a row. Its first field's title says what was decoded: a hash of names, labels and file sizes."""
    found = hashlib.sha256(source.labels.tobytes() + str(size_of(source.path)).encode())
    for i in np.concatenate([source.train, source.test]):
        title = source.title(i)
        found.update(f"{title}\n{size_of(os.path.join(source.path, title))}\n".encode())
    return np.dtype([((f"images {found.hexdigest()[:16]}", "image"), np.uint8, (3, size, size)),
                     ("label", np.int32), ("split", np.uint8)])


def size_of(path):
    """Bytes of a file; 0 for anything else: images in an archive are known by their names and its size."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def save_images(source, size, path, replace=False):
    """Decodes all images of a source into the file. -> {title: why not} of those that cannot be used.

    Goes on where an earlier call stopped, from path's .part.npy, and tries the unusable ones anew. A file that is of
    other images, or of another size, is replaced, or else a UserError. OSError if the disk is full.
    """
    items, partial = np.concatenate([source.train, source.test]), path.with_suffix(".part.npy")
    dtype = row_type(source, size)
    if path.exists():
        if not replace and open_rows(path, dtype) is None:
            raise DataError(f"{path} is there and holds something else: take it away, or choose another name")
        path.replace(partial)
    try:
        rows = resumable_array(partial, dtype, len(items))
    except UserError:
        if not replace:
            raise
        partial.unlink()
        rows = resumable_array(partial, dtype, len(items))
    rows["split"][wrong_rows(source, rows)] = NO_IMAGE  # those are decoded anew
    todo, bad, block = np.flatnonzero(rows["split"] == NO_IMAGE), {}, max(16, BLOCK_BYTES // dtype.itemsize)
    with tqdm(total=len(items), initial=len(items) - len(todo), desc="decoding", unit="img", leave=False,
              disable=None) as bar:
        for places in (todo[first:first + block] for first in range(0, len(todo), block)):
            pixels = np.zeros((len(places), 3, size, size), np.uint8)
            wrong = decode_all(source.read, items[places], size, pixels)
            rows["image"][places], rows["label"][places] = pixels, source.labels[items[places]]
            rows.flush()  # pixels are on the disk before their split says so, whatever happens in between
            good = np.delete(places, list(wrong))
            rows["split"][good] = np.where(good < len(source.train), TRAINING, HELD_OUT)
            bad |= {source.title(items[places[at]]): reason for at, reason in wrong.items()}
            bar.update(len(places))
    rows.flush()
    del rows
    partial.replace(path)
    return bad


def wrong_rows(source, rows):
    """Which rows (n,) say that they are done, and have not the label and the split of their image in the source?"""
    items, n = np.concatenate([source.train, source.test]), len(source.train)
    splits = np.where(np.arange(len(items)) < n, TRAINING, HELD_OUT)
    return (rows["split"] != NO_IMAGE) & ((rows["split"] != splits) | (rows["label"] != source.labels[items]))


# ----------------------------------------------------------------------------
# The cache of a run.

def bytes_needed(source, size):
    """Of the cache of a source; 0 if it needs none: what is drawn, or arrays that have the size already."""
    if not isinstance(source, Source):
        return 0
    try:
        first = source.read(source.train[0])
    except NotImplementedError:  # tokens
        return 0
    except Exception:  # it will be on the list of bad files
        first = None
    ready = isinstance(first, np.ndarray) and first.shape[:2] == (size, size)
    return 0 if ready else sum(source.counts()) * (3 * size ** 2 + 5)


def plan_cache(source, size, out):
    """(is there to be a cache, one line that says what it takes, if it is needed). It may fill half of what is free."""
    path, needed = out / CACHE, bytes_needed(source, size)
    if not needed:
        return False, ""
    parent = next(p for p in (out, *out.resolve().parents) if p.is_dir())
    files = [p for p in (path, path.with_suffix(".part.npy")) if p.exists()]
    free = shutil.disk_usage(parent).free + sum(p.stat().st_size for p in files)
    if needed > free / 2:
        else_ = "at every start" if needed <= IN_MEMORY_BYTES else "again at every step of the tokenizer"
        return False, (f"images: decoded {else_}; {path} would take {needed / 1e9:.2f} GB, more than half of the "
                       f"{free / 1e9:.2f} GB that are free")
    return True, (f"images: decoded once into {path}, {needed / 1e9:.2f} GB of {free / 1e9:.2f} GB that are free, and "
                  "deleted when the tokens are written (--no-cache: none)")


def load_through_cache(source, size, skipped, path, make):
    """source.load(size, skipped) -> (train, test), from the cache if it is there and of these images.

    make: write it first, as save_images does; images that cannot be decoded are then in source.skipped.
    """
    if make:
        try:
            source.skipped = skipped = save_images(source, size, path, replace=True)
        except OSError as error:
            print(f"{path} cannot be written ({error.strerror}): the run goes on without it")
    saved = open_cache(source, size, path)
    if saved is None:
        return source.load(size, skipped)
    sets = saved.load(size, {})
    for images in sets:
        images.class_names = source.class_names
    return sets


def open_rows(path, dtype):
    """Memory-mapped rows of a file; None if it is not there, or of other images than those that made this dtype."""
    try:
        rows = open_npy(path)
        return rows if rows.dtype == dtype else None
    except UserError:
        return None


def open_cache(source, size, path):
    """SavedImages of the cache; None if it is not there, is of other images, or has too few that can be used."""
    rows = open_rows(path, row_type(source, size)) if path.exists() else None
    if rows is None or rows.shape != (sum(source.counts()),) or wrong_rows(source, rows).any():
        return None
    with contextlib.suppress(UserError):
        return SavedImages(path, rows)


def remove_cache(out):
    """Where a system does not delete open files, the next start does it."""
    for path in (out / CACHE, (out / CACHE).with_suffix(".part.npy")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def save_for_runs(source, size, path):
    """`python data.py FOLDER --size S --save photos.npy`: the file, and photos.json with its classes -> SavedImages."""
    if size is None or path.suffix != ".npy" or not isinstance(source, Source):
        raise DataError(f"--save {path}: needs a name that ends in .npy, --size, and images that lie in files")
    source.skipped = save_images(source, size, path)
    write_json(path.with_suffix(".json"), {"classes": source.class_names})
    saved = SavedImages(path, open_npy(path))
    print(f"wrote {path} ({path.stat().st_size / 1e9:.2f} GB) and {path.with_suffix('.json')}: {len(saved.train):,} "
          f"images + {len(saved.test):,} held out. Train on them: python train.py --data {path} --size {size}")
    return saved
