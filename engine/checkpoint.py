"""Checkpoints: written atomically with the one before kept, read without executing or believing anything in them.

Their tensors are read by extras/foreign_checkpoint.py, never by torch.load. Every entry is checked where it is read,
against the options' own types and ranges, and weights against the model they are for. Called by train.py, sample.py and
extras/.
"""

import hashlib
import math
from pathlib import Path

import torch

from engine.config import RENAMED, TOKENIZER_OPTIONS, check_option
from engine.distributed import all_reduce_max
from engine.read_back import (
    ReadError,
    UserError,
    check_nesting,
    check_tensor,
    check_weights,
    expect,
    expect_each,
    printable,
    read_names,
    shown,
)
from engine.process import write_atomically
from extras.foreign_checkpoint import CheckpointError, read_object

CHECKPOINT_FORMAT = "vq-lcmd checkpoint 1"  # ckpt.pt
TOKENIZER_FORMAT = "vq-lcmd tokenizer 1"  # tokenizer.pt
MOST, DEEPEST = 1 << 20, 1000  # of any size, and of blocks, in a file: more is a lie, and to build it takes for ever
WEIGHTS = ("tokenizer", "discriminator", "model", "ema")  # entries that are state dicts


def rename(value):
    """A dict with all keys as they are called today, dicts inside it too; tensors and lists as they are.

    What came later and changes the network's shape is off where it is not named.
    """
    if type(value) is not dict:
        return value
    value = {RENAMED.get(name, name): rename(v) for name, v in value.items()}
    return {"posterior_input": False} | value if "output_prior" in value else value


