"""Arrays on the disk that are filled in many steps, and go on where they stopped. Tokens, samples, decoded images."""

import os

import numpy as np

from engine.read_back import UserError, open_npy


def reserve(path):
    """Takes the space of a sparse file now: a disk that fills up under a memory map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def resumable_array(path, dtype, length, fill=None):
    """A memory-mapped .npy (length,) of dtype to be filled in many steps: zeros, then fill(rows), when it is new.

    The dtype should name what the rows are made from (a field's title): UserError if the file there is of another.
    """
    if not path.exists():
        fresh = path.with_suffix(".new.npy")  # half a file without marks would look like a finished one
        fresh.unlink(missing_ok=True)
        rows = np.lib.format.open_memmap(fresh, mode="w+", dtype=dtype, shape=(length,))
        try:
            reserve(fresh)
        except OSError as error:
            fresh.unlink()
            raise OSError(error.errno, error.strerror, str(path)) from error
        if fill is not None:
            fill(rows)
        rows.flush()
        del rows
        fresh.replace(path)
    try:
        rows = open_npy(path, "r+")
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}): delete it") from error
    if rows.shape != (length,) or rows.dtype != np.dtype(dtype):
        raise UserError(f"{path} is of other images, settings or weights: delete it, or give another --out")
    return rows
