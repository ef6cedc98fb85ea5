"""Train VQ-LCMD from images to samples with one command; the same command again continues an interrupted run.

    python train.py                          the built-in set, minutes on two CPU cores
    python train.py --data FOLDER            your own images; a preset is chosen by their size and your device
    python train.py --data ffhq --root DIR   a published set by its name; how to get it if it is not there
    torchrun --nproc-per-node 8 train.py --data FOLDER      on 8 GPUs, with the same result

Three stages in one run directory (--out), whose page, index.html, follows them:

    (before)    what was found                      data.png, skipped.txt: images that cannot be used
    tokenizer   images -> VQ-VAE                    tokenizer.pt, reconstructions_*.png, tokenizer.csv
    tokens      every image encoded once            tokens.npy, one memory-mapped array
    diffusion   tokens -> embeddings and denoiser   ckpt.pt, best.pt, samples_*.png, diffusion.csv

Every random draw comes from (seed, stage, step): an interrupted run continues exactly, and many GPUs compute
what one would. The options are in engine/config.py; what happens before the first step is in extras/setup.py.
"""

import contextlib
import copy
import functools
import math

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

import losses
from data import image_batches
from embedding_diffusion import EmbeddingDiffusion
from engine import budget, checkpoint, process, status
from engine.build import load_tokenizer, make_pipeline, make_tokenizer, restore
from engine.config import parse_arguments
from engine.distributed import all_reduce_sum, bf16_works, data_parallel, init_distributed, rank_and_world
from engine.randomness import STAGES, batch_indices, generator_for, seed_for
from engine.tokens import random_tokens, read_tokens
from extras import fid_sources, pictures, run_page, setup
from extras.datasets import DATASETS
from extras.vqgan_losses import build_discriminator, discriminator_step, tokenizer_loss
from sample import COLUMNS, default_labels, sample_together
from schedule import ShiftedCosine
from vqvae import evaluate_tokenizer

RESTART_EVERY = 50  # steps of the tokenizer, after which codes that are no longer used restart
DRAWS, FINAL_DRAWS = 1000, 10000  # pairs (z_0, z_t) of the held-out bound, during training and at its end


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up, then half a cosine to zero."""
    return peak * min(1, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


# ----------------------------------------------------------------------------
# Stage 1: images -> tokenizer.

def build_tokenizer(run, state):
    """{"tokenizer", "optimizer", with --gan the discriminator's}, new or as in a checkpoint `state`."""
    torch.manual_seed(seed_for(run.seed, STAGES["weights"], 0))
    model = make_tokenizer(run.models["tokenizer"], bf16_works(run.device)).to(run.device)
    parts = {"tokenizer": model}
    if not run.tokenizer_is_published:
        parts["optimizer"] = AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0, fused=True)
        if run.config["gan"]:
            parts |= build_discriminator(run.config, model.bf16, run.device)
    restore(parts, state, run.init)
    return parts


def optimize_tokenizer(run, parts, log):
    """The steps of stage 1, from log.step on. parts: of build_tokenizer. log: a StatusLog or a Stopwatch."""
    config, device, steps = run.config, run.device, run.config["tokenizer_steps"]
    model, optimizer, discriminator = parts["tokenizer"], parts["optimizer"], parts.get("discriminator")
    forward = data_parallel(model)
    judge = data_parallel(discriminator.requires_grad_(True)) if config["gan"] else None
    batches = image_batches(run.load_images()[0], config, run.seed, log.step, steps, device)
    for step, images in zip(log.loop(), batches, strict=False):
        # Learning rate and batch.
        progress = step / steps
        lr = learning_rate(step, steps, config["warmup"], config["tokenizer_lr"])
        optimizer.param_groups[0]["lr"] = lr
        images = images.to(device, non_blocking=device.type != "mps")
        generator = generator_for(run.seed, "tokenizer", step)

        # Forward, backward, clip, step.
        model.train()
        outputs = forward(images, generator)
        loss, terms = tokenizer_loss(config, model, discriminator, outputs, progress, run.lpips)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        terms["norm"] = clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        if config["gan"] and progress >= config["gan_start"]:
            gan_lr = learning_rate(step, steps, config["warmup"], config["gan_lr"])
            terms |= discriminator_step(judge, parts, outputs, gan_lr, config["clip"])

        # Log, restart codes, draw and save when due.
        log.add(terms, outputs["tokens"])
        if step % RESTART_EVERY == RESTART_EVERY - 1 and progress < 0.75:  # later the codebook settles
            log.check()
            model.quantizer.restart_dead_codes(outputs["z_e"], generator)
        if log.due("log_every"):
            log.line(lr=f"{lr:.2e}")
        if log.due("sample_every"):
            draw_reconstructions(run, model, log.step)
        if log.due("save_every"):
            checkpoint.save(run.out / "tokenizer.pt", checkpoint.tokenizer_state(run, parts) | log.state())
        run_page.update_page(run.out)


