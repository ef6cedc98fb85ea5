"""One process or many, CPU or GPU: the same program. Plain `python` is one process; under torchrun all of them draw
the same random numbers, each computes its share of a batch, and gradients are added up while the backward pass runs.

Called by vqvae.py, sample.py, fid.py and train.py. With one process the sums and gathers here do nothing. Two functions
matter to a reader of the method: optimizer_step and compute_gradient, where the backward passes are.
"""

import contextlib
import ctypes
import datetime
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

PATIENCE = datetime.timedelta(hours=1)  # for the other processes, in a step or between two
WORK_ALONE = datetime.timedelta(days=1)  # for one that works while the others wait: a look at millions of images
waiting = {}  # "group": the process group in which they wait so long

ALONE = []  # see as_one_process


def init_distributed():
    """(rank, number of processes): (0, 1) for plain python; under torchrun the first call joins the others.

    Tensors on GPUs travel by NCCL, those on the CPU by gloo. If a process dies, torchrun ends all; if it is stuck, the
    others give up after PATIENCE.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        if (number := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
            torch.cuda.set_device(number)  # what "cuda" means from here on
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
        waiting["group"] = dist.new_group(backend="gloo", timeout=WORK_ALONE)
    return rank_and_world()


@contextlib.contextmanager
def as_one_process():
    """In this block rank_and_world() is (0, 1): what is only counted, by one process, sends the others nothing."""
    ALONE.append(True)
    try:
        yield
    finally:
        ALONE.pop()


def uses_nccl():
    """Do this process and others talk by NCCL?"""
    return dist.is_available() and dist.is_initialized() and torch.cuda.is_available() and dist.is_nccl_available()


def rank_and_world():
    """(this process's number, how many there are)."""
    if ALONE:
        return 0, 1
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def choose_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu) or a name; ValueError if it is not there.

    On a CPU freed memory is kept from then on, see keep_freed_memory.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here: {str(error).splitlines()[0]}") from error
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what is asked of "the" GPU, its memory and bfloat16, is asked of this one
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """On Linux, memory that is freed stays with the process: blocks below 32 MiB, and 2 GiB at the heap's end.

    glibc hands it back to the system at once, and each step asks for it again, page by page: some 4 % of its time.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems, other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2 ** 20)  # M_MMAP_THRESHOLD, at its upper limit
        mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD


def bf16_works(device):
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def precision(device):
    """The networks' precision there, in a word; losses, softmaxes and sums are float32 or float64 everywhere."""
    return "bfloat16" if bf16_works(device) else "float32"


# ----------------------------------------------------------------------------
# Sums and agreements.

def copy_from_first(tensors):
    """Each tensor, in place, becomes that of process 0."""
    if rank_and_world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def all_reduce_sum(tensors):
    """Each tensor, in place, becomes its sum over all processes; one all-reduce for all of them."""
    if rank_and_world()[1] == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def all_reduce_max(value, patient=False):
    """The largest value of all processes: of a tensor, in place; or of a whole number, by gloo, so that no GPU waits.

    No process goes on before all have come here. patient: one of them may work for hours before it does.
    """
    if rank_and_world()[1] == 1:
        return value
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, waiting["group"] if patient else None)
    return value if isinstance(value, torch.Tensor) else int(tensor)


def barrier():
    all_reduce_max(0)


def all_gather_cat(x):
    """x (n, ...) of every process, in their order -> (n world, ...)."""
    if rank_and_world()[1] == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def broadcast(value):
    """What process 0 has, whatever it is, for all."""
    box = [value]
    if rank_and_world()[1] > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def gather(value):
    """A list of what every process has, whatever it is, in their order: for process 0; None for the others."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values = [None] * world if rank == 0 else None
    dist.gather_object(value, values)
    return values


# ----------------------------------------------------------------------------
# Gradients: all passes, all processes.

class Objective(nn.Module):
    """The parameters of a module, and a function of them in place of its forward."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs):
        return self.function(*inputs)


