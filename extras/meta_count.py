"""What any work costs on a chip, without the chip: it runs on PyTorch's device "meta", whose tensors have shapes and no
values, and every operation is looked at on its way. Memory is that of all storages that live, by kind; autograd keeps
and frees them as it does on a GPU. Seconds: an operation takes as long as its arithmetic or its reading and writing
takes, whichever is longer, at SHARE of the chip's rates, and LAUNCH at least. Called by extras/price.py.
"""

import contextlib
import functools
import os
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.distributed import as_one_process, bf16_works

GB, GiB = 1e9, 2 ** 30
CHIPS = {  # memory in GiB, dense bfloat16 in TFLOP/s (float32 sums), GB/s: of the makers' data sheets
    "a100-80": (79.2, 312, 2039), "h100": (79.1, 989, 3350), "h200": (139.8, 989, 4800), "3090": (23.6, 71, 936),
    "4090": (23.6, 165, 1008)}
BESIDE = {"cuda": (1.08, 1.0), "cpu": (1.1, 0.5)}  # fits: peak x the first + GiB of the second (driver, workspaces)
SHARE = 0.4  # of the chip's rates that a run is taken to reach
LAUNCH = 1e-5  # seconds from one kernel to the next, when Python is what they wait for; assumed
KINDS = ("weights", "gradients", "optimizer", "EMA", "kept", "temporary")


# ----------------------------------------------------------------------------
# The chip.

def ram():
    """Bytes of memory that this process may take; None where nobody says."""
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@functools.lru_cache
def measure_rates(device):
    """(operations, bytes) per second: of products of two 1024 x 1024 matrices, and of copies; in 0.3 seconds."""
    dtype = torch.bfloat16 if bf16_works(device) else torch.float32
    a, b = torch.zeros(1024, 1024, dtype=dtype, device=device), torch.zeros(1 << 24, device=device)
    target, rates = torch.empty_like(b), []
    for work, amount in ((lambda: a @ a, 2 * 1024 ** 3), (lambda: target.copy_(b), 2 * b.nbytes)):
        work().sum().item()
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < 0.15:
            result, calls = work(), calls + 1
            if calls % 8 == 0:
                result[:1].sum().item()  # a GPU has done what it was given
        rates.append(calls * amount / (time.perf_counter() - start))
    return tuple(rates)


def chip_of(device, name=None):
    """The machine at hand, or the chip of --for: name, kind, memory in bytes or None, flops and bytes per second."""
    if name in CHIPS:
        memory, tera, giga = CHIPS[name]
        return SimpleNamespace(name=name, kind="cuda", memory=memory * GiB, flops=tera * 1e12, bytes=giga * GB,
                               bf16=True)
    flops, moved = measure_rates(device)
    name, memory = device.type, ram()
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]  # of others, if shared
        flops, moved = next(((tera * 1e12, giga * GB) for key, (_, tera, giga) in CHIPS.items()
                             if key.split("-")[0] in name.lower()), (flops, moved))
    return SimpleNamespace(name=name, kind="cuda" if device.type == "cuda" else "cpu", memory=memory, flops=flops,
                           bytes=moved, bf16=bf16_works(device))


def fits(chip, peak):
    factor, beside = BESIDE[chip.kind]
    return chip.memory is None or peak * factor + beside * GiB <= chip.memory


# ----------------------------------------------------------------------------
# The count.

@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Autocast(contextlib.ExitStack):
    """What torch.autocast does on a GPU, for the device "meta", which lacks it; and flash attention in one piece."""

    TYPES = {"linear": torch.bfloat16, "conv2d": torch.bfloat16, "group_norm": torch.float32,
             "layer_norm": torch.float32, "rms_norm": torch.float32}
    enabled = False

    def __enter__(self):
        for name, dtype in self.TYPES.items():
            self.enter_context(replaced(F, name, functools.partial(self.call, getattr(F, name), dtype)))
        self.enter_context(replaced(F, "scaled_dot_product_attention", lambda q, k, v:
                                    torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]))
        self.enter_context(replaced(torch, "autocast", self.autocast))
        return super().__enter__()

    def call(self, function, dtype, *args, **options):
        if self.enabled:
            args = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args]
        return function(*args, **options)

    @contextlib.contextmanager
    def autocast(self, device_type, dtype=None, enabled=True):
        before, self.enabled = self.enabled, enabled
        yield
        self.enabled = before


