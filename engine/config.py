"""Options and presets: every setting's type, default, range and help on a row, and the presets below.

The one place where a default of the method stands. A preset fills what the command line leaves open. All
sizes and step counts are ours, not the paper's.
"""

import argparse
import math
import sys

from engine.distributed import rank_and_world
from engine.validate import UserError, expect
from sample import SAMPLERS

POSITIVE = (1, 1 << 40)
NOT_NEGATIVE = (0, 1e9)
SHARE = (0, 1)
LOG_SNR = (-100, 100)
OPTIONS = {  # name: (type, default, range or choices, help); the flag is the name with dashes
    # images
    "size": (int, 32, POSITIVE, "pixels a side; images are centre-cropped and resized"),
    "flip": (bool, False, None, "train on both orientations: mirrored training images are encoded, too"),
    # tokenizer
    "f": (int, 4, POSITIVE, "down-sampling factor, a power of two: N = (size / f)^2 tokens"),
    "K": (int, 512, (2, 65536), "codebook size"),
    "code_dim": (int, 16, POSITIVE, "width of the tokenizer's codes"),
    "tokenizer_width": (int, 64, POSITIVE, "channels of its first level; doubles per level up to 4x"),
    "tokenizer_blocks": (int, 1, (1, 100), "residual blocks per level"),
    "codebook_update": (str, "ema", ("ema", "gradient"), "how the codebook moves"),
    "pixel_loss": (str, "l2", ("l2", "l1"), "squared or absolute difference"),
    "beta": (float, 0.25, NOT_NEGATIVE, "weight of the commitment loss"),
    "perceptual": (float, 0.0, NOT_NEGATIVE, "weight of LPIPS, 0: off; its weights are downloaded"),
    "gan": (float, 0.0, NOT_NEGATIVE, "weight of the patch discriminator's loss, 0: off"),
    "gan_lr": (float, 2e-4, NOT_NEGATIVE, "peak learning rate of the discriminator"),
    "gan_start": (float, 0.3, SHARE, "share of the steps after which the discriminator trains"),
    "tokenizer_steps": (int, 20000, POSITIVE, "training steps of the tokenizer"),
    "tokenizer_batch": (int, 128, POSITIVE, "images per tokenizer step"),
    "tokenizer_lr": (float, 4e-4, NOT_NEGATIVE, "its peak learning rate"),
    # embeddings and denoiser
    "D": (int, 16, POSITIVE, "width of the learned token embeddings"),
    "norm": (str, "rms", ("rms", "layer", "none"), "of an embedding: mean square 1; mean 0, too; or none"),
    "embedding_init": (str, "codebook", ("codebook", "random"), "the table starts at the codes, or normal"),
    "width": (int, 384, POSITIVE, "width of the transformer"),
    "depth": (int, 8, (1, 1000), "its blocks"),
    "heads": (int, 6, POSITIVE, "its attention heads"),
    "output_prior": (bool, True, None, "add log N(z_ti; alpha E_k, sigma^2) to the logits (Plaid)"),
    "posterior_input": (bool, True, None, "show the network E[e(x_i) | z_ti] beside z_ti (ours)"),
    # noise schedule and losses
    "shift": (float, 0.7, NOT_NEGATIVE, "s of the shifted cosine schedule; SNR is multiplied by s^2"),
    "log_snr_min": (float, -10 + 2 * math.log(0.7), LOG_SNR, "log(alpha^2 / sigma^2) at t = 1, pure noise"),
    "log_snr_max": (float, 3 + 2 * math.log(0.7), LOG_SNR, "the same at t = 0, where tokens are read out"),
    "w_rec": (float, 1.0, NOT_NEGATIVE, "weight of L_rec"),
    "w_diff": (float, 1.0, NOT_NEGATIVE, "weight of L_diff"),
    "w_cm": (float, 1.0, NOT_NEGATIVE, "weight of L_CM; 0 switches it off"),
    "weight_clip": (float, 5.0, (0, math.inf), "largest e^lambda in L_diff's weight; inf is the exact bound"),
    "rec_fraction": (float, 0.0625, SHARE, "share of the batch that sits at t = 0 and trains L_rec"),
    "cm_pairs": (str, "markov", ("markov", "shared"), "z_s of L_CM: a step back from z_t, or the same noise"),
    "max_gap": (float, 1.0, SHARE, "largest t - s of the two noisy images of L_CM"),
    "teacher": (str, "ema", ("current", "ema"), "weights of the CM teacher"),
    "max_drop_rate": (float, 0.1, SHARE, "embeddings are dropped at a rate drawn per image from [0, this]"),
    "label_drop": (float, 0.1, SHARE, "rate of dropped labels, for classifier-free guidance"),
    # optimisation of the denoiser
    "steps": (int, 50000, POSITIVE, "training steps of the denoiser; may be raised later"),
    "batch": (int, 256, (2, math.inf), "images per step, all GPUs and passes together; changes the result"),
    "lr": (float, 5e-4, NOT_NEGATIVE, "peak learning rate, reached after warmup, then cosine to zero"),
    "warmup": (int, 200, NOT_NEGATIVE, "warm-up steps, both stages"),
    "weight_decay": (float, 0.0, NOT_NEGATIVE, "AdamW's, denoiser"),
    "clip": (float, 1.0, (1e-6, math.inf), "largest gradient norm, both stages; inf: none is clipped"),
    "ema_decay": (float, 0.999, SHARE, "of the averaged weights that sample; shorter at the start"),
    # speed and memory: none of these changes what is trained, beyond rounding
    "micro_batch": (int, 0, NOT_NEGATIVE, "images per pass on one GPU; 0: its share of --batch, if it fits"),
    "eval_batch": (int, 256, POSITIVE, "largest batch in evaluation; sets the noise of the held-out bound"),
    "activation_checkpointing": (bool, False, None, "recompute the blocks in the backward pass"),
    "compile": (bool, False, None, "torch.compile the loss; takes a minute, needs a C++ compiler"),
    # sampling defaults, stored in the checkpoint
    "sample_steps": (int, 50, POSITIVE, "calls of the network per image"),
    "guidance": (float, 1.0, NOT_NEGATIVE, "omega; DiT's cfg-scale is 1 + omega; 0 is off"),
    "sampler": (str, "ancestral", SAMPLERS, "new noise at every step, or only at the start"),
    # bookkeeping
    "log_every": (int, 100, (1, 10000), "steps between status lines"),
    "sample_every": (int, 1000, POSITIVE, "steps between pictures and evaluations"),
    "save_every": (int, 500, POSITIVE, "steps between checkpoints"),
    "fid_every": (int, 0, NOT_NEGATIVE, "steps between FIDs of 2,048 samples, and at the end; 0: none"),
}
DEFAULTS = {name: default for name, (_, default, _, _) in OPTIONS.items()}
CHANGEABLE = {  # in a run that goes on; the last five help after a loss that is not finite
    "steps", "log_every", "sample_every", "save_every", "fid_every", "sample_steps", "guidance", "sampler",
    "micro_batch", "eval_batch", "activation_checkpointing", "compile",
    "lr", "tokenizer_lr", "gan_lr", "clip", "seed"}
