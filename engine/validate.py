"""Validation of files that anybody may have made: nothing in them is executed, and what is wrong is one line.

    executes nothing    torch.load(weights_only=True), numpy with allow_pickle=False, json, csv, Pillow
    one line            reading(path) turns whatever these libraries raise into a UserError that names the file
    memory              a model is built on the meta device and compared, names, shapes and types, before it takes any;
                        the announced size of what is unpacked is checked first

Called wherever a file is read.
"""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import torch

MAX_UNPACKED = 256 << 20  # bytes that any file may unpack to; a larger one may unpack to 8 times its own size


class UserError(ValueError):
    """One line: what was wrong, where, and what to do. status: the program's exit status (2: before any work)."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def printable(text):
    """Text of others with line breaks, escapes and marks of reading order spelled out: a name breaks no list."""
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason_of(error):
    """The first words of a library's exception."""
    return printable(" ".join(str(error).split())[:200]) or type(error).__name__


@contextlib.contextmanager
def reading(path, advice="it is damaged, or of another program"):
    """Whatever goes wrong in this block, which reads a file, is a UserError that names the file and the cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a damaged file libraries raise all sorts of things
        raise UserError(f"{printable(path)} cannot be read ({reason_of(error)}): {advice}") from error


def check_file(path):
    """path as a Path, if it is a regular file; a pipe or a device could keep the program waiting for ever."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{printable(path)}: {'not a regular file' if path.exists() else 'no such file'}")
    return path


def check_unpacked(where, unpacked, packed):
    """UserError if a small file announces that it unpacks to a full memory. Both in bytes."""
    if unpacked > max(MAX_UNPACKED, 8 * packed):
        raise UserError(f"{printable(where)} would unpack from {packed:,} to {unpacked:,} bytes: unpack it yourself, if "
                        "that is meant")


def read_json(path, kind=dict):
    """The object in a JSON file, of this kind."""
    path = check_file(path)
    with reading(path):
        content = json.loads(path.read_bytes())
    if not isinstance(content, kind):
        raise UserError(f"{path} must hold a JSON {kind.__name__}, holds a {type(content).__name__}")
    return content


def read_array(path, mode="r"):
    """The array of a .npy file, memory-mapped. numpy refuses what holds objects, or claims more than the file has."""
    path = check_file(path)
    with reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # first "r": "r+" would pad a file that was cut short
        if not isinstance(array, np.ndarray):
            raise ValueError("it is no .npy")
        return array if mode == "r" else np.load(path, mmap_mode=mode, allow_pickle=False)


# ----------------------------------------------------------------------------
# Values and weights.

def expect(where, value, kind, low=-math.inf, high=math.inf):
    """value, if it is of this kind and, a number, within [low, high]; else UserError. where: the file and the entry.

    kind: int, float (a whole number too), bool, str, list (a tuple too), dict, torch.Tensor, or a tuple of words.
    """
    if isinstance(kind, tuple):
        valid, what = isinstance(value, str) and value in kind, f"one of {', '.join(kind)}"
    else:
        valid = isinstance(value, {float: (int, float), list: (list, tuple)}.get(kind, kind))
        valid = valid and isinstance(value, bool) == (kind is bool)
        what = f"of type {kind.__name__}"
    if valid and kind in (int, float):
        valid = low <= value <= high  # never true of NaN
        what += f" from {low} to {high}"
    if not valid:
        raise UserError(f"{printable(where)} must be {what}, is {printable(repr(value)[:100])}")
    return value


def check_weights(where, wanted, weights):
    """UserError unless {name: tensor} of a file has the names, shapes and types of `wanted`, and is finite.

    wanted: a state dict, which may be of a model on the meta device. Nothing is allocated.
    """
    expect(where, weights, dict)
    for problem, names in (("lacks", wanted.keys() - weights.keys()), ("also has", weights.keys() - wanted.keys())):
        if names:
            raise UserError(f"{where} {problem} {printable(min(names, key=str))[:100]}, {len(names):,} of its weights: "
                            "it is damaged, or its configuration is another's")
    for name, value in weights.items():
        expect(f"{where}: {name}", value, torch.Tensor)
        if value.shape != wanted[name].shape or value.dtype != wanted[name].dtype:
            raise UserError(f"{where}: {name} must be {list(wanted[name].shape)} of {wanted[name].dtype}, is "
                            f"{list(value.shape)} of {value.dtype}")
        check_finite(f"{where}: {name}", value)


def check_finite(where, value):
    if value.is_floating_point() and not value.isfinite().all():
        raise UserError(f"{where} is not finite (NaN or infinity): take an earlier checkpoint")


def on_meta(where, make):
    """make(), a module, on the meta device: it has names, shapes and types, and takes no memory."""
    with reading(where), torch.device("meta"):
        return make()


def load_weights(where, make, weights):
    """make() with these weights, which are compared with it before it takes any memory."""
    check_weights(where, on_meta(where, make).state_dict(), weights)
    module = make()
    module.load_state_dict(weights)
    return module
