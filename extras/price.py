"""The price of a run before it is paid: memory, floating-point operations, hours, disk, the first picture; and how many
images at a time fit the memory there is. Called by engine/prepare.py and extras/sample_command.py.

    python train.py --data FOLDER --dry-run --for 4090      one run, in full
    python -m extras.price --for 4090                       a line for each preset

Nothing is imitated: the training steps, the bound and the sampler are those of this repository, on the device "meta"
(extras/meta_count.py). Reading images is not counted.
"""

import argparse
import math
from types import SimpleNamespace

import torch

from embedding_diffusion import EmbeddingDiffusion
from engine.build import make_tokenizer
from engine.config import DEFAULTS, PRESETS, describe_models
from engine.randomness import image_generators
from extras.meta_count import CHIPS, GB, KINDS, SHARE, Count, FusedAdamW, GiB, chip_of, fits
from extras.tokenizer_metrics import ssim
from extras.vqgan_losses import LPIPS, make_discriminator
from losses import LOSS_ARGS, NOISE_ARGS, sample_noise, training_loss, vlb
from sample import COLUMNS, sample_tokens
from schedule import ShiftedCosine
from vqvae import tokenizer_step

META = torch.device("meta")
PASSES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # into which a batch may be split


# ----------------------------------------------------------------------------
# The stages: as train.py runs them.

def blank(*shape, dtype=torch.int64):
    return torch.zeros(*shape, dtype=dtype, device=META)


def count_tokenizer(config, models, chip, batch):
    """A late step of stage 1, when the discriminator is at work."""
    with Count(chip) as count:
        with META:
            parts = {"tokenizer": make_tokenizer(models["tokenizer"], chip.bf16)}
            if config["gan"]:
                parts["discriminator"] = make_discriminator(config, chip.bf16)
            lpips = LPIPS() if config["perceptual"] else None
            images = blank(batch, 3, config["size"], config["size"], dtype=torch.uint8)
        if lpips:
            count.mark("weights", [*lpips.parameters(), *lpips.buffers()])
        parts["tokenizer"].quantizer.started = True
        for name in list(parts):
            optimizer = parts[{"tokenizer": "optimizer"}.get(name, "discriminator_optimizer")] = FusedAdamW(
                count, parts[name])
            for p in optimizer.parameters:  # of the step before
                p.grad = torch.zeros_like(p)
            count.mark("gradients", [p.grad for p in optimizer.parameters])
        count.start()
        tokenizer_step(config, parts, images, None, 1.0, 1e-3, 1e-3, lpips)
    return count.result()


