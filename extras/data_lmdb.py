"""A form of data: LSUN's LMDB, read by the package lmdb. Called by extras/datasets.py."""

import functools

import numpy as np

from data import Source
from engine.validate import UserError, printable, reading


@functools.cache  # lmdb opens a file once in a process
def open_lmdb(path):
    """(environment, its keys) of a directory with data.mdb."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"{path} is an LMDB: pip install lmdb, to read it") from error
    with reading(path, "fetch or unpack it again"):
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        n_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if n_bytes > (path / "data.mdb").stat().st_size:  # lmdb would crash where it ends
            raise ValueError("it is cut short")
        with environment.begin() as transaction:
            return environment, list(transaction.cursor().iternext(values=False))


class Lmdb(Source):
    """A directory NAME_lmdb, in which keys are names and values image files. test_path: held-out images."""

    def __init__(self, path, test_path=None):
        paths = [path] if test_path is None else [path, test_path]
        self.environments, names = zip(*[open_lmdb(part.resolve()) for part in paths], strict=True)
        if not all(names):
            raise UserError(f"{path} is an empty LMDB: fetch or unpack it again")
        self.names, n = sum(names, []), len(names[0])
        test = None if test_path is None else range(n, len(self.names))
        super().__init__(path, [], np.zeros(len(self.names)), range(n), test)

    def read(self, i):
        with self.environments[int(i >= self.total)].begin() as transaction:
            return transaction.get(self.names[i])

    def title(self, i):
        return printable(self.names[i].decode("utf-8", "backslashreplace"))
