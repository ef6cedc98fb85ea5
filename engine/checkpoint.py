"""Checkpoints: written atomically with the one before kept, read without executing anything in them."""

import hashlib
import math
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
TOKENIZER_ENTRIES = {"config": dict, "metrics": dict, "step": int, "tokenizer": dict}
ENTRIES = TOKENIZER_ENTRIES | {"ema": dict, "class_names": list, "class_counts": list, "sampling": dict}
WEIGHTS = ("tokenizer", "discriminator", "model", "ema")  # entries that are state dicts
MAX_SIZE, MAX_DEPTH = 1 << 20, 1000  # of a number in a configuration, of blocks: to make more takes for ever
FOREIGN = {"argparse", "ldm", "lightning", "main", "numpy", "omegaconf", "pathlib", "pytorch_lightning",
           "taming", "typing"}  # libraries of which published checkpoints hold objects


class StandIn:
    """In place of an object of another library. Whatever a file does with it, nothing happens."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_torch(path):
    """The object in a file of torch.save: tensors on the CPU, numbers, texts and containers of them."""
    path, stand_ins = check_file(path), []
    with reading(path, "it is damaged, or holds more than weights"):
        if zipfile.is_zipfile(path):  # else of torch before 1.6: there torch refuses every foreign object
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            check_unpacked(path, unpacked, path.stat().st_size)
            for name in get_unsafe_globals_in_checkpoint(path):
                if name.split(".")[0] not in FOREIGN:
                    raise UserError(f"{path} is refused: it names {name}, which has no place beside weights")
                # torch fills no other containers: what is derived from dict must be one.
                stand_ins.append((OrderedDict if name.endswith("Dict") else StandIn, name))
        with safe_globals(stand_ins):
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
    path, name = Path(path), "ckpt.pt" if formats[0] == CHECKPOINT_FORMAT else "tokenizer.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a file that train.py wrote, e.g. runs/toy/{name}")
    state = read_torch(path)
    if not is_own(state) or state["format"] not in formats:
        found = state["format"] if is_own(state) else "a file of another program"
        raise UserError(f"{path} is {found!r}, not {formats[0]!r}: give the {name} that train.py wrote")
    return check_contents(path, state)


def check_contents(path, state):
    """The dict of a checkpoint, if its entries are believable. Weights are compared where they are loaded."""
    is_tokenizer = state["format"] == TOKENIZER_FORMAT
    for name, kind in (TOKENIZER_ENTRIES if is_tokenizer else ENTRIES).items():
        expect(f"{path}: {name}", state.get(name), kind)
    check_config(f"{path}: config", {"tokenizer": state["config"]} if is_tokenizer else state["config"])
    expect(f"{path}: step", state["step"], int, 0, 1 << 40)
    for group in [state["metrics"]] if is_tokenizer else state["metrics"].values():
        for name, value in expect(f"{path}: metrics", group, dict).items():
            if not isinstance(value, (int, float, str)) or not f"{name} {value}".isprintable():
                raise UserError(f"{path}: metrics: {name} cannot be printed: it is damaged")
    for part in WEIGHTS:
        for name, value in expect(f"{path}: {part}", state.get(part, {}), dict).items():
            check_finite(f"{path}: {part}: {name}", expect(f"{path}: {part}: {name}", value, torch.Tensor))
            if value.dtype == torch.float16:  # of --export
                state[part][name] = value.float()
    return state if is_tokenizer else check_classes(path, state)


def check_config(where, config):
    """UserError unless the arguments of the models, in a file, have types and sizes that they can have."""
    for part, values in config.items():
        for name, value in expect(f"{where}: {part}", values, dict).items():
            if part != "training" and type(value) is int:
                largest = MAX_DEPTH if name in ("depth", "blocks") else MAX_SIZE
                expect(f"{where}: {part}: {name}", value, int, -MAX_SIZE, largest)
            if name not in ("grid", "num_classes", "published", "seed"):  # which are no options
                option = TOKENIZER_OPTIONS.get(name, name) if part == "tokenizer" else name
                check_option(f"{where}: {part}", option, value)


def check_classes(path, state):
    """The dict of a ckpt.pt, if it says how to draw images of its classes, whose names become printable."""
    names = [printable(expect(f"{path}: class_names", name, str)) for name in state["class_names"]]
    counts = [expect(f"{path}: class_counts", count, int, 0, 1 << 40) for count in state["class_counts"]]
    if len(counts) > max(1, len(names)):
        raise UserError(f"{path}: class_counts must be one for each class, are {len(counts):,}")
    sampling = {name: state["sampling"].get(name) for name in ("steps", "guidance", "sampler")}
    for name, option in zip(sampling, ("sample_steps", "guidance", "sampler"), strict=True):
        check_option(f"{path}: sampling", option, sampling[name])
    return state | {"class_names": names, "class_counts": counts, "sampling": sampling}


def previous(path):
    """Where the checkpoint before the last one is kept while a run trains: ckpt.pt, ckpt.previous.pt."""
    return path.with_suffix(".previous.pt")


def save(path, content, last=False):
    """Writes a checkpoint and keeps the one before, unless it is the last of its stage. All ranks call this.
    """
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
        best = read_torch(path) if path.exists() else {"step": math.inf}
        if best["step"] < content["step"]:  # a later one is of a course that was rolled back
            bits, least = content["bits"], best["bits"]
            n = len(bits) if len(bits) == len(least) else min(len(bits), len(least)) // batch * batch
            if not bits[:n].mean() < least[:n].mean():
                tqdm.write(f"held-out bits were fewer at step {best['step']:,}: {path} keeps that network")
                return barrier()
        content = {name: value for name, value in content.items() if name not in ("model", "optimizer")}
        write_atomically(path, lambda partial: torch.save(content, partial))
    barrier()


def tokenizer_state(run, parts):
    """What tokenizer.pt holds beside the log's state. With metrics it is complete."""
    weights = {name: part.state_dict() for name, part in parts.items()}
    return {"format": TOKENIZER_FORMAT, "config": run.models["tokenizer"], "metrics": {}} | weights


