"""Checkpoints: written atomically with the one before kept, read without executing anything in them.

torch.load looks at a file and chooses a loader by itself, and two of the loaders act on what the file says:
TorchScript is a program, and a tar archive is unpacked, links and all. Neither is a checkpoint of ours, so both are
refused by name before torch sees them. Called by train.py, sample.py and extras/.
"""

import hashlib
import tarfile
import zipfile
from pathlib import Path

import torch

from engine.run import UserError, write_atomically

CHECKPOINT_FORMAT = "vq-lcmd checkpoint 1"  # ckpt.pt
TOKENIZER_FORMAT = "vq-lcmd tokenizer 1"  # tokenizer.pt
RENAMED = {  # old name of an option, an argument or an entry: its name today
    "p_drop": "max_drop_rate", "max_snr": "weight_clip", "coupling": "cm_pairs", "likelihood": "output_prior",
    "judge": "discriminator", "judges": "discriminator_optimizer"}


class CheckpointError(UserError):
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


def rename(value):
    """A dict with all keys as they are called today, dicts inside it too; tensors and lists as they are.

    What came later and changes the network's shape is off where it is not named.
    """
    if type(value) is not dict:
        return value
    value = {RENAMED.get(name, name): rename(v) for name, v in value.items()}
    return {"posterior_input": False} | value if "output_prior" in value else value


def read_checkpoint(path, *formats):
    """The dict in a checkpoint of one of these formats, on the CPU. Nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give a file that train.py wrote, e.g. runs/toy/ckpt.pt")
    detect_container(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here; all mean the same to a user
        older = f"; {previous(path)} is the one before" if previous(path).exists() else ""
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is no file of "
                              f"train.py, or it is damaged{older}") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found not in formats:
        name = {CHECKPOINT_FORMAT: "ckpt.pt", TOKENIZER_FORMAT: "tokenizer.pt"}[formats[0]]
        error = CheckpointError(f"{path} is {found or 'a file of another program'!r}, not {formats[0]!r}: "
                                f"give the {name} that train.py wrote")
        error.found = found
        raise error
    return rename(checkpoint)


def previous(path):
    """Where the checkpoint before the last one is kept while a run trains: ckpt.pt, ckpt.previous.pt."""
    return path.with_suffix(".previous.pt")


def save_checkpoint(path, content):
    write_atomically(path, lambda partial: torch.save(content, partial), keep_as=previous(path))


def read_newest(path, expected):
    """The newest checkpoint of a run: the one before, if the last cannot be read; None if there is none yet."""
    older = previous(path)
    try:
        return read_checkpoint(path, expected) if path.exists() or older.exists() else None
    except CheckpointError as error:
        if error.found or not older.exists():
            raise
        state = read_checkpoint(older, expected)
        print(f"{error}: going on from there, step {state['step']:,}")
        return state


def restore(parts, state, init):
    """Loads {name: module or optimizer} from a checkpoint's `state`; without one, networks from `init` (--init)."""
    for name, part in parts.items():
        if state:
            part.load_state_dict(state[name])
        elif name in init:
            own, given, classes = part.state_dict(), dict(init[name]), "class_embedding.weight"
            if classes in own and own[classes].shape != given[classes].shape:  # other classes start anew
                given[classes] = own[classes]
            wrong = [key for key in own if key not in given or own[key].shape != given[key].shape]
            wrong += given.keys() - own.keys()
            if wrong:
                raise UserError(f"--init: the {name} there has other sizes ({wrong[0]}): take its --preset and sizes, "
                                "or leave --init away")
            if not any(value.is_meta for value in own.values()):  # on the meta device only the sizes are compared
                part.load_state_dict(given)


def load_optimizer(optimizer, model, state, device, fsdp):
    """optimizer.load_state_dict(state), splitting what is whole in the state if the weights are split."""
    if fsdp:
        from torch.distributed.tensor import distribute_tensor  # some builds of PyTorch lack it
        for p, of_p in zip(model.parameters(), state["state"].values(), strict=True):
            of_p.update({name: distribute_tensor(value.to(device), p.device_mesh, p.placements)
                         for name, value in of_p.items() if value.shape == p.shape})
    optimizer.load_state_dict(state)


def digest(weights):
    """A short hash of {name: tensor}: which tokenizer made these tokens, which model drew these images?"""
    content = hashlib.sha256()
    for name, value in sorted(weights.items()):
        content.update(name.encode() + value.cpu().numpy().tobytes())
    return content.hexdigest()[:16]
