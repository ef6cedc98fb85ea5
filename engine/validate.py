"""Validation of files that anybody may have made: torch, numpy, json and Pillow execute nothing in them, and
whatever these raise is one line. Models are compared with weights on the meta device, before memory is taken.
"""

import contextlib
import json
import math
import reprlib
from pathlib import Path

import numpy as np
import torch

MAX_UNPACKED = 256 << 20  # bytes that any file may unpack to; a larger one may unpack to 8 times its own size


def printable(text):
    """Text of others, with line breaks, escapes and marks of reading order spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class UserError(ValueError):
    """One line: what was wrong, where, what to do. status: the program's exit status (2: before any work)."""

    def __init__(self, message, status=2):
        super().__init__(printable(message))
        self.status = status


def reason_of(error):
    """The first sentence of a library's exception. In later ones torch advises to switch its guard off."""
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__


@contextlib.contextmanager
def reading(path, advice="it is damaged, or of another program"):
    """Whatever goes wrong in this block, where a file is read, is a UserError that names file and cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a damaged file libraries raise all sorts of things
        raise UserError(f"{path} cannot be read ({reason_of(error)}): {advice}") from error


def check_file(path):
    """path as a Path, if it is a regular file: a pipe or a device could keep the program waiting for ever."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    return path


def check_unpacked(where, unpacked, packed):
    """UserError if a small file announces that it unpacks to a full memory. Both in bytes."""
    if unpacked > max(MAX_UNPACKED, 8 * packed):
        raise UserError(f"{where}: {packed:,} bytes would unpack to {unpacked:,}: unpack it yourself first")


def read_json(path, kind=dict):
    """The object in a JSON file, of this kind."""
    with reading(path):
        return expect(path, json.loads(check_file(path).read_bytes()), kind)


def read_array(path, mode="r"):
    """The array of a .npy file, memory-mapped. numpy refuses objects, and sizes that the file lacks."""
    path = check_file(path)
    with reading(path):
        array = np.lib.format.open_memmap(path, "r")  # "r+" would pad a file that was cut short
        return array if mode == "r" else np.lib.format.open_memmap(path, mode)


def expect(where, value, kind, low=-math.inf, high=math.inf):
    """value, if it is of this kind and, a number, in [low, high]; else UserError. where: the entry.

    kind: int, float (an int too), bool, str, list (a tuple too), dict, torch.Tensor, or a tuple of words.
    """
    if isinstance(kind, tuple):
        valid, what = isinstance(value, str) and value in kind, f"one of {', '.join(kind)}"
    else:
        kinds = {float: (int, float), list: (list, tuple)}.get(kind, kind)
        valid = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
        what = f"of type {kind.__name__}"
    if valid and kind in (int, float):
        valid = low <= value <= high  # never true of NaN
        what += f" from {low} to {high}"
    if not valid:
        raise UserError(f"{where} must be {what}, is {reprlib.repr(value)[:100]}")
    return value


def check_weights(where, wanted, weights):
    """UserError unless {name: tensor} of a file is finite and has the names, shapes and types of `wanted`."""
    if wrong := wanted.keys() ^ expect(where, weights, dict).keys():
        name = min(map(str, wrong))[:100]
        raise UserError(f"{where} {'lacks' if name in wanted else 'also has'} {name} ({len(wrong):,} names "
                        "differ): it is damaged, or its configuration is another's")
    for name, value in weights.items():
        check_finite(f"{where}: {name}", value)
        model = wanted[name]
        if value.shape != model.shape or value.dtype != model.dtype:
            raise UserError(f"{where}: {name} must be {list(model.shape)} of {model.dtype}, is "
                            f"{list(value.shape)} of {value.dtype}")


def check_finite(where, value):
    """UserError unless this is a tensor, stored number by number, and finite."""
    expect(where, value, torch.Tensor)
    if value.layout != torch.strided or value.numel() * value.itemsize > value.untyped_storage().nbytes():
        raise UserError(f"{where} is {list(value.shape)}, of which the file holds only a part")
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
