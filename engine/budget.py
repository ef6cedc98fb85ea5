"""--minutes: how many steps of both stages fit into a time, from the speed that a few of them have on this machine.

Both stages get the steps of the preset times one factor, so time is shared between them as in the preset. What happens
besides is counted in: looking at the images, encoding them, evaluations, pictures, compiling (not --fid-every, nor
--eval-fid, which comes after it). The steps that are timed train networks that are thrown away. What was chosen is in
config.json: a run that goes on keeps its plan. Called by train.py.
"""

import gc
import time

import torch

from data import ImageSet
from engine.batches import image_batches
from engine.build import make_pipeline
from engine.distributed import all_reduce_max, compute_gradient, rank_and_world
from engine.process import write_json
from engine.randomness import generator_for
from engine.read_back import UserError, read_json
from extras.data_arrays import TokenFile
from extras.tokenizer_metrics import evaluate_tokenizer
from losses import NOISE_ARGS, held_out_bound, sample_noise
from sample import COLUMNS, default_labels, sample_together
from schedule import ShiftedCosine
from vqvae import tokenizer_step

DRAWS, FINAL_DRAWS = 1000, 10000  # pairs (z_0, z_t) of the held-out bound, now and then and at the end
HELD_OUT = 2000  # images at most of which it is taken
MARGIN = 0.95  # of the time is planned: checkpoints, and a machine that becomes warm
FEW = 1000  # steps of a stage that mean little


def choose_steps(run, build_tokenizer, build_denoiser, build_loss, update):
    """run.config, in which run.minutes, if it is not None, has set the steps. The functions are those of train.py.

    All processes call this, and choose the same. UserError if there is no time for any step.
    """
    if run.minutes is None:
        return run.config
    config, seconds = run.config, 60 * run.minutes
    print(f"--minutes {run.minutes:g}: timing some steps of both stages", flush=True)
    patience = min(10, seconds / 100)
    tokenizer, fixed = build_tokenizer(run, None), 0.0
    per_step = {"tokenizer_steps": 0.0}
    if not (run.out / "tokenizer.pt").exists():  # given by --tokenizer
        per_step["tokenizer_steps"], fixed = time_tokenizer(run, tokenizer, patience)
    if not isinstance(run.source, TokenFile) and not (run.out / "tokens.npy").exists():
        fixed += time_encoding(run, tokenizer["tokenizer"])
    per_step["steps"], more = time_denoiser(run, tokenizer["tokenizer"], patience, build_denoiser, build_loss, update)
    del tokenizer
    gc.collect()  # what is data parallel refers to itself
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    spent = all_reduce_max(round(time.monotonic() - run.began))
    chosen, message = plan(seconds, spent, fixed + more, per_step, config)
    config.update(chosen)
    if rank_and_world()[0] == 0:
        stored = read_json(run.out / "config.json")
        write_json(run.out / "config.json", stored | chosen | {"minutes": run.minutes})
    print(message)
    return config


def plan(seconds, spent, fixed, per_step, config):
    """({option: steps}, a message). per_step: seconds of a step of each stage, 0 for a stage that is not trained."""
    full = sum(config[name] * each for name, each in per_step.items())  # as long as the preset takes
    left = MARGIN * seconds - spent - fixed
    if left <= 0:
        raise UserError(f"--minutes {seconds / 60:g}: looking at the images, encoding and evaluations alone take "
                        f"{(spent + fixed) / 60:.1f} minutes; give at least "
                        f"{(spent + fixed + 0.05 * full) / MARGIN / 60:.1f}, for a twentieth of the preset's steps")
    chosen = {name: max(1, int(config[name] * left / full)) for name, each in per_step.items() if each}
    words = {"tokenizer_steps": "tokenizer", "steps": "denoiser"}
    message = (f"--minutes {seconds / 60:g}: " + " and ".join(
        f"{steps:,} steps of the {words[name]} ({1e3 * per_step[name]:.3g} ms each)" for name, steps in chosen.items())
        + f", {left / full:.2g} times the preset's; {(spent + fixed) / 60:.1f} minutes for all else")
    if min(chosen.values()) < FEW and left < full:
        message += ("\nThat is too little to mean much: the preset's steps would take "
                    f"{(spent + fixed + full) / 60:.0f} minutes. Give more of them, or a smaller "
                    "--size, --width, --depth or --batch")
    if config.get("fid_every"):
        message += "\nThe time of --fid-every is not in this plan, and comes on top"
    return chosen, message