def data_parallel(module, function=None):
    """What to call in place of the module, or of a function of its parameters: with one process, that itself.

    Under torchrun it is DistributedDataParallel around it: in the backward pass each gradient becomes its mean over all
    processes, and travels, in buckets of 25 MB, while the pass goes on. Made at the first call, and kept at the module
    (not as a part of it, which its state dict would list).
    """
    if rank_and_world()[1] == 1:
        return function or module
    made_of, parallel = module.__dict__.get("data_parallel", (None, None))
    if parallel is None or made_of is not function:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # what follows it, PyTorch 2.6 lacks
        parallel = nn.parallel.DistributedDataParallel(Objective(module, function) if function else module,
                                                       broadcast_buffers=False,  # the codebook is equal everywhere
                                                       gradient_as_bucket_view=True)  # so gradients are stored once
        module.__dict__["data_parallel"] = function, parallel
    return parallel


def optimizer_step(loss, module, optimizer, lr, clip):
    """One step of a module down the gradient of a loss, which data_parallel(module) had a part in.

    Over all processes that is the mean of their losses. Returns the gradient's norm.
    """
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return norm


def shard(rows, n_rec, counts, part, parts):
    """Every parts-th row from row `part` on, so that all parts have about as much work of each kind."""
    return {name: value[part::parts] for name, value in rows.items()}, len(range(part, n_rec, parts)), counts


def compute_gradient(model, loss_of, noisy_batch, micro_batch, fsdp=False):
    """The gradient of a whole batch, added to the parameters' by as many passes as needed. Returns its terms, (3,).

    noisy_batch: of losses.sample_noise. Process r of W takes rows r, r + W, ... of it, micro_batch of them at a time
    (0: all). The gradients of all processes meet during the last pass, while it runs; with fsdp in every pass, because
    to wait for the last one would take the memory that fsdp is there to save.
    """
    (rank, world), (rows, n_rec, _) = rank_and_world(), noisy_batch
    B = len(rows["x"])
    passes = -(-B // (world * micro_batch)) if micro_batch else 1
    passes = max(1, min(passes, (B - n_rec) // world))  # rows at t > 0 in every one
    loss_of, terms = loss_of if fsdp else data_parallel(model, loss_of), 0
    for i in range(passes):
        alone = world > 1 and not fsdp and i + 1 < passes
        with loss_of.no_sync() if alone else contextlib.nullcontext():
            loss, some = loss_of(*shard(*noisy_batch, rank + i * world, passes * world))
            (loss * world if world > 1 else loss).backward()  # the mean over processes is taken; we want the sum
        terms = terms + some
    all_reduce_sum([terms])
    return terms


# ----------------------------------------------------------------------------
# FSDP2: weights, EMA and optimizer split among the processes.

def apply_fsdp(model, device):
    """Each process keeps 1 / world of every weight; those of a block are gathered while it runs."""
    from torch.distributed.device_mesh import init_device_mesh  # some builds of PyTorch lack these
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of writing to the logits in place, which nobody does
    mesh = init_device_mesh(device.type, (rank_and_world()[1],))
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "table")


def place(model, device, fsdp):
    """The model on its device: as a whole, or this process's share of it."""
    return apply_fsdp(model, device) if fsdp else model.to(device)


def full_state_dict(value):
    """A tensor of which each process has a part, as a whole, in all of them. A dict of dicts of such tensors, for a
    checkpoint: whole in process 0 alone, on the CPU, put together one after the other. All processes call this.

    (PyTorch's get_optimizer_state_dict does the same, but files the moments under names; ckpt.pt has numbers, as
    optimizer.state_dict() gives them, so that one process and many read each other's.)
    """
    if isinstance(value, dict):
        return {name: full_state_dict(part) if isinstance(part, dict) else whole(part) for name, part in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole(value):
    """An entry of a checkpoint: on the CPU of process 0, if it is split; the others take part and keep nothing."""
    if not hasattr(value, "full_tensor"):
        return value
    full = value.full_tensor()
    return full.cpu() if rank_and_world()[0] == 0 else None
