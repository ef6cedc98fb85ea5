"""The best checkpoint by held-out bits, best.pt, beside the last one; and a line when those bits rise: a network that
learns its training images by heart gets worse at others. Called by train.py's evaluation.

When is a rise a rise? Each evaluation has the same images, times and noise, so two of them are compared draw by draw:
what is hard for one network is hard for the other, and leaves the difference d. Its error is s = std(d) / sqrt(n), over
images, of which each counts once. The best of k evaluations is the luckiest as well: of k equal ones, the least lies
sqrt(2 ln k) errors of a single one below the mean, 2.5 s for k = 500. So a rise is a mean of d above RISE = 4 s, in
TWICE = 2 evaluations one after the other.
"""

import contextlib

import torch
from tqdm import tqdm

from engine.checkpoint import CHECKPOINT_FORMAT, read_checkpoint
from engine.distributed import barrier, rank_and_world
from engine.read_back import ReadError, UserError, check_tensor, expect, shown
from engine.process import write_atomically

RISE, TWICE = 4, 2


def paired_difference(bits, before, images, batch):
    """(mean, its standard error) of bits - before, (draws,) each, of which draw i is of held-out image i % images.

    Of two evaluations of unequal length, the draws that both have: those of whole batches, whose noise is the same.
    """
    n = len(bits) if len(bits) == len(before) else min(len(bits), len(before)) // batch * batch
    of = torch.arange(max(n, 1)) % images  # (n,)
    d = torch.zeros(int(of.max()) + 1, dtype=bits.dtype).index_add_(0, of[:n], bits[:n] - before[:n]) / of.bincount()
    return float(d.mean()), float(d.std() / len(d) ** 0.5) if len(d) > 1 else float("inf")


def check_bits(where, bits, images):
    """The bits of an evaluation in a file, if each of the images has some; else ReadError."""
    if expect(where, bits, torch.Tensor).dtype != torch.float64 or bits.ndim != 1 or len(bits) < images:
        raise ReadError(f"{where} must be at least {images:,} numbers of float64, are {shown(bits)}")
    check_tensor(where, bits)
    if bits.min() < 0:
        raise ReadError(f"{where} must not be below 0, are down to {float(bits.min()):g}")
    return bits


class Best:
    """What best.pt holds, without its weights. A file from after the step `last` is of a course that was left."""

    def __init__(self, path, last, images, batch):
        self.path, self.images, self.batch, self.step, self.bits, self.rises = path, images, batch, 0, None, 0
        with contextlib.suppress(UserError):  # the next one will be written over what is none
            state = read_checkpoint(path, CHECKPOINT_FORMAT) if path.exists() else {}
            if "bits" in state and state["step"] <= last:
                self.step, self.bits = state["step"], check_bits(f"{path}: bits", state["bits"], images)

    def look(self, step, bits, content):
        """After an evaluation, by all processes. bits: (draws,) of each; content(): a checkpoint to draw from."""
        if not bits.isfinite().all():
            return
        mean, error = (0.0, 0.0) if self.bits is None else paired_difference(bits, self.bits, self.images, self.batch)
        if self.bits is None or mean < 0:
            self.step, self.bits, self.rises = step, bits, 0
            state = content() | {"step": step, "metrics": {}, "bits": bits}
            if rank_and_world()[0] == 0:
                write_atomically(self.path, lambda partial: torch.save(state, partial))
            barrier()  # it is written
            return
        self.rises = self.rises + 1 if mean > RISE * error else 0
        if self.rises >= TWICE:
            tqdm.write(f"held-out bits have risen by {mean:.3f} (standard error {error:.3f}) since step {self.step:,}, "
                       f"whose network is {self.path}: draw from it, stop here, and train anew on more images or with "
                       "--flip, a smaller --width, fewer --steps, more --weight-decay or --max-drop-rate")
