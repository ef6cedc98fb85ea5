"""How fast is a training step, beside the bare denoiser and beside PyTorch's own transformer?

    python experiments/speed.py                minutes on a CPU, one thread
    python experiments/speed.py --compile      torch.compile as well

On a GPU: preset 256 (130 M parameters, N = 256, K = 1024). All ways of a table are run in turn, so that a
machine that slows down slows all of them; medians count, without the first round. The matrix rate is that of
one large product. A backward pass counts as two forward passes, the teacher of L_CM as one over its share of
the batch; what is computed twice to save memory counts once.
"""

import argparse
import copy
import functools
import statistics
import time
from types import SimpleNamespace

import torch
from common import facts, markdown, update
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from embedding_diffusion import EmbeddingDiffusion
from engine.config import DEFAULTS, PRESETS, describe_models
from engine.distributed import bf16_works, choose_device
from engine.randomness import image_generators
from losses import NOISE_ARGS, sample_noise
from sample import sample_tokens
from schedule import ShiftedCosine
from train import build_loss


def measure(ways, device, repeat, inner):
    """{name: function} -> {name: (median of seconds per call, peak of GPU memory in bytes)}."""
    seconds, memory, cuda = {name: [] for name in ways}, dict.fromkeys(ways, 0), device.type == "cuda"
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
                memory[name] = torch.cuda.max_memory_allocated()
            if turn:  # the first round compiles, and fills caches
                seconds[name].append((time.perf_counter() - start) / inner)
    return {name: (statistics.median(seconds[name]), memory[name]) for name in ways}


@torch.no_grad()
def forward_flops(setup):
    """Of the matrix products of one image's way through the denoiser."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        z = torch.zeros(1, setup.model.N, setup.model.D, device=setup.device)
        setup.model(z, torch.zeros(1, device=setup.device), setup.labels[:1])
    return counter.get_total_flops()


def make_encoder(config, model):
    """torch.nn.TransformerEncoder of the denoiser's sizes, with its linear first and last layer."""
    width = config["width"]
    layer = nn.TransformerEncoderLayer(width, config["heads"], 4 * width, dropout=0.0, batch_first=True,
                                       norm_first=True, activation=nn.GELU(approximate="tanh"))
    return nn.Sequential(nn.Linear(model.D, width),
                         nn.TransformerEncoder(layer, config["depth"], enable_nested_tensor=False),
                         nn.Linear(width, model.K))


def prepare(config, device):
    """The denoiser, its EMA, one batch of random tokens: what the ways below share."""
    B, models = config["batch"], describe_models(config, 10)
    torch.manual_seed(0)
    model = EmbeddingDiffusion(**models["denoiser"], bf16=bf16_works(device)).to(device)
    for layer in [block.modulation for block in model.blocks] + [model.head]:
        nn.init.normal_(layer.weight, std=0.02)  # as after some training: no gradient is zero
    return SimpleNamespace(model=model, ema=copy.deepcopy(model).requires_grad_(False), device=device,
                           config=config, schedule=ShiftedCosine(**models["schedule"]),
                           x=torch.randint(config["K"], (B, model.N), device=device),
                           labels=torch.randint(10, (B,), device=device), generator=torch.Generator(device))


def forward_and_backward(network, *inputs, gradient, bf16):
    """A function that runs a network forward and backward."""
    def way():
        with torch.autocast(gradient.device.type, dtype=torch.bfloat16, enabled=bf16):
            outputs = network(*inputs)
        outputs.backward(gradient.to(outputs.dtype))
        network.zero_grad(set_to_none=True)
    return way


