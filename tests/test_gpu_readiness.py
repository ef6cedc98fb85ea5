"""What can be proved of the GPU path without a GPU: its loops read nothing back and mix no devices, the loss
compiles to one graph, and sums and losses are float32 where matrix products are bfloat16.

The stand-in for a GPU is PyTorch's meta device: whatever would make Python wait for a GPU (.item(), if,
bincount, a mask as an index, .cpu()) has no answer there and is an error.
"""

import contextlib
import copy
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
import sample
import train
import vqvae
from embedding_diffusion import EmbeddingDiffusion
from engine import checkpoint, status, tokens
from engine.config import DEFAULTS
from engine.distributed import choose_device
from engine.randomness import image_generators
from schedule import ShiftedCosine
from tests.common import close, seeded, train_tiny
from tests.exact import Steps, run_of

GPU = torch.device("meta")
NOISE = {name: DEFAULTS[name] for name in losses.NOISE_ARGS}
LEVELS = ShiftedCosine(0.4, -10, 7)
SIZES = dict(K=11, grid=(3, 3), D=6, width=16, depth=2, heads=2, num_classes=3)


def build_tokenizer(*args, build=train.build_tokenizer):
    parts = build(*args)
    parts["tokenizer"].quantizer.has_codes = True
    return parts


MAY_WAIT = [  # what may read from the GPU, seldom or before the first step; and what stands in for it
    (vqvae.VectorQuantizer, "restart_dead_codes", None), (status.StatusLog, "check", None),
    (status.StatusLog, "line", None), (checkpoint, "save", None),
    (losses, "collapse_diagnostics", {"effective_rank": 1.0, "smallest_distance": 1.0}),
    (train, "evaluate", {}), (train, "draw_reconstructions", None),
    (tokens, "open_tokens", lambda path, *_: np.load(path)), (train, "build_tokenizer", build_tokenizer),
    (train, "evaluate_tokenizer", {"psnr": 1.0}), (EmbeddingDiffusion, "init_from_codebook", None)]


def make_adam(parameters, fused, adam=torch.optim.AdamW, **options):
    """fused is not for meta."""
    return adam(parameters, **options)


def on_gpu(value):
    return isinstance(value, torch.Tensor) and value.device == GPU


class Strict(TorchDispatchMode):
    """Refuses what meta lets pass, and a GPU not, or not without a wait."""

    looping, in_loops = False, 0  # while looping, copies must not wait

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, given = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        result = func(*args, **kwargs or {})
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        if any(map(on_gpu, tree_leaves([given, result]))):
            self.in_loops += self.looping
            copies = name in ("_to_copy", "copy_")
            from_cpu = [t for t in tensors if not on_gpu(t) and (t.dim() or copies)]
            assert copies or not from_cpu, f"{name} mixes tensors of the CPU and the GPU"
            waits = not (kwargs or {}).get("non_blocking") and args[-1] is not True
            assert not (self.looping and from_cpu and waits), f"{name} to the GPU waits: non_blocking=True"
            if name.lstrip("_").startswith("index"):
                masks = [t for t in tree_leaves(args[1]) if getattr(t, "dtype", None) == torch.bool]
                assert not masks, f"{name}: a mask as an index reads from the GPU how much it selects"
            assert not any(isinstance(value, torch.Generator) for value in given), f"{name}: CPU's generator"
            assert torch.float64 not in [t.dtype for t in tree_leaves(result) if on_gpu(t)], name
        return result


