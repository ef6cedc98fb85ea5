"""One process or many, CPU or GPU: the same program. Plain `python` is one process; under torchrun all of them draw
the same random numbers, each computes its share of a batch, and gradients are added up.

Called by vqvae.py, sample.py, fid.py and train.py. With one process the sums and gathers here do nothing. Two functions
matter to a reader of the method: optimizer_step and compute_gradient, where the backward passes are.
"""

import contextlib
import datetime
import os
import warnings

import torch
import torch.distributed as dist

ALONE = []  # see as_one_process


def init_distributed():
    """(rank, number of processes): (0, 1) for plain python; under torchrun the first call joins the others.

    Tensors on GPUs travel by NCCL, those on the CPU by gloo. The others may have to wait for the main process for as
    long as it encodes the images; if one of them dies, torchrun ends all.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=datetime.timedelta(days=30))
    return rank_and_world()


@contextlib.contextmanager
def as_one_process():
    """In this block rank_and_world() is (0, 1): what is only counted, by one process, sends the others nothing."""
    ALONE.append(True)
    try:
        yield
    finally:
        ALONE.pop()


def rank_and_world():
    """(this process's number, how many there are)."""
    if ALONE:
        return 0, 1
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def choose_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu) or a name; ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def bf16_works(device):
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def precision(device):
    """The networks' precision there, in a word; losses, softmaxes and sums are float32 or float64 everywhere."""
    return "bfloat16" if bf16_works(device) else "float32"


# ----------------------------------------------------------------------------
# Sums and agreements.

def all_reduce_sum(tensors):
    """Each tensor, in place, becomes its sum over all processes; one all-reduce for all of them."""
    if rank_and_world()[1] == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def all_reduce_max(value):
    """The largest value of all processes: of a tensor, in place; or of a whole number, by gloo, so that no GPU waits.

    No process goes on before all have come here.
    """
    if rank_and_world()[1] == 1:
        return value
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
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


# ----------------------------------------------------------------------------
# Gradients: all passes, all processes.

def optimizer_step(loss, module, optimizer, lr, clip):
    """One step of a module down the gradient of a loss, the mean over all processes. Returns the gradient's norm."""
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    (loss / rank_and_world()[1]).backward()
    all_reduce_sum([p.grad for p in module.parameters()])
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return norm


def shard(rows, n_rec, counts, part, parts):
    """Every parts-th row from row `part` on, so that all parts have about as much work of each kind."""
    return {name: value[part::parts] for name, value in rows.items()}, len(range(part, n_rec, parts)), counts


def compute_gradient(model, loss_of, noisy_batch, micro_batch, fsdp=False):
    """The gradient of a whole batch, added to the parameters' by as many passes as needed. Returns its terms, (3,).

    noisy_batch: of losses.sample_noise. Process r of W takes rows r, r + W, ... of it, micro_batch of them at a time
    (0: all). The gradients of all processes meet in one all-reduce, after the last pass: for P parameters and a link
    of b bytes/s that is 8 P / b seconds of waiting per step.
    """
    (rank, world), (rows, n_rec, _) = rank_and_world(), noisy_batch
    B = len(rows["x"])
    passes = -(-B // (world * micro_batch)) if micro_batch else 1
    passes = max(1, min(passes, (B - n_rec) // world))  # rows at t > 0 in every one
    terms = 0
    for i in range(passes):
        loss, some = loss_of(*shard(*noisy_batch, rank + i * world, passes * world))
        (loss * world if fsdp else loss).backward()  # FSDP2 takes the mean over processes; we want the sum
        terms = terms + some
    all_reduce_sum([terms, *([] if fsdp else (p.grad for p in model.parameters()))])
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
    """A tensor, or a dict of dicts of them, whose split tensors are put together, by all processes."""
    if isinstance(value, dict):
        return {name: full_state_dict(v) for name, v in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value