class Count(TorchDispatchMode):
    """What lives on the device, by KINDS, and at the moment when most does; operations and seconds."""

    def __init__(self, chip):
        super().__init__()
        self.chip, self.stored, self.now = chip, {}, dict.fromkeys(KINDS, 0)
        self.start()

    def __enter__(self):
        self.held = contextlib.ExitStack()
        self.held.enter_context(as_one_process())
        self.autocast = self.held.enter_context(Autocast()).autocast
        self.held.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.held.close()

    def start(self):
        """From here on."""
        self.peak, self.flops, self.kernels, self.launches = dict(self.now), 0, 0.0, 0

    def is_new(self, tensor):
        """Counts its memory, unless it is known: of a view, or of what was changed in place."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.stored:
            return False
        self.stored[key] = ["temporary", storage.nbytes(), weakref.ref(storage, functools.partial(self.freed, key))]
        self.now["temporary"] += storage.nbytes()
        return True

    def mark(self, kind, tensors):
        for tensor in tensors:
            self.is_new(tensor)
            of = self.stored[tensor.untyped_storage()._cdata]
            self.now[of[0]] -= of[1]
            self.now[kind] += of[1]
            of[0] = kind

    def keep(self, tensor):
        """It is there till the backward pass has been here."""
        if tensor.is_meta and (self.is_new(tensor) or self.stored[tensor.untyped_storage()._cdata][0] == "temporary"):
            self.mark("kept", [tensor])
        return tensor

    def freed(self, key, _):
        kind, size, _ = self.stored.pop(key)
        self.now[kind] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        given, made = ([t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_meta]
                       for value in ((args, kwargs), result))
        if sum(map(self.is_new, made)) or func.overloadpacket.__name__.endswith("_"):  # else a view: nothing runs
            if sum(self.now.values()) > sum(self.peak.values()):
                self.peak = dict(self.now)
            flops = flop_registry[func.overloadpacket](*args, **kwargs or {}, out_val=result) if (
                func.overloadpacket in flop_registry) else 0
            single = self.chip.bf16 and any(t.dtype == torch.float32 for t in made)  # TF32: half the rate
            self.flops += flops
            self.launches += bool(made)
            self.kernels += max(flops * (1 + single) / self.chip.flops, sum(
                t.numel() * t.itemsize for t in [*given, *made]) / self.chip.bytes)
        return result

    def result(self, steps=1):
        """Of one of `steps` equal steps since start()."""
        seconds = max(self.kernels / SHARE, self.launches * LAUNCH) / steps
        return SimpleNamespace(peak=self.peak, total=sum(self.peak.values()), flops=self.flops / steps, seconds=seconds)


class FusedAdamW:
    """AdamW's memory: two moments per weight, gradients that stay till the next step, and no temporaries."""

    def __init__(self, count, module):
        self.count, self.parameters, self.param_groups = count, list(module.parameters()), [{}]
        self.moments = [torch.zeros_like(p) for p in self.parameters for _ in range(2)]
        count.mark("optimizer", self.moments)
        count.mark("weights", [*self.parameters, *module.buffers()])
        for p in self.parameters:
            p.register_post_accumulate_grad_hook(lambda p: count.mark("gradients", [p.grad]))

    def zero_grad(self, set_to_none=True):
        for p in self.parameters:
            p.grad = None

    def step(self):
        self.count.kernels += 7 * sum(p.nbytes for p in self.parameters) / self.count.chip.bytes
