"""Checkpoints: written atomically with the one before kept, read without executing anything in them."""

import contextlib
import hashlib
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from tqdm import tqdm

from engine.config import TOKENIZER_OPTIONS, check_option
from engine.distributed import all_reduce_max, barrier, rank_and_world
from engine.process import write_atomically
from engine.validate import UserError, check_file, check_finite, check_unpacked, expect, printable, reading

CHECKPOINT_FORMAT = "vq-lcmd checkpoint 1"  # ckpt.pt
TOKENIZER_FORMAT = "vq-lcmd tokenizer 1"  # tokenizer.pt
OLD_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # of files of torch before 1.6
TOKENIZER_ENTRIES = {"config": dict, "metrics": dict, "step": int, "tokenizer": dict}
ENTRIES = TOKENIZER_ENTRIES | {"ema": dict, "class_names": list, "class_counts": list, "sampling": dict}


class StandIn:
    """In place of an object of another library that is no dict."""

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __init__


def read_torch(path):
    """The object in a file of torch.save: tensors on the CPU, numbers, texts and containers of them."""
    path, names = check_file(path), []
    with reading(path, "it is damaged, or holds more than weights"):
        if zipfile.is_zipfile(path):  # else of torch before 1.6: there torch refuses every foreign object
            with zipfile.ZipFile(path) as archive:
                check_unpacked(path, sum(m.file_size for m in archive.infolist()), path.stat().st_size)
            names = get_unsafe_globals_in_checkpoint(path)
        elif path.open("rb").read(len(OLD_MAGIC)) != OLD_MAGIC:
            raise ValueError("it is no file of torch.save")
        stand_ins = [(OrderedDict if name.endswith("Dict") else StandIn, name) for name in names]
        with safe_globals(stand_ins):  # so that nothing of theirs runs; torch refuses os, sys and the like
            return torch.load(path, map_location="cpu", weights_only=True)


def tensors_of(path, content):
    """{name: tensor} of the state dict in what read_torch read from `path`, whatever else is there."""
    state = expect(path, expect(path, content, dict).get("state_dict", content), dict)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def is_own(content):
    """Is this, which read_torch returned, a checkpoint of this project?"""
    return isinstance(content, dict) and content.get("format") in [CHECKPOINT_FORMAT, TOKENIZER_FORMAT]