TOKENIZER_OPTIONS = {  # argument of VQVAE: option
    "size": "size", "f": "f", "K": "K", "code_dim": "code_dim", "width": "tokenizer_width",
    "blocks": "tokenizer_blocks", "update": "codebook_update"}
GROUPS = {  # first option of a group: its title in --help
    "size": "images", "f": "tokenizer", "D": "embeddings and denoiser", "shift": "schedule and losses",
    "steps": "optimisation of the denoiser", "micro_batch": "speed and memory", "sample_steps": "sampling",
    "log_every": "bookkeeping"}

# ----------------------------------------------------------------------------
# Presets.

SHARP = dict(pixel_loss="l1", perceptual=1.0, gan=0.5)  # as in VQGAN; for fewer pixels the squared error does
LARGE = dict(**SHARP, size=256, f=16, K=1024, code_dim=32, tokenizer_width=96, tokenizer_steps=200000,
             tokenizer_batch=32, D=32, width=768, depth=12, heads=12, steps=400000, batch=96, lr=2e-4,
             ema_decay=0.9999)
GREY = dict(size=28, K=256, tokenizer_steps=10000, width=256, depth=6, heads=4, steps=30000)  # 7 x 7 tokens
PRESETS = {
    "toy": dict(size=20, K=256, tokenizer_width=32, tokenizer_steps=2000, tokenizer_batch=32,
                tokenizer_lr=4e-3, width=96, depth=2, heads=3, steps=2500, batch=64, lr=5e-3),
    "32-cpu": dict(size=32, K=512, tokenizer_width=32, tokenizer_steps=4000, tokenizer_batch=32,
                   tokenizer_lr=3e-3, width=128, depth=3, heads=4, steps=3000, batch=64, lr=4e-3),
    "32": dict(size=32),
    "64": dict(**SHARP, size=64, f=8, K=1024, tokenizer_width=96),
    "256": LARGE,
    "cifar10": dict(size=32, flip=True, steps=100000),
    "mnist": GREY,
    "fashion-mnist": GREY,
    # For one GPU of 24 GB or more. The smaller sets get a smaller network.
    "ffhq": LARGE | dict(flip=True, width=512, heads=8, batch=128, steps=300000),
    "lsun-churches": LARGE | dict(width=512, heads=8, batch=128, steps=300000),
    "lsun-bedrooms": LARGE | dict(tokenizer_steps=300000, steps=600000),
    "imagenet": LARGE | dict(flip=True, K=4096, tokenizer_steps=300000, steps=1000000),
}
WIDTHS = ((300000, 768), (50000, 512), (10000, 384), (0, 256))  # (training images, largest width for so many)
MAX_EPOCHS = 500
SMALL_SETS = {"cifar10", "fashion-mnist", "mnist"}  # fit the 32-cpu preset, which they get on a CPU


