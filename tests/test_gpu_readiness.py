"""What can be proved of the GPU path without a GPU: that its loops read nothing back and mix no devices, that the loss
compiles to one graph, and which numbers are float32 where matrix products are bfloat16.

The stand-in for a GPU is PyTorch's device "meta", whose tensors have shapes and no values: whatever would make Python
wait for a GPU (.item(), if, bincount, a mask as an index, .cpu()) has no answer there and is an error.
"""

import contextlib
import copy
import functools
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
import sample
import train
import vqvae
from embedding_diffusion import EmbeddingDiffusion
from engine import status, tokens
from engine.batches import image_batches
from engine.config import DEFAULTS
from engine.distributed import compute_gradient
from engine.randomness import image_generators
from extras.vqgan_losses import LPIPS, PatchDiscriminator
from schedule import ShiftedCosine
from tests.common import TINY, call, close, flags, seeded

GPU = torch.device("meta")
NOISE = {name: DEFAULTS[name] for name in losses.NOISE_ARGS}
LEVELS = ShiftedCosine(0.4, -10, 7)
SIZES = dict(K=11, grid=(3, 3), D=6, width=16, depth=2, heads=2, num_classes=3)

# ----------------------------------------------------------------------------
# 1. Nothing is read back.

def started(vq, *_):
    vq.started = True


MAY_WAIT = [  # what the loops call that may read from the GPU, what the tests put in its place, and why it may
    (vqvae.VectorQuantizer, "start", started, "once per process: is there a codebook? If not, k-means on the batch"),
    (vqvae.VectorQuantizer, "restart_dead_codes", None, "every 50 steps: drawn on the CPU, the same in all processes"),
    (status.StatusLog, "check", None, "when a status line, a picture or a checkpoint is due: are losses finite?"),
    (status.StatusLog, "line", None, "a status line"),
    (status.StatusLog, "save", None, "a checkpoint"),
    (train, "collapse_diagnostics", {"effective_rank": 1.0, "smallest_distance": 1.0}, "a status line"),
    (train, "evaluate", {}, "when pictures are due: a table of numbers"),
    (train, "draw_samples", None, "a picture"),
    (train, "draw_reconstructions", None, "a picture"),
    (train, "evaluate_tokenizer", {"psnr": 1.0}, "after the last step"),
    (tokens, "check_tokenizer_hash", None, "before the first step"),
    (EmbeddingDiffusion, "init_from_codebook", None, "before the first step"),
]
READS = ("item", "_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim",
         "unique_consecutive", "equal", "is_nonzero", "multinomial", "repeat_interleave")


def on_gpu(value):
    return isinstance(value, torch.Tensor) and value.device == GPU


class Strict(TorchDispatchMode):
    """Refuses what "meta" lets pass and a GPU does not, or not without a wait. looping: copies must not wait either."""

    looping, in_loops = False, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, given = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        result = func(*args, **kwargs or {})
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        if any(map(on_gpu, tree_leaves([given, result]))):
            self.in_loops += self.looping
            assert name not in READS, f"{name} reads from the GPU"
            from_cpu = [t for t in tensors if not on_gpu(t) and (t.dim() or name in ("_to_copy", "copy_"))]
            if name in ("_to_copy", "copy_"):
                waits = self.looping and from_cpu and not (kwargs or {}).get("non_blocking") and args[-1] is not True
                assert not waits, f"{name} to the GPU waits: non_blocking=True"
            else:
                assert not from_cpu, f"{name} mixes tensors of the CPU and the GPU"
            if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
                masks = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
                assert not masks, f"{name}: a mask as an index reads from the GPU how much it selects"
            assert not any(isinstance(value, torch.Generator) for value in given), f"{name}: a generator of the CPU"
            assert not any(on_gpu(t) and t.dtype == torch.float64 for t in tree_leaves(result)), f"{name}: float64"
        return result


