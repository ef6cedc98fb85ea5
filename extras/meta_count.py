"""Operations and memory of work on a chip, without the chip: it runs on PyTorch's meta device, whose tensors
have shapes and no values. Called by extras/cost.py.
"""

import contextlib
import copy
import functools
import math
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

from engine import distributed

GiB = 2 ** 30
CHIPS = {  # memory in GiB, peak of dense bfloat16 products in TFLOP/s: from the makers' data sheets
    "a100-80": (79.2, 312), "h100": (79.1, 989), "h200": (139.8, 989), "3090": (23.6, 71),
    "4090": (23.6, 165)}
UTILISATION = 0.3  # share of that peak which a run is assumed to reach
MARGIN, RESERVE = 1.1, GiB // 2  # for fragments and workspaces; for the driver


def read_memory():
    """Bytes that this process may take of the machine's memory or its container's; infinite if unknown."""
    limits = [math.inf]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def chip_of(device, name=None):
    """The chip of --for, or else of the device: name, memory in bytes, flops per second at its peak, bf16.

    The peak of a chip that is not in CHIPS is measured, by matrix products for 0.1 seconds.
    """
    chip = SimpleNamespace(name=name, memory=read_memory(), flops=None, bf16=True)
    if name not in CHIPS:
        chip.bf16 = distributed.bf16_works(device)
        chip.name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for key, (memory, tera) in CHIPS.items():
        if key.split("-")[0] in chip.name.lower():
            chip.memory, chip.flops = memory * GiB, tera * 1e12
    if name not in CHIPS and device.type == "cuda":
        chip.memory, _ = torch.cuda.mem_get_info(device)  # what is free
    if chip.flops is None:
        a = torch.ones(1024, 1024, dtype=torch.bfloat16 if chip.bf16 else torch.float32, device=device)
        timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
        chip.flops = 2 * 1024 ** 3 / timer.blocked_autorange(min_run_time=0.1).median
    return chip


def fits(chip, peak):
    return MARGIN * peak + RESERVE <= chip.memory


# ----------------------------------------------------------------------------
# The count.

CASTS = {"linear": torch.bfloat16, "conv2d": torch.bfloat16, "group_norm": torch.float32,
         "layer_norm": torch.float32, "rms_norm": torch.float32}  # of autocast on CUDA


def call_with(function, dtype, *args, **options):
    return function(*(arg.to(dtype) if isinstance(arg, torch.Tensor) else arg for arg in args), **options)


@contextlib.contextmanager
def autocast(device_type, dtype=None, enabled=True):
    """What the meta device lacks: autocast as on CUDA; and flash attention, which stores no N x N matrix."""
    def attention(q, k, v):
        if q.ndim == 3:  # a published VQGAN's, of one head
            return attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    functions = {"scaled_dot_product_attention": attention}
    for name, cast in CASTS.items() if enabled else ():
        functions[name] = functools.partial(call_with, getattr(F, name), cast)
    with mock.patch.multiple(F, **functions):
        yield


class Counter(TorchDispatchMode):
    """flops: by PyTorch's own formulas. now, peak: bytes of all storages, at this moment and at most.

    (Not FlopCounterMode, whose hooks on modules keep tensors alive that a backward pass has freed.)
    """

    def __init__(self):
        super().__init__()
        self.storages, self.flops, self.now, self.peak = weakref.WeakSet(), 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs or {}, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage not in self.storages:
                    self.storages.add(storage)
                    weakref.finalize(storage, self.add, -storage.nbytes())
                    self.add(storage.nbytes())
        return result

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


class Stage:
    """Work on a number of images at a time: flops, peak {kind: bytes}, size (bytes of the modules).

    build() -> (modules, work): makes the modules, and returns what they are to do.
    """

    def __init__(self, build, images, trained=True, ema=False):
        with (Counter() as counter, mock.patch.object(torch, "autocast", autocast),
              mock.patch.object(distributed, "rank_and_world", lambda: (0, 1))):  # nothing is sent
            with torch.device("meta"):
                modules, work = build()
            parameters = [p for module in modules for p in module.parameters()]
            size, weights = sum(p.nbytes for p in parameters), counter.now
            for p in parameters if trained else ():
                p.grad = torch.zeros_like(p)  # of the step before
            built = counter.peak = counter.now
            work()
        self.images, self.flops, self.size = images, counter.flops, size
        self.peak = {"weights": weights - ema * size, "gradients": trained * size,
                     "optimizer": 2 * trained * size, "EMA": ema * size, "activations": counter.peak - built}

    @property
    def total(self):
        return sum(self.peak.values())

    def at(self, images):
        """With another number of images at a time, to which activations are proportional."""
        stage = copy.copy(self)
        activations = self.peak["activations"] * images / self.images
        stage.images, stage.peak = images, self.peak | {"activations": activations}
        return stage

    def fit(self, chip, images, least=1):
        """With so many images, or the fewest equal parts of them that fit the chip."""
        parts, stage = 1, self.at(images)
        while stage.images > least and not fits(chip, stage.total):
            parts += 1
            stage = self.at(max(least, -(-images // parts)))
        return stage
