"""All that comes before the first step: the data are found and looked at, every option and size is checked,
weights of others are fetched, and the run directory is made or recognised. Called by train.py.
"""

import dataclasses
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from embedding_diffusion import EmbeddingDiffusion
from engine import checkpoint, process
from engine.build import load_tokenizer, make_tokenizer, options_of, read_tokenizer, restore
from engine.config import CHANGEABLE, describe_models, flag, resolve
from engine.distributed import all_reduce_max, broadcast, choose_device, precision, rank_and_world
from engine.tokens import encode_sets, open_tokens
from engine.validate import UserError, printable, read_json
from extras import cost
from extras.data_arrays import TokenFile
from extras.datasets import DATASETS, WNID, find
from extras.grids import contact_sheet
from extras.image_cache import CACHE, load_through_cache, plan_cache, remove_cache
from extras.inception import find_inception
from extras.run_page import page_of_a_run
from extras.vqgan_losses import LPIPS, find_lpips, make_discriminator, read_lpips
from schedule import ShiftedCosine

__all__ = ["DATASETS", "MEMORY_ADVICE", "Run", "encode_tokens", "prepare"]
MEMORY_ADVICE = ("the same command goes on with a lower --micro-batch or --activation-checkpointing "
                 "(denoiser), a lower --eval-batch (pictures and evaluations), or, in another --out, "
                 "--tokenizer-batch (tokenizer)")


@dataclasses.dataclass
class Run:
    """What train.py works with."""

    config: dict             # every option of engine/config.py, resolved
    models: dict             # keyword arguments of the models: "tokenizer", "denoiser", "schedule"
    source: object           # the data.Source of the images, or a TokenFile
    load_images: Callable                                           # () -> (training, held-out) data.ImageSet
    out: Path                # the run directory
    seed: int
    device: torch.device
    lpips: object            # network of the perceptual loss, or None
    inception: object        # file of Inception's weights, or None
    init: dict               # {part: state dict} of --init
    minutes: float | None    # of --minutes, in a new run
    began: float             # time.monotonic() of the start
    micro_batch: int         # rows per pass on one device
    eval_batch: int          # the same without training

    @property
    def tokenizer_is_published(self):
        return "published" in self.models["tokenizer"]


