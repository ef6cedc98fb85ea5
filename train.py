"""Train VQ-LCMD from images to samples with one command; the same command again continues an interrupted run.

    python train.py                          the built-in set, minutes on two CPU cores
    python train.py --data FOLDER            your own images; a preset is chosen by their size and your device
    python train.py --data ffhq --root DIR   a published set by its name; it says how to get it if it is not there
    python train.py --data FOLDER --preset 64 --out runs/faces --device cuda
    torchrun --nproc-per-node 8 train.py --data FOLDER      on 8 GPUs, with the same result

Three stages in one run directory (--out); its page, index.html, follows them (extras/run_page.py):

    (before)    what was found                         data.png, skipped.txt: images that cannot be used
    tokenizer   images -> VQ-VAE                       tokenizer.pt, reconstructions_*.png, tokenizer.csv
    tokens      every image encoded once               tokens.npy, one memory-mapped array
    diffusion   tokens -> embeddings and denoiser      ckpt.pt, best.pt, samples_*.png, diffusion.csv, evaluation.csv

Every random draw comes from (seed, stage, step): an interrupted run continues exactly, and many GPUs compute what one
would. Options: engine/config.py. Before the first step: engine/prepare.py. Stage 2: engine/tokens.py.
"""

import contextlib
import copy
import functools
import math

import numpy as np
import torch

from embedding_diffusion import EmbeddingDiffusion
from engine.batches import image_batches
from engine.best import Best
from engine.budget import DRAWS, FINAL_DRAWS, choose_steps
from engine.build import load_tokenizer, make_pipeline, make_tokenizer, restore
from engine.checkpoint import CHECKPOINT_FORMAT, TOKENIZER_FORMAT, previous, read_newest
from engine.config import parse_arguments
from engine.distributed import bf16_works, compute_gradient, full_state_dict, init_distributed, place, rank_and_world
from engine.prepare import prepare
from engine.randomness import STAGES, batch_indices, generator_for, seed_for
from engine.process import on_out_of_memory, release_signals, report_errors, write_json
from engine.status import StatusLog, format_metrics, log_bound
from engine.tokens import encode_tokens, read_tokens
from extras.datasets import DATASETS
from extras.fid_sources import evaluate_during, evaluate_run
from extras.grids import save_grid, save_pairs
from extras.tokenizer_metrics import evaluate_tokenizer
from extras.vqgan_losses import make_discriminator
from losses import LOSS_ARGS, NOISE_ARGS, collapse_diagnostics, held_out_bits, mean_bound, sample_noise, training_loss
from sample import COLUMNS, default_labels, sample_together
from schedule import ShiftedCosine
from vqvae import tokenizer_step

