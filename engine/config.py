"""Options: each has its type, default, range and help in one table; a preset (engine/presets.py) fills what the command
line leaves open.

The one place where a default of the method stands. Called by engine/prepare.py; extras and experiments read DEFAULTS.
All sizes and step counts are ours, not the paper's.
"""

import argparse
import math
import sys

from engine.distributed import choose_device, rank_and_world
from engine.presets import GROW, PRESETS, choose_preset, for_gpus, suit_number
from engine.read_back import UserError, expect, shown

OPTIONS = {  # name: (type, default, help); the flag is the name with dashes
    "size": (int, 32, "pixels a side; images are centre-cropped and resized"),
    "flip": (bool, False, "train on both orientations; tokens of the mirrored training images are written too"),
    # tokenizer
    "f": (int, 4, "down-sampling factor, a power of two: N = (size / f)^2 tokens"),
    "K": (int, 512, "codebook size"),
    "code_dim": (int, 16, "width of the tokenizer's codes"),
    "tokenizer_width": (int, 64, "channels of its first level; doubles per level up to 4x"),
    "tokenizer_blocks": (int, 1, "residual blocks per level"),
    "codebook_update": (("ema", "gradient"), "ema", "how the codebook moves"),
    "codebook_distance": (("euclidean", "cosine"), "euclidean", "between vectors and codes; cosine: directions alone"),
    "pixel_loss": (("l2", "l1"), "l2", "squared or absolute difference"),
    "beta": (float, 0.25, "weight of the commitment loss"),
    "perceptual": (float, 0.0, "weight of the perceptual loss LPIPS, 0: off; its weights are downloaded"),
    "gan": (float, 0.0, "weight of the patch discriminator's loss, 0: off"),
    "gan_lr": (float, 2e-4, "peak learning rate of the discriminator"),
    "gan_start": (float, 0.3, "share of the steps before the discriminator trains; a little later the decoder sees it"),
    "tokenizer_steps": (int, 20000, "training steps of the tokenizer"),
    "tokenizer_batch": (int, 128, "images per tokenizer step"),
    "tokenizer_lr": (float, 4e-4, "its peak learning rate"),
    # embeddings and denoiser
    "D": (int, 16, "width of the learned token embeddings"),
    "norm": (("rms", "layer", "none"), "rms", "keeps embeddings at one length: mean square 1, that and mean 0, or not"),
    "embedding_init": (("codebook", "random"), "codebook", "start of the table: the tokenizer's codebook, or normal"),
    "width": (int, 384, "width of the transformer"),
    "depth": (int, 8, "its blocks"),
    "heads": (int, 6, "its attention heads"),
    "output_prior": (bool, True, "add to the logits what a token's own noisy embedding says, in closed form (Plaid)"),
    "posterior_input": (bool, True, "show the network E[e(x_i) | z_ti] beside z_ti, in closed form (ours)"),
    # schedule and losses
    "shift": (float, 0.7, "s of the shifted cosine schedule; SNR is multiplied by s^2"),
    "log_snr_min": (float, -10.0, "log(alpha^2 / sigma^2) at t = 1: lower is purer noise to start from"),
    "log_snr_max": (float, 3.0, "the same at t = 0, where the tokens are read out; both before the shift"),
    "w_rec": (float, 1.0, "weight of L_rec"),
    "w_diff": (float, 1.0, "weight of L_diff"),
    "w_cm": (float, 1.0, "weight of L_CM; 0 switches it off"),
    "weight_clip": (float, 5.0, "largest e^lambda in the weight of the trained L_diff; inf is the exact bound"),
    "rec_fraction": (float, 0.0625, "share of the batch that is hardly noised (t = 0) and trains L_rec alone"),
    "cm_pairs": (("markov", "shared"), "markov", "L_CM's cleaner image: a step back from the other, or the same noise"),
    "max_gap": (float, 1.0, "how far apart in time L_CM's two noisy images may be"),
    "teacher": (("current", "ema"), "ema", "weights of the CM teacher"),
    "max_drop_rate": (float, 0.1, "embeddings are dropped at a rate that is drawn per image from [0, this]"),
    "label_drop": (float, 0.1, "rate of dropped labels, for classifier-free guidance"),
    # optimisation of the denoiser
    "steps": (int, 50000, "training steps of the denoiser; may be raised later"),
    "batch": (int, 256, "images per step, all GPUs and passes together; it changes the result"),
    "lr": (float, 5e-4, "peak learning rate, reached after warmup, then cosine to zero"),
    "warmup": (int, 200, "warm-up steps, both stages"),
    "weight_decay": (float, 0.0, "AdamW's, denoiser"),
    "clip": (float, 1.0, "largest gradient norm, both stages; inf: none is clipped"),
    "ema_decay": (float, 0.999, "of the averaged weights that sample; shorter at the start"),
    # speed and memory: none of these changes what is trained, beyond rounding
    "micro_batch": (int, 0, "images at once on one GPU, which is what takes memory; 0: its share of --batch, or as "
                    "many as fit"),
    "eval_batch": (int, 256, "images at a time where nothing is trained, or as many as fit the memory; changes the "
                   "noise of the held-out bound"),
    "activation_checkpointing": (bool, False, "compute the blocks again in the backward pass instead of keeping them"),
    "compile": (bool, False, "torch.compile the loss; faster on a GPU after a minute, needs a C++ compiler"),
    "fsdp": (bool, False, "under torchrun, split weights, EMA and optimizer among the processes (FSDP2)"),
    # sampling defaults, stored in the checkpoint
    "sample_steps": (int, 50, "calls of the network per image"),
    "guidance": (float, 1.0, "omega of classifier-free guidance; DiT's cfg-scale is 1 + omega; 0 is off"),
    "sampler": (("ancestral", "ddim"), "ancestral", "with new noise at every step, or only at the start"),
    # bookkeeping
    "log_every": (int, 100, "steps between status lines"),
    "sample_every": (int, 1000, "steps between pictures and evaluations"),
    "save_every": (int, 500, "steps between checkpoints"),
    "fid_every": (int, 0, "steps between FID-2k, of 2,048 samples (minutes on a CPU), at the end too; 0: none"),
}
RENAMED = {  # old name of an option, an argument or an entry: its name today
    "p_drop": "max_drop_rate", "max_snr": "weight_clip", "coupling": "cm_pairs", "likelihood": "output_prior",
    "judge": "discriminator", "judges": "discriminator_optimizer"}