def measure(step, device, patience):
    """(seconds of a call, seconds of the first one): step(i) once to get going, then for about `patience` seconds."""
    def timed(numbers):
        began = time.perf_counter()
        for i in numbers:
            step(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return all_reduce_max(round(1e6 * (time.perf_counter() - began))) / 1e6  # the slowest process decides for all

    first, once = timed([0]), timed([1])
    calls = min(50, int(patience / max(once, 1e-6)))
    return (timed(range(2, 2 + calls)) / calls if calls else once), first


def time_tokenizer(run, parts, patience):
    """(seconds of a step, seconds at the start) with the images that the first steps will see."""
    config, (train, _) = run.config, run.load_images()
    batches = image_batches(train, config, run.seed, 0, 200, run.device)

    def step(i, done):
        images = next(batches).to(run.device, non_blocking=run.device.type != "mps")
        tokenizer_step(config, parts, images, generator_for(run.seed, "tokenizer", i), done, 0.0, 0.0, run.lpips)

    share = config["gan_start"] if config["gan"] else 1.0  # of the steps, before the discriminator comes in
    parts_of = [measure(lambda i, done=done: step(i, done), run.device, patience / 2)
                for done, weight in ((0.0, share), (1.0, 1 - share)) if weight]
    batches.close()
    weights = [share, 1 - share] if len(parts_of) == 2 else [1.0]
    return (sum(w * each for w, (each, _) in zip(weights, parts_of, strict=True)),
            sum(first for _, first in parts_of))


def time_encoding(run, model):
    """Seconds of encoding all images and of evaluating the tokenizer on those held out."""
    (train, test), batch = run.load_images(), run.eval_batch
    some = test.batch(range(min(batch, 64, len(test))))
    few = ImageSet(torch.zeros(len(some)), [], test.size, some)
    evaluation, _ = measure(lambda i: evaluate_tokenizer(model, few, run.device, run.lpips, batch), run.device, 0)
    encoding, _ = measure(lambda i: model.encode(test.batch(range(len(some))).to(run.device)), run.device, 0)
    images = (1 + run.config["flip"]) * len(train) + len(test)
    return (evaluation * len(test) + encoding * images) / len(some) / rank_and_world()[1]


def time_denoiser(run, tokenizer, patience, build_denoiser, build_loss, update):
    """(seconds of a step with its part of the evaluations, seconds at the start and at the end), of random tokens."""
    config, device, models = run.config, run.device, run.models
    schedule = ShiftedCosine(**models["schedule"])
    model, ema, optimizer = build_denoiser(run, tokenizer, None)
    loss_of = build_loss(config, model, ema, schedule)
    noise_options = {name: config[name] for name in NOISE_ARGS}
    optimizer.param_groups[0]["lr"] = 0.0

    def tokens(n):
        generator = torch.Generator(device).manual_seed(0)
        classes = max(models["denoiser"]["num_classes"], 1)
        return (torch.randint(config["K"], (n, model.N), generator=generator, device=device),
                torch.randint(classes, (n,), generator=generator, device=device))

    def step(i):
        noisy = sample_noise(model, *tokens(config["batch"]), generator_for(run.seed, "diffusion", i, device),
                             **noise_options)
        compute_gradient(model.train(), loss_of, noisy, run.micro_batch, config["fsdp"])
        update(model, ema, optimizer, config["clip"], config["ema_decay"])

    per_step, first = measure(step, device, patience)
    model.zero_grad(set_to_none=True)
    ema.eval()
    world, batch, names = rank_and_world()[1], run.eval_batch, run.source.class_names
    bound, _ = measure(lambda i: held_out_bound(ema, schedule, *tokens(world * batch), lambda i: generator_for(
        run.seed, "evaluation", i, device), 1, batch), device, 0)  # a batch for each process
    labels = default_labels(COLUMNS * min(len(names) or 8, 16), len(names))
    pipeline = make_pipeline(tokenizer, ema, schedule, device)
    picture, _ = measure(lambda i: sample_together(
        pipeline, labels, seed=0, batch=batch, steps=2, guidance=config["guidance"], sampler=config["sampler"]),
        device, 0)
    picture *= config["sample_steps"] / 2
    draws = [max(n, min(HELD_OUT, run.source.counts()[1])) / (world * batch) for n in (DRAWS, FINAL_DRAWS)]
    return (per_step + (draws[0] * bound + picture) / config["sample_every"],
            first + sum(draws) * bound + picture)
