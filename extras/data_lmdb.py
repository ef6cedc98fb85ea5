"""A form of data: LSUN's LMDB, read by the package lmdb."""

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
        self.environment, self.names = open_lmdb(path.resolve())
        train, test = range(len(self.names)), None
        if test_path:
            self.test_environment, test_names = open_lmdb(test_path.resolve())
            self.names = self.names + test_names
            test = range(len(train), len(self.names))
        super().__init__(path, [], np.zeros(len(self.names)), train, test)

    def read(self, i):
        environment = self.environment if i < self.total else self.test_environment
        with environment.begin() as transaction:
            return transaction.get(self.names[i])

    def title(self, i):
        return printable(self.names[i].decode("utf-8", "backslashreplace"))
