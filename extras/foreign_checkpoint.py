"""Reads the tensors of a checkpoint that somebody else wrote, and runs nothing of it.

A .pt, .pth or .ckpt file is a program: a pickle may call any function, and torch.load also unpacks tar archives and
runs TorchScript. This file never calls torch.load. It knows two containers, torch's zip archive and the older plain
pickle, reads their tensors itself, and replaces every other object in them by a Stub that does nothing.

Called by extras/published_vqgan.py (--tokenizer of a published VQGAN) and extras/vqgan_losses.py (--lpips-weights).
"""

import collections
import math
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from engine.checkpoint import CheckpointError, detect_container


class Stub:
    """Stands for any object beside the tensors. Whatever the pickle does with it, nothing happens."""

    def __init__(self, *args, **kwargs):
        pass

    def ignore(self, *args, **kwargs):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = update = ignore


DTYPES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
          "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
          "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
          "BoolStorage": torch.bool}
STUBBED = {"pytorch_lightning", "lightning", "omegaconf", "numpy", "argparse", "pathlib", "collections", "torch",
           "taming", "ldm", "main", "_codecs", "copyreg"}  # libraries that left objects in published files
PLAIN = {"set", "frozenset", "list", "dict", "tuple", "object", "int", "float", "bool", "complex", "bytearray"}


def rebuild_tensor(storage, offset, size, stride, *rest):
    """A view of the flat tensor `storage`, as torch._utils._rebuild_tensor makes it, never larger than that."""
    if math.prod(size) > len(storage):
        raise CheckpointError("a tensor in it is larger than its storage")
    return storage.as_strided(size, stride, offset)  # which checks the bounds


class RestrictedUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers. storage(key, dtype, count) returns a flat tensor for each storage."""

    TENSORS = {("torch._utils", "_rebuild_tensor"): rebuild_tensor,
               ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
               ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
               ("torch", "Size"): tuple,
               ("collections", "OrderedDict"): collections.OrderedDict}

    def __init__(self, file, storage):
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module, name):
        if (module, name) in self.TENSORS:
            return self.TENSORS[module, name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        plain = module in ("builtins", "__builtin__") and name in PLAIN
        if plain or module.split(".")[0] in STUBBED:
            return Stub
        raise CheckpointError(f"it names {module}.{name}, which has no place in a checkpoint")

    def persistent_load(self, key):
        kind, dtype, name, _, count, *view = key
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"it holds a {kind} of {dtype}, which is not supported")
        whole = self.storage(name, dtype, count)
        if view and view[0]:  # only files older than 2018 have these
            _, offset, length = view[0]
            return whole[offset:offset + length]
        return whole


def from_bytes(content, dtype):
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def read_zip(path):
    """The object in an archive of torch.save: ROOT/data.pkl and one uncompressed ROOT/data/KEY per storage."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members) or \
                sum(member.file_size for member in members) > path.stat().st_size:
            raise CheckpointError("its archive unpacks to more than the file holds")
        root = next(member.filename for member in members if member.filename.endswith("/data.pkl"))[:-len("data.pkl")]
        storages = {}

        def storage(key, dtype, count):
            if key not in storages:
                storages[key] = from_bytes(archive.read(f"{root}data/{key}"), dtype)
            return storages[key]

        with archive.open(root + "data.pkl") as file:
            return RestrictedUnpickler(file, storage).load()


def read_legacy(path):
    """The object in a file of torch before 1.6: pickles of a mark, a version, facts on the system, the object and the
    keys of its storages; then, for each key, the number of its elements and the elements."""
    size, storages = path.stat().st_size, {}

    def storage(key, dtype, count):
        if key not in storages:
            if not 0 <= count * dtype.itemsize <= size - sum(s.nbytes for s in storages.values()):
                raise CheckpointError("its tensors are larger than the file")
            storages[key] = torch.zeros(count, dtype=dtype)  # filled below
        return storages[key]

    with path.open("rb") as file:
        for _ in range(3):
            RestrictedUnpickler(file, storage).load()
        content = RestrictedUnpickler(file, storage).load()
        for key in RestrictedUnpickler(file, storage).load():
            count, = struct.unpack("<q", file.read(8))
            if count != len(storages[key]):
                raise CheckpointError("its tensors and their storages do not agree")
            storages[key].copy_(from_bytes(file.read(storages[key].nbytes), storages[key].dtype))
    return content


def read_state(path):
    """{name: tensor} in a checkpoint, whatever else it holds. CheckpointError if it cannot be trusted or read."""
    path = Path(path)
    read = {"zip": read_zip, "pickle": read_legacy}[detect_container(path)]
    try:
        content = read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # damaged files raise all sorts of things here
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = state if isinstance(state, dict) else {}
    return {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
