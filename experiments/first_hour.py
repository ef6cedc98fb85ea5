"""The first hour on a GPU, in ten minutes: does it compute what the CPU computes, in the memory and the time foretold?

    python experiments/first_hour.py                              no data, no network; results in runs/first_hour
    python experiments/first_hour.py --skip speed sampling        or --only memory; Ctrl-C, and the same command goes on
    python experiments/first_hour.py --only processes --processes 2 4

Every part is a program of its own: if it crashes, runs out of memory or takes more than --limit seconds, the next one
goes on, and the same command tries it again. After each of them report.md and report.json are written anew; what was
not as predicted stands at the top. The predictions were made before any GPU was seen. On a CPU everything is tiny, the
"GPU" is that CPU with other roundings, and it says so; it shows that the program works.
"""

import copy
import csv
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kills
import speed
from in_parts import at_least, below, finding, main

import train
from engine.config import DEFAULTS, PRESETS, describe_models
from engine.distributed import compute_gradient
from engine.randomness import image_generators
from extras.inception import InceptionV3, fold_batch_norm
from extras.cost import chip_of, estimate
from extras.vqgan_losses import LPIPS
from losses import NOISE_ARGS, sample_noise
from sample import sample_tokens
from schedule import ShiftedCosine
from vqvae import VQVAE, tokenizer_step

HERE = Path(__file__).resolve().parent


def config_of(here, preset, **changed):
    """A preset, or on a CPU the built-in set's."""
    return DEFAULTS | PRESETS["toy" if here.tiny else preset] | changed


# ----------------------------------------------------------------------------
# What it computes.

def machine(here):
    chip = chip_of(here.device)
    yield finding("device", here.name)
    yield finding("torch, CUDA, Python", f"{torch.__version__}, {torch.version.cuda}, {sys.version.split()[0]}")
    yield finding("memory", "?" if chip.memory is None else f"{chip.memory / 2 ** 30:.1f} GiB")
    yield finding("bfloat16 is used", chip.bf16, f"{not here.tiny}", chip.bf16 == (not here.tiny))
    if not here.tiny:
        yield finding("GPUs, NCCL", f"{torch.cuda.device_count()}, {torch.distributed.is_nccl_available()}")
    product, flops = speed.matrix_rate(SimpleNamespace(device=here.device, model=SimpleNamespace(bf16=chip.bf16)))
    (seconds, _), = speed.measure({"product": product}, here.device, 5, 5).values()
    yield at_least(f"rate of a large matrix product, of the {chip.flops / 1e12:.3g} TFLOP/s that the price counts with",
                   flops / seconds / chip.flops, 0.5)


def features(here):
    """Inception with random weights: a GPU must not round to TF32."""
    torch.manual_seed(0)
    network = fold_batch_norm(InceptionV3())
    images = torch.randint(256, (2 if here.tiny else 16, 3, 64, 64), dtype=torch.uint8)
    expected = network(images)
    if here.tiny:
        parts = [network(image[None]) for image in images]
        found = {tap: torch.cat([part[tap] for part in parts]) for tap in expected}
    else:
        found = network.to(here.device)(images)
    for tap in ("64", "2048", "spatial", "logits_unbiased"):
        difference = (found[tap].cpu() - expected[tap]).double().norm() / expected[tap].double().norm()
        yield below(f"features {tap}: relative difference to the CPU", float(difference), 1e-4)