def count_diffusion(config, models, chip, batch, passes=1):
    """A step of stage 3 for `batch` images, in that many passes. (Two stand for all: the third is as the second.)"""
    with Count(chip) as count:
        with META:
            model, ema = (EmbeddingDiffusion(**models["denoiser"], bf16=chip.bf16,
                                             recompute=config["activation_checkpointing"]) for _ in range(2))
        ema.requires_grad_(False)
        optimizer = FusedAdamW(count, model.train())
        count.mark("EMA", ema.parameters())
        weights = {name: config[name] for name in LOSS_ARGS}
        options = {name: config[name] for name in NOISE_ARGS}
        images, done = max(2, -(-batch // passes)), min(passes, 2)
        count.start()
        noisy = sample_noise(model, blank(images, model.N), blank(images), None, **options)
        for _ in range(done):
            loss, _ = training_loss(model, ema if config["teacher"] == "ema" else model,
                                    ShiftedCosine(**models["schedule"]), *noisy, **weights)
            with count.autocast("meta", enabled=chip.bf16):  # blocks that are computed again
                loss.backward()
            del loss
        result = count.result(done / passes)
        optimizer.step()
    return result


def count_untrained(config, models, chip, images):
    """{encoding, bound, sampling, ...: that many images at a time, without what else is there}, "largest" of them, and
    "parts": tokenizer and denoiser."""
    results, schedule = {}, ShiftedCosine(**models["schedule"])
    with Count(chip) as count, torch.no_grad():
        with META:
            tokenizer = make_tokenizer(models["tokenizer"], chip.bf16).eval()
            model = EmbeddingDiffusion(**models["denoiser"], bf16=chip.bf16).eval()
        count.mark("weights", [*tokenizer.parameters(), *tokenizer.buffers(), *model.parameters()])
        x, labels = blank(images, model.N), blank(images)
        pixels = blank(images, 3, tokenizer.size, tokenizer.size, dtype=torch.uint8)
        for name, work in (("encoding", lambda: tokenizer.encode(pixels)), ("decoding", lambda: tokenizer.decode(x)),
                           ("comparing", lambda: ssim(pixels, pixels)),
                           ("bound", lambda: vlb(model, schedule, x, labels, None)),
                           ("sampling", lambda: sample_tokens(model, schedule, labels, image_generators(
                               0, range(images)), 2, config["guidance"], config["sampler"]))):
            count.start()
            work()
            results[name] = count.result(2 if name == "sampling" else 1)
            results[name].total -= results[name].peak["weights"]
    return results | {"largest": max(results.values(), key=lambda part: part.total), "parts": (tokenizer, model)}


def estimate(config, models, counts, chip, world=1, trains_tokenizer=True):
    """What a run costs on `world` chips, and the images at a time for which it fits each of them.

    models: of engine.config.describe_models; counts: (training, held-out) images. -> a namespace: micro_batch and
    eval_batch (what was asked for, or as many images as fit), stages {name: what Count.result gives}, hours {name: of
    the whole run}, what report() prints, and fits {name: does it, by the count?}.
    """
    (n_train, n_test), per, asked = counts, config["batch"] // world, config["micro_batch"]
    stages = {"tokenizer": count_tokenizer(config, models, chip, config["tokenizer_batch"] // world)
              } if trains_tokenizer else {}
    rows = n_train * (1 + config["flip"]) + n_test
    beside = (rows - n_test) * (2 * math.prod(models["denoiser"]["grid"]) + 8)  # tokens and labels lie on the device
    for passes in [-(-per // asked)] if asked else [n for n in PASSES if n == 1 or 2 * n <= per]:
        stages["diffusion"] = share_out(count_diffusion(config, models, chip, per, passes), world, config["fsdp"])
        stages["diffusion"].peak["weights"] += beside
        stages["diffusion"].total += beside
        if fits(chip, stages["diffusion"].total):
            break
    resident = max(sum(stage.peak[kind] for kind in KINDS[:4]) for stage in stages.values())
    eval_batch, untrained = 2 * config["eval_batch"], None
    while untrained is None or (eval_batch > 1 and not fits(chip, resident + untrained["largest"].total)):
        eval_batch = -(-eval_batch // 2)
        untrained = count_untrained(config, models, chip, eval_batch)
    largest = stages["untrained"] = untrained.pop("largest")
    largest.peak = dict.fromkeys(KINDS, 0) | {"weights": resident, "temporary": largest.total}
    largest.total += resident

    def hours(name, images):
        return untrained[name].seconds * images / eval_batch / 3600

    evaluations = 1 + config["steps"] // config["sample_every"]
    pictures = COLUMNS * min(models["denoiser"]["num_classes"] or COLUMNS, 16)
    once = (hours("bound", max(1000, min(n_test, 2000))) + hours("sampling", pictures) * config["sample_steps"]) / world
    work = {"tokens": hours("encoding", rows) / world,
            "diffusion": stages["diffusion"].seconds * config["steps"] / 3600, "evaluation": once * evaluations}
    if trains_tokenizer:
        work = {"tokenizer": stages["tokenizer"].seconds * config["tokenizer_steps"] / 3600} | work
    share = min(1, config["sample_every"] / config["steps"])
    first = work.get("tokenizer", 0) + work["tokens"] + 2 * once + share * work["diffusion"]
    flops = {"diffusion": stages["diffusion"].flops * world}
    if trains_tokenizer:
        flops = {"tokenizer": stages["tokenizer"].flops * world} | flops
    steps = {"tokenizer": config["tokenizer_steps"], "diffusion": config["steps"]}
    sizes = [sum(p.nbytes for p in part.parameters()) for part in untrained.pop("parts")]
    return SimpleNamespace(
        chip=chip, world=world, stages=stages, hours=work, first=first, flops=flops, steps=steps,
        micro_batch=asked or (-(-per // passes) if passes > 1 else 0), eval_batch=eval_batch,
        passes={"tokenizer": config["tokenizer_steps"] * config["tokenizer_batch"] / n_train,
                "diffusion": config["steps"] * config["batch"] / n_train},
        disk={"tokens": rows * (2 * models["denoiser"]["grid"][0] ** 2 + 5),
              "checkpoints": 3 * (sizes[0] + 4 * sizes[1]) + 2 * sum(sizes) + 9 * sizes[0]},
        fits={name: fits(chip, stage.total) for name, stage in stages.items()})


def fitting_batch(pipeline, most):
    """Images that sample.py draws at a time: `most` of them, or half, a quarter ... where the memory is short."""
    chip, models, images = chip_of(pipeline.device, None), pipeline.config, most
    while images > 1 and not fits(chip, count_untrained(DEFAULTS, models, chip, images)["sampling"].total + sum(
            p.nbytes for p in [*pipeline.model.parameters(), *pipeline.tokenizer.parameters()])):
        images = -(-images // 2)
    return images


def share_out(result, world, fsdp):
    """The peak of one process of many: with the buckets where gradients stay, or with its share of what FSDP splits."""
    for kind in KINDS[:4] if fsdp else ():
        result.peak[kind] /= world
    if world > 1 and not fsdp:
        result.peak["temporary"] += result.peak["weights"]
    result.total = sum(result.peak.values())
    return result


# ----------------------------------------------------------------------------
# In words.

def in_words(hours):
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.2g} min"


def summary(found):
    """One line, before the training."""
    name = max(found.stages, key=lambda name: found.stages[name].total)
    micro = f", the batch in passes of {found.micro_batch} images" if found.micro_batch else ""
    return (f"price, by counting: {found.stages[name].total / GiB:.2g} GiB at most ({name}){micro}; about "
            f"{in_words(sum(found.hours.values()))} at {SHARE:.0%} of the rates of {found.chip.name}, the first "
            f"generated picture after {in_words(found.first)} (--dry-run: in full)")


def report(found):
    """Many lines, for --dry-run."""
    chip, memory = found.chip, "" if found.chip.memory is None else f"{found.chip.memory / GiB:.1f} GiB, "
    yield (f"price on {found.world} x {chip.name} ({memory}{chip.flops / 1e12:.3g} TFLOP/s, {chip.bytes / GB:.4g} GB/s"
           f"), by counting; times are at {SHARE:.0%} of these rates, without reading images")
    yield "  GiB at peak      all  " + "  ".join(f"{kind:>9}" for kind in KINDS)
    for name, stage in found.stages.items():
        yield f"  {name:<10} {stage.total / GiB:>9.3f}  " + "  ".join(
            f"{stage.peak[kind] / GiB:>9.3f}" for kind in KINDS) + ("" if found.fits[name] else "  does not fit")
    yield f"  (untrained: {found.eval_batch} images at a time are encoded, evaluated or drawn)"
    for name, hours in found.hours.items():
        steps, flops = found.steps.get(name), found.flops.get(name)
        words = f"  {name:<10} {in_words(hours):>9}"
        if flops is not None:
            words += f": {steps:,} steps of {flops:.2g} FLOP = {steps * flops:.2g}; {found.passes[name]:,.0f} passes"
        yield words
    yield f"  in all {in_words(sum(found.hours.values()))}, the first generated picture after {in_words(found.first)}"
    yield "  disk: " + ", ".join(f"{name} {size / GB:.2g} GB" for name, size in found.disk.items()) + " at most"


def advice(found, config, models):
    """What to do about a stage that does not fit. The tokenizer's batch is never split: its codebook moves, and dead
    codes restart, by the vectors of the whole batch, and the discriminator's weight is the quotient of two gradients of
    the whole batch, which is not known before the last part. With several GPUs each has its share of it."""
    if not found.fits.get("tokenizer", True):
        batch = config["tokenizer_batch"] // found.world
        while batch > 1 and not fits(found.chip, count_tokenizer(config, models, found.chip, batch).total):
            batch //= 2
        yield ("the tokenizer's batch does not fit this memory, by the count. What does: --tokenizer-batch "
               f"{batch * found.world}, which changes the result, or more GPUs (torchrun), which do not")
    if not found.fits["diffusion"]:
        per = config["batch"] // found.world
        for option in ({}, {"activation_checkpointing": True}):
            for passes in [n for n in PASSES if n == 1 or 2 * n <= per]:
                if fits(found.chip, count_diffusion(config | option, models, found.chip, per, passes).total):
                    yield ("the denoiser's batch does not fit this memory, by the count; what does: --micro-batch "
                           f"{-(-per // passes)}{' --activation-checkpointing' * bool(option)}")
                    return
        yield "the denoiser does not fit this memory, by the count, in passes of any size: a smaller --width"


def main():
    """A table for a README: every preset."""
    parser = argparse.ArgumentParser(description="The price of every preset, by counting; needs no data.")
    parser.add_argument("--for", dest="chip", choices=[*CHIPS], default="4090", help="default: 4090")
    chip = chip_of(None, parser.parse_args().chip)
    print(f"| preset | GiB: tokenizer | denoiser | untrained, of images | fits {chip.memory / GiB:.1f} GiB | a pass "
          "| hours: tokenizer | denoiser |\n|" + "---|" * 8)
    for preset, options in PRESETS.items():
        config = DEFAULTS | options
        classes = {"imagenet": 1000, "cifar10": 10, "mnist": 10, "fashion-mnist": 10, "toy": 12}.get(preset, 0)
        found = estimate(config, describe_models(config, classes), (100000, 2000), chip)
        hours = [float(f"{found.hours[name]:.2g}") for name in ("tokenizer", "diffusion")]
        GiBs = [f"{found.stages[name].total / GiB:.1f}" for name in ("tokenizer", "diffusion", "untrained")]
        print(f"| `{preset}` | {GiBs[0]} | {GiBs[1]} | {GiBs[2]}, {found.eval_batch} | "
              f"{'yes' if all(found.fits.values()) else 'no'} | {found.micro_batch or config['batch']} of "
              f"{config['batch']} | {hours[0]:g} | {hours[1]:g} |", flush=True)


if __name__ == "__main__":
    main()