DEFAULTS = {name: default for name, (_, default, _) in OPTIONS.items()}
SHARES = ("rec_fraction", "max_drop_rate", "label_drop", "max_gap", "ema_decay", "gan_start")
LIMITS = {  # where not 0 ... inf, or 1 ... inf for whole numbers; tokens are stored in 16 bits
    "K": (2, 65536), "batch": (2, math.inf), "warmup": (0, math.inf), "micro_batch": (0, math.inf),
    "clip": (1e-6, math.inf), "fid_every": (0, math.inf), "log_every": (1, 10000), "log_snr_min": (-math.inf, math.inf),
    "log_snr_max": (-math.inf, math.inf)} | {name: (0, 1) for name in SHARES}
CHANGEABLE = {  # when a run goes on: how long, how fast, how often, and what helps after a loss that is not finite
    "steps", "log_every", "sample_every", "save_every", "fid_every", "sample_steps", "guidance", "sampler",
    "micro_batch", "eval_batch", "activation_checkpointing", "compile", "fsdp", "lr", "tokenizer_lr", "gan_lr", "clip",
    "seed"}

GROUPS = {  # first option of a group: its title in --help
    "size": "images", "f": "tokenizer", "D": "embeddings and denoiser", "shift": "noise schedule and losses",
    "steps": "optimisation of the denoiser", "micro_batch": "speed and memory; nothing that is trained changes",
    "sample_steps": "sampling, stored in the checkpoint", "log_every": "bookkeeping"}
ELSEWHERE = {  # what other programs call it: what it is here
    "--epochs": "--steps counts optimizer steps; an epoch is the number of images / --batch of them",
    "--batch-size": "--batch (the denoiser's) and --tokenizer-batch; --micro-batch is what one pass takes at a time",
    "--image-size": "--size", "--resolution": "--size", "--learning-rate": "--lr (the denoiser's) and --tokenizer-lr",
    "--resume": "the same command again continues a run; --init starts a new one from another run's weights",
    "--ema": "--ema-decay", "--cfg-scale": "--guidance, which is the cfg scale - 1", "--output": "--out",
    "--gpus": "torchrun --nproc-per-node N train.py ...", "--data-path": "--data",
    "--num-classes": "sub-folders are classes"}
EXAMPLES = """examples:
  python train.py                                          the built-in set
  python train.py --data photos --no-classes               your own images, of one kind
  python train.py --data photos --out runs/b --init runs/a       from another run's weights
  python train.py --data ffhq --root /datasets --dry-run   what would be done
  torchrun --nproc-per-node 8 train.py --data ffhq --root /datasets --gpus-like 8"""
