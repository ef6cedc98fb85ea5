"""Operations and memory of work on a chip, without the chip: it runs on PyTorch's meta device, whose tensors
have shapes and no values. Called by extras/cost.py.
"""

import contextlib
import copy
import functools
import os
import weakref
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

from engine.distributed import bf16_works

GiB = 2 ** 30
CHIPS = {  # memory in GiB, peak of dense bfloat16 products in TFLOP/s: from the makers' data sheets
    "a100-80": (79.2, 312), "h100": (79.1, 989), "h200": (139.8, 989), "3090": (23.6, 71),
    "4090": (23.6, 165)}
MARGIN, RESERVE = 1.1, GiB // 2  # for fragments and workspaces; for the driver
TYPES = {"linear": torch.bfloat16, "conv2d": torch.bfloat16, "group_norm": torch.float32,
         "layer_norm": torch.float32, "rms_norm": torch.float32}  # of CUDA's autocast


def chip_of(device, name=None):
    """The chip of --for, or else of the device: name, memory in bytes, flops per second at its peak, bf16."""
    if name in CHIPS:
        memory, peak = CHIPS[name]
        return SimpleNamespace(name=name, memory=memory * GiB, flops=peak * 1e12, bf16=True)
    name, memory, bf16 = device.type, float("inf"), bf16_works(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        memory, _ = torch.cuda.mem_get_info(device)  # what is free
    elif hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peaks = [peak * 1e12 for key, (_, peak) in CHIPS.items() if key.split("-")[0] in name.lower()]
    if not peaks:  # measured for 0.1 seconds
        a = torch.ones(1024, 1024, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
        timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
        peaks = [2 * 1024 ** 3 / timer.blocked_autorange(min_run_time=0.1).median]
    return SimpleNamespace(name=name, memory=memory, flops=peaks[0], bf16=bf16)


def fits(chip, peak):
    return MARGIN * peak + RESERVE <= chip.memory


def call_with(function, dtype, *args, **options):
    return function(*(arg.to(dtype) if isinstance(arg, torch.Tensor) else arg for arg in args), **options)


@contextlib.contextmanager
def autocast(device_type, dtype=None, enabled=True):
    """In place of torch.autocast, which the meta device lacks: the types of CUDA's, and flash attention."""
    plain, flash = F.scaled_dot_product_attention, torch.ops.aten._scaled_dot_product_flash_attention

    def attention(q, k, v):  # without heads the plain one, as on a GPU
        return plain(q, k, v) if q.ndim == 3 else flash(q, k, v)[0]
    # Functions of F are replaced: a mode would not reach the blocks that a backward pass computes again.
    functions = {name: functools.partial(call_with, getattr(F, name), dtype) for name, dtype in TYPES.items()}
    with mock.patch.multiple(F, scaled_dot_product_attention=attention, **functions if enabled else {}):
        yield


class Counter(TorchDispatchMode):  # FlopCounterMode keeps tensors alive that a backward pass has freed
    """flops: by PyTorch's formulas. now, peak: bytes of all storages, at this moment and at most."""
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
    """Work on images at a time: flops, peak {kind: bytes}, size in bytes. build() -> (modules, work)."""
    def __init__(self, build, images, trained=True, ema=False):
        with mock.patch.object(torch, "autocast", autocast), Counter() as counter:
            with torch.device("meta"):
                modules, work = build()
            weights = counter.now
            parameters = [p for module in modules for p in module.parameters()]
            for p in parameters if trained else ():
                p.grad = torch.zeros_like(p)  # of the step before
            built = counter.peak = counter.now
            work()
        self.images, self.flops, self.size = images, counter.flops, sum(p.nbytes for p in parameters)
        self.peak = {"weights": weights - ema * self.size, "gradients": trained * self.size,
                     "optimizer": 2 * trained * self.size, "EMA": ema * self.size,
                     "activations": counter.peak - built}

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
        for parts in range(1, images + 1):
            stage = self.at(max(least, -(-images // parts)))
            if fits(chip, stage.total):
                break
        return stage