def prepare(args, stack):
    """The Run of the command line; rank 0 looks first, then the others. After --dry-run the program ends
    here.

    stack: a contextlib.ExitStack that keeps the run directory's lock and page.
    """
    rank, world = rank_and_world()
    if rank:  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")
    run = process.main_process_first(lambda: prepare_rank(args, stack))
    if broadcast(run is None):
        sys.exit()
    run = run or prepare_rank(args, stack)
    # All take as many images at a time as the one with the least memory.
    run.micro_batch = -all_reduce_max(-(run.micro_batch or run.config["batch"] // world))
    run.eval_batch = -all_reduce_max(-run.eval_batch)
    process.catch_signals()
    return run


def prepare_rank(args, stack):
    began = time.monotonic()
    if args.seed < 0:
        raise UserError("--seed must not be negative")
    if args.eval_fid is not None and args.eval_fid < 2:
        raise UserError(f"--eval-fid {args.eval_fid}: must be at least 2, and 2,048 to mean anything")
    if args.chip and not args.dry_run:
        raise UserError("--for asks for the cost on another machine: give --dry-run with it")
    with process.user_error():
        device = choose_device(args.device)
    if args.chip:  # its presets, too
        device = torch.device("cpu" if args.chip == "cpu" else "cuda")
    elif device.type == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise UserError(f"more processes than GPUs, {torch.cuda.device_count()}: lower --nproc-per-node")

    source = find(args.data, args.root)
    has_images = not isinstance(source, TokenFile)
    if args.no_classes:
        if not has_images:
            raise UserError("--no-classes is for images; these tokens were made with or without classes")
        source.class_names = []
    out = Path(args.out or Path("runs") / source.name)
    previous_config = read_config(out)
    adopt(source, previous_config)
    print(source.describe())
    repeat_choices(args, previous_config, out)
    init = read_init(args.init) if args.init and not (out / "ckpt.pt").exists() else {}
    config, models, tokenizer = check_options(args, source, out, device, init)

    will_cache, cache_plan = plan_cache(source, config["size"], out)
    if args.dry_run:
        print("\n".join(f"  {flag(name)} {value}" for name, value in config.items()))
    if cache_plan and not args.no_cache and not previous_config:
        print(cache_plan)
    estimate = cost.estimate(config, models, source.counts(), cost.chip_of(device, args.chip), rank_and_world()[1],
                             trains_tokenizer=not tokenizer and not (out / "tokens.npy").exists())
    print("\n".join(cost.report(estimate)) if args.dry_run else cost.summary(estimate))
    for line in cost.advice(estimate, config, models):
        print(line)
    if args.dry_run:
        return None

    if (args.eval_fid or config["fid_every"]) and not has_images:
        raise UserError("--eval-fid and --fid-every need the images: give them instead of their tokens")
    inception = find_inception() if args.eval_fid or config["fid_every"] else None
    lpips, lpips_digest = find_perceptual(args, config, tokenizer, previous_config, out, device)
    run_config = {
        "seed": args.seed, "data": source.name, "train_images": source.counts()[0],
        "held_out_images": source.counts()[1], "classes": source.class_names, "lpips": lpips_digest,
        "tokenizer": checkpoint.digest(tokenizer["tokenizer"]) if tokenizer else "own", "init": args.init or "none",
        **config}
    if has_images:
        run_config["sides"] = list(source.sizes())
    if "minutes" in previous_config:
        run_config["minutes"] = previous_config["minutes"]
    require_same_run(out, previous_config, run_config)

    skipped = read_skipped(out / "skipped.txt") if previous_config else None
    make_cache = will_cache and not previous_config and not args.no_cache and not (out / "tokens.npy").exists()
    load_images = functools.lru_cache(  # if a stage needs images at all
        lambda: load(source, config["size"], skipped, out / CACHE, make_cache))
    if rank_and_world()[0] == 0:
        make_run_directory(args, source, load_images, models, tokenizer, run_config, out, previous_config, stack)
    return Run(config=config, models=models, source=source, load_images=load_images, out=out, seed=args.seed,
               device=device, lpips=lpips, inception=inception, init=init, began=began,
               minutes=None if "minutes" in previous_config else args.minutes,
               micro_batch=estimate.micro_batch, eval_batch=estimate.eval_batch)


# ----------------------------------------------------------------------------
# 1. What an earlier start of this run left.

def read_config(out):
    """config.json of an earlier start; {} if there was none."""
    if (out / "config.json").exists():
        return read_json(out / "config.json")
    # perhaps .part: of a start that was killed
    early = ("skipped.txt", "data.png", ".lock", CACHE, "config.json")
    if out.exists() and any(not path.name.startswith(early) for path in out.iterdir()):
        raise UserError(f"{out} exists, is not empty and is no run of train.py: give another --out")
    return {}


def adopt(source, previous_config):
    """What the first start found out about the images: their sides, and the words of ImageNet's classes."""
    if "sides" in previous_config:
        source.sides = tuple(previous_config["sides"])
    names = previous_config.get("classes", [])
    if names and all(WNID.match(name + " ") for name in source.class_names) and (
            [name.split(" ")[0] for name in names] == [name.split(" ")[0] for name in source.class_names]):
        source.class_names = names


def repeat_choices(args, previous_config, out):
    """What need not be given again: --init, and the steps that --minutes chose."""
    previous = previous_config.get("init", "none")
    if args.init:
        args.init = str(Path(args.init).resolve())
    elif previous != "none":
        args.init = previous
    planned, names = previous_config.get("minutes"), ("tokenizer_steps", "steps")
    if planned:
        if args.minutes not in (None, planned):
            raise UserError(f"{out} was planned for --minutes {planned:g}: leave that as it is; a higher "
                            "--steps trains it longer")
        for name in names:
            if getattr(args, name) is None:
                setattr(args, name, previous_config[name])
    elif args.minutes is not None:
        if not args.minutes > 0:
            raise UserError(f"--minutes {args.minutes:g}: must be more than 0")
        given = [flag(name) for name in names if getattr(args, name) is not None]
        if given:
            raise UserError(f"--minutes chooses {given[0]}: give one of the two")
        if (out / "tokenizer.csv").exists() or (out / "ckpt.pt").exists():
            raise UserError(f"--minutes is for a new run; {out} has its steps already: --steps trains it "
                            "longer")


def require_same_run(out, previous_config, run_config):
    """An existing run is continued as it was begun, but for what is CHANGEABLE; such changes are printed."""
    for name, value in run_config.items():
        before = previous_config.get(name, value)
        if before == value:
            continue
        if name not in CHANGEABLE:
            way_on = "give another --out, or the old setting to continue it"
            if name in ("train_images", "held_out_images", "classes"):
                way_on = f"give the images (and --no-classes or not) that it was begun with, or a new --out with " \
                         f"--init {out}, to start from its weights"
            raise UserError(f"{out} was made with {name} {printable(str(before)[:100])}, now {name} is "
                            f"{printable(str(value)[:100])}: {way_on}")
        print(f"{name} was {before}, from here on it is {value}")


# ----------------------------------------------------------------------------
# 2. Options, sizes and weights of others.

def check_options(args, source, out, device, init):
    """(config, models, content of --tokenizer or None); UserError for what does not fit, before any work."""
    tokenizer_file, tokenizer = args.tokenizer, None
    if isinstance(source, TokenFile):  # tokens mean nothing without their tokenizer, so it decides
        tokenizer_file = args.tokenizer or source.path.parent / "tokenizer.pt"
    if tokenizer_file:
        tokenizer = read_tokenizer(tokenizer_file)
    from_tokenizer = options_of(tokenizer) if tokenizer else {}
    config = resolve(args, source, device, from_tokenizer)
    for name, value in from_tokenizer.items():
        if config[name] != value:
            raise UserError(f"--tokenizer {tokenizer_file} has {name} {value}, this run {config[name]}: "
                            f"leave {flag(name)} away")
    if config["perceptual"] and config["size"] < 2 ** (len(LPIPS.STAGES) - 1):
        raise UserError(f"--perceptual needs images of at least {2 ** (len(LPIPS.STAGES) - 1)} pixels, not "
                        f"{config['size']}: --perceptual 0")
    models = describe_models(config, len(source.class_names), tokenizer and tokenizer["config"].get("published"))
    with torch.device("meta"), process.user_error():  # every size is checked here, and no memory is taken
        parts = {"tokenizer": make_tokenizer(models["tokenizer"]), "model": EmbeddingDiffusion(**models["denoiser"])}
        ShiftedCosine(**models["schedule"])
        if config["gan"]:
            make_discriminator(config)
        if tokenizer:
            init = {name: state for name, state in init.items() if name != "tokenizer"}
        restore(parts, None, init)
    if args.init and init:
        words = {"tokenizer": "tokenizer", "model": "denoiser"}
        used = " and ".join(words[name] for name in words if name in init)
        classes = "class_embedding.weight"
        same = init.get("model", {}).get(classes, parts["model"].class_embedding.weight).shape
        fresh = ", but for its classes" if same != parts["model"].class_embedding.weight.shape else ""
        print(f"--init {args.init}: this run starts from the weights of its {used}{fresh}")
    if not isinstance(source, TokenFile) and source.name != "toy" and source.sizes()[1] < config["size"]:
        print(f"most images have fewer than {config['size']} pixels a side and are enlarged: a smaller "
              "--size?")
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts.values()]
    kind = "bfloat16" if args.chip not in (None, "cpu") else precision(device)
    print(f"{out}: {parts['model'].N} tokens of {config['K']} codes per image, tokenizer {sizes[0]:.2f} M "
          f"parameters, denoiser {sizes[1]:.2f} M, on {device} in {kind}")
    return config, models, tokenizer


def find_perceptual(args, config, tokenizer, previous_config, out, device):
    """(LPIPS or None, digest of its weights or "none"). A tokenizer that wants it does not begin without
    it.
    """
    needed = config["perceptual"] and not tokenizer
    if args.lpips_weights and not needed:
        raise UserError("--lpips-weights: no tokenizer is trained here that uses them (--perceptual)")
    if not needed or (out / "tokens.npy").exists() and not args.lpips_weights:
        return None, previous_config.get("lpips", "none")
    weights = read_lpips(find_lpips(args.lpips_weights))
    return LPIPS(weights).to(device), checkpoint.digest(weights)


def read_init(name):
    """{part: state dict} of --init: a run directory, a ckpt.pt (its averaged weights), or a tokenizer.pt."""
    path, parts = Path(name), {}
    files = [path]
    if path.is_dir():
        files = [path / file for file in ("tokenizer.pt", "ckpt.pt") if (path / file).exists()]
        if not files:
            raise UserError(f"--init {name}: no tokenizer.pt and no ckpt.pt in it")
    for file in files:
        state = checkpoint.read_checkpoint(file, checkpoint.TOKENIZER_FORMAT, checkpoint.CHECKPOINT_FORMAT)
        parts |= {key: state[key] for key in ("tokenizer", "discriminator") if key in state}
        if "ema" in state:
            parts |= {"model": state["ema"], "ema": state["ema"]}
    return parts


# ----------------------------------------------------------------------------
# 3. The images and the run directory.

def load(source, size, skipped, cache, make):
    """(training, held-out) ImageSets, without labels where --no-classes took the class names away."""
    sets = load_through_cache(source, size, skipped, cache, make)
    if not source.class_names:
        for images in sets:
            images.class_names, images.labels = [], torch.zeros_like(images.labels)
    return sets


def make_run_directory(args, source, load_images, models, tokenizer, run_config, out, previous_config, stack):
    """Locks it, looks at the images at the first start; writes config.json, the page, a tokenizer that was
    given.
    """
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(process.lock(out))
    if not isinstance(source, TokenFile) and not previous_config:
        look_at_images(source, load_images, out, args.allow_bad)
    process.write_json(out / "config.json", run_config)
    stack.enter_context(page_of_a_run(out))
    if tokenizer and not (out / "tokenizer.pt").exists():
        checkpoint.save(out / "tokenizer.pt", tokenizer | {"config": models["tokenizer"]})


def look_at_images(source, load_images, out, allow_bad):
    """The first start of a run: every image is decoded once. Leaves skipped.txt and data.png in the run
    directory.
    """
    train, _ = load_images()
    skipped, total = source.skipped, sum(source.counts())
    lines = "".join(f"{printable(title)}\t{printable(reason)}\n" for title, reason in skipped.items())
    process.write_atomically(out / "skipped.txt", lambda partial: partial.write_text(lines, encoding="utf-8"))
    if skipped:
        print(f"{len(skipped):,} of {total:,} images ({len(skipped) / total:.2%}) cannot be used and are "
              f"left out: {out / 'skipped.txt'}")
    if len(skipped) > 0.01 * total and not allow_bad:
        title, reason = next(iter(skipped.items()))
        raise UserError(f"{len(skipped):,} of {total:,} images cannot be used, more than 1 %, e.g. {title} "
                        f"({reason}); all are in {out / 'skipped.txt'}: repair them or take them out, or add "
                        "--allow-bad")
    contact_sheet(train, out / "data.png")


def read_skipped(path):
    """skipped.txt -> {title: why not}; None if there is none, that is, if the images were not looked at
    yet.
    """
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.partition("\t")[::2] for line in lines)


def encode_tokens(run):
    """Stage 2: tokens.npy, every image encoded, or a copy of the tokens that an earlier run made. All ranks
    call this.

    After it only --eval-fid opens images: the cache of decoded ones is deleted.
    """
    path = run.out / "tokens.npy"
    tokenizer, _ = load_tokenizer(run.models["tokenizer"], run.out, run.device)
    complete = broadcast(path.exists())
    if not complete and isinstance(run.source, TokenFile):
        def copy():
            open_tokens(run.source.path, tokenizer, run.source.class_names)
            process.write_atomically(path, lambda partial: shutil.copyfile(run.source.path, partial))

        process.main_process_first(copy)
    elif not complete:
        encode_sets(tokenizer, *run.load_images(), path, run.device, run.eval_batch, run.config["flip"])
        if run.load_images()[0].pixels is None:
            run.load_images.cache_clear()  # a file's space is free once nobody has it open
    process.main_process_first(lambda: remove_cache(run.out))
    rows = open_tokens(path, tokenizer, run.source.class_names)
    print(f"tokens: {'complete, ' * complete}{len(rows):,} images x {rows['x'].shape[1]} tokens in {path}")
