"""How fast is a training step, beside the bare denoiser and beside PyTorch's own transformer?

    python experiments/speed.py                minutes on a CPU, one thread
    python experiments/speed.py --compile      torch.compile as well

On a GPU: preset 256 (130 M parameters, N = 256, K = 1024). All ways of a table are run in turn, so that a
machine that slows down slows all of them; medians count, without the first round.
"""

import argparse
import copy
import functools
import itertools
import statistics
import time
from types import SimpleNamespace

import torch
from common import facts, markdown, update
from torch import nn

from embedding_diffusion import EmbeddingDiffusion
from engine.config import DEFAULTS, PRESETS, describe_models
from engine.distributed import bf16_works, choose_device
from engine.randomness import image_generators
from losses import NOISE_ARGS, sample_noise
from sample import sample_tokens
from schedule import ShiftedCosine
from train import build_loss

STEPS = 50  # of the sampler


def measure(ways, device, repeat, inner=2):
    """{name: function} -> {name: median of seconds per call}."""
    seconds = {name: [] for name in ways}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(repeat + 1):
        for name, way in ways.items():
            wait()
            start = time.perf_counter()
            for _ in range(inner):
                way()
            wait()
            seconds[name].append((time.perf_counter() - start) / inner)
    # The first round compiles, and fills caches.
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


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
    return 2 * n ** 3 / measure({"product": lambda: a @ a}, device, 9)["product"]


def training(setup, repeat, fast):
    """The step beside the denoiser, and beside torch's encoder with the same linear first and last layer."""
    model, config, device = setup.model, setup.config, setup.device
    width, B = config["width"], config["batch"]
    layer = nn.TransformerEncoderLayer(width, config["heads"], 4 * width, dropout=0.0, batch_first=True,
                                       norm_first=True, activation=nn.GELU(approximate="tanh"))
    layers = nn.TransformerEncoder(layer, config["depth"], enable_nested_tensor=False)
    encoder = nn.Sequential(nn.Linear(model.D, width), layers, nn.Linear(width, model.K)).to(device)
    z = torch.randn(B, model.N, model.D, device=device, requires_grad=True)
    inputs = z, torch.randn(B, device=device), setup.labels
    alone = dict(gradient=torch.randn(B, model.N, model.K, device=device) / B, bf16=model.bf16)
    ways = {"nn.TransformerEncoder": forward_and_backward(encoder, z, **alone),
            "denoiser": forward_and_backward(model, *inputs, **alone),
            "training step": training_step(setup),
            "training step without L_CM": training_step(setup, w_cm=0.0),
            "training step, activation checkpointing": training_step(setup, recompute=True)}
    if fast:
        ways |= {"nn.TransformerEncoder, compiled": forward_and_backward(torch.compile(encoder), z, **alone),
                 "denoiser, compiled": forward_and_backward(torch.compile(model), *inputs, **alone),
                 "training step, compiled": training_step(setup, compile=True)}
    found = measure(ways, device, repeat)
    rows = [[name, f"{seconds:.4g}", f"{seconds / found['denoiser']:.2f}", f"{B / seconds:.4g}"]
            for name, seconds in found.items()]
    print(markdown(["forward and backward", "seconds", "ratio", "images/s"], rows))


def sampling(setup, repeat, fast):
    """Images per second of tokens alone; the tokenizer's decoder comes on top."""
    B, models, ways = setup.config["batch"], {"": setup.model.eval()}, {}
    if fast:
        copied = models[", compiled"] = copy.copy(setup.model)  # shares the weights
        copied.guided = torch.compile(copied.guided, mode="reduce-overhead", dynamic=False)
    for (said, model), omega in itertools.product(models.items(), (0.0, 1.0)):
        ways[f"{STEPS} steps, guidance {omega}{said}"] = functools.partial(
            sample_tokens, model, setup.schedule, setup.labels, image_generators(0, range(B)), STEPS, omega,
            setup.config["sampler"])
    found = measure(ways, setup.device, repeat, 1)
    print(markdown(["sampling", "images/s"], [[name, f"{B / seconds:.4g}"] for name, seconds in found.items()]))


def main():
    parser = argparse.ArgumentParser(description="Speed of training and sampling.")
    parser.add_argument("--preset", choices=PRESETS, help="of train.py (default: 32-cpu, on a GPU 256)")
    parser.add_argument("--repeat", type=int, default=9, help="rounds (default: 9)")
    parser.add_argument("--compile", action="store_true", help="also compiled")
    args = parser.parse_args()
    device = choose_device("auto")
    torch.set_num_threads(1)
    preset = args.preset or ("256" if device.type == "cuda" else "32-cpu")
    setup = prepare(DEFAULTS | PRESETS[preset], device)
    print(f"{facts(device)['device']}, preset {preset}\n")
    training(setup, args.repeat, args.compile)
    sampling(setup, max(1, args.repeat // 3), args.compile)


if __name__ == "__main__":
    main()
