"""How fast is a training step, beside the bare denoiser and beside PyTorch's own transformer, and what made it so?

    python experiments/speed.py                          minutes on a CPU, one thread
    python experiments/speed.py --compile                torch.compile as well
    python experiments/speed.py --profile                on a GPU: preset 256 (130 M parameters, N = 256, K = 1024),
                                                         each measure switched on in turn, and the slowest kernels

All ways of a table are run in turn, A, B, C, A, B, C, ..., so that a machine that slows down slows all of them; medians
count, after a first round that does not. The matrix rate is measured in the same rounds, by one large product in the
precision of the network. Model FLOPs are those of the matrix products: a backward pass counts as two forward passes,
the teacher of L_CM as one over its share of the batch; what is computed twice to save memory counts once.
"""

import argparse
import contextlib
import copy
import functools
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from embedding_diffusion import EmbeddingDiffusion
from engine.config import DEFAULTS, PRESETS
from engine.distributed import bf16_works, choose_device, compute_gradient
from engine.randomness import image_generators
from losses import LOSS_ARGS, NOISE_ARGS, sample_noise, training_loss
from sample import sample_tokens
from schedule import ShiftedCosine
from train import update

SIZES = ("size", "f", "K", "D", "width", "depth", "heads", "batch", "micro_batch")


def measure(ways, device, repeat, inner):
    """{name: function} -> {name: (median of seconds per call, peak of GPU memory in GB or None)}."""
    seconds, memory, cuda = {name: [] for name in ways}, dict.fromkeys(ways), device.type == "cuda"
    for turn in range(repeat + 1):
        for name, way in ways.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(inner):
                way()
            if cuda:
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 1e9
            if turn:  # the first round compiles, and fills caches
                seconds[name].append((time.perf_counter() - start) / inner)
    return {name: (statistics.median(seconds[name]), memory[name]) for name in ways}


def forward_flops(model):
    """Of the matrix products of one image's way through the denoiser."""
    width, N = model.position.shape[1], model.N
    block = N * (24 * width ** 2 + 4 * N * width) + 12 * width ** 2  # linear layers, attention, modulation
    products = (model.output_prior or model.posterior_input) + model.posterior_input  # tokens' likelihoods, their mean
    own = products * model.D * model.K + model.K
    return len(model.blocks) * block + N * 2 * (model.input.in_features * width + width * model.K + own)


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder of the denoiser's width, depth, heads, with its linear first and last layer."""

    def __init__(self, model, heads):
        super().__init__()
        width = model.position.shape[1]
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True,
                                           activation=nn.GELU(approximate="tanh"))
        self.input, self.head = nn.Linear(model.D, width), nn.Linear(width, model.K)
        self.encoder = nn.TransformerEncoder(layer, len(model.blocks), enable_nested_tensor=False)
        self.bf16 = model.bf16

    def forward(self, z):
        with torch.autocast(z.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.head(self.encoder(self.input(z)))


def prepare(config, device):
    """The denoiser, its EMA, one batch of random tokens: everything that the ways below share."""
    grid = (config["size"] // config["f"],) * 2
    torch.manual_seed(0)
    model = EmbeddingDiffusion(config["K"], grid, config["D"], config["width"], config["depth"], config["heads"],
                               num_classes=10, bf16=bf16_works(device)).to(device)
    for layer in [block.modulation for block in model.blocks] + [model.head]:
        nn.init.normal_(layer.weight, std=0.02)  # as after some training: no gradient is zero
    B, schedule = config["batch"], ShiftedCosine(config["shift"], config["log_snr_min"], config["log_snr_max"])
    return SimpleNamespace(
        model=model, ema=copy.deepcopy(model).requires_grad_(False), schedule=schedule, device=device, config=config,
        x=torch.randint(config["K"], (B, model.N), device=device), labels=torch.randint(10, (B,), device=device),
        z=torch.randn(B, model.N, model.D, device=device, requires_grad=True), log_snr=torch.randn(B, device=device),
        gradient=torch.randn(B, model.N, config["K"], device=device) / B, generator=torch.Generator(device))


def there_and_back(network, *inputs, gradient):
    """Forward and backward pass of a network alone."""
    def way():
        network(*inputs).backward(gradient)
        network.zero_grad(set_to_none=True)
    return way


def training_step(setup, *, fused=True, bf16=None, attention=None, compiled=False, recompute=False, **changed):
    """What train.py does in a step: random numbers, all losses, gradient, clipping, AdamW, EMA. compiled: or a mode."""
    model, config = setup.model, setup.config | changed
    loss_of = functools.partial(training_loss, model, model, setup.schedule, **{
        name: config[name] for name in LOSS_ARGS})
    loss_of = torch.compile(loss_of, mode=compiled if isinstance(compiled, str) else None) if compiled else loss_of
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0, fused=fused,
                                  foreach=False)
    options = {name: config[name] for name in NOISE_ARGS}

    def way():
        before, model.bf16, model.recompute = model.bf16, model.bf16 if bf16 is None else bf16, recompute
        with sdpa_kernel(attention) if attention else contextlib.nullcontext():
            noisy = sample_noise(model, setup.x, setup.labels, setup.generator, **options)
            compute_gradient(model, loss_of, noisy, config["micro_batch"])
        update(model, setup.ema, optimizer, config["clip"], 0.999)
        model.bf16, model.recompute = before, False
    return way


def matrix_rate(setup):
    """(one large matrix product, its FLOPs), in bf16 where the network uses it."""
    n = 8192 if setup.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=setup.device, dtype=torch.bfloat16 if setup.model.bf16 else torch.float32)
            for _ in range(2))
    return lambda: a @ b, 2 * n ** 3