def tokens(here):
    """A tokenizer of preset 256 with random weights and codes that k-means found."""
    config = config_of(here, "256")
    torch.manual_seed(0)
    model = VQVAE(**describe_models(config, 0)["tokenizer"])
    images = torch.randint(256, (64 if here.tiny else 16, 3, *[config["size"] // 8] * 2), dtype=torch.uint8)
    images = torch.nn.functional.interpolate(images.float(), [config["size"]] * 2, mode="bilinear").to(torch.uint8)
    model.train()(images, torch.Generator().manual_seed(0))
    expected = model.eval().encode(images)
    for bf16, least in (False, 0.98), (True, 0.8):
        other = copy.deepcopy(model).to(here.device)
        other.bf16 = bf16
        same = (other.encode(images.to(here.device)).cpu() == expected).double().mean()
        yield at_least(f"tokens equal to the CPU's, {'bfloat16' if bf16 else 'float32 (TF32)'}", float(same), least)


# ----------------------------------------------------------------------------
# Memory and time.

def steps_of_both(here, config):
    """(a step of the tokenizer, a step of the denoiser), from train.py's own parts, on random images and tokens."""
    run = SimpleNamespace(seed=0, config=config, models=describe_models(config, 10), device=here.device, init={},
                          tokenizer_is_published=False)
    bf16 = train.bf16_works(here.device)
    torch.manual_seed(0)

    def tokenizer():
        parts, lpips = train.build_tokenizer(run, None), LPIPS().to(here.device) if config["perceptual"] else None
        images = torch.randint(256, (config["tokenizer_batch"], 3, config["size"], config["size"]), dtype=torch.uint8,
                               device=here.device)
        return lambda: tokenizer_step(config, parts, images, torch.Generator().manual_seed(0), 1.0, 1e-4, 1e-4, lpips)

    def diffusion():
        codebook = SimpleNamespace(codebook=torch.randn(config["K"], config["code_dim"]))
        model, ema, optimizer = train.build_denoiser(run, codebook, None)
        loss_of = train.build_loss(config, model, ema, ShiftedCosine(**run.models["schedule"]))
        x = torch.randint(config["K"], (config["batch"], model.N), device=here.device)
        generator, options = torch.Generator(here.device), {name: config[name] for name in NOISE_ARGS}

        def step():
            noisy = sample_noise(model, x, x[:, 0] % 10, generator, **options)
            compute_gradient(model.train(), loss_of, noisy, config["micro_batch"])
            train.update(model, ema, optimizer, 1.0, 0.999)
        assert model.bf16 == bf16
        return step

    return {"tokenizer": tokenizer, "diffusion": diffusion}


def memory(here):
    """The peak of every preset's steps, its images at a time chosen by the price, beside that price."""
    chip, seen = chip_of(here.device), []
    for preset in ["32-cpu"] if here.tiny else [name for name in PRESETS if name not in ("toy", "32-cpu")]:
        config = DEFAULTS | PRESETS[preset]
        models = describe_models(config, 10)
        sizes = [models[part] for part in ("tokenizer", "denoiser")] + [config["batch"], config["tokenizer_batch"]]
        if sizes in seen:
            continue
        seen.append(sizes)
        price = estimate(config, models, (50000, 2000), chip)
        config = config | {"micro_batch": price.micro_batch}
        for stage, build in steps_of_both(here, config).items():
            if here.tiny and stage == "tokenizer":
                continue  # the largest memory of a process never falls again: one stage is measured, the larger
            before, where = held(here), f"{preset}, {stage}: GiB at peak"
            if not price.fits[stage]:
                yield finding(where, "", f"{price.stages[stage].total / 2 ** 30:.2f}: does not fit, not tried")
                continue
            step = build()
            for _ in range(3):
                step()
            peak, counted = held(here, True) - before, price.stages[stage].total
            yield finding(where, f"{peak / 2 ** 30:.3f}", f"{counted / 2 ** 30:.3f}, within 15 %",
                          abs(peak / counted - 1) < 0.15)
            start = time.perf_counter()
            step()
            held(here)  # waits for the GPU
            ratio = (time.perf_counter() - start) / price.stages[stage].seconds
            yield finding(f"{preset}, {stage}: time of a step, of that in the price", f"{ratio:.2f}", "0.5 to 2",
                          0.5 <= ratio <= 2)
            del step


def held(here, peak=False):
    """Bytes that are allocated now, or were at most since the last call; on a CPU by this process at most."""
    if here.tiny:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def runs(way):
    """None, or in one line why it does not."""
    try:
        way()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"


def quickly(here, ways):
    """({name: seconds}, {name: why it does not run})."""
    wrong = {name: problem for name, way in ways.items() if (problem := runs(way))}
    found = speed.measure({name: way for name, way in ways.items() if name not in wrong}, here.device, *(
        (1, 1) if here.tiny else (3, 5)))
    return {name: seconds for name, (seconds, _) in found.items()}, wrong


def step_times(here):
    """speed.py's measures, one after the other switched on, at preset 256 with 32 images."""
    setup, settings, ways = speed.prepare(config_of(here, "256", batch=8 if here.tiny else 32), here.device), {}, {}
    for name, change in {
            "float32, attention written out": dict(fused=False, bf16=False, attention=SDPBackend.MATH),
            "+ flash attention": {"attention": None}, "+ bfloat16": {"bf16": True}, "+ fused AdamW": {"fused": True},
            "+ torch.compile": {"compiled": True}, "+ CUDA graphs": {"compiled": "reduce-overhead"}}.items():
        settings |= change
        if here.tiny and "compiled" in change:
            continue  # a compiler would take longer than all else
        ways[name] = speed.training_step(setup, **settings)
    found, wrong = quickly(here, ways)
    peak = chip_of(here.device).flops
    flops = speed.forward_flops(setup.model) * (4 - setup.config["rec_fraction"]) * setup.config["batch"]
    before = None
    for name in ways:
        if name in wrong:
            yield finding(name, wrong[name], "it runs", False)
            continue
        what, value = f"{name}: seconds, model FLOP utilisation", f"{found[name]:.4f}, {flops / found[name] / peak:.0%}"
        yield finding(what, value) if here.tiny or not before else finding(
            what, value, f"at most {1.05 * before:.4f}", found[name] <= 1.05 * before)
        before = found[name]
    if not here.tiny:
        yield at_least("model FLOP utilisation of the fastest, of the rate that the price counts with",
                       flops / min(found.values()) / peak, 0.4)


def sampling(here):
    """50 steps with guidance: two calls each; and the decoder."""
    config, steps = config_of(here, "256", batch=4 if here.tiny else 64), 4 if here.tiny else 50
    setup = speed.prepare(config, here.device)
    decoder = VQVAE(**describe_models(config, 0)["tokenizer"], bf16=setup.model.bf16).to(here.device).eval()
    fast, generators = copy.copy(setup.model.eval()), image_generators(0, range(config["batch"]))
    fast.guided = torch.compile(fast.guided, mode="reduce-overhead", dynamic=False)
    ways = {name: lambda model=model: decoder.decode(sample_tokens(
        model, setup.schedule, setup.labels, generators, steps, 1.0, "ancestral"))
        for name, model in {"as it is": setup.model, "compiled, CUDA graphs": fast}.items()
        if not here.tiny or model is not fast}
    found, wrong = quickly(here, ways)
    for name in ways:
        yield finding(f"images/s, {steps} steps, guided, {name}", wrong[name], "it runs", False) if name in wrong else (
            finding(f"images/s, {steps} steps, guided, {name}", f"{config['batch'] / found[name]:.3g}"))


# ----------------------------------------------------------------------------
# Whole runs of train.py.

PROGRAM = f"""import os, sys
sys.path.insert(0, {str(HERE.parent)!r})
import train
if "BF16" in os.environ:
    train.bf16_works = lambda device: os.environ["BF16"] == "1"
train.main()
"""


def start(here, words, processes=1, **environment):
    """train.py, as torchrun starts it if need be; its --out is here. RuntimeError with its last line if it fails."""
    (here.out / "program.py").write_text(PROGRAM)
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    command = [sys.executable, *how, here.out / "program.py", "--device", here.device.type, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "rror" in line] or [done.stderr.strip()[-200:]]
        raise RuntimeError(f"train.py {' '.join(map(str, words))}: {errors[0]}")


def tokenizer_of(here):
    """A short tokenizer of the built-in set, for the denoisers of several parts -> its file."""
    out = here.out / "tokenizer"
    start(here, ["--data", "toy", "--preset", "toy", "--stage", "tokenizer", "--out", out, "--tokenizer-steps",
                 300 if here.tiny else 2000])
    return out / "tokenizer.pt"


def difference(a, b, part="model"):
    """The largest of |a - b| over all weights in two runs' checkpoints."""
    a, b = (torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)[part] for out in (a, b))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def precision(here):
    """300 steps of the built-in set, 500 on a GPU: bfloat16 ends as float32 does, and the samples show their class."""
    tokenizer, ends, steps = tokenizer_of(here), {}, 300 if here.tiny else 500
    for name, bf16, seed in ("float32", "0", 0), ("float32, another seed", "0", 1), ("bfloat16", "1", 0):
        out = here.out / f"precision-{bf16}-{seed}"
        start(here, ["--data", "toy", "--preset", "toy", "--tokenizer", tokenizer, "--steps", steps, "--seed", seed,
                     "--out", out, "--sample-every", steps, "--log-every", 10], BF16=bf16)
        with (out / "diffusion.csv").open() as file:
            losses = [float(row[name]) for row in csv.DictReader(file) for name in ("rec", "diff", "cm", "norm")]
        ends[name] = json.loads((out / "metrics.json").read_text())["vlb"]
        yield finding(f"{name}: bits per token after {steps} steps; all losses finite", f"{ends[name]['total']:.4f} ± "
                      f"{ends[name]['standard_error']:.4f}", "finite", all(map(math.isfinite, losses)))
    single, other, half = (end["total"] for end in ends.values())
    yield below("bfloat16 against float32, of the distance of two seeds", abs(half - single) / abs(other - single), 1)
    shown = {}
    for name, bf16 in ("float32", "0"), ("bfloat16", "1"):
        checkpoint = here.out / f"precision-{bf16}-0" / "ckpt.pt"
        done = subprocess.run([sys.executable, HERE / "agreement.py", checkpoint, "--n", "240", "--guidance", "1",
                               "--classifier-steps", "100" if here.tiny else "600", "--device", here.device.type],
                              capture_output=True, text=True, check=True)
        words = [line.split() for line in done.stdout.splitlines() if line and not line.startswith(" ")]
        shown[name] = {line[0]: float(next(word for word in line if word.endswith("%"))[:-1]) / 100 for line in words}
        yield finding(f"agreement of a classifier with held-out images, reconstructions, samples in {name}",
                      ", ".join(f"{share:.0%}" for share in shown[name].values()))
    yield below("agreement with samples: bfloat16 against float32",
                abs(shown["float32"]["samples"] - shown["bfloat16"]["samples"]), 0.1)


def resume(here):
    """A small run, killed once and continued, beside two that nobody disturbed."""
    words = [*kills.WORDS[:-1], here.device.type]
    calm, again, killed = (here.out / f"resume-{name}" for name in ("calm", "again", "killed"))
    seconds = kills.start([*words, "--out", calm])
    kills.start([*words, "--out", again])
    kills.start([*words, "--out", killed], seconds / 2)
    kills.start([*words, "--out", killed])
    itself, other = difference(calm, again), difference(calm, killed)
    yield finding("the same command twice: largest difference of a weight", f"{itself:.3g}", "0", itself == 0)
    yield finding("killed and continued: largest difference of a weight", f"{other:.3g}", "as for the same twice",
                  other == 0 or other <= 10 * itself)


def processes(here):
    """Several processes against one, in float32: 20 steps, batch 64. NCCL on GPUs, gloo on a CPU."""
    tokenizer, limit = tokenizer_of(here), 1e-5 if here.device.type == "cpu" else 1e-4
    words = ["--preset", "toy", "--tokenizer", tokenizer, "--steps", 20, "--sample-every", 20]
    one = here.out / "processes-1"
    start(here, ["--data", "toy", *words, "--out", one], BF16="0")
    for world in here.processes:
        if here.device.type == "cuda" and world > torch.cuda.device_count():
            yield finding(f"{world} processes", "not run: not so many GPUs")
            continue
        for name, more in {"DDP": [], "DDP, passes": ["--micro-batch", 4], "FSDP": ["--fsdp"],
                           "FSDP, passes": ["--fsdp", "--micro-batch", 4]}.items():
            out = here.out / f"processes-{world}-{name.replace(', ', '-')}"
            data = "toy" if name == "DDP" else one / "tokens.npy"
            start(here, ["--data", data, *words, *more, "--out", out], world, BF16="0")
            yield below(f"{world} processes, {name}: largest difference of a weight after 20 steps",
                        difference(one, out), limit)
            if name == "DDP":
                same = (out / "tokens.npy").read_bytes() == (one / "tokens.npy").read_bytes()
                yield finding(f"{world} processes: tokens are those of one, bit for bit", same, "True", same)


PARTS = {part.__name__: part for part in (machine, features, tokens, memory, step_times, sampling, precision, resume,
                                          processes)}

if __name__ == "__main__":
    main("The first hour on", PARTS, "Is everything on this GPU as it was predicted without one?")