TOKENIZER_OPTIONS = {"size": "size", "f": "f", "K": "K", "code_dim": "code_dim", "width": "tokenizer_width",
                     "blocks": "tokenizer_blocks", "update": "codebook_update",
                     "distance": "codebook_distance"}  # argument of VQVAE: option


def flag(name):
    return "--" + name.replace("_", "-")


def parse_arguments(names, words=None):
    """The command line of train.py. names: of the published sets, for the help text."""
    words = sys.argv[1:] if words is None else words
    preset = preset_for_help(words, names)
    defaults = DEFAULTS | PRESETS.get(preset, {})
    parser = argparse.ArgumentParser(
        description="Train VQ-LCMD: tokenizer, tokens, diffusion. The same command again continues. Defaults from "
        "--size on are " + (f"those of preset {preset}, which this command would take" if preset else "those without "
                            "a preset: which one is taken depends on the size of the images") + "; see those of "
        "another by --preset NAME --help, and all that is taken by --dry-run.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    for word in words:
        if (answer := ELSEWHERE.get(word.split("=")[0])) is not None:
            parser.error(f"{word.split('=')[0]}: {answer}")
    if words and not words[0].startswith("-"):
        parser.error(f"{words[0]}: to train on it, give --data {words[0]}")
    parser.add_argument("--data", default="toy", help=f"toy (built in), {', '.join(names)}, or a path: a "
                        "folder of images, a zip, an LMDB, an array (.npy, .npz), a tokens.npy (default: toy)")
    parser.add_argument("--root", metavar="DIR", help="where the named set lies (default: $VQLCMD_DATA, then data/)")
    parser.add_argument("--no-classes", action="store_true", help="sub-folders (albums, say) are not classes")
    parser.add_argument("--no-cache", action="store_true", help="do not keep decoded images in the run directory "
                        "while the tokenizer trains")
    parser.add_argument("--allow-bad", action="store_true", help="train even if more than 1%% of images are bad")
    parser.add_argument("--preset", choices=list(PRESETS), help="default: by name, or by image size, device and number "
                        "of images. Those of 256 pixels are for one GPU of 24 GB or more; with eight: --gpus-like 8")
    parser.add_argument("--gpus-like", type=int, default=1, metavar="S", help="train as suits S GPUs, on however "
                        "many: the preset's batches times S, rates times S^(1/3), steps divided by S^(2/3) (8: batch "
                        "times 8, rate times 2, a quarter of the steps; default: 1)")
    parser.add_argument("--out", help="run directory (default: runs/NAME_OF_DATA)")
    parser.add_argument("--stage", choices=["all", "tokenizer", "tokens", "diffusion"], default="all",
                        help="run only this stage (default: all)")
    parser.add_argument("--tokenizer", metavar="FILE", help="train none, but take that of another run (its "
                        "tokenizer.pt or ckpt.pt), or the checkpoint of a VQGAN of taming-transformers or "
                        "latent-diffusion; it decides f, K and so on")
    parser.add_argument("--init", metavar="RUN", help="start from the weights of another run (its directory, ckpt.pt "
                        "or tokenizer.pt); the sizes must be the same, all else may differ")
    parser.add_argument("--lpips-weights", nargs="+", metavar="FILE", help="of --perceptual: vgg16-397923af.pth "
                        "and LPIPS' vgg.pth, or a VQGAN's checkpoint, which has both (default: download)")
    parser.add_argument("--minutes", type=float, metavar="X", help="choose --steps and --tokenizer-steps so that all "
                        "is done in this time (but --fid-every, --eval-fid), from the speed that a few steps have here")
    parser.add_argument("--eval-fid", type=int, metavar="N", help="at the end, FID of N samples against the training "
                        "images; fid.py says where its weights come from")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration, and what it will "
                        "cost: memory, operations, hours, disk; and stop")
    parser.add_argument("--for", dest="chip", choices=["a100-80", "h100", "h200", "3090", "4090", "cpu"],
                        help="with --dry-run: the cost on this, not on the machine at hand")
    group = parser
    for name, (kind, _, text) in OPTIONS.items():
        group = parser.add_argument_group(GROUPS[name]) if name in GROUPS else group
        add_option(group, flag(name), name, kind, f"{text} (default: {defaults[name]})")
    for old, name in RENAMED.items():  # still understood, but not shown
        if name in OPTIONS:
            add_option(parser, flag(old), name, OPTIONS[name][0], argparse.SUPPRESS)
    return parser.parse_args(words)


