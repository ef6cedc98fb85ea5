"""The cost of a run before it starts: memory, operations, hours, disk; and how many images at a time fit.

    python train.py --data FOLDER --dry-run --for 4090      one run, in full
    python -m extras.cost 4090                              a line for each preset

Training steps and sampling are counted (extras/meta_count.py), reading images and evaluations are not.
"""

import math
import sys
from types import SimpleNamespace

import torch

from embedding_diffusion import EmbeddingDiffusion
from engine.build import make_tokenizer
from engine.config import DEFAULTS, PRESETS, describe_models
from extras.meta_count import GiB, Stage, autocast, chip_of, fits
from extras.vqgan_losses import LPIPS, hinge_loss, make_discriminator, tokenizer_loss
from losses import LOSS_ARGS, NOISE_ARGS, sample_noise, training_loss
from sample import sample_tokens
from schedule import ShiftedCosine

UTILISATION = 0.3  # share of a chip's peak which a run is assumed to reach


def count_tokenizer(config, models, chip, images):
    """A late step of stage 1, when the discriminator is at work."""
    def build():
        tokenizer = make_tokenizer(models["tokenizer"], chip.bf16)
        tokenizer.quantizer.eval()  # moving the codes costs little, and the processes would meet for it
        discriminator = make_discriminator(config, chip.bf16) if config["gan"] else None
        lpips = LPIPS() if config["perceptual"] else None
        pixels = torch.zeros(images, 3, config["size"], config["size"], dtype=torch.uint8)

        def step():
            outputs = tokenizer(pixels)
            loss, _ = tokenizer_loss(config, tokenizer, discriminator, outputs, 1.0, lpips)
            loss.backward()
            if discriminator:
                discriminator.requires_grad_(True)
                real, fake = discriminator(outputs["x"]), discriminator(outputs["x_hat"].detach())
                hinge_loss(real, fake).backward()
        return [tokenizer, discriminator] if discriminator else [tokenizer], step
    return Stage(build, images)


def count_diffusion(config, models, chip, images):
    def build():
        model, ema = (EmbeddingDiffusion(**models["denoiser"], bf16=chip.bf16,
                                         recompute=config["activation_checkpointing"]) for _ in range(2))
        x = torch.zeros(images, model.N, dtype=torch.int64)

        def step():
            noisy = sample_noise(model, x, x[:, 0], None, **{name: config[name] for name in NOISE_ARGS})
            loss, _ = training_loss(model, ema.requires_grad_(False), ShiftedCosine(**models["schedule"]),
                                    *noisy, **{name: config[name] for name in LOSS_ARGS})
            with autocast("meta", enabled=chip.bf16):  # for blocks that are computed again
                loss.backward()
        return [model], step
    return Stage(build, images, ema=True)


@torch.no_grad()
def count_untrained(config, models, chip, images=8):
    """(encoding, two steps of sampling)."""
    def encode():
        tokenizer = make_tokenizer(models["tokenizer"], chip.bf16)
        pixels = torch.zeros(images, 3, tokenizer.size, tokenizer.size, dtype=torch.uint8)
        return [tokenizer], lambda: tokenizer.encode(pixels)

    def sample():
        model = EmbeddingDiffusion(**models["denoiser"], bf16=chip.bf16)
        labels = torch.zeros(images, dtype=torch.int64)
        generators = [torch.Generator() for _ in range(images)]
        return [model], lambda: sample_tokens(model, ShiftedCosine(**models["schedule"]), labels, generators,
                                              2, config["guidance"], config["sampler"])
    return Stage(encode, images, trained=False), Stage(sample, images, trained=False)


def fitting_batch(pipeline, most):
    """Images that sample.py draws at a time: `most`, or as many as fit."""
    chip = chip_of(pipeline.device)
    return count_untrained(DEFAULTS, pipeline.config, chip)[1].fit(chip, most).images