def check_config(where, config):
    """ReadError unless the arguments of a model, in a file, have types and sizes that they can have."""
    for part, names in (("tokenizer", TOKENIZER_OPTIONS), ("denoiser", None), ("schedule", None)):
        for name, value in expect(f"{where}: {part}", config.get(part, {}), dict).items():
            entry = f"{where}: {part}: {name}"
            if isinstance(value, int) and not -MOST <= value <= MOST or name in ("depth", "blocks") and (
                    isinstance(value, int) and value > DEEPEST):
                raise ReadError(f"{entry} must be below {DEEPEST if name in ('depth', 'blocks') else MOST:,}, is "
                                      f"{shown(value)}")
            if name == "grid":
                if len(expect(entry, value, list)) != 2:
                    raise ReadError(f"{entry} must be 2 numbers, are {len(value)}")
                for side in value:
                    expect(entry, side, int, 1, 1 << 16)
            elif name == "num_classes":
                expect(entry, value, int, 0, MOST)
            elif name == "published":
                check_shapes(entry, value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise ReadError(f"{entry} must be a finite number, is {value}")
            else:
                check_option(f"{where}: {part}", expect(where, (names or {}).get(name, name), str), value)


def check_shapes(where, shapes):
    """ReadError unless this is {name: shape} of a published tokenizer's weights."""
    for name, shape in expect(where, shapes, dict).items():
        expect(f"{where}: a name", name, str)
        for side in expect(f"{where}: {printable(name)}", shape, list):
            expect(f"{where}: {printable(name)}", side, int, 1, MOST)


def check_metrics(where, metrics, depth):
    """ReadError unless these are numbers or texts by name, perhaps in groups."""
    for name, value in expect(where, metrics, dict).items():
        if depth and isinstance(value, dict):
            check_metrics(f"{where}: {shown(name)}", value, depth - 1)
        elif not (isinstance(value, str) and value.isprintable() or isinstance(value, float)):  # NaN is a number here
            expect(f"{where}: {shown(name)}", value, float)
        if not expect(f"{where}: a name", name, str).isprintable():
            raise ReadError(f"{where} has the name {shown(name)}")


def check_contents(path, state):
    """The dict of a checkpoint, if all of its entries but the weights' names and shapes can be believed."""
    is_tokenizer = state["format"] == TOKENIZER_FORMAT
    for name, kind in {"config": dict, "metrics": dict, "tokenizer": dict, "step": int, **(
            {} if is_tokenizer else {"ema": dict, "class_names": list, "sampling": dict})}.items():
        if name not in state:
            raise ReadError(f"{path} lacks the entry {name}: it is damaged, or of another version")
        expect(f"{path}: {name}", state[name], kind, *((0, 1 << 62) if kind is int else ()))
    config = {"tokenizer": state["config"]} if is_tokenizer else state["config"]
    check_config(f"{path}: config", config)
    check_metrics(f"{path}: metrics", state["metrics"], 0 if is_tokenizer else 1)
    expect(f"{path}: begin", state.get("begin", 0), int, 0, state["step"])
    for part in WEIGHTS:
        for name, value in expect(f"{path}: {part}", state.get(part, {}), dict).items():
            entry = f"{path}: {part}: {shown(name)}"
            if expect(entry, value, torch.Tensor).dtype == torch.float16:  # of --export
                check_tensor(entry, value)
                state[part][name] = value.float()
    history = expect(f"{path}: history", state.get("history", []), list)
    old = isinstance(history, tuple)  # (rows, codes in use) of an earlier version
    for row in [*(history[1:] if old else history), *([state["used"]] if "used" in state else [])]:
        if expect(f"{path}: history", row, torch.Tensor).ndim != 1 or not row.is_floating_point() or len(row) > MOST:
            raise ReadError(f"{path}: history must be rows of numbers, has {shown(row)}")
        check_tensor(f"{path}: history", row)
    if "used" in state and "K" in state["config"] and len(state["used"]) != state["config"]["K"]:
        raise ReadError(f"{path}: used must be {state['config']['K']} numbers, are {len(state['used'])}")
    if is_tokenizer:
        return state
    training = expect(f"{path}: config: training", config.get("training"), dict)
    for name in ("label_drop", "tokenizer_steps"):
        check_option(f"{path}: config: training", name, training.get(name))
    for group in ("vlb", "collapse", "tokenizer") if state["metrics"] else ():
        expect(f"{path}: metrics: {group}", state["metrics"].get(group), dict)
    expect_each(f"{path}: sampling", state["sampling"], dict(
        steps=(int, 1, MOST), guidance=(float, -1e6, 1e6), sampler=(str,)))
    for name in ("steps", "guidance", "sampler"):
        if name not in state["sampling"]:
            raise ReadError(f"{path}: sampling lacks {name}")
    check_option(f"{path}: sampling", "sampler", state["sampling"]["sampler"])
    names = read_names(f"{path}: class_names", state["class_names"])
    return state | {"class_names": names, "class_counts": read_counts(path, state.get("class_counts"), len(names))}


def read_counts(path, counts, classes):
    """The entry class_counts, a list of at most so many numbers of images; None in files of earlier versions."""
    if counts is None:
        return None
    if len(expect(f"{path}: class_counts", counts, list)) > max(1, classes):
        raise ReadError(f"{path}: class_counts must be at most {max(1, classes):,} numbers, one a class, are "
                        f"{len(counts):,}")
    return [expect(f"{path}: class_counts", count, int, 0, 1 << 40) for count in counts]  # so that sums are int64


def read_checkpoint(path, *formats):
    """The dict in a checkpoint of one of these formats, on the CPU. Nothing in the file is executed."""
    path = Path(path)
    if path.is_dir():
        name = {CHECKPOINT_FORMAT: "ckpt.pt", TOKENIZER_FORMAT: "tokenizer.pt"}[formats[0]]
        raise CheckpointError(f"{path} is a folder: give the file in it that train.py wrote, {path / name}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give a file that train.py wrote, e.g. runs/toy/ckpt.pt")
    try:
        checkpoint = read_object(path)
    except CheckpointError as error:
        older = f"; {previous(path)} is the one before" if previous(path).exists() else ""
        raise CheckpointError(f"{error}: it is no file of train.py, or it is damaged{older}") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    found = found if isinstance(found, str) else None
    if found not in formats:
        name = {CHECKPOINT_FORMAT: "ckpt.pt", TOKENIZER_FORMAT: "tokenizer.pt"}[formats[0]]
        error = CheckpointError(f"{path} is {shown(found or 'a file of another program')}, not {formats[0]!r}: "
                                f"give the {name} that train.py wrote")
        error.found = found
        raise error
    check_nesting(path, checkpoint)
    return check_contents(path, rename(checkpoint))


def previous(path):
    """Where the checkpoint before the last one is kept while a run trains: ckpt.pt, ckpt.previous.pt."""
    return path.with_suffix(".previous.pt")


def save_checkpoint(path, content):
    write_atomically(path, lambda partial: torch.save(content, partial), keep_as=previous(path))


def read_newest(path, expected):
    """The newest checkpoint of a run: the one before, if the last cannot be read; None if there is none yet."""
    older = previous(path)
    try:
        state = read_checkpoint(path, expected) | {"path": path} if path.exists() or older.exists() else None
        if state and expected == CHECKPOINT_FORMAT and "optimizer" not in state:
            raise UserError(f"{path} was made by --export and cannot be trained further as it is: give it to --init, "
                            "with another --out")
    except UserError as error:
        if getattr(error, "found", None) or not older.exists():
            raise
        state = read_checkpoint(older, expected)
        print(f"{error}: going on from there, step {state['step']:,}")
        state["path"] = older
    step = state["step"] if state else -1
    if all_reduce_max(step) != -all_reduce_max(-step):  # a disk that fails one of them
        raise OSError(f"{path} could be read by some processes and not by others")
    return state


def restore(parts, state, init):
    """Loads {name: module or optimizer} from a checkpoint's `state`; without one, networks from `init` (--init)."""
    for name, part in parts.items():
        if state and isinstance(part, torch.nn.Module):
            check_weights(f"{state['path']}: {name}", part.state_dict(), state.get(name))
            part.load_state_dict(state[name])
        elif state:
            check_optimizer(f"{state['path']}: {name}", part, state.get(name))
            part.load_state_dict(state[name])
        elif name in init:
            own, given, classes = part.state_dict(), dict(init[name]), "class_embedding.weight"
            if classes in own and classes in given and own[classes].shape != given[classes].shape:
                given[classes] = own[classes]  # other classes start anew
            wrong = [key for key in own if key not in given or own[key].shape != given[key].shape]
            wrong += given.keys() - own.keys()
            if wrong:
                raise UserError(f"--init: the {name} there has other sizes ({wrong[0]}): take its --preset and sizes, "
                                "or leave --init away")
            if not any(value.is_meta for value in own.values()):  # on the meta device only the sizes are compared
                check_weights(f"--init: {name}", own, given)
                part.load_state_dict(given)


def check_optimizer(where, optimizer, stored):
    """ReadError unless the state of an optimizer in a file is one of this optimizer, for these parameters."""
    expect(where, stored, dict)
    groups = expect(f"{where}: param_groups", stored.get("param_groups"), list)
    values = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in groups for n in expect(f"{where}: params", expect(
        f"{where}: a group", group, dict).get("params"), list)]
    if len(groups) != len(optimizer.param_groups) or numbers != list(range(len(values))):
        raise ReadError(f"{where} must be of {len(values)} parameters, is of {len(numbers)}: it is damaged, or "
                              "of another run")
    for own, given in zip(optimizer.param_groups, groups, strict=True):
        for name in own.keys() & given.keys() - {"params"}:
            if isinstance(own[name], tuple):
                for beta in expect(f"{where}: {name}", given[name], list):
                    expect(f"{where}: {name}", beta, float, 0, 1)
            elif isinstance(own[name], bool) or own[name] is None:
                if given[name] is not None:
                    expect(f"{where}: {name}", given[name], bool)
            else:
                expect(f"{where}: {name}", given[name], float, 0, 1e6)
    for number, entries in expect(f"{where}: state", stored.get("state"), dict).items():
        p = values[expect(f"{where}: a number", number, int, 0, len(values) - 1)]
        for name, value in expect(f"{where}: {number}", entries, dict).items():
            if name != "step":
                check_weights(f"{where}: {number}", {name: p}, {name: value})
            elif expect(f"{where}: step", value, torch.Tensor).numel() != 1:
                raise ReadError(f"{where}: step must be one number, is {shown(value)}")
        if not {"step", "exp_avg", "exp_avg_sq"} <= entries.keys():
            raise ReadError(f"{where}: {number} lacks step, exp_avg or exp_avg_sq")


def load_optimizer(optimizer, model, state, device, fsdp):
    """The optimizer of a checkpoint's `state`, splitting what is whole in it if the weights are split."""
    check_optimizer(f"{state['path']}: optimizer", optimizer, state.get("optimizer"))
    stored = state["optimizer"]
    if fsdp:
        from torch.distributed.tensor import distribute_tensor  # some builds of PyTorch lack it
        for p, of_p in zip(model.parameters(), stored["state"].values(), strict=True):
            of_p.update({name: distribute_tensor(value.to(device), p.device_mesh, p.placements)
                         for name, value in of_p.items() if value.shape == p.shape})
    optimizer.load_state_dict(stored)


def digest(weights):
    """A short hash of {name: tensor}: which tokenizer made these tokens, which model drew these images?"""
    content = hashlib.sha256()
    for name, value in sorted(weights.items()):
        content.update(name.encode() + value.cpu().numpy().tobytes())
    return content.hexdigest()[:16]