def train_tokenizer(run):
    """Stage 1. The result is tokenizer.pt; it is complete when it has metrics."""
    config, path = run.config, run.out / "tokenizer.pt"
    state = checkpoint.read_newest(path, checkpoint.TOKENIZER_FORMAT)
    if state and state["metrics"]:
        metrics = status.format_metrics(state["metrics"])
        return print(f"tokenizer: complete ({state['step']:,} steps), {metrics}")
    steps = 0 if run.tokenizer_is_published else config["tokenizer_steps"]
    parts = build_tokenizer(run, state)
    log = status.StatusLog("tokenizer", run.out, config, steps, config["tokenizer_batch"], run.device, state,
                           per_rank=True, K=config["K"])
    if steps:
        optimize_tokenizer(run, parts, log)
    content = checkpoint.tokenizer_state(run, parts) | log.state()
    checkpoint.save(path, content)
    process.exit_if_stopped()
    draw_reconstructions(run, parts["tokenizer"], steps)
    test = run.load_images()[1]
    metrics = evaluate_tokenizer(parts["tokenizer"], test, run.device, run.lpips, run.eval_batch)
    complete = {name: value for name, value in content.items() if not name.endswith("optimizer")}
    checkpoint.save(path, complete | {"metrics": metrics}, last=True)
    print(f"tokenizer: {status.format_metrics(metrics)} on {len(test):,} held-out images")


def draw_reconstructions(run, model, step):
    if rank_and_world()[0] == 0:
        test = run.load_images()[1]
        images = test.batch(np.linspace(0, len(test) - 1, min(4 * COLUMNS, len(test))).astype(int))
        decoded = model.eval().decode(model.encode(images.to(run.device))).cpu()
        pictures.save_pairs(images, decoded, run.out / f"reconstructions_{step:06d}.png")


# ----------------------------------------------------------------------------
# Stage 3: tokens -> embeddings and denoiser.

def build_denoiser(run, tokenizer, state):
    """{"model", "ema": its averaged weights, "optimizer"}, new or as a checkpoint `state` left them."""
    config, device = run.config, run.device
    torch.manual_seed(seed_for(run.seed, STAGES["weights"], 1))
    model = EmbeddingDiffusion(**run.models["denoiser"], bf16=bf16_works(device),
                               recompute=config["activation_checkpointing"])
    if config["embedding_init"] == "codebook":
        model.init_from_codebook(tokenizer.codebook)
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=config["weight_decay"], fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    restore(parts, state, run.init)
    return parts


def build_loss(config, model, ema, schedule):
    """losses.training_loss with everything but the batch filled in."""
    teacher = ema if config["teacher"] == "ema" else model
    loss = functools.partial(losses.training_loss, model, teacher, schedule,
                             **{name: config[name] for name in losses.LOSS_ARGS})
    return torch.compile(loss) if config["compile"] else loss


