"""What a file has to stand before anything of it is believed, allocated or printed: anybody may have made it.

Only regular files are opened, so nothing waits for a pipe. Sizes that a file announces are compared with the
bytes that it has, and with limits that the user can raise. Values are of the type and range that they must
have. Weights are compared with a model on the meta device, which takes no memory, before the model is made.
What is wrong is one line, with the file, the entry, what was expected and what was found. Names of others are
printed by `printable`.

Called wherever a file is read: engine/checkpoint.py, engine/config.py, engine/tokens.py, data.py, extras/.
"""

import itertools
import json
import math
import os
import reprlib
import stat
from pathlib import Path

import numpy as np
import torch

from engine.validate import UserError

LIMITS = {  # name of the environment variable that sets another one: (default, what it limits)
    "VQLCMD_MAX_PIXELS": (50_000_000, "pixels of a decoded image"),
    "VQLCMD_MAX_IMAGE_BYTES": (256 << 20, "bytes of an image file"),
    "VQLCMD_MAX_PACKED_IMAGE_BYTES": (32 << 20, "bytes of an image in a zip, beyond 4 times its packed size"),
    "VQLCMD_MAX_UNPACKED_BYTES": (256 << 20, "bytes of what is unpacked as a whole, beyond 8 times its packed size"),
    "VQLCMD_MAX_INDEX_BYTES": (512 << 20, "bytes of memory for a table of text"),
    "VQLCMD_MAX_IMAGES": (10_000_000, "images of an array"),
    "VQLCMD_MAX_CLASSES": (100_000, "classes"),
    "VQLCMD_MAX_DEPTH": (64, "folders in one another")}


class ReadError(UserError):
    """One line: which file, which entry, what was expected, what was found."""


def printable(text):
    """Names of others may hold line breaks, tabs, a terminal's escapes, marks that turn the reading order, or
    bytes that are no UTF-8: all of them are spelled out, so that none breaks a list or a page, or deceives.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value):
    """A value in a few words, whatever it is and however large."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"an array {list(value.shape)} of {printable(str(value.dtype))[:200]}"
    try:
        return printable(reprlib.repr(value))
    except Exception:  # a whole number of more digits than Python prints, say
        return f"a {type(value).__name__}"


# ----------------------------------------------------------------------------
# Files and sizes.

def limit(name):
    """The number that LIMITS, or the environment, sets."""
    given = os.environ.get(name, "")
    if given and not (given.isascii() and given.isdecimal()):
        raise ReadError(f"the environment variable {name}: must be a whole number, is {shown(given)}")
    return int(given[:18]) if given else LIMITS[name][0]


def at_most(where, found, name):
    """ReadError if `found` is more than the limit of this name."""
    if found > limit(name):
        found = min(int(found), 10 ** 18)
        raise ReadError(f"{where}: {found:,} {LIMITS[name][1]}, more than {limit(name):,}; if that is meant, set "
                        f"{name}={found}")


def check_unpacked(where, unpacked, packed):
    """ReadError if a small file would unpack to a full memory. Both in bytes."""
    if unpacked > 8 * packed:
        at_most(where, unpacked, "VQLCMD_MAX_UNPACKED_BYTES")


def no_file(path):
    """Why this is nothing to be opened: "a pipe, no file"; "" if it is a file. OSError if there is nothing.
    """
    mode = os.stat(path).st_mode
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
    return "" if stat.S_ISREG(mode) else f"{kinds.get(stat.S_IFMT(mode), 'a device')}, no file"


def regular_file(path):
    """path, if it is a file that can be opened without waiting; else ReadError."""
    try:
        reason = no_file(path)
    except OSError as error:
        raise ReadError(f"{printable(str(path))}: {error.strerror}") from error
    if reason:
        raise ReadError(f"{printable(str(path))}: {reason}")
    return Path(path)


def read_bytes(path, name):
    """The content of a file of at most so many bytes as the limit of this name."""
    path = regular_file(path)
    at_most(path, path.stat().st_size, name)
    return path.read_bytes()


def parse_json(where, content, kind=dict):
    """bytes of JSON -> the object in it, of this kind. Nesting and the memory that it would take are bounded.
    """
    # An empty list takes 2 bytes there and 64 here, and its place in another one 8.
    memory = 2 * len(content) + 80 * (content.count(b"[") + content.count(b"{")) + 40 * content.count(b",")
    at_most(where, memory, "VQLCMD_MAX_INDEX_BYTES")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ReadError(f"{where} cannot be read as JSON ({type(error).__name__}): make it again, or take it "
                        "away") from error
    return expect(where, found, kind)


def read_json(path, kind=dict):
    return parse_json(path, read_bytes(path, "VQLCMD_MAX_INDEX_BYTES"), kind)


def read_npy_header(where, file, size):
    """(shape, is it in Fortran's order, dtype) of a .npy that is open, whose arrays are as large as its
    `size` bytes allow. Headers are Python's syntax: of unusual ones numpy raises whatever its parser does.
    """
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
    except Exception as error:
        raise ReadError(f"{where} cannot be read as an array ({reason_of(error)}): make it again") from error
    if dtype.hasobject:
        raise ReadError(f"{where} cannot be read as an array: it holds Python objects, and those may run a program")
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize > size:
        raise ReadError(f"{where} claims shape {shown(shape)} of {shown(dtype)}, more than it holds: make it again")
    return shape, fortran, dtype