RESTART_EVERY = 50  # steps of the tokenizer, after which codes that are no longer used restart


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up, then half a cosine to zero."""
    return peak * min(1, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


# ----------------------------------------------------------------------------
# Stage 1: images -> tokenizer.

def build_tokenizer(run, state):
    """The parts that are trained and saved, new or as a checkpoint `state` left them, on the device.

    "tokenizer": VQVAE, "optimizer": its AdamW; with --gan "discriminator" and "discriminator_optimizer".
    """
    torch.manual_seed(seed_for(run.seed, STAGES["weights"], 0))
    model = make_tokenizer(run.models["tokenizer"], bf16_works(run.device)).to(run.device)
    parts, adam = {"tokenizer": model}, functools.partial(torch.optim.AdamW, weight_decay=0.0, fused=True)
    if not run.tokenizer_is_published:
        parts["optimizer"] = adam(model.parameters(), betas=(0.9, 0.99))
        if run.config["gan"]:
            discriminator = parts["discriminator"] = make_discriminator(run.config, model.bf16).to(run.device)
            parts["discriminator_optimizer"] = adam(discriminator.parameters(), betas=(0.5, 0.9))
    restore(parts, state, run.init)
    return parts


def train_tokenizer(run):
    """Trains, then measures. The result is tokenizer.pt; with metrics in it, it is complete."""
    config, device, path = run.config, run.device, run.out / "tokenizer.pt"
    state, steps = read_newest(path, TOKENIZER_FORMAT), 0 if run.tokenizer_is_published else config["tokenizer_steps"]
    if state and state["metrics"]:
        return print(f"tokenizer: complete ({state['step']:,} steps), {format_metrics(state['metrics'])}")
    train, test = run.load_images()
    shown = test.batch(np.linspace(0, len(test) - 1, min(4 * COLUMNS, len(test))).astype(int))
    parts = build_tokenizer(run, state)
    model, last_restart = parts["tokenizer"], 0.75 * steps  # after it the codebook settles
    names = ["reconstruction", *["lpips"] * (run.lpips is not None), "commitment", "codebook", "norm",
             *["adversarial", "weight", "discriminator", "discriminator_norm"] * bool(config["gan"])]
    log = StatusLog("tokenizer", run.out, names, config, steps, config["tokenizer_batch"], device, state, summed=True,
                    K=config["K"])

    batches = image_batches(train, config, run.seed, log.step, steps, device)
    for step, images in zip(log.loop(), batches, strict=False):  # loop() ends early after Ctrl-C or kill
        lr, gan_lr = (learning_rate(step, steps, config["warmup"], config[peak]) for peak in ("tokenizer_lr", "gan_lr"))
        generator = generator_for(run.seed, "tokenizer", step)
        images = images.to(device, non_blocking=device.type != "mps")
        outputs, losses = tokenizer_step(config, parts, images, generator, step / steps, lr, gan_lr, run.lpips)
        log.add(losses, outputs["tokens"])
        if step % RESTART_EVERY == RESTART_EVERY - 1 and step < last_restart:
            log.check()
            model.quantizer.restart_dead_codes(outputs["z_e"], generator)
        if log.due("log_every"):
            log.line(lr=f"{lr:.2e}")
        if log.due("sample_every"):
            draw_reconstructions(run, model, shown, log.step)
        if log.due("save_every"):
            log.save(path, tokenizer_state(run, parts))

    log.save(path, tokenizer_state(run, parts))
    log.leave_if_stopped()
    draw_reconstructions(run, model, shown, steps)
    with run.eval_memory():
        metrics = evaluate_tokenizer(model, test, device, run.lpips, run.eval_batch)
    log.save(path, tokenizer_state(run, parts, metrics))
    if rank_and_world()[0] == 0:
        previous(path).unlink(missing_ok=True)
        print(f"tokenizer: {format_metrics(metrics)} on {len(test):,} held-out images; pictures in {run.out}")


def tokenizer_state(run, parts, metrics=None):
    """What tokenizer.pt holds. Metrics mean that it is complete."""
    return {"format": TOKENIZER_FORMAT, "config": run.models["tokenizer"], "metrics": metrics or {}} | {
        name: part.state_dict() for name, part in parts.items()}


def draw_reconstructions(run, model, images, step):
    if rank_and_world()[0] == 0:
        decoded = model.eval().decode(model.encode(images.to(run.device))).cpu()
        save_pairs(images, decoded, run.out / f"reconstructions_{step:06d}.png", COLUMNS)


# ----------------------------------------------------------------------------
# Stage 3: tokens -> embeddings and denoiser.

def build_denoiser(run, tokenizer, state):
    """(model, its averaged weights ema, optimizer), new or as a checkpoint `state` left them."""
    config, device = run.config, run.device
    torch.manual_seed(seed_for(run.seed, STAGES["weights"], 1))
    model = EmbeddingDiffusion(**run.models["denoiser"], bf16=bf16_works(device),
                               recompute=config["activation_checkpointing"])
    if config["embedding_init"] == "codebook":
        model.init_from_codebook(tokenizer.codebook)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    restore({"model": model, "ema": ema}, state, run.init)
    for network in (model, ema):
        place(network, device, config["fsdp"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=config["weight_decay"],
                                  fused=True)
    if state:
        restore({"optimizer": optimizer}, state, {})
    return model, ema, optimizer


def build_loss(config, model, ema, schedule):
    """losses.training_loss with everything but the batch filled in."""
    teacher = ema if config["teacher"] == "ema" else model
    loss = functools.partial(training_loss, model, teacher, schedule, **{name: config[name] for name in LOSS_ARGS})
    if config["compile"] and config["fsdp"]:  # what FSDP2 does between the blocks cannot be compiled
        for block in model.blocks:
            block.compile()
    return torch.compile(loss) if config["compile"] and not config["fsdp"] else loss


def update(model, ema, optimizer, clip, decay):
    """One step of the optimizer and of the averaged weights. Returns the gradient's norm, as it was."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
    return full_state_dict(norm)