@pytest.fixture
def on_the_gpu():
    """Programs on the stand-in for a GPU, by --device: Strict in the loops of train.py, or where looping is set.

    "meta" lacks autocast, fused AdamW and generators; what MAY_WAIT is left out.
    """
    def watched(log):
        for step in steps_of(log):
            strict.looping = True
            yield step
            strict.looping = False

    def generator_of(seed, stage, step, device="cpu"):
        return None if torch.device(device) == GPU else generator_for(seed, stage, step)

    adam, generator_for, steps_of = torch.optim.AdamW, train.generator_for, status.StatusLog.loop
    with contextlib.ExitStack() as stack:
        for owner, name, instead, _ in [
                (torch, "autocast", lambda *_, **__: contextlib.nullcontext(), ""),
                (torch.optim, "AdamW", lambda parameters, fused, **options: adam(parameters, **options), ""),
                (train, "generator_for", generator_of, ""), (status.StatusLog, "loop", watched, ""), *MAY_WAIT]:
            stand_in = instead if callable(instead) else lambda *_, instead=instead, **__: instead
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        strict = stack.enter_context(Strict())
        yield strict


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("more", [[], ["--micro-batch", 3, "--activation-checkpointing"]])
def test_gpu_denoiser_loop_reads_nothing(undone, folder, on_the_gpu, more):
    """Stage 3 as train.py runs it: batches, noise, gradient, update, the log of losses."""
    words = ["--data", folder, "--out", undone, "--stage", "diffusion", "--preset", "32-cpu", "--device", GPU,
             *flags(TINY | {"steps": 2})]
    assert call("train.py", *words, *more) == 0 and on_the_gpu.in_loops > 500


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_gpu_tokenizer_loop_reads_nothing(small_lpips, folder, tmp_path, on_the_gpu, update):
    """Stage 1 with LPIPS and discriminator, its codebook moved in either way."""
    words = ["--data", folder, "--out", tmp_path / "pets", "--stage", "tokenizer", "--lpips-weights", small_lpips,
             "--device", GPU, *flags(TINY | {"tokenizer_steps": 2, "perceptual": 1.0, "codebook_update": update})]
    with mock.patch.object(train, "tokenizer_step", wraps=train.tokenizer_step) as step:
        assert call("train.py", *words) == 0 and on_the_gpu.in_loops > 500 and step.call_count == 2


def test_gpu_images_wait_in_pinned_memory():
    """A copy from other memory would wait for the step before; tokens.to_device and the sampler pin likewise."""
    images, dataset, pinned = torch.zeros(9, 3, 8, 8, dtype=torch.uint8), mock.MagicMock(), []
    dataset.batch, dataset.__len__.return_value = images.__getitem__, len(images)
    with mock.patch.object(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x):
        for device, count in ("cpu", 0), ("cuda", 3):
            batches = list(image_batches(dataset, {"tokenizer_batch": 4, "flip": True}, 0, 0, 3, torch.device(device)))
            assert len(batches) == 3 and len(pinned) == count
    assert all(batch is other for batch, other in zip(batches, pinned, strict=True))