def table(title, found, reference, images, flops=None, rate=None):
    """Markdown. flops: {name: model FLOPs per image}."""
    print(f"\n| {title} | seconds | ratio | images/s | of the matrix rate | GB |\n|---|---|---|---|---|---|")
    for name, (seconds, memory) in found.items():
        used = f"{flops[name] * images / seconds / rate:.0%}" if flops and name in flops else ""
        print(f"| {name} | {seconds:.4g} | {seconds / found[reference][0]:.2f} | {images / seconds:.4g} | {used} | "
              f"{'' if memory is None else f'{memory:.1f}'} |")


def training(setup, args):
    """The step beside its parts."""
    model, config, forward = setup.model, setup.config, forward_flops(setup.model)
    encoder = Encoder(model, config["heads"]).to(setup.device)
    inputs = setup.z, setup.log_snr, setup.labels
    product, product_flops = matrix_rate(setup)
    ways = {"matrix product": product,
            "nn.TransformerEncoder": there_and_back(encoder, setup.z, gradient=setup.gradient),
            "denoiser": there_and_back(model, *inputs, gradient=setup.gradient),
            "training step": training_step(setup),
            "training step without L_CM": training_step(setup, w_cm=0.0),
            "training step, activation checkpointing": training_step(setup, recompute=True)}
    step = forward * (3 + 1 - config["rec_fraction"])
    flops = {"nn.TransformerEncoder": 3 * forward, "denoiser": 3 * forward, "training step": step,
             "training step without L_CM": 3 * forward, "training step, activation checkpointing": step}
    if args.compile:
        ways |= {"nn.TransformerEncoder, compiled": there_and_back(torch.compile(encoder), setup.z,
                                                                   gradient=setup.gradient),
                 "denoiser, compiled": there_and_back(torch.compile(model), *inputs, gradient=setup.gradient),
                 "training step, compiled": training_step(setup, compiled=True)}
        flops |= {f"{name}, compiled": flops[name] for name in ("nn.TransformerEncoder", "denoiser", "training step")}
    found = measure(ways, setup.device, args.repeat, args.inner)
    rate = product_flops / found.pop("matrix product")[0]
    print(f"matrix rate: {rate / 1e12:.3g} TFLOP/s in {'bf16' if model.bf16 else 'fp32'}")
    table("forward and backward", found, "denoiser", config["batch"], flops, rate)


def measures(setup, args):
    """One after the other switched on: what did each bring?"""
    settings, ways = dict(fused=False, bf16=False, attention=SDPBackend.MATH), {}
    for name, change in {"float32, AdamW one tensor at a time, attention written out": {},
                         "+ flash attention": {"attention": None}, "+ bf16": {"bf16": True},
                         "+ fused AdamW": {"fused": True}, "+ torch.compile": {"compiled": True}}.items():
        settings |= change
        ways[name] = training_step(setup, **settings)
    table("training step", measure(ways, setup.device, args.repeat, args.inner), next(iter(ways)),
          setup.config["batch"])


def sampling(setup, args):
    """Tokens alone; the tokenizer's decoder comes on top."""
    model, B, labels = setup.model.eval(), setup.config["batch"], setup.labels
    generators = image_generators(0, range(B))
    fast = copy.copy(model)  # shares the weights
    fast.guided = torch.compile(fast.guided, mode="reduce-overhead", dynamic=False)
    found = measure({f"{args.sample_steps} steps, guidance {omega}{', compiled' if network is fast else ''}":
                     functools.partial(sample_tokens, network, setup.schedule, labels, generators, args.sample_steps,
                                       omega, setup.config["sampler"])
                     for network in ([model, fast] if args.compile else [model]) for omega in (0.0, 1.0)},
                    setup.device, max(1, args.repeat // 3), 1)
    table("sampling", found, next(iter(found)), B)


def profile(setup):
    """The slowest kernels of three training steps."""
    step = training_step(setup, compiled=setup.device.type == "cuda")
    step()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    key = "self_cuda_time_total" if setup.device.type == "cuda" else "self_cpu_time_total"
    print("\n" + profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


def main():
    parser = argparse.ArgumentParser(description="Speed of training and sampling.")
    parser.add_argument("--preset", choices=list(PRESETS), help="of train.py (default: 32-cpu, on a GPU 256)")
    for name in SIZES:
        parser.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help="in place of the preset's")
    parser.add_argument("--repeat", type=int, default=9, help="rounds (default: 9)")
    parser.add_argument("--inner", type=int, help="steps per round (default: 2, on a GPU 5)")
    parser.add_argument("--sample-steps", type=int, default=50, help="network calls per image (default: 50)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also compiled (default: on a GPU)")
    parser.add_argument("--measures", action=argparse.BooleanOptionalAction,
                        help="switch the measures on in turn (default: on a GPU)")
    parser.add_argument("--profile", action="store_true", help="print the slowest kernels of the training step")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args()
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    args.inner = args.inner or (5 if cuda else 2)
    args.compile, args.measures = (cuda if flag is None else flag for flag in (args.compile, args.measures))
    torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset or ("256" if cuda else "32-cpu")]
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    setup = prepare(DEFAULTS | preset | given, device)
    millions = sum(p.numel() for p in setup.model.parameters()) / 1e6
    name = torch.cuda.get_device_name(device) if cuda else f"{device}, {args.threads} thread(s)"
    print(f"{name}, torch {torch.__version__}: {millions:.1f} M parameters, batch {setup.config['batch']}, N = "
          f"{setup.model.N}, K = {setup.model.K}, medians of {args.repeat} rounds")
    training(setup, args)
    if args.measures:
        measures(setup, args)
    sampling(setup, args)
    if args.profile:
        profile(setup)


if __name__ == "__main__":
    main()