def denoiser_state(run, pipeline, parts, begin):
    """What ckpt.pt holds beside the log's state: all that sample.py needs, and what training needs to
    continue.
    """
    return {"format": CHECKPOINT_FORMAT, "config": run.models | {"training": run.config | {"seed": run.seed}},
            "tokenizer": pipeline.tokenizer.state_dict(), "ema": parts["ema"].state_dict(), "metrics": {},
            "class_names": run.source.class_names, "class_counts": pipeline.class_counts,
            "sampling": pipeline.sampling, "begin": begin,
            "model": parts["model"].state_dict(), "optimizer": parts["optimizer"].state_dict()}


def read_newest(path, expected):
    """The newest checkpoint of a run, with its "path": the one before, if the last cannot be read; or None.
    """
    state, older = None, previous(path)
    if path.exists() or older.exists():
        try:
            state = read_checkpoint(path, expected)
        except UserError as error:
            if not older.exists():
                raise
            path, state = older, read_checkpoint(older, expected)
            print(f"{error}: going on from {older}, step {state['step']:,}")
        state["path"] = path
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


def export(checkpoint, out):
    """Writes `checkpoint` anew to `out`, to be shared: without what only training needs, in half precision.
    """
    if out.suffix != ".pt" or out.exists():
        raise UserError(f"--export {out}: give a name that ends in .pt and is not there already")
    kept, state = {"format": CHECKPOINT_FORMAT}, read_checkpoint(checkpoint, CHECKPOINT_FORMAT)
    for name in ("config", "tokenizer", "ema", "class_names", "class_counts", "sampling", "metrics", "step"):
        kept[name] = state[name]
    for part in ("tokenizer", "ema"):
        halves = {name: value.half() for name, value in state[part].items() if value.dtype == torch.float32}
        kept[part] = state[part] | {name: half for name, half in halves.items() if half.isfinite().all()}
    write_atomically(out, lambda partial: torch.save(kept, partial))
    return f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB. Draw with it:  python sample.py {out}"