def training_step(setup, recompute=False, **changed):
    """A function that does what a step of train.py does. recompute: activation checkpointing."""
    model, config = setup.model, setup.config | changed
    loss_of = build_loss(config, model, model, setup.schedule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)
    options = {name: config[name] for name in NOISE_ARGS}
    passes = -(-config["batch"] // (config["micro_batch"] or config["batch"]))

    def way():
        model.recompute = recompute
        rows, n_rec, counts = sample_noise(model, setup.x, setup.labels, setup.generator, **options)
        for i in range(passes):
            part = {name: value[i::passes] for name, value in rows.items()}
            loss, _ = loss_of(part, len(range(i, n_rec, passes)), counts)
            loss.backward()
        update(model, setup.ema, optimizer, config, 0)
        model.recompute = False
    return way


def matrix_rate(device, bf16):
    """FLOP/s of one large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds, _ = measure({"product": lambda: a @ a}, device, 9, 2)["product"]
    return 2 * n ** 3 / seconds


def print_table(title, found, images, reference, used=None):
    """found: of measure. reference: which is 1.00. used: {name: share of the matrix rate}."""
    one, _ = found[reference]
    rows = [[name, f"{seconds:.4g}", f"{seconds / one:.2f}", f"{images / seconds:.4g}",
             f"{used[name]:.0%}" if used else "", f"{memory / 1e9:.1f}" if memory else ""]
            for name, (seconds, memory) in found.items()]
    print("\n" + markdown([title, "seconds", "ratio", "images/s", "of the matrix rate", "GB"], rows))


def training(setup, args):
    """The step beside its parts."""
    model, B, forward, device = setup.model, setup.config["batch"], forward_flops(setup), setup.device
    encoder = make_encoder(setup.config, model).to(device)
    z = torch.randn(B, model.N, model.D, device=device, requires_grad=True)
    inputs = z, torch.randn(B, device=device), setup.labels
    alone = dict(gradient=torch.randn(B, model.N, model.K, device=device) / B, bf16=model.bf16)
    step = forward * (3 + 1 - setup.config["rec_fraction"])
    ways = {"nn.TransformerEncoder": (3 * forward, forward_and_backward(encoder, z, **alone)),
            "denoiser": (3 * forward, forward_and_backward(model, *inputs, **alone)),
            "training step": (step, training_step(setup)),
            "training step without L_CM": (3 * forward, training_step(setup, w_cm=0.0)),
            "training step, activation checkpointing": (step, training_step(setup, recompute=True))}
    if args.compile:
        fast_encoder = forward_and_backward(torch.compile(encoder), z, **alone)
        fast_model = forward_and_backward(torch.compile(model), *inputs, **alone)
        ways |= {"nn.TransformerEncoder, compiled": (3 * forward, fast_encoder),
                 "denoiser, compiled": (3 * forward, fast_model),
                 "training step, compiled": (step, training_step(setup, compile=True))}
    rate = matrix_rate(device, model.bf16)
    print(f"matrix rate: {rate / 1e12:.3g} TFLOP/s in {'bf16' if model.bf16 else 'fp32'}")
    found = measure({name: way for name, (_, way) in ways.items()}, device, args.repeat, args.inner)
    print_table("forward and backward", found, B, "denoiser", {
        name: flops * B / found[name][0] / rate for name, (flops, _) in ways.items()})


def sampling(setup, args):
    """Tokens alone; the tokenizer's decoder comes on top."""
    model, B, steps, ways = setup.model.eval(), setup.config["batch"], args.sample_steps, {}
    models = {"": model}
    if args.compile:
        fast = models[", compiled"] = copy.copy(model)  # shares the weights
        fast.guided = torch.compile(fast.guided, mode="reduce-overhead", dynamic=False)
    for said, network in models.items():
        for omega in (0.0, 1.0):
            ways[f"{steps} steps, guidance {omega}{said}"] = functools.partial(
                sample_tokens, network, setup.schedule, setup.labels, image_generators(0, range(B)), steps,
                omega, setup.config["sampler"])
    found = measure(ways, setup.device, max(1, args.repeat // 3), 1)
    print_table("sampling", found, B, f"{steps} steps, guidance 0.0")


def main():
    parser = argparse.ArgumentParser(description="Speed of training and sampling.")
    parser.add_argument("--preset", choices=PRESETS, help="of train.py (default: 32-cpu, on a GPU 256)")
    parser.add_argument("--repeat", type=int, default=9, help="rounds (default: 9)")
    parser.add_argument("--inner", type=int, default=2, help="steps per round (default: 2)")
    parser.add_argument("--sample-steps", type=int, default=50, help="network calls per image (default: 50)")
    parser.add_argument("--compile", action="store_true", help="also compiled")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args()
    device = choose_device(args.device)
    cuda = device.type == "cuda"
    torch.set_num_threads(args.threads)
    setup = prepare(DEFAULTS | PRESETS[args.preset or ("256" if cuda else "32-cpu")], device)
    millions = sum(p.numel() for p in setup.model.parameters()) / 1e6
    print(f"{facts(device)['device']}, {millions:.1f} M parameters, batch {setup.config['batch']}, "
          f"N = {setup.model.N}, K = {setup.model.K}")
    training(setup, args)
    sampling(setup, args)


if __name__ == "__main__":
    main()