def estimate(config, models, counts, chip, world=1, trains_tokenizer=True):
    """The cost of a run on `world` chips, a namespace. counts: (training, held-out) images."""
    encoding, sampling = count_untrained(config, models, chip)
    diffusion = count_diffusion(config, models, chip, config["batch"] // world)
    rows = counts[0] * (1 + config["flip"])  # of training tokens
    row_bytes = 2 * math.prod(models["denoiser"]["grid"]) + 8
    diffusion.peak["weights"] += rows * row_bytes  # all tokens and labels lie on the device
    stages, fitting, flops = {}, {}, {}
    if trains_tokenizer:
        stage = count_tokenizer(config, models, chip, config["tokenizer_batch"] // world)
        stages["tokenizer"] = stage
        fitting["tokenizer"] = stage.fit(chip, stage.images).images * world
        flops["tokenizer"] = config["tokenizer_steps"] * stage.flops * world
    fitting["diffusion"] = diffusion.fit(chip, diffusion.images, least=2).images
    stages["diffusion"] = diffusion.at(min(config["micro_batch"] or fitting["diffusion"], diffusion.images))
    untrained = max(encoding, sampling, key=lambda stage: stage.peak["activations"])
    untrained.peak["weights"] = max(stage.total - stage.peak["activations"] for stage in stages.values())
    stages["untrained"] = untrained.fit(chip, config["eval_batch"])
    flops["tokens"] = encoding.flops / encoding.images * (rows + counts[1])
    flops["diffusion"] = config["steps"] * diffusion.flops * world
    hours = {name: value / (world * chip.flops * UTILISATION * 3600) for name, value in flops.items()}
    return SimpleNamespace(
        chip=chip, world=world, stages=stages, fitting=fitting, flops=flops, hours=hours,
        first=sum(hours.values()) - hours["diffusion"] * max(0, 1 - config["sample_every"] / config["steps"]),
        micro_batch=config["micro_batch"] or fitting["diffusion"] % diffusion.images,
        eval_batch=stages["untrained"].images,
        fits={name: fits(chip, stage.total) for name, stage in stages.items()},
        disk=(rows + counts[1]) * row_bytes + 14 * (encoding.size + diffusion.size))


def in_words(hours):
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.2g} min"


def report(cost, full):
    """Lines: of --dry-run all figures, what to expect, what to do about a stage that does not fit."""
    if full:
        yield (f"cost on {cost.world} x {cost.chip.name} ({cost.chip.memory / GiB:.1f} GiB, "
               f"{cost.chip.flops / 1e12:.3g} TFLOP/s), by counting")
        for name, stage in cost.stages.items():
            kinds = ", ".join(f"{kind} {size / GiB:.3f}" for kind, size in stage.peak.items() if size)
            yield (f"  {name:<10} {stage.total / GiB:>8.3f} GiB at peak, {stage.images} images at a time: "
                   f"{kinds}" + ("" if cost.fits[name] else "; does not fit"))
        for name, hours in cost.hours.items():
            yield f"  {name:<10} {in_words(hours):>8}: {cost.flops[name]:.2g} FLOP"
        yield f"  disk: {cost.disk / 1e9:.2g} GB at most"
    name = max(cost.stages, key=lambda name: cost.stages[name].total)
    passes = f", the batch in passes of {cost.micro_batch} images" if cost.micro_batch else ""
    yield (f"cost, by counting: {cost.stages[name].total / GiB:.2g} GiB at most ({name}){passes}; about "
           f"{in_words(sum(cost.hours.values()))} at {UTILISATION:.0%} of the peak of {cost.chip.name}, "
           f"the first generated picture after {in_words(cost.first)}")
    if not cost.fits.get("tokenizer", True):  # its codebook and discriminator need the whole batch at once
        yield ("the tokenizer's batch does not fit the memory. What may: more GPUs, or --tokenizer-batch "
               f"{cost.fitting['tokenizer']}, which changes the result")
    if not cost.fits["diffusion"]:
        yield ("the denoiser does not fit the memory. What may: --activation-checkpointing, a smaller "
               f"--width, or --micro-batch {cost.fitting['diffusion']}")


if __name__ == "__main__":
    for preset, options in PRESETS.items():
        config, chip = DEFAULTS | options, chip_of(None, sys.argv[1])
        costs = estimate(config, describe_models(config, 10), (100000, 2000), chip)
        print(f"{preset:<14}", *report(costs, full=False))