def test_gpu_codebook_is_asked_once(one_thread):
    """Whether a codebook has started stands in its checkpoint; a GPU is asked at the first step after loading alone."""
    torch.manual_seed(0)
    vq, other, z = vqvae.VectorQuantizer(8, 3), vqvae.VQVAE(8, 4, 8, 3, 16).train(), torch.randn(4, 3, 5, 6)
    fresh, images = copy.deepcopy(other.state_dict()), torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    with mock.patch.object(vqvae.VectorQuantizer, "initialise", autospec=True,
                           side_effect=vqvae.VectorQuantizer.initialise) as kmeans:
        for _ in range(3):
            vq(z, seeded(0))
        assert kmeans.call_count == 1 and vq.initialised and vq.started
        other.quantizer.load_state_dict(vq.state_dict())
        other(images)  # needs no generator: there are codes
        assert kmeans.call_count == 1 and other.quantizer.started
        other.load_state_dict(fresh)  # by way of the whole tokenizer
        other(images, seeded(0))
        assert kmeans.call_count == 2


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_gpu_sampler_reads_nothing(on_the_gpu, sampler):
    """Not even before and after its loop, in which no copy waits; guided, cooled, inpainted."""
    with GPU:
        model, labels, kept = EmbeddingDiffusion(**SIZES), torch.zeros(4, dtype=torch.int64), torch.zeros(
            1, 9, dtype=torch.int64)

    def strict_from_here(t, p):
        on_the_gpu.looping = True  # before the loop the grid of times is copied once

    drawn = sample.sample_tokens(model, LEVELS, labels, image_generators(0, range(4)), 4, 2.0, sampler, temperature=0.9,
                                 inpaint=kept, callback=strict_from_here)
    assert drawn.device == GPU and on_the_gpu.in_loops > 300


def test_gpu_bound_is_read_once(on_the_gpu):
    """At the end, when every batch is under way."""
    with GPU:
        model, x, labels = EmbeddingDiffusion(**SIZES), torch.zeros(7, 9, dtype=torch.int64), torch.zeros(
            7, dtype=torch.int64)
    with mock.patch.object(losses, "vlb", wraps=losses.vlb) as batches, pytest.raises(
            NotImplementedError, match="Cannot copy out of meta tensor"):
        losses.held_out_bound(model, LEVELS, x, labels, lambda i: None, 20, 4)
    assert batches.call_count == 5


# ----------------------------------------------------------------------------
# 2. torch.compile: one graph.

class Counter:
    """A backend of torch.compile that counts the graphs it is given. (PyTorch's own takes long to import.)"""

    def __init__(self, backend):
        self.backend, self.frame_count = backend, 0

    def __call__(self, graph, inputs):
        self.frame_count += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


def compiled_loss(counter, **options):
    """A small denoiser, its EMA, and the loss that train.build_loss compiles."""
    torch.manual_seed(0)
    model = EmbeddingDiffusion(**SIZES | {"depth": 1}, **options)
    ema = copy.deepcopy(model).requires_grad_(False)
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=counter)):
        return model, ema, train.build_loss(DEFAULTS | {"compile": True}, model, ema, LEVELS)


def batch_of(model, seed, B=8):
    """A made-up batch with its noise, what sample_noise gives."""
    generator = seeded(seed)
    x = torch.randint(model.K, (B, 1), generator=generator) + torch.arange(model.N) * torch.randint(
        2, (B, model.N), generator=generator)  # neighbours say something of each other
    return losses.sample_noise(model, x % model.K, x[:, 0] % model.num_classes, generator,
                               **NOISE | {"rec_fraction": 0.25})  # in every pass there is one at t = 0


@pytest.fixture
def no_graphs_yet():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(capture_scalar_outputs=False):  # a value that is read breaks the graph
        yield
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    torch._dynamo.reset()
    assert not breaks


@pytest.mark.parametrize("backend, options, micro_batch, graphs", [
    ("aot_eager", {"bf16": True}, 4, 1), ("eager", {"recompute": True}, 3, 2)])
