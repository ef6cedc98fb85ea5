"""Checkpoints: what kind of file one is, before anything in it is read.

torch.load looks at a file and chooses a loader by itself, and two of the loaders act on what the file says:
TorchScript is a program, and a tar archive is unpacked, links and all. Neither is a checkpoint of ours, so both are
refused by name.
"""

import tarfile
import zipfile
from pathlib import Path


class CheckpointError(ValueError):
    """One line: what is wrong with the file and what to do. found: the format it is of, if it is of this project."""

    found = None


def detect_container(path):
    """ "zip" for torch's archive, "pickle" for anything else; CheckpointError for TorchScript and tar archives."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.split("/")[-1] == "constants.pkl" or "code" in name.split("/")[:-1] for name in names):
            raise CheckpointError(f"{path} is refused: it is TorchScript, a program and not weights alone; "
                                  "give the state dict that it was made of")
        return "zip"
    if tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is refused: it is a tar archive, a form that torch left in 2018; "
                              "unpack it elsewhere and give the file of weights")
    return "pickle"
