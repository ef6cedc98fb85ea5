"""All that comes before the first step: the data are found and looked at, every option and size is checked, weights of
others are fetched, and the run directory is made or recognised. Called by train.py.
"""

import functools
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from embedding_diffusion import EmbeddingDiffusion
from engine.checkpoint import (
    CHECKPOINT_FORMAT,
    TOKENIZER_FORMAT,
    digest,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from engine.config import describe_models, flag, resolve
from engine.distributed import all_reduce_max, broadcast, choose_device, precision, rank_and_world
from engine.process import (
    catch_signals,
    in_turns,
    lock,
    main_process_first,
    on_out_of_memory,
    require_shared,
    user_error,
    write_atomically,
    write_json,
)
from engine.read_back import UserError
from engine.stored import CACHE, keep_promises, read_config, read_skipped, require_same_run, write_skipped
from engine.tokens import options_of, read_tokenizer
from extras.cost import advice, chip_of, estimate, report, summary
from extras.data_arrays import TokenFile
from extras.datasets import find
from extras.fid_sources import FEW
from extras.grids import contact_sheet
from extras.image_cache import load_through_cache, plan_cache
from extras.inception import find_inception
from extras.published_vqgan import make_tokenizer
from extras.run_page import page_of_a_run
from extras.sampling_options import WNID
from extras.vqgan_losses import LPIPS, find_lpips, make_discriminator, read_lpips
from schedule import ShiftedCosine


def prepare(args, held):
    """The run of the command line `args`, or None after --dry-run. Process 0 looks first, then the others.

    held: a contextlib.ExitStack that keeps the run directory's lock and page. The run is a namespace with config,
    models, source, load_images() -> (train, held-out) ImageSets, out, seed, device, lpips, inception, init (weights to
    start from), minutes (None: the steps are known), began (when, by time.monotonic()), tokenizer_is_published;
    micro_batch and eval_batch, which are the config's or what fits the memory; and
    eval_memory(), a context in which too little memory is a matter of --eval-batch.
    """
    rank, _ = rank_and_world()
    if rank:  # process 0 speaks for all
        sys.stdout = open(os.devnull, "w")
    run = main_process_first(lambda: prepare_one(args, held))
    out = broadcast(run and str(run.out))
    if out is None:
        return None
    require_shared(Path(out))
    run = in_turns(lambda: run or prepare_one(args, held))
    share = run.config["batch"] // rank_and_world()[1]
    # All take as many images at a time as the one with the least memory.
    run.micro_batch, run.eval_batch = (-all_reduce_max(-n) for n in (run.micro_batch or share, run.eval_batch))
    catch_signals()
    return run


def prepare_one(args, held):
    if args.seed < 0:
        raise UserError("--seed must not be negative")
    if args.eval_fid is not None and args.eval_fid < 2:
        raise UserError(f"--eval-fid {args.eval_fid}: must be at least 2, and 2,048 to mean anything")
    if args.chip and not args.dry_run:
        raise UserError("--for asks for the price on another machine: give --dry-run with it")
    with user_error():
        device = choose_device(args.device)
    if args.chip:  # its presets, too
        device = torch.device("cpu" if args.chip == "cpu" else "cuda")
    elif device.type == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise UserError(f"more processes than GPUs, {torch.cuda.device_count()}: lower --nproc-per-node")
    began, source = time.monotonic(), find(args.data, args.root)
    if args.no_classes:
        if isinstance(source, TokenFile):
            raise UserError("--no-classes is for images; these tokens were made with or without classes")
        source.class_names = []
    out = Path(args.out or Path("runs") / source.name)
    stored = read_config(out)
    if "sides" in stored:  # known since the first start: no image is opened for it again
        source.sides = tuple(stored["sides"])
    wnids, names = ([name.split(" ")[0] for name in names] for names in (stored.get("classes", []), source.class_names))
    if wnids == names and all(WNID.match(name + " ") for name in names):  # with the words of the first start, or none
        source.class_names = stored.get("classes", source.class_names)
    print(source.describe())
    keep_promises(args, stored, out)
    init = read_init(args.init, stored and out) if args.init and not (out / "ckpt.pt").exists() else {}
    config, models, tokenizer = check_options(args, source, out, device, init, not stored or "by_number" in stored)
    cached, cache_plan = plan_cache(source, config["size"], out)
    if args.dry_run:
        print("\n".join([*(f"  {flag(name)} {value}" for name, value in config.items()),
                         *[cache_plan] * bool(cache_plan and not args.no_cache)]))
    price = find_price(args, source, config, models, tokenizer, out, device)
    if args.dry_run:
        return
    lpips, inception, asked = gather_weights(args, source, out, config, tokenizer, stored, device)
    require_same_run(out, stored, asked)
    skipped = read_skipped(out / "skipped.txt") if stored else None
    cached = cached and not stored and not args.no_cache  # made by the first start, when each image is opened anyway
    load_images = functools.lru_cache(  # if a stage needs images at all
        lambda: load(source, config["size"], skipped, out / CACHE, cached and not (out / "tokens.npy").exists()))
    if not stored and not args.no_cache and cache_plan:
        print(cache_plan)
    if rank_and_world()[0] == 0:
        make_run_directory(args, source, load_images, models, tokenizer, asked, out, stored, held)
    return SimpleNamespace(
        config=config, models=models, source=source, load_images=load_images, out=out, seed=args.seed, device=device,
        lpips=lpips, inception=inception, init=init, began=began, minutes=None if "minutes" in stored else args.minutes,
        tokenizer_is_published="published" in models["tokenizer"],
        micro_batch=price.micro_batch, eval_batch=price.eval_batch,
        eval_memory=lambda: on_out_of_memory(f"lower --eval-batch {price.eval_batch}, and the run goes on"))


def load(source, size, skipped, cache, make):
    """source.load or its cache, without labels where --no-classes took the class names away."""
    sets = load_through_cache(source, size, skipped, cache, make)
    for images in sets if not source.class_names else ():
        images.class_names, images.labels = [], torch.zeros_like(images.labels)
    return sets


# ----------------------------------------------------------------------------
# 1. Options and sizes.

def check_options(args, source, out, device, init, by_number):
    """(config, models, content of --tokenizer or None); UserError for what does not fit, before any work."""
    tokenizer_file, tokenizer = args.tokenizer, None
    if isinstance(source, TokenFile):  # tokens mean nothing without their tokenizer, so it decides
        tokenizer_file = args.tokenizer or source.path.parent / "tokenizer.pt"
    if tokenizer_file:
        tokenizer = read_tokenizer(tokenizer_file)
    fixed = options_of(tokenizer) if tokenizer else {}
    config, (_, world) = resolve(args, source, device, fixed, by_number), rank_and_world()
    for name, value in fixed.items():
        if config[name] != value:
            raise UserError(f"--tokenizer {tokenizer_file} has {name} {value}, this run {config[name]}: leave "
                            f"{flag(name)} away")
    for name, least in (("batch", 2), ("tokenizer_batch", 1)):
        if config[name] % world or config[name] < least * world:
            raise UserError(f"{flag(name)} {config[name]}: must be a multiple of the number of "
                            f"processes, {world}{', and at least twice as many' * (least - 1)}")
    if config["fsdp"] and world == 1:
        raise UserError("--fsdp splits the weights among processes: start them by torchrun --nproc-per-node")
    if config["fsdp"] and torch.__version__ < "2.8":
        raise UserError(f"--fsdp needs PyTorch 2.8 or later, this is {torch.__version__}: leave it away")
    if config["fsdp"] and config["fid_every"] and FEW % world:
        raise UserError(f"--fid-every with --fsdp: {world} processes must have equal shares of {FEW:,} samples")
    models = describe_models(config, len(source.class_names), tokenizer and tokenizer["config"].get("published"))
    with torch.device("meta"), user_error():  # every size is checked here, before any work
        parts = make_tokenizer(models["tokenizer"]), EmbeddingDiffusion(**models["denoiser"])
        ShiftedCosine(**models["schedule"])
        if config["gan"]:
            make_discriminator(config)
        restore({"model": parts[1]} | ({} if tokenizer else {"tokenizer": parts[0]}), None, init)
    if init:
        used = [word for key, word in (("tokenizer", "tokenizer"), ("model", "denoiser")) if key in init and not (
            tokenizer and key == "tokenizer")]
        given, own = (state.get("class_embedding.weight") for state in (init.get("model", {}), parts[1].state_dict()))
        anew = "" if given is None or own is None or given.shape == own.shape else ", but for its classes"
        print(f"--init {args.init}: this run starts from the weights of its {' and '.join(used)}{anew}" if used else
              f"--init {args.init}: nothing of it is used, with --tokenizer")
    if not isinstance(source, TokenFile) and source.name != "toy" and source.sizes()[1] < config["size"]:
        print(f"most images have fewer than {config['size']} pixels a side and are enlarged: a smaller --size?")
    if config["perceptual"] and config["size"] < (least := 2 ** (len(LPIPS.STAGES) - 1)):
        raise UserError(f"--perceptual needs images of at least {least} pixels, not {config['size']}: --perceptual 0")
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    kind = "bfloat16" if args.chip not in (None, "cpu") else precision(device)
    print(f"{out}: {parts[1].N} tokens of {config['K']} codes per image, tokenizer {sizes[0]:.2f} M parameters, "
          f"denoiser {sizes[1]:.2f} M, on {device} in {kind}")
    return config, models, tokenizer


def find_price(args, source, config, models, tokenizer, out, device):
    """cost.estimate of what is left of the run; says it in a line, with --dry-run in full, and what does not fit."""
    found = estimate(config, models, source.counts(), chip_of(device, args.chip), rank_and_world()[1],
                     trains_tokenizer=not tokenizer and not (out / "tokens.npy").exists())
    print("\n".join(report(found)) if args.dry_run else summary(found))
    for line in advice(found):
        print(line)
    return found


# ----------------------------------------------------------------------------
# 2. Weights of others.

def gather_weights(args, source, out, config, tokenizer, stored, device):
    """(LPIPS or None, file of Inception's weights or None, all that makes this run this run)."""
    counts, has_images = source.counts(), not isinstance(source, TokenFile)
    if (args.eval_fid or config["fid_every"]) and not has_images:
        raise UserError("--eval-fid and --fid-every need the images: give them instead of their tokens")
    inception = find_inception(instead="set $FID_WEIGHTS (`python -m extras.downloads`, where there is a network, "
                               "fetches all weights)") if args.eval_fid or config["fid_every"] else None
    asked = {"seed": args.seed, "data": source.name, "train_images": counts[0], "held_out_images": counts[1],
             "classes": source.class_names, "lpips": stored.get("lpips", "none"),
             "tokenizer": digest(tokenizer["tokenizer"]) if tokenizer else "own", "init": args.init or "none",
             **({"minutes": stored["minutes"]} if "minutes" in stored else {}),
             **({"sides": list(source.sizes())} if has_images else {}), **config}
    if not stored or "by_number" in stored:  # runs of earlier versions keep their size
        asked["by_number"] = True
    if args.lpips_weights and (tokenizer or not config["perceptual"]):
        raise UserError("--lpips-weights: no tokenizer is trained here that uses them (--perceptual)")
    lpips, open_question = None, stored.get("lpips") != "none" and not (out / "tokens.npy").exists()
    if config["perceptual"] and not tokenizer and (open_question or args.lpips_weights):
        lpips, asked["lpips"] = load_lpips(args.lpips_weights, device)
    elif config["perceptual"] and not tokenizer and stored.get("lpips") == "none":
        print("This run was begun without the weights of its perceptual loss, and goes on without it")
    return lpips, inception, asked


def load_lpips(files, device):
    """(network of the perceptual loss, digest of its weights). Hours without it would be lost: it is that or a stop."""
    try:
        state = read_lpips(find_lpips(files))
    except UserError as error:
        raise error if files else UserError(
            f"the tokenizer's perceptual loss needs weights: {error}. Where there is a network, `python -m "
            "extras.downloads` fetches all weights into the cache; --perceptual 0 trains without it") from error
    return LPIPS(state).to(device), digest(state)


def read_init(name, continued=None):
    """{part: state dict} of --init: a run directory, a ckpt.pt (its averaged weights), or a tokenizer.pt.

    continued: the directory of a run that was begun with it, whose denoiser has no checkpoint yet.
    """
    path = Path(name)
    if continued and not path.exists():
        raise UserError(f"{continued} was begun with --init {name}, whose weights it needs until its own ckpt.pt is "
                        "there, and they are gone: put them back, or begin anew in another --out")
    files = [path / "tokenizer.pt", path / "ckpt.pt"] if path.is_dir() else [path]
    states = [read_checkpoint(file, TOKENIZER_FORMAT, CHECKPOINT_FORMAT) for file in files if file.exists() or len(
        files) == 1]
    if not states:
        raise UserError(f"--init {name}: no tokenizer.pt and no ckpt.pt in it")
    parts = {}
    for state in states:
        parts |= {key: state[key] for key in ("tokenizer", "discriminator") if key in state}
        parts |= {"model": state["ema"], "ema": state["ema"]} if "ema" in state else {}
    return parts


# ----------------------------------------------------------------------------
# 3. The run directory.

def make_run_directory(args, source, load_images, models, tokenizer, asked, out, stored, held):
    """Locks it, looks at the images at the first start; writes config.json, the page, a tokenizer that was given."""
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(lock(out))
    if not isinstance(source, TokenFile) and not stored:
        look_at_images(source, load_images, out, args.allow_bad)
    write_json(out / "config.json", asked)
    held.enter_context(page_of_a_run(out))
    if tokenizer and not (out / "tokenizer.pt").exists():
        tokenizer["config"] = models["tokenizer"]
        save_checkpoint(out / "tokenizer.pt", tokenizer)


def look_at_images(source, load_images, out, allow_bad):
    """The first start of a run: every image is decoded once. Leaves skipped.txt and data.png in the run directory."""
    train, _ = load_images()
    bad, total = source.skipped, sum(source.counts())
    write_atomically(out / "skipped.txt", lambda partial: write_skipped(partial, bad))
    if bad:
        print(f"{len(bad):,} of {total:,} images ({len(bad) / total:.2%}) cannot be used and are left out: "
              f"{out / 'skipped.txt'}")
    if len(bad) > 0.01 * total and not allow_bad:
        title, reason = next(iter(bad.items()))
        raise UserError(f"{len(bad):,} of {total:,} images cannot be used, more than 1 %, e.g. {title} ({reason}); all "
                        f"are in {out / 'skipped.txt'}: repair them or take them out, or add --allow-bad")
    contact_sheet(train, out / "data.png")