def test_gpu_loss_compiles_to_one_graph(one_thread, no_graphs_yet, backend, options, micro_batch, graphs):
    """Forward and backward, whatever the data. Passes of unequal size, 8 images by 3, make a second graph, at once,
    for all sizes. The gradient is that of the loss as it is written."""
    counter = Counter(backend)
    model, ema, loss_of = compiled_loss(counter, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(3):
        noisy = batch_of(model, step)
        terms = compute_gradient(model.train(), loss_of, noisy, micro_batch)
        assert counter.frame_count == graphs
        if step == 2:
            found = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            plain = train.build_loss(DEFAULTS, model, ema, LEVELS)
            close(compute_gradient(model, plain, noisy, micro_batch), terms)
            for p, gradient in zip(model.parameters(), found, strict=True):
                close(p.grad, gradient)
        train.update(model, ema, optimizer, 1.0, 0.9)


def test_gpu_sampler_compiles_to_one_graph(one_thread, no_graphs_yet):
    """As extras/sample_command.py does it; a second one where guidance is off."""
    counter = Counter("eager")
    model, labels = EmbeddingDiffusion(**SIZES), torch.arange(3)
    draw = functools.partial(sample.sample_tokens, model, LEVELS, labels, steps=5, guidance=2.0, sampler="ancestral")
    expected = draw(image_generators(0, range(3)))
    model.guided = torch.compile(model.guided, dynamic=False, backend=counter)
    assert torch.equal(draw(image_generators(0, range(3))), expected) and counter.frame_count == 1
    draw(image_generators(1, range(3)), interval=(0.2, 0.6))
    assert counter.frame_count == 2


# ----------------------------------------------------------------------------
# 3. What is float32 where matrix products are bfloat16.

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}  # operator: which argument stands on the left
DELICATE = {"_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward",
            "nll_loss_backward", "exp", "cumsum", "searchsorted", "argmin", "mse_loss", "mse_loss_backward",
            "index_add_", "lerp_", "linalg_vector_norm", "_foreach_norm", "_fused_adamw_", "_foreach_lerp_"}
WEIGHTS = {name: DEFAULTS[name] for name in losses.LOSS_ARGS}


class Precision(TorchDispatchMode):
    """products: {inner size: types}; filters: {(channels out, in): types}; delicate: {name: types}.

    callers: is the caller's own autocast on? Who needs float32 must see to it.
    """

    def __init__(self, callers):
        super().__init__()
        self.callers = torch.autocast("cpu", dtype=torch.bfloat16, enabled=callers)
        self.products, self.filters, self.delicate = {}, {}, {}

    def __enter__(self):
        self.callers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.callers.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        found = {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point()}
        if name in PRODUCTS:
            self.products.setdefault(args[PRODUCTS[name]].shape[-1], set()).update(found)
        elif name == "convolution":
            self.filters.setdefault(tuple(args[1].shape[:2]), set()).update(found)
        elif name in DELICATE:
            self.delicate.setdefault(name, set()).update(found)
        return func(*args, **kwargs or {})


SINGLE, HALF = {torch.float32}, {torch.bfloat16}


@pytest.mark.parametrize("callers", [True, False])
@pytest.mark.parametrize("bf16, prior, posterior", [(True, True, True), (True, True, False), (True, False, False),
                                                    (False, True, True)])
def test_gpu_denoiser_precision(one_thread, bf16, prior, posterior, callers):
    """In training, in the bound and in sampling the transformer's products are bfloat16, if asked for; the output prior
    and the posterior input (D + 1 factors), e_hat (a sum over K) and every softmax, loss and draw are float32."""
    torch.manual_seed(0)
    model = EmbeddingDiffusion(**SIZES, bf16=bf16, output_prior=prior, posterior_input=posterior)
    noisy = batch_of(model, 0)
    x, labels = noisy[0]["x"], noisy[0]["labels"]
    transformer = dict.fromkeys((SIZES["D"] * (1 + posterior), 128, SIZES["width"], 4 * SIZES["width"]),
                                HALF if bf16 else SINGLE)
    expected = transformer | {SIZES["K"]: SINGLE} | ({SIZES["D"] + 1: SINGLE} if prior or posterior else {})
    assert torch.get_float32_matmul_precision() == "highest"  # no TF32 in those on a GPU
    with Precision(callers) as training:
        loss, _ = losses.training_loss(model, model, LEVELS, *noisy, **WEIGHTS)
    with Precision(callers) as backward:
        loss.backward()
    with Precision(callers) as bound:
        losses.vlb(model, LEVELS, x, labels, seeded(0))
    with Precision(callers) as sampling:
        sample.sample_tokens(model, LEVELS, labels, image_generators(0, range(8)), 3, 2.0, "ancestral")
    for part, names in ((training, {"_log_softmax", "nll_loss_forward", "exp"}),
                        (backward, {"_log_softmax_backward_data", "nll_loss_backward"}),
                        (bound, {"_softmax", "nll_loss_forward"}), (sampling, {"_softmax", "cumsum", "searchsorted"})):
        assert part.products == expected or part is backward
        assert names <= part.delicate.keys() and all(types == SINGLE for types in part.delicate.values())


