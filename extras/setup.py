"""What comes before the first step: the data are found, every option and size is checked, weights of others
are fetched, and the run directory is made or recognised (extras/run_directory.py). Called by train.py.
"""

import functools
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from embedding_diffusion import EmbeddingDiffusion
from engine import checkpoint, process
from engine.build import load_tokenizer, make_tokenizer, options_of, read_tokenizer, restore
from engine.config import describe_models, flag, resolve
from engine.distributed import all_reduce_max, broadcast, choose_device, precision, rank_and_world
from engine.tokens import encode_sets, open_tokens
from engine.validate import UserError, expect
from extras import cost, run_directory
from extras.data_arrays import TokenFile
from extras.datasets import find
from extras.image_cache import CACHE, load_through_cache, plan_cache, remove_cache
from extras.inception import find_inception
from extras.vqgan_losses import LPIPS, find_lpips, make_discriminator, read_lpips
from schedule import ShiftedCosine

MEMORY_ADVICE = ("the same command continues with a lower --micro-batch or --activation-checkpointing "
                 "(denoiser), a lower --eval-batch (pictures and evaluations), or, in another --out, a lower "
                 "--tokenizer-batch")


def prepare(args, stack):
    """What train.py works with, a namespace. stack: an ExitStack, for the run directory's lock and page."""
    rank, world = rank_and_world()
    if rank:  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")
    run = process.main_process_first(lambda: prepare_rank(args, stack))
    if broadcast(run is None):  # --dry-run
        sys.exit(0)
    run = run or prepare_rank(args, stack)
    # All take as many images at a time as the one with the least memory.
    run.micro_batch = -all_reduce_max(-(run.micro_batch or run.config["batch"] // world))
    run.eval_batch = -all_reduce_max(-run.eval_batch)
    process.catch_signals()
    return run


def prepare_rank(args, stack):
    began = time.monotonic()
    expect("--seed", args.seed, int, 0)
    expect("--eval-fid", args.eval_fid or 2, int, 2)
    if args.chip and not args.dry_run:
        raise UserError("--for asks for the cost on another machine: give --dry-run with it")
    device = choose_device(args.device)
    if args.chip:  # its presets, too
        device = torch.device("cpu" if args.chip == "cpu" else "cuda")
    elif device.type == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise UserError(f"more processes than GPUs, {torch.cuda.device_count()}: lower --nproc-per-node")
    source = find(args.data, args.root)
    if args.no_classes:
        source.class_names, source.labels = [], np.zeros_like(source.labels)
    out = Path(args.out or Path("runs") / source.name)
    before = run_directory.read_config(out)
    if "sides" in before:  # known since the first start: no image is opened for it again
        source.sides = tuple(before["sides"])
    print(source.describe())
    run_directory.repeat_choices(args, before, out)
    init = read_init(args.init) if args.init and not (out / "ckpt.pt").exists() else {}
    config, models, tokenizer = check_options(args, source, out, device, init)
    make_cache, cache_plan = plan_cache(source, config["size"], out)
    if before or args.no_cache:
        make_cache, cache_plan = False, ""
    if args.dry_run:
        print("\n".join(f"  {flag(name)} {value}" for name, value in config.items()))
    if cache_plan:
        print(cache_plan)
    trains_tokenizer = not tokenizer and not (out / "tokens.npy").exists()
    estimate = estimate_cost(args, source, config, models, device, trains_tokenizer)
    if args.dry_run:
        return None

    if (args.eval_fid or config["fid_every"]) and isinstance(source, TokenFile):
        raise UserError("--eval-fid and --fid-every need the images: give them instead of their tokens")
    inception = find_inception() if args.eval_fid or config["fid_every"] else None
    wants_lpips = config["perceptual"] and not tokenizer
    if args.lpips_weights and not wants_lpips:
        raise UserError("--lpips-weights: no tokenizer is trained here that uses them (--perceptual)")
    lpips, lpips_digest = None, before.get("lpips", "none")
    if wants_lpips and (args.lpips_weights or not (out / "tokens.npy").exists()):
        weights = read_lpips(find_lpips(args.lpips_weights))
        lpips, lpips_digest = LPIPS(weights).to(device), checkpoint.digest(weights)
    run_config = {
        "seed": args.seed, "data": source.name, "train_images": source.counts()[0],
        "held_out_images": source.counts()[1], "classes": source.class_names, "lpips": lpips_digest,
        "tokenizer": checkpoint.digest(tokenizer["tokenizer"]) if tokenizer else "own",
        "init": args.init or "none"} | config
    if not isinstance(source, TokenFile):
        run_config["sides"] = list(source.sizes())
    if "minutes" in before:
        run_config["minutes"] = before["minutes"]
    run_directory.require_same_run(out, before, run_config)
    skipped = run_directory.read_skipped(out) if before else None
    load_images = functools.lru_cache(lambda: load_through_cache(  # if a stage needs images at all
        source, config["size"], skipped, out / CACHE, make_cache and not (out / "tokens.npy").exists()))
    if rank_and_world()[0] == 0:
        run_directory.make(out, source, load_images, run_config, not before, args.allow_bad, stack)
        if tokenizer and not (out / "tokenizer.pt").exists():
            content = tokenizer | {"config": models["tokenizer"]}
            process.write_atomically(out / "tokenizer.pt", lambda partial: torch.save(content, partial))
    return SimpleNamespace(
        config=config, models=models, tokenizer_is_published="published" in models["tokenizer"],
        source=source, load_images=load_images,  # () -> (training, held-out) data.ImageSet
        out=out, seed=args.seed, device=device, began=began,
        lpips=lpips, inception=inception,  # a network and a file, or None
        init=init,  # {part: state dict} of --init
        minutes=None if "minutes" in before else args.minutes,
        micro_batch=estimate.micro_batch, eval_batch=estimate.eval_batch)  # rows per pass; without training


def check_options(args, source, out, device, init):
    """(config, models, content of --tokenizer or None); UserError for what does not fit, before any work."""
    file, tokenizer, from_tokenizer = args.tokenizer, None, {}
    if isinstance(source, TokenFile):  # tokens mean nothing without their tokenizer, so it decides
        file = args.tokenizer or source.path.parent / "tokenizer.pt"
    if file:
        tokenizer = read_tokenizer(file)
        from_tokenizer = options_of(tokenizer)
        init = {name: state for name, state in init.items() if name != "tokenizer"}
    config = resolve(args, source, device, from_tokenizer)
    for name, value in from_tokenizer.items():
        if config[name] != value:
            raise UserError(f"--tokenizer {file} has {name} {value}, this run {config[name]}: leave "
                            f"{flag(name)} away")
    smallest = 2 ** (len(LPIPS.STAGES) - 1)
    if config["perceptual"] and config["size"] < smallest:
        raise UserError(f"--perceptual needs images of at least {smallest} pixels: --perceptual 0")
    published = tokenizer["config"].get("published") if tokenizer else None
    models = describe_models(config, len(source.class_names), published)
    with torch.device("meta"), process.user_error():  # every size is checked here, and no memory is taken
        parts = {"tokenizer": make_tokenizer(models["tokenizer"]),
                 "model": EmbeddingDiffusion(**models["denoiser"])}
        ShiftedCosine(**models["schedule"])
        if config["gan"]:
            make_discriminator(config)
        restore(parts, None, init)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts.values()]
    kind = "bfloat16" if args.chip not in (None, "cpu") else precision(device)
    print(f"{out}: {parts['model'].N} tokens of {config['K']} codes per image, tokenizer {sizes[0]:.2f} M "
          f"parameters, denoiser {sizes[1]:.2f} M, on {args.chip or device} in {kind}")
    return config, models, tokenizer


def estimate_cost(args, source, config, models, device, trains_tokenizer):
    """cost.estimate of what is left of the run, printed; in full with --dry-run."""
    chip, (_, world) = cost.chip_of(device, args.chip), rank_and_world()
    estimate = cost.estimate(config, models, source.counts(), chip, world, trains_tokenizer=trains_tokenizer)
    print("\n".join(cost.report(estimate, args.dry_run)))
    return estimate


def read_init(name):
    """{part: state dict} of --init: a run directory, a ckpt.pt (its averaged weights), or a tokenizer.pt."""
    path, parts = Path(name), {}
    files = [path / "tokenizer.pt", *path.glob("ckpt.pt")] if path.is_dir() else [path]
    print(f"--init {name}: this run starts from its weights")
    for file in files:
        state = checkpoint.read_checkpoint(file, checkpoint.TOKENIZER_FORMAT, checkpoint.CHECKPOINT_FORMAT)
        parts |= {key: state[key] for key in ("tokenizer", "discriminator") if key in state}
        if "ema" in state:
            parts |= {"model": state["ema"], "ema": state["ema"]}
    return parts


def encode_tokens(run):
    """Stage 2, called by all ranks: tokens.npy. After it only --eval-fid opens images: their cache goes."""
    path = run.out / "tokens.npy"
    tokenizer, _ = load_tokenizer(run.models["tokenizer"], run.out, run.device)
    complete = broadcast(path.exists())
    if not complete and isinstance(run.source, TokenFile):
        open_tokens(run.source.path, tokenizer, run.source.class_names)
        process.main_process_first(lambda: process.write_atomically(
            path, lambda partial: shutil.copyfile(run.source.path, partial)))
    elif not complete:
        encode_sets(tokenizer, *run.load_images(), path, run.device, run.eval_batch, run.config["flip"])
        if run.load_images()[0].pixels is None:
            run.load_images.cache_clear()  # a file's space is free once nobody has it open
    process.main_process_first(lambda: remove_cache(run.out))
    rows = open_tokens(path, tokenizer, run.source.class_names)
    print(f"tokens: {'complete' if complete else path}, {len(rows):,} images x {rows['x'].shape[1]} tokens")
