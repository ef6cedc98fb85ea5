"""A form of data: LSUN's LMDB. Its pages are read here, in Python: LMDB's own library maps the file into memory and
believes it, and a file that is cut short or damaged ends the process, without an exception.

Called by extras/datasets.py. Layout of data.mdb (LMDB 0.9, 64 bits, little-endian): pages of equal size, the first two
about the rest; from the root branch pages lead to leaf pages, whose nodes hold a key and a value, or the page where
a long value begins.
"""

import os
import struct

import numpy as np

from data import DataError, Source
from engine.read_back import at_most, printable, regular_file

MAGIC, HEADER = 0xBEEFC0DE, 16  # of the file; bytes at the start of each page
BRANCH, LEAF, META = 1, 2, 8  # flags of a page
LONG, OTHERS = 1, 6  # flags of a node: its value lies elsewhere; tables in tables, and several values of a key
EMPTY = (1 << 64) - 1  # root of a table without entries


class Pages:
    """An open data.mdb. DataError for whatever in it does not add up."""

    def __init__(self, path):
        self.path = regular_file(path)
        self.file = self.path.open("rb")
        self.bytes = os.fstat(self.file.fileno()).st_size
        metas = [self.meta(0)]
        self.page_size = metas[0][0]
        metas.append(self.meta(self.page_size))
        _, self.root, _ = max(metas, key=lambda meta: meta[2])  # of the last transaction

    def wrong(self, what):
        return DataError(f"{self.path} is damaged or cut short ({what}): fetch or unpack it again")

    def read(self, at, size):
        if not 0 <= at <= self.bytes - size:
            raise self.wrong(f"it refers to byte {at + size:,} of {self.bytes:,}")
        return os.pread(self.file.fileno(), size, at)

    def meta(self, at):
        """(page size, root, transaction) of the page at this byte."""
        page = self.read(at, 152)
        (flags,), (magic, version), (size,), (root, _, transaction) = (
            struct.unpack_from("<H", page, 10), struct.unpack_from("<II", page, 16), struct.unpack_from("<I", page, 40),
            struct.unpack_from("<QQQ", page, 128))
        if magic != MAGIC or version != 1 or not flags & META or size not in (2 ** i for i in range(9, 17)):
            raise self.wrong("its first pages are not LMDB's")
        return size, root, transaction

    def nodes(self, number):
        """(is it a leaf, [(low and high 16 bits, flags, length of the key, byte in the file)]) of a page."""
        page = self.read(number * self.page_size, self.page_size)
        own, _, flags, lower, upper = struct.unpack_from("<QHHHH", page)
        kind = flags & (BRANCH | LEAF)
        if own != number or flags & ~0x4010 not in (BRANCH, LEAF) or not HEADER <= lower <= upper <= self.page_size:
            raise self.wrong(f"page {number:,}")
        found = []
        for at in struct.unpack_from(f"<{(lower - HEADER) // 2}H", page, HEADER):
            if not lower <= at <= self.page_size - 8:
                raise self.wrong(f"page {number:,}")
            low, high, node_flags, key = struct.unpack_from("<HHHH", page, at)
            if at + 8 + key > self.page_size or node_flags & OTHERS and kind == LEAF:
                raise self.wrong(f"page {number:,}, or it is a table of tables")
            found.append((low | high << 16, node_flags, page[at + 8:at + 8 + key], number * self.page_size + at))
        return kind == LEAF, found

    def entries(self):
        """(key, byte in the file, length of the value) of each entry, in the order of the keys."""
        seen, waiting = 0, [] if self.root == EMPTY else [self.root]
        while waiting:
            seen += 1
            if seen > self.bytes // self.page_size:
                raise self.wrong("its pages lead in a circle")
            is_leaf, nodes = self.nodes(waiting.pop())
            if not is_leaf:
                waiting += [number | flags << 32 for number, flags, _, _ in reversed(nodes)]
                continue
            for length, flags, key, at in nodes:
                at += 8 + len(key)
                if flags & LONG:
                    at = struct.unpack("<Q", self.read(at, 8))[0] * self.page_size + HEADER
                if at + length > self.bytes:
                    raise self.wrong(f"a value of {length:,} bytes at byte {at:,} of {self.bytes:,}")
                yield key, at, length


class Lmdb(Source):
    """A directory NAME_lmdb with data.mdb, in which keys are names and values image files."""

    def __init__(self, path, test_path=None):
        paths = [path] if test_path is None else [path, test_path]
        self.parts = [Pages(p.resolve() / "data.mdb") for p in paths]
        self.names, self.places, ends = [], [], []
        for part in self.parts:
            for name, at, length in part.entries():
                self.names.append(name)
                self.places.append((at, length))
            ends.append(len(self.names))
        if not ends[0] or ends[-1] == ends[0] and test_path is not None:
            raise DataError(f"{path} is an empty LMDB: fetch or unpack it again")
        self.places = np.array(self.places, np.int64)
        test = None if test_path is None else range(ends[0], ends[1])
        super().__init__(path, [], np.zeros(ends[-1]), range(ends[0]), test)

    def read(self, i):
        at, length = self.places[i].tolist()
        at_most("the entry", length, "VQLCMD_MAX_IMAGE_BYTES")
        return self.parts[int(i >= self.total)].read(at, length)

    def title(self, i):
        return printable(self.names[i].decode("utf-8", "backslashreplace"))