def choose_preset(dataset, median, on_cpu):
    """(preset for a published set, or for images of a median shorter side in pixels; the one on a GPU)."""
    on_gpu = dataset or ("32" if median <= 40 else "64" if median <= 128 else "256")
    if on_cpu and (dataset is None or dataset in SMALL_SETS):
        return "32-cpu", on_gpu
    return on_gpu, on_gpu


def adapt_to_size(config, given, n):
    """{option: value} to change in a preset that was chosen by the size of n images, but not in `given`.

    Few images need no large network, which would memorise them, and no thousand epochs.
    """
    width = next(width for least, width in WIDTHS if n >= least)
    changes = {}
    if width < config["width"] and not {"width", "heads"} & given.keys():
        changes = {"width": width, "heads": width // 64}
    for steps, batch in (("tokenizer_steps", "tokenizer_batch"), ("steps", "batch")):
        most = max(MAX_EPOCHS * n // config[batch], config[steps] // 10) // 100 * 100
        if steps not in given and most < config[steps]:
            changes[steps] = most
    return changes


# ----------------------------------------------------------------------------
# The command line.

ELSEWHERE = {  # a flag of other programs: what it is here
    "--epochs": "--steps counts optimizer steps; an epoch is the number of images / --batch of them",
    "--batch-size": "--batch (the denoiser's) and --tokenizer-batch; --micro-batch is one pass on one GPU",
    "--image-size": "--size", "--resolution": "--size", "--learning-rate": "--lr and --tokenizer-lr",
    "--resume": "the same command again continues a run; --init starts a new one from another run's weights",
    "--ema": "--ema-decay", "--cfg-scale": "--guidance, which is the cfg scale - 1", "--output": "--out",
    "--gpus": "torchrun --nproc-per-node N train.py ...", "--data-path": "--data",
    "--num-classes": "sub-folders are classes"}
EXAMPLES = """examples:
  python train.py                                          the built-in set
  python train.py --data photos --out runs/b --init runs/a       from another run's weights
  python train.py --data ffhq --root /datasets --dry-run   what would be done
  torchrun --nproc-per-node 8 train.py --data ffhq --root /datasets"""


def flag(name):
    return "--" + name.replace("_", "-")


def parse_arguments(names):
    """The command line of train.py. names: of the published sets, for the help text."""
    parser = argparse.ArgumentParser(
        description="Train VQ-LCMD: tokenizer, tokens, diffusion. The same command again continues. The "
        "defaults below are those without a preset; which preset is taken depends on the data and the "
        "device, and --dry-run prints all that this command would take.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    for word in (word.split("=")[0] for word in sys.argv[1:]):
        if word in ELSEWHERE:
            parser.error(f"{word}: {ELSEWHERE[word]}")
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        parser.error(f"{sys.argv[1]}: to train on it, give --data {sys.argv[1]}")
    add = parser.add_argument
    add("--data", default="toy", help=f"toy (built in), {', '.join(names)}, or a path: a folder of images, a "
        "zip, an LMDB, an array (.npy, .npz), a tokens.npy (default: toy)")
    add("--root", metavar="DIR", help="where the named set lies (default: $VQLCMD_DATA, then data/)")
    add("--no-classes", action="store_true", help="sub-folders (albums, say) are not classes")
    add("--no-cache", action="store_true", help="keep no decoded images while the tokenizer trains")
    add("--allow-bad", action="store_true", help="train even if more than 1%% of images are bad")
    add("--preset", choices=list(PRESETS), help="default: by the set's name, or by image size and device")
    add("--out", help="run directory (default: runs/NAME_OF_DATA)")
    add("--stage", choices=["all", "tokenizer", "tokens", "diffusion"], default="all", help="run only this")
    add("--tokenizer", metavar="FILE", help="train none: that of another run, or a VQGAN's checkpoint")
    add("--init", metavar="RUN", help="start from the weights of another run of the same sizes")
    add("--lpips-weights", nargs="+", metavar="FILE", help="VGG-16 and LPIPS, or a VQGAN's checkpoint, which "
        "has both (default: download)")
    add("--minutes", type=float, metavar="X", help="choose the steps so that training takes this long here")
    add("--eval-fid", type=int, metavar="N", help="at the end, FID of N samples against the training images")
    add("--seed", type=int, default=0, help="of every random draw (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dry-run", action="store_true", help="print all settings and what they cost: memory, hours, disk")
    chips = ["a100-80", "h100", "h200", "3090", "4090", "cpu"]
    add("--for", dest="chip", choices=chips, help="with --dry-run: the cost on this machine")
    group = parser
    for name, (kind, default, choices, text) in OPTIONS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        text += f" (default: {f'{default:.4g}' if kind is float else default})"
        if kind is bool:
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
        elif kind is str:
            group.add_argument(flag(name), choices=choices, help=text)
        else:
            group.add_argument(flag(name), type=kind, metavar="N" if kind is int else "X", help=text)
    return parser.parse_args()


def resolve(args, source, device, from_tokenizer):
    """All options: defaults, then the preset, then those of a given tokenizer, then the command line."""
    preset = args.preset
    if preset is None:
        median = from_tokenizer.get("size") or source.sizes()[1]
        preset, on_gpu = choose_preset(source.dataset, median, device.type == "cpu")
        hint = f"; on a GPU it would be {on_gpu}" if preset == "32-cpu" else ""
        print(f"preset {preset}: chosen for {source.dataset or 'images'} of {median} pixels on "
              f"{device.type}{hint} (--preset)")
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    config = DEFAULTS | PRESETS[preset] | from_tokenizer | given
    if args.preset is None and not source.dataset:
        n = source.counts()[0]
        changes = adapt_to_size(config, given, n)
        if changes:
            print(f"  for {n:,} training images: " + ", ".join(
                f"{flag(name)} {value} instead of {config[name]}" for name, value in changes.items()))
        config |= changes
    for name, value in config.items():
        check_option("", name, value)
    if source.class_names and not config["label_drop"]:  # the null class is never trained
        if given.get("guidance"):
            raise UserError("--label-drop 0 leaves nothing to guide away from: give --guidance 0, too")
        config["guidance"] = 0.0
    for batch, rate in (("batch", "lr"), ("tokenizer_batch", "tokenizer_lr")):
        usual = (DEFAULTS | PRESETS[preset])[batch]
        if config[batch] < usual and rate not in given:
            print(f"  {flag(batch)} {config[batch]} is less than this preset's {usual}: a lower {flag(rate)} "
                  f"suits it better, {config[rate] * (config[batch] / usual) ** (1 / 3):.2g}")
    _, world = rank_and_world()
    for name, least in (("batch", 2), ("tokenizer_batch", 1)):
        if config[name] % world or config[name] < least * world:
            raise UserError(f"{flag(name)} {config[name]}: must be a multiple of {world} processes, at least "
                            f"{least * world}")
    return config


def check_option(where, name, value):
    """UserError if an option has a value that it cannot have. where: its file, "" for the command line."""
    if name not in OPTIONS:
        raise UserError(f"{where} has the entry {name!r}, which is no option")
    kind, _, allowed, _ = OPTIONS[name]
    entry = f"{where}: {name}" if where else flag(name)
    if kind is str:
        expect(entry, value, allowed)
    else:
        expect(entry, value, kind, *(allowed or ()))


def describe_models(config, num_classes, published=None):
    """Keyword arguments of the models, as checkpoints have them. published: {name: shape} of a VQGAN."""
    tokenizer = {name: config[option] for name, option in TOKENIZER_OPTIONS.items()}
    if published is not None:
        tokenizer = {"published": published, "size": config["size"]}
    denoiser = {name: config[name] for name in ("K", "D", "width", "depth", "heads", "norm", "output_prior",
                                                "posterior_input")}
    denoiser |= {"grid": (config["size"] // config["f"],) * 2, "num_classes": num_classes}
    schedule = {name: config[name] for name in ("shift", "log_snr_min", "log_snr_max")}
    return {"tokenizer": tokenizer, "denoiser": denoiser, "schedule": schedule}