@pytest.fixture
def on_the_gpu():
    """Programs on the stand-in for a GPU, by --device: Strict in the loops of train.py."""
    generator_for, steps_of = train.generator_for, status.StatusLog.loop

    def watched(log):
        for step in steps_of(log):
            strict.looping = True
            yield step
            strict.looping = False

    def generator_of(seed, stage, step, device="cpu"):
        return None if torch.device(device) == GPU else generator_for(seed, stage, step)

    with contextlib.ExitStack() as stack:
        for owner, name, instead in [
                (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
                (train, "AdamW", make_adam), (torch.optim, "AdamW", make_adam),
                (train, "generator_for", generator_of), (status.StatusLog, "loop", watched), *MAY_WAIT]:
            stand_in = instead if callable(instead) else lambda *_, instead=instead, **__: instead
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        strict = stack.enter_context(Strict())
        yield strict


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_gpu_denoiser_loop_reads_nothing(undone, folder, on_the_gpu):
    """Stage 3 as train.py runs it: batches, noise, gradient in two passes, update, the log of losses."""
    assert train_tiny(folder, undone, "--activation-checkpointing", stage="diffusion", preset="32-cpu",
                      device=GPU, micro_batch=3, steps=2) == 0 and on_the_gpu.in_loops > 500


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_gpu_tokenizer_loop_reads_nothing(small_lpips, folder, tmp_path, on_the_gpu, update):
    """Stage 1 with LPIPS and discriminator, its codebook moved in either way."""
    options = dict(stage="tokenizer", device=GPU, tokenizer_steps=2, perceptual=1.0, codebook_update=update)
    assert train_tiny(folder, tmp_path / "pets", "--lpips-weights", small_lpips, **options) == 0
    assert on_the_gpu.in_loops > 500


def test_gpu_sampler_reads_nothing(on_the_gpu):
    with GPU:
        model, labels = EmbeddingDiffusion(**SIZES), torch.zeros(4, dtype=torch.int64)
        keep = torch.zeros(1, 9, dtype=torch.int64)

    def callback(*_):
        on_the_gpu.looping = True  # before the loop the grid of times is copied once

    drawn = sample.sample_tokens(model, LEVELS, labels, image_generators(0, range(4)), 4, 2.0, "ancestral",
                                 temperature=0.9, inpaint=keep, callback=callback)
    assert drawn.device == GPU and on_the_gpu.in_loops > 300


def test_gpu_loss_compiles_to_one_graph():
    """No graph breaks; the gradient is that of the loss as it is written."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = EmbeddingDiffusion(**SIZES | {"depth": 1}, bf16=True)
    loss_of = train.build_loss(DEFAULTS, model, copy.deepcopy(model).requires_grad_(False), LEVELS)
    compiled = torch.compile(loss_of, backend=torch._dynamo.lookup_backend("eager"), fullgraph=True)
    x = torch.randint(11, (8, 9))
    noisy = losses.sample_noise(model, x, x[:, 0] % 3, seeded(0), **NOISE)
    close(*(torch.autograd.grad(loss(*noisy)[0], list(model.parameters())) for loss in (loss_of, compiled)))
    torch._dynamo.reset()


class Types(TorchDispatchMode):
    """{operation: float types of its arguments}."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        dtypes = {t.dtype for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()}
        self.of.setdefault(func.overloadpacket.__name__, set()).update(dtypes)
        return func(*args, **kwargs or {})


DELICATE = {"_softmax", "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "exp",
            "nll_loss_backward", "cumsum", "searchsorted", "argmin", "mse_loss", "index_add_",
            "linalg_vector_norm", "lerp_"}


def test_gpu_by_its_number():
    """Its memory and its types are asked for, not those of the first."""
    with mock.patch.object(torch, "empty"), mock.patch.object(torch.cuda, "set_device") as chosen:
        assert choose_device("cuda:1") == torch.device("cuda:1")
    chosen.assert_called_once_with(torch.device("cuda:1"))


def test_gpu_precision():
    """Transformer and convolutions are bfloat16; softmax, losses, draws, codes and norms are float32, also
    where the caller has its own autocast on."""
    model, x = EmbeddingDiffusion(**SIZES, bf16=True), torch.randint(11, (8, 9))
    tokenizer = vqvae.VQVAE(8, f=4, K=11, code_dim=5, width=16, bf16=True)
    parts = {"tokenizer": tokenizer, "optimizer": torch.optim.AdamW(tokenizer.parameters())}
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16), Types() as seen:
        noisy = losses.sample_noise(model, x, x[:, 0] % 3, seeded(0), **NOISE)
        loss, _ = losses.training_loss(model, model, LEVELS, *noisy, **{
            name: DEFAULTS[name] for name in losses.LOSS_ARGS})
        loss.backward()
        losses.vlb(model, LEVELS, x, x[:, 0] % 3, seeded(0))
        sample.sample_tokens(model, LEVELS, x[:, 0] % 3, image_generators(0, range(8)), 3, 2.0, "ancestral")
        train.optimize_tokenizer(run_of(DEFAULTS | {"tokenizer_batch": 4}, images), parts, Steps(9000))
    assert DELICATE <= seen.of.keys()
    assert {name: seen.of[name] for name in DELICATE if seen.of[name] != {torch.float32}} == {}
    assert seen.of["addmm"] == {torch.bfloat16} and seen.of["convolution"] == {torch.bfloat16}