def train_diffusion(run):
    """Trains embeddings and denoiser on tokens.npy until ckpt.pt says that it is complete."""
    config, device, seed, path, steps = run.config, run.device, run.seed, run.out / "ckpt.pt", run.config["steps"]
    state = read_newest(path, CHECKPOINT_FORMAT)
    if state and state["metrics"] and state["step"] >= steps:
        bits = format_metrics(state["metrics"]["vlb"])
        return print(f"diffusion: complete ({state['step']:,} steps), bits per token: {bits}")
    tokenizer, tokenizer_metrics = load_tokenizer(run.models["tokenizer"], run.out, device)
    tokens, held_out = read_tokens(run.out / "tokens.npy", tokenizer, run.source.class_names, device)
    schedule = ShiftedCosine(**run.models["schedule"])
    model, ema, optimizer = build_denoiser(run, tokenizer, state)
    loss_of = build_loss(config, model, ema, schedule)
    pipeline = make_pipeline(tokenizer, ema, schedule, device, class_counts=tokens.class_counts, sampling={
        "steps": config["sample_steps"], "guidance": config["guidance"], "sampler": config["sampler"]})
    log = StatusLog("diffusion", run.out, ["rec", "diff", "cm", "norm"], config, steps, config["batch"], device, state,
                    also=[run.out / "evaluation.csv", run.out / "fid.csv"])
    begin = 0 if not state else state["step"] if state["metrics"] else state.get("begin", 0)
    if begin:  # a finished run with more --steps
        print(f"from step {begin:,} on the learning rate rises and falls once more")
    content = functools.partial(denoiser_state, run, pipeline, model, optimizer, begin)
    best = Best(run.out / "best.pt", log.step, len(held_out[0]), config["eval_batch"])
    evaluate_now = functools.partial(evaluate, run, pipeline, held_out, best)
    del state
    noise_options = {name: config[name] for name in NOISE_ARGS}
    if log.step == 0:
        evaluate_now(0, DRAWS)

    for step in log.loop():
        lr = learning_rate(step - begin, steps - begin, config["warmup"], config["lr"])
        optimizer.param_groups[0]["lr"] = lr
        x, labels = tokens.batch(batch_indices(len(tokens), config["batch"], seed, "diffusion", step))
        noisy = sample_noise(model, x, labels, generator_for(seed, "diffusion", step, device), **noise_options)
        rec, diff, cm = compute_gradient(model.train(), loss_of, noisy, run.micro_batch, config["fsdp"])
        decay = min(config["ema_decay"], (1 + step) / (10 + step))  # a short memory while weights still run
        norm = update(model, ema, optimizer, config["clip"], decay)
        log.add({"rec": rec, "diff": diff, "cm": cm, "norm": norm})
        if log.due("log_every"):
            collapse = collapse_diagnostics(full_state_dict(model.table().detach()))
            log.line(lr=f"{lr:.2e}", **{key: f"{collapse[key]:.3f}" for key in ("effective_rank", "smallest_distance")})
        if log.due("sample_every"):
            evaluate_now(log.step, DRAWS)
            draw_samples(run, pipeline, log.step)
        if log.due("fid_every"):
            evaluate_during(run, pipeline, log.step)
        if log.due("save_every"):
            log.save(path, content())

    log.save(path, content())
    log.leave_if_stopped()
    draw_samples(run, pipeline, steps)
    metrics = evaluate_now(steps, FINAL_DRAWS) | {"tokenizer": tokenizer_metrics}
    log.save(path, content(metrics))
    if rank_and_world()[0] == 0:
        write_json(run.out / "metrics.json", metrics)
        previous(path).unlink(missing_ok=True)