def preset_for_help(words, names):
    """The preset whose values --help shows: the one that would be taken; None if that depends on the images."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--data", "--preset", "--device"):
        parser.add_argument(name)
    try:
        args, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:  # one without its value, which the real parser is going to say
        return None
    dataset = (args.data or "toy") if (args.data or "toy") in ("toy", *names) else None
    on_cpu = args.device == "cpu" or args.device in (None, "auto") and choose_device().type == "cpu"
    chosen = choose_preset(dataset, 0, on_cpu)[0] if dataset or on_cpu else None
    return args.preset if args.preset in PRESETS else chosen


def add_option(parser, word, name, kind, text):
    if kind is bool:
        parser.add_argument(word, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif isinstance(kind, tuple):
        parser.add_argument(word, dest=name, choices=kind, help=text)
    else:
        parser.add_argument(word, dest=name, type=kind, help=text, metavar="N" if kind is int else "X")


def resolve(args, source, device, fixed, by_number=True):
    """Defaults, then the preset, then fixed (of a tokenizer that is given), then what the command line gave.

    by_number: a preset that is chosen by the images' size is cut down to their number, see suit_number.

    -> a dict with the keys of OPTIONS, all checked.
    """
    preset, by_size = args.preset, args.preset is None and not source.dataset
    if preset is None:
        median = fixed.get("size") or source.sizes()[1]
        preset, on_gpu = choose_preset(source.dataset, median, device.type == "cpu")
        hint = f"; on a GPU it would be {on_gpu}" if preset == "32-cpu" else ""
        print(f"preset {preset}: chosen for {source.dataset or 'images'} of {median} pixels on {device.type}{hint} "
              "(--preset)")
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}

    def settings(S):
        config = for_gpus(DEFAULTS | PRESETS[preset] | fixed, S) | given
        return config, suit_number(config, given, source.counts()[0]) if by_size and by_number else {}

    (config, changes), (_, world) = settings(args.gpus_like), rank_and_world()
    if changes:
        print(f"  for {source.counts()[0]:,} training images: " + ", ".join(
            f"{flag(name)} {value} instead of {config[name]}" for name, value in changes.items()))
        config |= changes
    if world > 1 and args.gpus_like == 1 and not given.keys() & GROW.keys():
        larger, changes = settings(world)
        print(f"{world} processes share the batch of one GPU and compute what it would; --gpus-like {world} makes more "
              "use of them, in another training: "
              + " ".join(f"{flag(name)} {value:g}" for name, value in (larger | changes).items() if name in GROW))
    for name, value in config.items():
        kind = OPTIONS[name][0]
        if kind in (int, float):
            low, high = LIMITS.get(name, (int(kind is int), math.inf))
            if not low <= value <= high:
                raise UserError(f"{flag(name)} {value}: must lie between {low} and {high}")
    if source.class_names and not config["label_drop"]:  # the null class is never trained
        if config["guidance"] and "guidance" in given:
            raise UserError("--label-drop 0 leaves nothing to guide away from: give --guidance 0, or drop some labels")
        config["guidance"] = 0.0
    usual = for_gpus(DEFAULTS | PRESETS[preset], args.gpus_like)
    for batch, rate in (("batch", "lr"), ("tokenizer_batch", "tokenizer_lr")):
        if config[batch] < usual[batch] and rate not in given:  # by the rule of --gpus-like
            print(f"  {flag(batch)} {config[batch]} is less than this preset's {usual[batch]}: a lower {flag(rate)} "
                  f"suits it better, {usual[rate] * (config[batch] / usual[batch]) ** GROW[rate]:.2g}")
    return config


def check_option(where, name, value):
    """ReadError if an option in a file has a value that it cannot have."""
    if name not in OPTIONS:
        raise UserError(f"{where} has the entry {shown(name)}, which is no option")
    kind = OPTIONS[name][0]
    expect(f"{where}: {name}", value, kind, *(LIMITS.get(name, (int(kind is int), math.inf)) if kind in (int, float)
                                              else ()))


def describe_models(config, num_classes, published=None):
    """Keyword arguments of the three parts, as the checkpoint stores them. published: {name: shape} of a VQGAN."""
    tokenizer = {name: config[option] for name, option in TOKENIZER_OPTIONS.items()}
    if published is not None:
        tokenizer = {"published": published, "size": config["size"]}
    denoiser = dict(K=config["K"], grid=(config["size"] // config["f"],) * 2, num_classes=num_classes,
                    **{name: config[name] for name in ("D", "width", "depth", "heads", "norm", "output_prior",
                                                   "posterior_input")})
    schedule = {name: config[name] for name in ("shift", "log_snr_min", "log_snr_max")}
    return {"tokenizer": tokenizer, "denoiser": denoiser, "schedule": schedule}