def read_checkpoint(path, *formats):
    """The dict in a checkpoint of one of these formats, on the CPU."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: give a file that train.py wrote, e.g. runs/toy/ckpt.pt")
    state = read_torch(path)
    if not is_own(state) or state["format"] not in formats:
        raise UserError(f"{path} is no {' or '.join(formats)}: give the file that train.py wrote")
    return check_contents(path, state)


def check_contents(path, state):
    """The dict of a checkpoint, if its entries are believable. Weights are compared where they are loaded."""
    is_tokenizer = state["format"] == TOKENIZER_FORMAT
    for name, kind in (TOKENIZER_ENTRIES if is_tokenizer else ENTRIES).items():
        expect(f"{path}: {name}", state.get(name), kind)
    expect(f"{path}: step", state["step"], int, 0, 1 << 40)
    for group in [state["metrics"]] if is_tokenizer else state["metrics"].values():
        for name, value in expect(f"{path}: metrics", group, dict).items():
            if not isinstance(value, (int, float, str)) or not f"{name} {value}".isprintable():
                raise UserError(f"{path}: metrics: {name} cannot be printed: it is damaged")
    for part in ("tokenizer", "discriminator", "model", "ema"):
        for name, value in expect(f"{path}: {part}", state.get(part, {}), dict).items():
            check_finite(f"{path}: {part}: {name}", value)
            if value.dtype == torch.float16:  # of --export
                state[part][name] = value.float()
    if is_tokenizer:
        check_config(f"{path}: config", {"tokenizer": state["config"]})
        return state
    check_config(f"{path}: config", state["config"])
    training = expect(f"{path}: training", state["config"].get("training"), dict)
    check_option(f"{path}: training", "label_drop", training.get("label_drop"))
    for name, option in (("steps", "sample_steps"), ("guidance", "guidance"), ("sampler", "sampler")):
        check_option(f"{path}: sampling", option, state["sampling"].get(name))
    names = [printable(expect(f"{path}: class_names", name, str)) for name in state["class_names"]]
    counts = [expect(f"{path}: class_counts", count, int, 0, 1 << 40) for count in state["class_counts"]]
    return state | {"class_names": names, "class_counts": counts[:max(1, len(names))]}


def check_config(where, config):
    """UserError unless the arguments of the models, in a file, have types and sizes that they can have."""
    for part in config.keys() - {"training"}:
        for name, value in expect(f"{where}: {part}", config[part], dict).items():
            if name not in ("grid", "num_classes", "published"):  # which are no options
                option = TOKENIZER_OPTIONS.get(name, name) if part == "tokenizer" else name
                check_option(f"{where}: {part}", option, value)


def previous(path):
    """Where the checkpoint before the last one is kept while a run trains: ckpt.pt, ckpt.previous.pt."""
    return path.with_suffix(".previous.pt")


def save(path, content, last=False):
    """All ranks call this. Keeps the checkpoint before, unless this is the last of its stage."""
    if rank_and_world()[0] == 0:
        write_atomically(path, lambda partial: torch.save(content, partial), keep_as=previous(path))
        if last:
            previous(path).unlink(missing_ok=True)
    barrier()


def save_best(path, content, batch):
    """Writes best.pt if none of an earlier step has fewer held-out bits, in the mean over the draws of both.

    content: a checkpoint with "step" and "bits" (draws,). Of two evaluations of unequal length, whole batches
    of draws have the same noise.
    """
    if rank_and_world()[0] == 0:
        bits, best, is_best = content["bits"], None, True
        with contextlib.suppress(UserError):  # none yet, or a damaged one
            found = expect(path, read_torch(path), dict)
            least = expect(f"{path}: bits", found.get("bits"), torch.Tensor)
            expect(f"{path}: step", found.get("step"), int)
            best = found
        if best and best["step"] < content["step"]:  # a later one is of a course that was rolled back
            n = len(bits) if len(bits) == len(least) else min(len(bits), len(least)) // batch * batch
            is_best = n == 0 or bits[:n].mean() < least[:n].mean()  # 0: no draw is the same
        if is_best:
            content = {name: value for name, value in content.items() if name not in ("model", "optimizer")}
            write_atomically(path, lambda partial: torch.save(content, partial))
        else:
            tqdm.write(f"held-out bits were fewer at step {best['step']:,}: {path} keeps that network")
    barrier()


def tokenizer_state(run, parts):
    """What tokenizer.pt holds beside the log's state. With metrics it is complete, and has no optimizers."""
    return {"format": TOKENIZER_FORMAT, "config": run.models["tokenizer"], "metrics": {},
            **{name: part.state_dict() for name, part in parts.items()}}


def denoiser_state(run, pipeline, parts, begin):
    """What ckpt.pt holds beside the log's state, for sample.py and to continue."""
    return {"format": CHECKPOINT_FORMAT, "config": run.models | {"training": run.config | {"seed": run.seed}},
            "tokenizer": pipeline.tokenizer.state_dict(), "ema": parts["ema"].state_dict(), "metrics": {},
            "class_names": run.source.class_names, "class_counts": pipeline.class_counts,
            "sampling": pipeline.sampling, "begin": begin,
            "model": parts["model"].state_dict(), "optimizer": parts["optimizer"].state_dict()}


def read_newest(path, expected):
    """The newest checkpoint of a run and its "path": the one before, if the last cannot be read. Or None."""
    state, files = None, [file for file in (path, previous(path)) if file.exists()]
    for file in files:
        try:
            state = read_checkpoint(file, expected) | {"path": file}
            break
        except UserError as error:
            if file == files[-1]:
                raise
            print(f"{error}: going on from {files[-1]}")
    step = state["step"] if state else -1
    if all_reduce_max(step) != -all_reduce_max(-step):  # a disk that fails one of them
        raise OSError(f"{path} could be read by some processes and not by others")
    return state


def digest(weights):
    """A short hash of {name: tensor}: which tokenizer made these tokens, which model drew these images?"""
    content = hashlib.sha256()
    for name, value in sorted(weights.items()):
        content.update(name.encode() + value.cpu().numpy().tobytes())
    return content.hexdigest()[:16]
