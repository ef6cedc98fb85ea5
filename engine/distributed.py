"""One process or many, CPU or GPU: the same program. With one process the collectives here do nothing."""

import datetime
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

from engine.validate import UserError, reason_of

TIMEOUT = datetime.timedelta(days=1)  # one process may look at millions of images while the others wait


def init_distributed():
    """(rank, world): (0, 1) for plain python; under torchrun the first call joins the others."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)  # what "cuda" means from here on
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
    return rank_and_world()


def rank_and_world():
    """(this process's number, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def choose_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu) or a name; UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available here: {reason_of(error)}") from error
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # memory and bfloat16 are those of this GPU
    return device


def bf16_works(device):
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def precision(device):
    """The networks' precision there, in a word; losses, softmaxes and sums are never below float32."""
    return "bfloat16" if bf16_works(device) else "float32"


# ----------------------------------------------------------------------------
# Collectives.

def copy_from_first(tensors):
    """Each tensor, in place, becomes that of rank 0."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def all_reduce_sum(tensors):
    """Each tensor, in place, becomes its sum over all ranks; one all-reduce for all of them."""
    if rank_and_world()[1] == 1 or tensors[0].is_meta:  # meta: extras/cost.py counts a step
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def all_reduce_max(value):
    """The largest value of all ranks: of a tensor, in place; or of an int, by gloo, so that no GPU waits."""
    if rank_and_world()[1] == 1:
        return value
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return value if isinstance(value, torch.Tensor) else int(tensor)


def barrier():
    all_reduce_max(0)


def all_gather_cat(x):
    """x (n, ...) of every rank, in order -> (n world, ...)."""
    if rank_and_world()[1] == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def broadcast(value):
    """What rank 0 has, any object, for all."""
    box = [value]
    if rank_and_world()[1] > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def gather(value):
    """A list of every rank's value, any object, in order: for rank 0; None for the others."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values = [None] * world if rank == 0 else None
    dist.gather_object(value, values)
    return values


# ----------------------------------------------------------------------------
# Gradients.

class Objective(nn.Module):
    """The parameters of a module, and a function of them in place of its forward."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs):
        return self.function(*inputs)


def data_parallel(module, function=None):
    """What to call in place of the module, or of a function of its parameters: with one process, that itself.

    Under torchrun it is DistributedDataParallel around it: in the backward pass each gradient becomes its
    mean over all ranks, and travels, in buckets of 25 MB, while the pass goes on.
    """
    if rank_and_world()[1] == 1:
        return function or module
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    return nn.parallel.DistributedDataParallel(
        Objective(module, function) if function else module,
        broadcast_buffers=False,  # the codebook is equal everywhere
        gradient_as_bucket_view=True)  # so gradients are stored once