def open_npy(path, mode="r"):
    """The array of a .npy file, memory-mapped."""
    path = regular_file(path)
    with path.open("rb") as file:
        read_npy_header(path, file, path.stat().st_size)
        at = file.tell()
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # "r+" would fill up a file that was cut short
        return array if mode == "r" else np.load(path, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # numpy's reader of headers raises all sorts of things
        raise ReadError(f"{path} cannot be read as an array ({reason_of(error)}, {at} bytes of header): make it "
                        "again") from error


def reason_of(error):
    """The first words of an exception of a library."""
    return printable(" ".join(str(error).split())[:200]) or type(error).__name__


# ----------------------------------------------------------------------------
# Values.

def expect(where, value, kind, low=-math.inf, high=math.inf):
    """value, if it is what it must be; else ReadError. where: the file, and the entry in it.

    kind: int, float (a whole number too), bool, str, list (a tuple too), dict, torch.Tensor, or a tuple of
    the words that it may be. low, high: bounds of a number, both included; NaN lies in none.
    """
    if isinstance(kind, tuple):
        good, what = isinstance(value, str) and value in kind, f"one of {', '.join(kind)}"
    else:
        kinds = {float: (int, float), list: (list, tuple)}.get(kind, kind)
        good = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
        what = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list",
                dict: "entries by name", torch.Tensor: "a tensor"}[kind]
    if kind in (int, float):
        good = good and low <= value <= high
        what += f" from {low} to {high}" * (math.isfinite(low) or math.isfinite(high))
    if not good:
        raise ReadError(f"{where} must be {what}, is {shown(value)}")
    return value


def expect_each(where, values, kinds):
    """ReadError unless `values` is a dict whose entries are those of `kinds`, {name: (kind, low, high)} or
    less.
    """
    for name, value in expect(where, values, dict).items():
        if name not in kinds:
            raise ReadError(f"{where} has the entry {shown(name)}, expected {', '.join(kinds)}")
        expect(f"{where}: {name}", value, *kinds[name])


def read_names(where, values):
    """A list of class names, as they may be printed."""
    at_most(where, len(expect(where, values, list)), "VQLCMD_MAX_CLASSES")
    names = [printable(expect(f"{where}: number {i}", name, str)) for i, name in enumerate(values)]
    if any(len(name) > 4096 for name in names):
        raise ReadError(f"{where} has a name of {max(map(len, names)):,} characters, more than 4096")
    return names


def check_nesting(where, content, depth=12, entries=1_000_000):
    """ReadError if containers lie deeper in one another, or are more; one that is named twice is two."""
    level = [content]
    for _ in range(depth):
        inner = (part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(part, (dict, list, tuple)))
        level = list(itertools.islice(inner, entries))
        if not level:
            return
        if len(level) == entries:
            raise ReadError(f"{where} holds more than {entries:,} lists")
    raise ReadError(f"{where} holds lists in one another, more than {depth} deep")


# ----------------------------------------------------------------------------
# Weights.

def check_weights(where, wanted, weights):
    """ReadError unless {name: tensor} of a file has the names, shapes and types of `wanted`, and is finite.

    wanted: a state dict, which may be of a model on the meta device. Nothing is allocated.
    """
    expect(where, weights, dict)
    for problem, names in (("lacks", wanted.keys() - weights.keys()), ("also has", weights.keys() - wanted.keys())):
        if names:
            raise ReadError(f"{where} {problem} {shown(min(names, key=str))}, {len(names):,} of its weights: it is "
                            "damaged, or its configuration is another's")
    for name, value in weights.items():
        entry, model = f"{where}: {name}", wanted[name]
        expect(entry, value, torch.Tensor)
        if value.shape != model.shape or value.dtype != model.dtype:
            raise ReadError(f"{entry} must be {shown(model)}, is {shown(value)}")
        check_tensor(entry, value)


def check_tensor(where, value):
    """ReadError if a tensor is not stored in full, or not finite."""
    if value.layout != torch.strided or value.numel() * value.itemsize > value.untyped_storage().nbytes():
        raise ReadError(f"{where} is {shown(value)}, of which the file holds only a part")
    if value.is_floating_point() and not value.isfinite().all():
        raise ReadError(f"{where} is not finite (NaN or infinity): take an earlier checkpoint")


def on_meta(where, make):
    """make(), a module that is made on the meta device: it has names, shapes and types, and takes no memory.
    """
    try:
        with torch.device("meta"):
            return make()
    except UserError:
        raise
    except Exception as error:  # whatever sizes that make no sense lead to
        raise ReadError(f"{where}: no model can be made of it ({reason_of(error)}): it is damaged, or of another "
                        "version") from error


def load_weights(where, make, weights):
    """make() with these weights, which are compared with it before it takes any memory."""
    check_weights(where, on_meta(where, make).state_dict(), weights)
    module = make()
    module.load_state_dict(weights)
    return module