def optimize_denoiser(run, parts, tokens, log, begin=0, pipeline=None, held_out=None):
    """The steps of stage 3, from log.step on. parts: of build_denoiser. tokens: a TokenDataset.

    begin: the step at which the learning rate began to rise. pipeline, held_out: for what is done when due.
    """
    config, device, (rank, world) = run.config, run.device, rank_and_world()
    model, ema, optimizer = parts["model"].train(), parts["ema"], parts["optimizer"]
    loss_of = data_parallel(model, build_loss(config, model, ema, ShiftedCosine(**run.models["schedule"])))
    noise_options = {name: config[name] for name in losses.NOISE_ARGS}
    B, steps = config["batch"], config["steps"]
    for step in log.loop():
        # Learning rate.
        lr = learning_rate(step - begin, steps - begin, config["warmup"], config["lr"])
        optimizer.param_groups[0]["lr"] = lr

        # Batch and noise. They depend on (seed, step) alone, so that many ranks draw what one would.
        x, labels = tokens.batch(batch_indices(len(tokens), B, run.seed, "diffusion", step))
        generator = generator_for(run.seed, "diffusion", step, device)
        rows, n_rec, counts = losses.sample_noise(model, x, labels, generator, **noise_options)

        # Forward and backward, in as many passes as the memory needs. Each takes every (passes world)-th row,
        # so that all have as much work of each kind. Gradients add up; the ranks' meet in the last pass.
        passes = -(-B // (world * run.micro_batch)) if run.micro_batch else 1
        passes = max(1, min(passes, (B - n_rec) // world))  # rows at t > 0 in every one
        terms = 0
        for i in range(passes):
            first, stride = rank + i * world, passes * world
            some = {name: value[first::stride] for name, value in rows.items()}
            alone = world > 1 and i + 1 < passes
            with loss_of.no_sync() if alone else contextlib.nullcontext():
                loss, part = loss_of(some, len(range(first, n_rec, stride)), counts)
                (loss * world).backward()  # the mean over ranks is taken; we want the sum
            terms = terms + part
        all_reduce_sum([terms])

        # Clip, step, EMA.
        norm = clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config["ema_decay"], (1 + step) / (10 + step))  # a short memory at the start
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)

        # Log, evaluate and save when due.
        log.add(dict(zip(("rec", "diff", "cm"), terms, strict=True)) | {"norm": norm})
        if log.due("log_every"):
            collapse = losses.collapse_diagnostics(model.table())
            log.line(lr=f"{lr:.2e}", effective_rank=f"{collapse['effective_rank']:.3f}",
                     smallest_distance=f"{collapse['smallest_distance']:.3f}")
        if log.due("sample_every"):
            evaluate(run, pipeline, parts, held_out, log.step, DRAWS)
        if log.due("fid_every"):
            fid_sources.evaluate_during(run, pipeline, log.step)
        if log.due("save_every"):
            content = checkpoint.denoiser_state(run, pipeline, parts, begin)
            checkpoint.save(run.out / "ckpt.pt", content | log.state())
        run_page.update_page(run.out)


def train_diffusion(run):
    """Stage 3, on tokens.npy. The result is ckpt.pt; it is complete when it has metrics."""
    config, path, steps = run.config, run.out / "ckpt.pt", run.config["steps"]
    state = checkpoint.read_newest(path, checkpoint.CHECKPOINT_FORMAT)
    if state and state["metrics"] and state["step"] >= steps:
        bits = status.format_metrics(state["metrics"]["vlb"])
        return print(f"diffusion: complete ({state['step']:,} steps), bits per token: {bits}")
    tokenizer, tokenizer_metrics = load_tokenizer(run.models["tokenizer"], run.out, run.device)
    tokens, held_out = read_tokens(run.out / "tokens.npy", tokenizer, run.source.class_names, run.device)
    parts = build_denoiser(run, tokenizer, state)
    sampling = {"steps": config["sample_steps"], "guidance": config["guidance"], "sampler": config["sampler"]}
    pipeline = make_pipeline(tokenizer, parts["ema"], ShiftedCosine(**run.models["schedule"]), run.device,
                             class_counts=tokens.class_counts, sampling=sampling)
    log = status.StatusLog("diffusion", run.out, config, steps, config["batch"], run.device, state)
    begin = 0
    if state:
        begin = state["step"] if state["metrics"] else state["begin"]
    if begin:  # a finished run with more --steps
        print(f"from step {begin:,} on the learning rate rises and falls once more")
    del state
    if log.step == 0:
        evaluate(run, pipeline, parts, held_out, 0, DRAWS)
    optimize_denoiser(run, parts, tokens, log, begin, pipeline, held_out)

    content = checkpoint.denoiser_state(run, pipeline, parts, begin) | log.state()
    checkpoint.save(path, content)
    process.exit_if_stopped()
    metrics = evaluate(run, pipeline, parts, held_out, steps, FINAL_DRAWS) | {"tokenizer": tokenizer_metrics}
    checkpoint.save(path, content | {"metrics": metrics}, last=True)
    if rank_and_world()[0] == 0:
        process.write_json(run.out / "metrics.json", metrics)


def evaluate(run, pipeline, parts, held_out, step, draws):
    """Of the averaged weights: the bound on held-out tokens, the state of the table, and samples."""
    bits = losses.held_out_bits(pipeline.model.eval(), pipeline.schedule, *held_out, lambda i: generator_for(
        run.seed, "evaluation", i, run.device), draws, run.config["eval_batch"], run.eval_batch)
    bound, collapse = losses.mean_bound(bits), losses.collapse_diagnostics(pipeline.model.table())
    status.log_bound(run.out / "evaluation.csv", step, bound, run.config["K"], collapse)
    if step > 0:
        content = checkpoint.denoiser_state(run, pipeline, parts, 0) | {"step": step, "bits": bits.sum(0)}
        checkpoint.save_best(run.out / "best.pt", content, run.config["eval_batch"])
        names = run.source.class_names  # the picture that sample.py draws by default
        labels = default_labels(COLUMNS * min(len(names) or 8, 16), len(names))
        images = sample_together(pipeline, labels, seed=run.seed, batch=run.eval_batch, **pipeline.sampling)
        if rank_and_world()[0] == 0:
            rows = [names[label] for label in labels[::COLUMNS]] if names else None
            pictures.save_grid(images, run.out / f"samples_{step:06d}.png", COLUMNS, row_labels=rows)
    return {"vlb": bound, "collapse": collapse}


def choose_steps(run):
    """--minutes: times some steps of both loops, of networks that are thrown away, and sets the steps."""
    parts, loops = build_tokenizer(run, None), {}
    if not run.tokenizer_is_published and not (run.out / "tokenizer.pt").exists():
        loops["tokenizer_steps"] = functools.partial(optimize_tokenizer, run, parts)
    tokens = random_tokens(run.config["batch"], run.models["denoiser"], run.device)
    denoiser = build_denoiser(run, parts["tokenizer"], None)
    loops["steps"] = functools.partial(optimize_denoiser, run, denoiser, tokens)
    budget.choose_steps(run, loops)


def main():
    args = parse_arguments(DATASETS)
    with process.report_errors("train.py", "stopped", setup.MEMORY_ADVICE), contextlib.ExitStack() as stack:
        init_distributed()
        run = setup.prepare(args, stack)
        if run.minutes is not None:
            choose_steps(run)
        if args.stage in ("all", "tokenizer"):
            train_tokenizer(run)
        if args.stage in ("all", "tokens"):
            setup.encode_tokens(run)
        if args.stage in ("all", "diffusion"):
            train_diffusion(run)
            if args.eval_fid:
                process.release_signals()
                fid_sources.evaluate_run(run, args.eval_fid)
            print(f"complete. Draw images:  python sample.py {run.out / 'ckpt.pt'}    Train longer: --steps")


if __name__ == "__main__":
    main()
