"""Opens archives that somebody else made, within bounds: a small file must not unpack to a full memory or disk.

Nothing is unpacked to the disk, links are not followed, and pickles in arrays are refused. Called by data.py (npz,
gzip, tar, zip) and fid.py (npz).
"""

import gzip
import json
import math
import os
import tarfile
import zipfile

import numpy as np

from engine.run import UserError

LARGEST_IMAGE = 256 << 20  # bytes of one packed image file
LARGEST_ARRAY = 4 << 30  # bytes of an array or a table that is unpacked as a whole


class ArchiveError(UserError):
    """One line: why an archive is not opened."""


def open_npz(path):
    """np.load of an .npz whose arrays, unpacked, are no larger than LARGEST_ARRAY or, if stored, than the file."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.file_size > LARGEST_ARRAY and member.compress_type != zipfile.ZIP_STORED:
                raise ArchiveError(f"{member.filename} in it unpacks to {member.file_size:,} bytes: save it without "
                                   "compression (np.savez)")
            if member.compress_type == zipfile.ZIP_STORED and member.file_size > os.path.getsize(path):
                raise ArchiveError(f"{member.filename} in it claims to be larger than the file")
    return np.load(path, allow_pickle=False)


def read_npz_array(npz, name):
    """npz[name] after a look at its header: the shape that it claims is not allocated unless the bytes are there."""
    if name + ".npy" not in npz.zip.namelist():
        raise ArchiveError(f"{name.rsplit('/', 1)[-1]} in it is no array")
    member = npz.zip.getinfo(name + ".npy")
    with npz.zip.open(member) as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ArchiveError(f"{name} in it claims shape {shape} of {dtype}, more than it holds")
    return npz[name]


def read_gzip(path, at_most=LARGEST_ARRAY):
    """The content of a .gz, or of a plain file, of at most so many bytes."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise ArchiveError(f"it holds more than {at_most:,} bytes")
    return content


def read_tar(path, wanted, at_most=1 << 30):
    """{base name: bytes} of the regular files in a tar, packed or not, whose base name satisfies `wanted`."""
    found, total = {}, 0
    with tarfile.open(path) as archive:
        for member in archive:
            total += member.size
            if total > at_most:
                raise ArchiveError(f"it unpacks to more than {at_most:,} bytes")
            if member.isreg() and wanted(os.path.basename(member.name)):
                found[os.path.basename(member.name)] = archive.extractfile(member).read()
    return found


def read_json(path):
    """The object in a JSON file; ArchiveError if it is none, or nested without end."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} cannot be read as JSON ({type(error).__name__}): make it again, or take it "
                           "away") from error