def drawing_state(run, pipeline):
    """What sample.py needs, which is what best.pt holds."""
    return full_state_dict({
        "format": CHECKPOINT_FORMAT, "config": run.models | {"training": run.config | {"seed": run.seed}},
        "tokenizer": pipeline.tokenizer.state_dict(), "ema": pipeline.model.state_dict(),
        "class_names": run.source.class_names, "class_counts": pipeline.class_counts, "sampling": pipeline.sampling})


def denoiser_state(run, pipeline, model, optimizer, begin, metrics=None):
    """What ckpt.pt holds: that, and what is needed to go on. begin: step at which the learning rate began."""
    return drawing_state(run, pipeline) | full_state_dict({
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "metrics": metrics or {}, "begin": begin})


def evaluate(run, pipeline, held_out, best, step, draws):
    """The bound on held-out tokens and the state of the table, of the averaged weights: a row of evaluation.csv."""
    with run.eval_memory():
        bits = held_out_bits(pipeline.model.eval(), pipeline.schedule, *held_out, lambda i: generator_for(
            run.seed, "evaluation", i, run.device), draws, run.config["eval_batch"], run.eval_batch)
    bound, collapse = mean_bound(bits), collapse_diagnostics(full_state_dict(pipeline.model.table()))
    log_bound(run.out / "evaluation.csv", step, bound, run.config["K"], collapse)
    if step > 0:
        best.look(step, bits.sum(0), lambda: drawing_state(run, pipeline))
    return {"vlb": bound, "collapse": collapse}


def draw_samples(run, pipeline, step):
    """The picture that sample.py draws by default."""
    names = run.source.class_names
    labels = default_labels(COLUMNS * min(len(names) or 8, 16), len(names))
    with run.eval_memory():
        images = sample_together(pipeline, labels, seed=run.seed, batch=run.eval_batch, **pipeline.sampling)
    if rank_and_world()[0] == 0:
        save_grid(images, run.out / f"samples_{step:06d}.png", COLUMNS,
                  row_labels=[names[label] for label in labels[::COLUMNS]] if names else None)


def main():
    args = parse_arguments(DATASETS)
    with report_errors("train.py"), contextlib.ExitStack() as held:
        _, world = init_distributed()
        run = prepare(args, held)
        if run is None:
            return
        with on_out_of_memory("--minutes tried a step of each stage: lower --tokenizer-batch, or --micro-batch"):
            config = choose_steps(run, build_tokenizer, build_denoiser, build_loss, update)
        all_of = args.stage == "all"
        if all_of or args.stage == "tokenizer":
            with on_out_of_memory("choose another --out and lower --tokenizer-batch"):
                train_tokenizer(run)
        if all_of or args.stage == "tokens":
            with run.eval_memory():
                encode_tokens(run)
        if all_of or args.stage == "diffusion":
            images = run.micro_batch or config["batch"] // world
            with on_out_of_memory(f"{images} images at once are too many for {run.device}: add --micro-batch "
                                  f"{max(images // 2, 1)} or --activation-checkpointing, and the run goes on"):
                train_diffusion(run)
            if args.eval_fid:
                release_signals()
                with run.eval_memory():
                    evaluate_run(run, args.eval_fid)
            print(f"complete. Draw images:  python sample.py {run.out / 'ckpt.pt'}    Train longer: raise --steps")


if __name__ == "__main__":
    main()
