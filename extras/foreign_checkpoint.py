"""Reads the tensors of a checkpoint that somebody else wrote, and runs nothing of it.

A .pt, .pth or .ckpt file is a program: a pickle may call any function, and torch.load also unpacks tar archives and
runs TorchScript. This file never calls torch.load. It knows two containers, torch's zip archive and the older plain
pickle, reads their tensors itself, and replaces every other object in them by a Stub that does nothing. What it takes
from memory is in proportion to the size of the file.

Called by engine/checkpoint.py (our own), extras/published_vqgan.py (--tokenizer of a published VQGAN) and
extras/vqgan_losses.py (--lpips-weights).
"""

import collections
import io
import math
import pickle
import pickletools
import struct
import tarfile
import zipfile

import torch

from engine.read_back import UserError, printable, regular_file


class CheckpointError(UserError):
    """One line: what is wrong with the file and what to do. found: the format it is of, if it is of this project."""

    found = None


def detect_container(path):
    """ "zip" for torch's archive, "pickle" for anything else; CheckpointError for TorchScript and tar archives."""
    path = regular_file(path)
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
MOST_STEPS = 1_000_000  # of a pickle, each of which may take 200 bytes
DEEPEST_NAME, LONGEST_NAME = 16, 256  # parts and characters of a tensor's name


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


def check_pickle(file):
    """CheckpointError if the pickle that begins here would take memory out of proportion. Comes back to its start.

    A step may be one byte and make a list; one that numbers what was made may ask for room for all numbers below.
    """
    start = file.tell()
    for steps, (code, argument, _) in enumerate(pickletools.genops(file)):
        if steps > MOST_STEPS or code.name in ("PUT", "LONG_BINPUT") and not 0 <= argument <= MOST_STEPS:
            raise CheckpointError(f"it holds more than {MOST_STEPS:,} objects")
    file.seek(start)


def unpickle(file, storage):
    check_pickle(file)
    return RestrictedUnpickler(file, storage).load()


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

        return unpickle(io.BytesIO(archive.read(root + "data.pkl")), storage)


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
            unpickle(file, storage)
        content = unpickle(file, storage)
        for key in unpickle(file, storage):
            count, = struct.unpack("<q", file.read(8))
            if count != len(storages[key]):
                raise CheckpointError("its tensors and their storages do not agree")
            storages[key].copy_(from_bytes(file.read(storages[key].nbytes), storages[key].dtype))
    return content


def read_object(path):
    """The object in a checkpoint: tensors, numbers, texts and containers. CheckpointError if it cannot be read."""
    path = regular_file(path)
    try:
        return {"zip": read_zip, "pickle": read_legacy}[detect_container(path)](path)
    except CheckpointError as error:
        said = str(error)
        raise CheckpointError(said if said.startswith(str(path)) else f"{path} is refused: {said}") from error
    except Exception as error:  # damaged files raise all sorts of things here
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error


def read_state(path):
    """{name: tensor} in a checkpoint, whatever else it holds. CheckpointError if it cannot be trusted or read."""
    content = read_object(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = state if isinstance(state, dict) else {}
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    for name in state:
        if not isinstance(name, str) or len(name) > LONGEST_NAME or name.count(".") >= DEEPEST_NAME:
            raise CheckpointError(f"{path} is refused: a tensor is called {printable(str(name)[:50])}..., which is no "
                                  f"text of at most {DEEPEST_NAME} parts and {LONGEST_NAME} characters")
    return state