@pytest.mark.parametrize("callers", [True, False])
def test_gpu_tokenizer_precision(one_thread, small_lpips, callers):
    """Its convolutions and the discriminator's are bfloat16; distances to codes, running means, norms, losses and LPIPS
    are float32."""
    torch.manual_seed(0)
    tokenizer, lpips = vqvae.VQVAE(8, f=4, K=11, code_dim=5, width=16, distance="cosine", bf16=True), LPIPS()
    discriminator, adam = PatchDiscriminator(8, 16, bf16=True), functools.partial(torch.optim.AdamW, fused=True)
    parts = {"tokenizer": tokenizer, "optimizer": adam(tokenizer.parameters()), "discriminator": discriminator,
             "discriminator_optimizer": adam(discriminator.parameters())}
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    with Precision(callers) as seen:
        config = DEFAULTS | {"perceptual": 1.0, "gan": 0.5}
        outputs, values = vqvae.tokenizer_step(config, parts, images, seeded(0), 0.9, 1e-3, 1e-3, lpips)
    perceptual = {tuple(layer.weight.shape[:2]) for layer in lpips.features if isinstance(layer, torch.nn.Conv2d)}
    others = [types for shape, types in seen.filters.items() if shape not in perceptual]
    assert all(seen.filters[shape] == SINGLE for shape in perceptual) and others == [HALF] * len(others) != []
    assert seen.products == {5: SINGLE}  # to find the nearest codes
    assert {"argmin", "mse_loss", "index_add_", "lerp_", "linalg_vector_norm"} <= seen.delicate.keys()
    assert all(types == SINGLE for types in seen.delicate.values())
    assert {value.dtype for value in [*values.values(), outputs["x_hat"], outputs["z_e"]]} == SINGLE
    assert len(values) == 9


def trained(bf16, seed):
    """The objective on 256 made-up images, before and after 60 steps on others. A tenth of their tokens is random."""
    def batch(seed, B):
        generator = seeded(seed)
        labels = torch.randint(3, (B,), generator=generator)
        other, where = torch.randint(11, (B, 9), generator=generator), torch.rand(B, 9, generator=generator) < 0.1
        x = torch.where(where, other, (4 * labels[:, None] + torch.arange(9)) % 11)
        return losses.sample_noise(model, x, labels, generator, **NOISE)

    torch.manual_seed(seed)
    model = EmbeddingDiffusion(**SIZES, bf16=bf16)
    ema = copy.deepcopy(model).requires_grad_(False)
    loss_of = train.build_loss(DEFAULTS, model, ema, LEVELS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    before = float(loss_of(*batch(99, 256))[0].detach())
    for step in range(60):
        terms = compute_gradient(model, loss_of, batch(100 + 100 * seed + step, 16), 0)
        norm = train.update(model, ema, optimizer, 1.0, 0.9)
        assert terms.isfinite().all() and norm.isfinite()
    assert all(p.isfinite().all() for p in [*model.parameters(), *ema.parameters()])
    return before, float(loss_of(*batch(99, 256))[0].detach())


def test_gpu_bf16_trains_as_float32(one_thread):
    """From the same start, on the same batches; measured by how far another seed ends. (0.002 and 0.47, here.)"""
    (start, single), (_, half), (_, other) = trained(False, 0), trained(True, 0), trained(False, 2)
    assert single < 0.9 * start and abs(half - single) < 0.1 * abs(other - single)
