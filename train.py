"""Train VQ-LCMD from images to samples with one command; the same command again continues an interrupted run.

    python train.py                          the built-in set, minutes on two CPU cores
    python train.py --data FOLDER            your own images; a preset is chosen by their size and your device
    python train.py --data ffhq --root DIR   a published set by its name; it says how to get it if it is not there
    python train.py --data FOLDER --preset 64 --out runs/faces --device cuda
    torchrun --nproc-per-node 8 train.py --data FOLDER      on 8 GPUs, with the same result

Three stages in one run directory (--out):

    (before)    what was found                         data.png, skipped.txt: images that cannot be used
    tokenizer   images -> VQ-VAE                       tokenizer.pt, reconstructions_*.png, tokenizer.csv
    tokens      every image encoded once               tokens.npy, one memory-mapped array
    diffusion   tokens -> embeddings and denoiser      ckpt.pt, samples_*.png, diffusion.csv, evaluation.csv

Every random draw comes from (seed, stage, step), so an interrupted run continues exactly where it was, and one on many
GPUs computes what one on a single GPU would.
"""

import argparse
import contextlib
import copy
import csv
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import data
import fid
import vqvae
from embedding_diffusion import EmbeddingDiffusion
from extras.archives import read_json
from losses import collapse_diagnostics, draw, held_out_bound, partial_loss, share
from sample import (
    CHECKPOINT_FORMAT,
    COLUMNS,
    CheckpointError,
    bf16_works,
    choose_device,
    default_labels,
    load_checkpoint,
    previous,
    processes,
    read_checkpoint,
    sample_together,
)
from schedule import ShiftedCosine

TOKENIZER_FORMAT = "vq-lcmd tokenizer 1"

# ----------------------------------------------------------------------------
# Configuration: a preset fills only what the command line leaves open. All sizes and step counts are ours.

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
    "perceptual": (float, 0.0, "weight of the perceptual loss LPIPS, 0: off; without its weights left out, saying so"),
    "gan": (float, 0.0, "weight of the patch discriminator's loss, 0: off"),
    "gan_lr": (float, 2e-4, "peak learning rate of the discriminator"),
    "gan_start": (float, 0.3, "share of the steps before the discriminator trains; a little later the decoder sees it"),
    "tokenizer_steps": (int, 20000, "training steps of the tokenizer"),
    "tokenizer_batch": (int, 128, "images per tokenizer step"),
    "tokenizer_lr": (float, 4e-4, "its peak learning rate"),
    # embeddings and denoiser
    "D": (int, 16, "width of the learned token embeddings"),
    "norm": (("rms", "layer", "none"), "rms", "normalisation of the embedding table"),
    "embedding_init": (("random", "codebook"), "random", "start of the table: normal, or the tokenizer's codebook"),
    "width": (int, 384, "width of the transformer"),
    "depth": (int, 8, "its blocks"),
    "heads": (int, 6, "its attention heads"),
    "likelihood": (bool, True, "add the closed-form log-likelihood of a token's own noisy embedding to its logits"),
    # schedule and losses
    "shift": (float, 0.4, "s of the shifted cosine schedule; SNR is multiplied by s^2"),
    "log_snr_min": (float, -10.0, "lambda(1) before the shift"),
    "log_snr_max": (float, 7.0, "lambda(0) before the shift"),
    "w_rec": (float, 1.0, "weight of L_rec"),
    "w_diff": (float, 1.0, "weight of L_diff"),
    "w_cm": (float, 1.0, "weight of L_CM; 0 switches it off"),
    "max_snr": (float, 5.0, "bound on e^lambda in the trained L_diff; inf is the exact bound"),
    "rec_fraction": (float, 0.25, "share of the batch at t = 0, which gives L_rec"),
    "coupling": (("markov", "shared"), "markov", "how z_s and z_t of L_CM belong together"),
    "max_gap": (float, 1.0, "largest t - s of L_CM"),
    "teacher": (("current", "ema"), "current", "weights of the CM teacher"),
    "p_drop": (float, 0.1, "highest rate of dropped embeddings, drawn per image from [0, p_drop]"),
    "label_drop": (float, 0.1, "rate of dropped labels, for classifier-free guidance"),
    # optimisation of the denoiser
    "steps": (int, 50000, "training steps of the denoiser; may be raised later"),
    "batch": (int, 256, "images per step, of all passes and processes together"),
    "lr": (float, 5e-4, "peak learning rate, reached after warmup, then cosine to zero"),
    "warmup": (int, 200, "warm-up steps, both stages"),
    "weight_decay": (float, 0.0, "AdamW's, denoiser"),
    "clip": (float, 1.0, "largest gradient norm, both stages"),
    "ema_decay": (float, 0.999, "of the averaged weights that sample; shorter at the start"),
    # speed and memory: none of these changes what is computed, beyond rounding
    "micro_batch": (int, 0, "images per pass of one process, which is what takes memory; 0: its share of the batch"),
    "activation_checkpointing": (bool, False, "compute the blocks again in the backward pass instead of keeping them"),
    "compile": (bool, False, "torch.compile the loss; faster on a GPU after a minute, needs a C++ compiler"),
    "fsdp": (bool, False, "under torchrun, split weights, EMA and optimizer among the processes (FSDP2)"),
    # sampling defaults, stored in the checkpoint
    "sample_steps": (int, 50, "calls of the network per image"),
    "guidance": (float, 1.0, "omega of classifier-free guidance"),
    "sampler": (("ancestral", "ddim"), "ancestral", "sampler"),
    # bookkeeping
    "log_every": (int, 100, "steps between status lines"),
    "sample_every": (int, 1000, "steps between pictures and evaluations"),
    "save_every": (int, 500, "steps between checkpoints"),
}
SHARP = dict(pixel_loss="l1", perceptual=1.0, gan=0.5)  # as in VQGAN; for fewer pixels the squared error does
LARGE = dict(**SHARP, size=256, f=16, K=1024, code_dim=32, tokenizer_width=96, tokenizer_steps=200000,
             tokenizer_batch=32, D=32, width=768, depth=12, heads=12, steps=400000, batch=96, lr=2e-4, ema_decay=0.9999)
GREY = dict(size=28, K=256, tokenizer_steps=10000, width=256, depth=6, heads=4, steps=30000)  # 7 x 7 tokens
PRESETS = {
    "toy": dict(size=20, K=256, tokenizer_width=32, tokenizer_steps=2000, tokenizer_batch=32, tokenizer_lr=4e-3,
                embedding_init="codebook", width=96, depth=2, heads=3, steps=2500, batch=64, lr=5e-3),
    "32-cpu": dict(size=32, K=512, tokenizer_width=32, tokenizer_steps=4000, tokenizer_batch=32, tokenizer_lr=3e-3,
                   embedding_init="codebook", width=128, depth=3, heads=4, steps=3000, batch=64, lr=4e-3),
    "32": dict(size=32),
    "64": dict(**SHARP, size=64, f=8, K=1024, tokenizer_width=96),
    "256": LARGE,
    "cifar10": dict(size=32, flip=True, steps=100000),
    "mnist": GREY,
    "fashion-mnist": GREY,
    # For one GPU of 24 GB, by adding up what the backward pass keeps (16 to 20 GB). With eight of them: eight times the
    # batch, twice the learning rate, a quarter of the steps. The two smaller sets get a smaller network.
    "ffhq": LARGE | dict(flip=True, width=512, heads=8, batch=128, steps=300000),
    "lsun-churches": LARGE | dict(width=512, heads=8, batch=128, steps=300000),
    "lsun-bedrooms": LARGE | dict(tokenizer_steps=300000, steps=600000),
    "imagenet": LARGE | dict(flip=True, K=4096, tokenizer_steps=300000, steps=1000000),
}
SMALL_SETS = {"cifar10", "fashion-mnist", "mnist"}  # fit the 32-cpu preset, which they get on a CPU
TOKENIZER_OPTIONS = {"size": "size", "f": "f", "K": "K", "code_dim": "code_dim", "width": "tokenizer_width",
                     "blocks": "tokenizer_blocks", "update": "codebook_update",
                     "distance": "codebook_distance"}  # argument of VQVAE: option
GAN_WARMUP, GAN_RAMP = 0.05, 0.1  # shares of the steps: discriminator alone, then its weight for the decoder rising
DRAWS, FINAL_DRAWS = 1000, 10000  # pairs (z_0, z_t) of the held-out bound, now and then and at the end
CHANGEABLE = {"steps", "log_every", "sample_every", "save_every", "sample_steps", "guidance", "sampler", "micro_batch",
              "activation_checkpointing", "compile", "fsdp"}


class UserError(ValueError):
    """One line: what was wrong and what to do. Exit status 2."""


class RunError(RuntimeError):
    """One line: why a run ended that had begun, and what to do. Exit status 1."""


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train VQ-LCMD: tokenizer, tokens, diffusion. The same command again "
                                     "continues. Defaults are those without a preset; a preset may set others.")
    parser.add_argument("--data", default="toy", help=f"toy (built in), {', '.join(data.DATASETS)}, or a path: a "
                        "folder of images, a zip, an LMDB, an array (.npy, .npz), a tokens.npy (default: toy)")
    parser.add_argument("--root", metavar="DIR", help="where the named set lies (default: $VQLCMD_DATA, then data/)")
    parser.add_argument("--allow-bad", action="store_true", help="train even if more than 1%% of images are bad")
    parser.add_argument("--preset", choices=list(PRESETS), help="default: by name or image size, and device. Those of "
                        "256 pixels are for one 24 GB GPU; with eight: 8 times --batch, twice --lr, 1/4 of --steps")
    parser.add_argument("--out", help="run directory (default: runs/NAME_OF_DATA)")
    parser.add_argument("--stage", choices=["all", "tokenizer", "tokens", "diffusion"], default="all",
                        help="run only this stage (default: all)")
    parser.add_argument("--tokenizer", metavar="FILE", help="train none, but take another run's tokenizer.pt, or the "
                        "checkpoint of a VQGAN of taming-transformers or latent-diffusion; it decides f, K and so on")
    parser.add_argument("--lpips-weights", nargs="+", metavar="FILE", help="of --perceptual: vgg16-397923af.pth "
                        "and LPIPS' vgg.pth, or a VQGAN's checkpoint, which has both (default: download)")
    parser.add_argument("--eval-fid", type=int, metavar="N", help="at the end, FID of N samples against the training "
                        "images; fid.py says where its weights come from")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    for name, (kind, default, text) in OPTIONS.items():
        flag, text = "--" + name.replace("_", "-"), f"{text} (default: {default})"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(kind, tuple):
            parser.add_argument(flag, choices=kind, help=text)
        else:
            parser.add_argument(flag, type=kind, help=text, metavar="N" if kind is int else "X")
    return parser.parse_args()


def resolve(args, source, device, fixed):
    """Defaults, then the preset, then fixed (of a tokenizer that is given), then what the command line gave.

    -> a dict with the keys of OPTIONS, all checked.
    """
    preset = args.preset
    if preset is None:
        median = fixed.get("size") or source.sizes()[1]
        on_gpu = source.dataset or ("32" if median <= 40 else "64" if median <= 128 else "256")
        own = source.dataset and source.dataset not in SMALL_SETS
        preset = on_gpu if own or device.type != "cpu" else "32-cpu"
        hint = f"; on a GPU it would be {on_gpu}" if preset == "32-cpu" else ""
        print(f"preset {preset}: chosen for {source.dataset or 'images'} of {median} pixels on {device.type}{hint} "
              "(--preset)")
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    config = {name: default for name, (_, default, _) in OPTIONS.items()} | PRESETS[preset] | fixed | given
    for name, value in config.items():
        kind, low, high = OPTIONS[name][0], 0, math.inf
        if kind not in (int, float) or name.startswith("log_snr"):
            continue
        if kind is int and name not in ("warmup", "micro_batch"):
            low = 2 if name in ("K", "batch") else 1
        if name in ("rec_fraction", "p_drop", "label_drop", "max_gap", "ema_decay", "gan_start"):
            high = 1
        if name == "K":
            high = 65536  # tokens are stored in 16 bits
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
    return config


def describe_models(config, num_classes, given=None):
    """Keyword arguments of the three parts, as the checkpoint stores them. given: content of --tokenizer."""
    tokenizer = {name: config[option] for name, option in TOKENIZER_OPTIONS.items()}
    if given and "published" in given["config"]:
        tokenizer = given["config"] | {"size": config["size"]}
    denoiser = dict(K=config["K"], grid=(config["size"] // config["f"],) * 2, num_classes=num_classes,
                    **{name: config[name] for name in ("D", "width", "depth", "heads", "norm", "likelihood")})
    schedule = {name: config[name] for name in ("shift", "log_snr_min", "log_snr_max")}
    return {"tokenizer": tokenizer, "denoiser": denoiser, "schedule": schedule}


def read_config(out):
    """What an earlier start of this run was asked for; {} if there was none."""
    path = out / "config.json"
    if path.exists():
        return read_json(path)
    early = ("skipped.txt", "data.png", "config.json", ".lock")  # .part: of a run that was killed
    if out.exists() and any(p.name.removesuffix(".part") not in early for p in out.iterdir()):
        raise UserError(f"{out} exists, is not empty and is no run of train.py: give another --out")
    return {}


def compare(out, stored, asked):
    """An existing run is continued only as it was begun."""
    for name, value in asked.items():
        if name in stored and name not in CHANGEABLE and stored[name] != value:
            raise UserError(f"{out} was made with {name} {stored[name]}, now {name} is {value}: give another --out, or "
                            "the old setting to continue it")


def load_lpips(files, device):
    """(network of the perceptual loss, digest of its weights), or (None, "none") after saying why not."""
    try:
        state = vqvae.read_lpips(vqvae.find_lpips(files))
    except ValueError as error:
        if files:
            raise
        print(f"The tokenizer is trained without its perceptual loss: {error}")
        return None, "none"
    return vqvae.LPIPS(state).to(device), vqvae.digest(state)


def look_at_images(source, sets, out, allow_bad):
    """The first start of a run: every image is decoded once. Leaves skipped.txt and data.png in the run directory."""
    train, _ = sets()
    bad, total = source.skipped, sum(source.counts())
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "skipped.txt", lambda partial: data.write_skipped(partial, bad))
    if bad:
        print(f"{len(bad):,} of {total:,} images ({len(bad) / total:.2%}) cannot be used and are left out: "
              f"{out / 'skipped.txt'}")
    if len(bad) > 0.01 * total and not allow_bad:
        title, reason = next(iter(bad.items()))
        raise UserError(f"{len(bad):,} of {total:,} images cannot be used, more than 1 %, e.g. {title} ({reason}); all "
                        f"are in {out / 'skipped.txt'}: repair them or take them out, or add --allow-bad")
    data.contact_sheet(train, out / "data.png")


# ----------------------------------------------------------------------------
# What both training loops need: randomness by step, learning rate, files that are never half written, signals.

STAGES = {"tokenizer": 0, "diffusion": 1, "evaluation": 2, "weights": 3, "flips": 4}
SIGNALS = []  # received so far; the loops look at it once per step


def seed_for(*key):
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_for(seed, stage, step, device="cpu"):
    """A torch.Generator that depends on (seed, stage, step) alone: resuming needs no random state."""
    return torch.Generator(device).manual_seed(seed_for(seed, STAGES[stage], step))


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, stage, epoch):
    return np.random.default_rng(np.random.SeedSequence((seed, STAGES[stage], 1 << 40, epoch))).permutation(n)


def batch_indices(n, batch, seed, stage, step):
    """The step-th batch (batch,) of an endless walk through n items, reshuffled every epoch."""
    epoch, place = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    return np.concatenate([epoch_order(n, seed, stage, e)[place[epoch == e]] for e in range(epoch[0], epoch[-1] + 1)])


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up, then half a cosine to zero."""
    return peak * min(1, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def lock(out):
    """An open file that keeps every other process out of this run; the system lets go of it when its process dies.

    It keeps nobody out on Windows and on file systems without locks.
    """
    file = (out / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{out} is in use by another process: wait for it, or give another --out") from error
    except (OSError, AttributeError):
        pass
    return file


def write_atomically(path, write, keep=False):
    """write(partial path), down to the disk, then rename: whatever happens, there is the old file or the new one.

    keep: the old one stays, as previous(path).
    """
    partial = path.with_name(path.name + ".part")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: is the disk full? ({' '.join(str(error).split())})") from error
    if keep and path.exists():
        path.replace(previous(path))
    partial.replace(path)


def read_last(path, expected):
    """The newest checkpoint: the one before, if the last cannot be read; None if there is none yet."""
    older = previous(path)
    try:
        return read_checkpoint(path, expected) if path.exists() or older.exists() else None
    except CheckpointError as error:
        if error.found or not older.exists():
            raise
        state = read_checkpoint(older, expected)
        print(f"{error}: going on from there, step {state['step']:,}")
        return state


def append_row(path, row):
    """One more line of a CSV file, with a header first."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([row.keys()] * new + [row.values()])


def trim_rows(path, last_step):
    """Drops the rows that a killed run wrote after its last checkpoint; the last line may be half a line."""
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        rows = rows[:1] + [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= last_step]
        if len(rows) > 1:
            write_atomically(path, lambda partial: partial.write_text("\n".join(map(",".join, rows)) + "\n"))
        else:
            path.unlink()


def on_signal(number, frame):
    if number == signal.SIGINT in SIGNALS:  # the second Ctrl-C means it; a scheduler's kill may come twice
        raise KeyboardInterrupt
    SIGNALS.append(number)


def agree(number):
    """The largest number that any process gives; none goes on before all have come here. By gloo: no GPU waits."""
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def stop_if_asked(save=None, together=False):
    """Between two steps: after Ctrl-C or kill, saves and leaves with the shell's status (130 or 143).

    together: all processes call this, and stop at the same step, whichever of them was asked.
    """
    asked = max(SIGNALS, default=0)
    asked = agree(asked) if together else asked
    if asked:
        if save is not None:
            save()
        tqdm.write("stopped; the same command continues from here")
        if together:
            agree(0)  # the checkpoint is written
        sys.exit(128 + asked)


def status(stage, step, steps, values):
    tqdm.write(f"{stage} {step:>6,}/{steps:,}  " + "  ".join(f"{name} {value}" for name, value in values.items()))


# ----------------------------------------------------------------------------
# Stage 1: images -> tokenizer.

def batches_ahead(dataset, batch, seed, start, steps, flip):
    """(step, this process' images) for every step; the next ones are read by a thread while these train."""
    rank, world = processes()
    mine = slice(rank * batch // world, (rank + 1) * batch // world)

    def read(step):
        images = dataset.batch(batch_indices(len(dataset), batch, seed, "tokenizer", step)[mine])
        if flip:
            mirrored = torch.rand(batch, 1, 1, 1, generator=generator_for(seed, "flips", step))[mine] < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        return images

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, start)
        for step in range(start, steps):
            images, ahead = ahead.result(), pool.submit(read, step + 1)
            yield step, images


def read_tokenizer(file):
    """What --tokenizer names: the content of another run's tokenizer.pt, or a published VQGAN in the same form."""
    try:
        state = read_checkpoint(file, TOKENIZER_FORMAT)
    except CheckpointError as error:
        if error.found or not Path(file).is_file():
            raise
        weights = vqvae.read_published(file)
        shapes = {name: list(value.shape) for name, value in weights.items()}
        return {"format": TOKENIZER_FORMAT, "config": {"published": shapes}, "tokenizer": weights, "step": 0,
                "metrics": {}}
    if not state["metrics"]:
        raise UserError(f"--tokenizer {file}: its training is not complete; finish it first")
    return state


def options_of(tokenizer):
    """What a given tokenizer decides: {option: value}."""
    if "published" in tokenizer["config"]:
        return dict(zip(("f", "K", "code_dim"), vqvae.read_off(tokenizer["config"]["published"]), strict=True))
    return {option: tokenizer["config"].get(name, OPTIONS[option][1]) for name, option in TOKENIZER_OPTIONS.items()}


def make_discriminator(config, bf16=False):
    return vqvae.PatchDiscriminator(config["size"], 32 if config["tokenizer_width"] < 64 else 64, bf16)


def add_up(tensors):
    """Each tensor, in place, becomes its sum over all processes; one all-reduce for all of them."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def descend(loss, module, optimizer, lr, clip):
    """One step of module's parameters down the gradient of the loss, a mean over equal shares of all processes."""
    _, world = processes()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    (loss / world).backward()
    if world > 1:
        add_up([p.grad for p in module.parameters()])
    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()


def tokenizer_step(config, model, optimizer, images, generator, step, lpips=None, judge=None, judges=None):
    """One step of the tokenizer, and of the discriminator `judge` (its optimizer: judges) if there is one.

    images: uint8 (B, 3, H, W). -> what VQVAE.forward returns, and {name: scalar} for the status line.
    """
    done = step / config["tokenizer_steps"]
    lr, judge_lr = (learning_rate(step, config["tokenizer_steps"], config["warmup"], config[peak])
                    for peak in ("tokenizer_lr", "gan_lr"))
    terms = model(images, generator)
    x, x_hat = terms["x"], terms["x_hat"]
    found = {"reconstruction": vqvae.pixel_loss(x, x_hat, config["pixel_loss"])}
    loss = found["reconstruction"]
    if lpips is not None:
        found["lpips"] = lpips(x, x_hat).mean()
        loss = loss + config["perceptual"] * found["lpips"]
    if judge is not None and done >= config["gan_start"] + GAN_WARMUP:
        judge.requires_grad_(False)
        found["adversarial"] = -judge(x_hat).mean()
        found["weight"] = vqvae.adaptive_weight(loss, found["adversarial"], model.last_layer)
        ramp = min(1.0, (done - config["gan_start"] - GAN_WARMUP) / GAN_RAMP)
        loss = loss + config["gan"] * ramp * found["weight"] * found["adversarial"]
    found |= {"commitment": terms["commitment"], "codebook": terms["codebook"]}
    loss = loss + config["beta"] * terms["commitment"]
    if config["codebook_update"] == "gradient":
        loss = loss + terms["codebook"]
    descend(loss, model, optimizer, lr, config["clip"])
    if judge is not None and done >= config["gan_start"]:
        judge.requires_grad_(True)
        found["discriminator"] = vqvae.hinge_loss(judge(x), judge(x_hat.detach()))
        descend(found["discriminator"], judge, judges, judge_lr, config["clip"])
    # Restart unused codes, but leave the last quarter for everything to settle.
    if step % 50 == 49 and done < 0.75:
        model.quantizer.restart_dead_codes(terms["z_e"], generator)
    return terms, {name: value.detach() for name, value in found.items()} | {"lr": lr}


def train_tokenizer(config, models, sets, out, seed, device, lpips=None):
    """Trains until tokenizer.pt says it is complete. Returns nothing: the file is the result. lpips: a vqvae.LPIPS."""
    path, (rank, world) = out / "tokenizer.pt", processes()
    steps = 0 if "published" in models["tokenizer"] else config["tokenizer_steps"]
    state = read_last(path, TOKENIZER_FORMAT)
    if state and state["metrics"]:
        return print(f"tokenizer: complete ({state['step']:,} steps), {show(state['metrics'])}")
    train, test = sets()
    torch.manual_seed(seed_for(seed, STAGES["weights"], 0))
    trained = {"tokenizer": vqvae.make(models["tokenizer"], bf16_works(device)).to(device)}
    model = trained["tokenizer"]
    trained["optimizer"] = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    if config["gan"] and steps:
        judge = make_discriminator(config, model.bf16).to(device)
        trained["judge"] = judge
        trained["judges"] = torch.optim.AdamW(judge.parameters(), betas=(0.5, 0.9), weight_decay=0.0, fused=True)
    start, metrics = 0, {}
    if state:
        start = state["step"]
        for name in trained if steps else ["tokenizer"]:
            trained[name].load_state_dict(state[name])
        if steps:
            print(f"tokenizer: continuing at step {start:,}")
    if rank == 0:
        trim_rows(out / "tokenizer.csv", start)
    shown = test.batch(np.linspace(0, len(test) - 1, min(4 * COLUMNS, len(test))).astype(int))

    def save(at):
        if rank:
            return
        write_atomically(path, lambda partial: torch.save(
            {"format": TOKENIZER_FORMAT, "config": models["tokenizer"], "step": at, "metrics": metrics,
             "history": (history, used)}  # of the status line to come
            | {name: part.state_dict() for name, part in trained.items()}, partial), keep=True)

    def picture(at):
        """Rows of held-out images, each above its reconstruction."""
        model.eval()
        pairs = torch.stack([shown, model.decode(model.encode(shown.to(device))).cpu()])           # (2, n, 3, H, W)
        rows = [pairs[i, c:c + COLUMNS] for c in range(0, len(shown), COLUMNS) for i in (0, 1)]
        data.save_grid(torch.cat(rows), out / f"reconstructions_{at:06d}.png", min(COLUMNS, len(shown)))

    names = ["reconstruction", *["lpips"] * (lpips is not None), "commitment", "codebook",
             *["adversarial", "weight", "discriminator"] * bool(config["gan"])]
    history, used = state["history"] if state and "history" in state else ([], torch.zeros(config["K"]))
    history, used, absent = [row.to(device) for row in history], used.to(device), torch.zeros((), device=device)
    since, clock = start, time.time()
    with tqdm(total=steps, initial=start, desc="tokenizer", unit="step", disable=True if rank else None,
              leave=False) as bar:
        for step, images in batches_ahead(train, config["tokenizer_batch"], seed, start, steps, config["flip"]):
            stop_if_asked(lambda at=step: save(at), together=world > 1)
            model.train()
            terms, found = tokenizer_step(config, model, trained["optimizer"], images.to(device, non_blocking=True),
                                          generator_for(seed, "tokenizer", step), step, lpips, trained.get("judge"),
                                          trained.get("judges"))
            # Stays on the device: reading it back each step would make the GPU wait for Python.
            history.append(torch.stack([found.get(name, absent) for name in names]))
            used += torch.bincount(terms["tokens"].flatten(), minlength=config["K"])
            done = step + 1
            bar.update()
            log, keep = (done % config[name] == 0 and done < steps for name in ("log_every", "save_every"))
            if log or keep or done == steps:  # before anything is written
                values = torch.stack(history) / world
                if world > 1:
                    add_up([values, used])
                means = check_finite(values, "tokenizer", done, names)
            if log or done == steps:
                row = {"step": done} | {name: f"{mean:.5f}" for name, mean in zip(names, means, strict=True)}
                row |= {"lr": f"{found['lr']:.2e}", "codes": int((used > 0).sum()),
                        "img/s": round((done - since) * config["tokenizer_batch"] / (time.time() - clock))}
                if rank == 0:
                    append_row(out / "tokenizer.csv", row)
                status("tokenizer", row.pop("step"), steps, row)
                history, used, since, clock = [], torch.zeros_like(used), done, time.time()
            if done % config["sample_every"] == 0 and done < steps and rank == 0:
                picture(done)
            if keep:
                save(done)
    save(steps)
    if rank == 0:
        picture(steps)
        metrics = vqvae.evaluate(model, test, device, lpips)
        save(steps)
        previous(path).unlink(missing_ok=True)
        print(f"tokenizer: {show(metrics)} on {len(test):,} held-out images; pictures in {out}")
    if world > 1:
        agree(0)  # all is written


def check_finite(values, stage, step, names=(), what="loss"):
    """Means over steps, a list, of values (steps, n) or (n,), the last row of which belongs to `step`.

    A row that is not finite ends the run before anything is overwritten.
    """
    rows = values.view(-1, values.shape[-1]).tolist()
    for at, row in enumerate(rows, step - len(rows) + 1):
        if not all(map(math.isfinite, row)):
            found = f" ({show(dict(zip(names, row, strict=True)))})" if names else ""
            raise RunError(f"the {stage}'s {what} is not finite at step {at:,}{found}; its last checkpoint is kept. "
                           "Lower the learning rate")
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def show(metrics):
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


# ----------------------------------------------------------------------------
# Stage 2: images -> tokens.

def load_tokenizer(models, out, device):
    """(tokenizer in eval mode, its metrics) from a complete tokenizer.pt."""
    path = out / "tokenizer.pt"
    state = read_last(path, TOKENIZER_FORMAT)
    if not state or not state["metrics"]:
        raise UserError(f"{path} is not there or not complete: run --stage tokenizer (or all) first")
    tokenizer = vqvae.make(models["tokenizer"], bf16_works(device)).to(device).eval()
    tokenizer.load_state_dict(state["tokenizer"])
    return tokenizer, state["metrics"]


def check_maker(path, tokenizer):
    """Tokens of one tokenizer mean nothing to another: the file names its maker (vqvae.encode_sets)."""
    maker, asked = np.load(path, mmap_mode="r").dtype.fields["x"][2:], vqvae.digest(tokenizer.state_dict())
    if maker and maker[0] != f"tokenizer {asked}":
        raise UserError(f"{path} was made by {maker[0]}, this one is {asked}: they do not belong together; give the "
                        "tokenizer.pt that lies beside the tokens, or encode the images again")


def encode_tokens(config, models, source, sets, out, device):
    """Writes tokens.npy (vqvae.encode_sets), unless it is there. A token file made earlier is checked and copied."""
    path = out / "tokens.npy"
    if path.exists():
        return print(f"tokens: complete ({len(np.load(path, mmap_mode='r')):,} images)")
    tokenizer, _ = load_tokenizer(models, out, device)
    if isinstance(source, data.Tokens):
        x, (h, w) = np.load(source.path, mmap_mode="r")["x"], tokenizer.grid
        if x.shape[1] != h * w or x.max() >= tokenizer.K:
            raise UserError(f"{source.path} has {x.shape[1]} tokens per image up to {x.max()}, the tokenizer {h * w} "
                            f"below {tokenizer.K}: they do not belong together")
        check_maker(source.path, tokenizer)
        write_atomically(path, lambda partial: shutil.copyfile(source.path, partial))
    else:
        while not vqvae.encode_sets(tokenizer, *sets(), path, device, lambda: bool(SIGNALS), flip=config["flip"]):
            stop_if_asked()
    rows = np.load(path, mmap_mode="r")
    print(f"tokens: {len(rows):,} images x {rows['x'].shape[1]} tokens in {path}")


# ----------------------------------------------------------------------------
# Stage 3: tokens -> embeddings and denoiser.

def to_device(array, device):
    """A numpy array as a tensor on the device. From pinned memory: the GPU is not waited for."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Tokens:
    """Some rows of tokens.npy, on the device at two bytes a token. batch(indices) -> x (B, N), labels (B,), int64."""

    def __init__(self, rows, device):
        self.x = torch.from_numpy(rows["x"].astype(np.int16)).to(device)
        self.labels, self.device = torch.from_numpy(rows["label"].astype(np.int64)).to(device), device

    def batch(self, indices):
        indices = to_device(indices, self.device)
        return self.x[indices].long() & 0xFFFF, self.labels[indices]  # 16 bits without sign


def split_weights(model, device, world):
    """FSDP2: each process keeps 1 / world of every weight; those of a block are gathered while it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of writing to the logits in place, which nobody does
    mesh = init_device_mesh(device.type, (world,))
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "table")


def whole(value):
    """A state dict whose split tensors are put together, by all processes."""
    if isinstance(value, dict):
        return {name: whole(v) for name, v in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def add_gradient(model, loss_of, drawn, micro_batch, fsdp=False):
    """The gradient of a whole batch, added to the parameters' by as many passes as needed. Returns its terms, (3,).

    drawn: of losses.draw. Process r of W takes rows r, r + W, ... of it, micro_batch of them at a time. The gradients
    of all processes meet in one all-reduce, after the last pass: for P parameters and a link of b bytes/s that is
    8 P / b seconds of waiting per step. DistributedDataParallel would hide it behind the backward pass, and wrap the
    model; between GPUs with NVLink there is little to hide (130 M parameters, 300 GB/s: 4 ms of some hundred).
    """
    (rank, world), (rows, n_rec, _) = processes(), drawn
    B = len(rows["x"])
    passes = -(-B // (world * micro_batch)) if micro_batch else 1
    passes = max(1, min(passes, (B - n_rec) // world))  # rows at t > 0 in every one
    terms = 0
    for i in range(passes):
        loss, some = loss_of(*share(*drawn, rank + i * world, passes * world))
        (loss * world if fsdp else loss).backward()  # FSDP2 takes the mean over processes; we want the sum
        terms = terms + some
    if world > 1:
        add_up([terms, *([] if fsdp else (p.grad for p in model.parameters()))])
    return terms


def update(model, ema, optimizer, clip, decay):
    """One step of the optimizer and of the averaged weights. Returns the gradient's norm, (1,), as it was."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
    return whole(norm).view(1)


def train_diffusion(config, models, class_names, out, seed, device):
    """Trains embeddings and denoiser on tokens.npy until ckpt.pt says that it is complete."""
    path, steps, (rank, world) = out / "ckpt.pt", config["steps"], processes()
    state = read_last(path, CHECKPOINT_FORMAT)
    if state and state["metrics"] and state["step"] >= steps:
        return print(f"diffusion: complete ({state['step']:,} steps), bits per token: {show(state['metrics']['vlb'])}")
    tokenizer, tokenizer_metrics = load_tokenizer(models, out, device)
    if not (out / "tokens.npy").exists():
        raise UserError(f"{out / 'tokens.npy'} is not there: run --stage tokens (or all) first")
    check_maker(out / "tokens.npy", tokenizer)
    rows = np.load(out / "tokens.npy", mmap_mode="r")
    test_rows = np.flatnonzero(rows["test"])
    test_rows = test_rows[np.linspace(0, len(test_rows) - 1, min(2000, len(test_rows))).astype(int)]
    tokens, held_out = Tokens(rows[~rows["test"]], device), Tokens(rows[test_rows], device)
    held_out = held_out.batch(np.arange(len(test_rows)))
    torch.manual_seed(seed_for(seed, STAGES["weights"], 1))
    model = EmbeddingDiffusion(**models["denoiser"], bf16=bf16_works(device),
                               recompute=config["activation_checkpointing"])
    if config["embedding_init"] == "codebook":
        model.start_from(tokenizer.codebook)
    ema = copy.deepcopy(model).requires_grad_(False)
    start, metrics, history = 0, {}, []  # of the status line to come
    if state:
        history = [row.to(device) for row in state.get("history", [])]
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        start = state["step"]
        print(f"diffusion: continuing at step {start:,}")
    for network in (model, ema):
        split_weights(network, device, world) if config["fsdp"] else network.to(device)
    schedule = ShiftedCosine(**models["schedule"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=config["weight_decay"],
                                  fused=True)
    if state:
        if config["fsdp"]:
            from torch.distributed.tensor import distribute_tensor
            for p, of_p in zip(model.parameters(), state["optimizer"]["state"].values(), strict=True):
                of_p.update({name: distribute_tensor(value.to(device), p.device_mesh, p.placements)
                             for name, value in of_p.items() if value.shape == p.shape})
        optimizer.load_state_dict(state["optimizer"])
        del state
    for name in ("diffusion.csv", "evaluation.csv"):
        if rank == 0:
            trim_rows(out / name, start or -1)
    settings = {"steps": config["sample_steps"], "guidance": config["guidance"], "sampler": config["sampler"]}
    bundle = SimpleNamespace(tokenizer=tokenizer, model=ema, schedule=schedule, device=device)
    labels_shown = default_labels(COLUMNS * min(len(class_names) or 8, 16), len(class_names))

    def save(at):
        content = whole({"format": CHECKPOINT_FORMAT, "config": models | {"training": config | {"seed": seed}},
                         "tokenizer": tokenizer.state_dict(), "model": model.state_dict(), "ema": ema.state_dict(),
                         "optimizer": optimizer.state_dict(), "step": at, "class_names": class_names,
                         "sampling": settings, "metrics": metrics, "history": history})
        if rank == 0:
            write_atomically(path, lambda partial: torch.save(content, partial), keep=True)

    def evaluate(at, draws):
        ema.eval()
        bound = held_out_bound(ema, schedule, *held_out, lambda i: generator_for(seed, "evaluation", i, device), draws,
                               rank=rank, world=world)
        collapse = collapse_diagnostics(ema.table())
        if rank == 0:
            append_row(out / "evaluation.csv", {"step": at} | bound | {"log2_K": math.log2(config["K"])} | collapse)
        tqdm.write(f"held out at step {at:,}: {bound['total']:.3f} bits per token = prior {bound['prior']:.3f} + rec "
                   f"{bound['rec']:.3f} + diff {bound['diff']:.3f} (log2 K = {math.log2(config['K']):.2f});  "
                   f"{show(collapse)}")
        return {"vlb": bound, "collapse": collapse, "tokenizer": tokenizer_metrics}

    def picture(at):
        ema.eval()
        images = sample_together(bundle, labels_shown, seed=seed, **settings)
        words = [class_names[label] for label in labels_shown[::COLUMNS]] if class_names else None
        if rank == 0:
            data.save_grid(images, out / f"samples_{at:06d}.png", COLUMNS, row_labels=words)

    if start == 0:
        evaluate(0, DRAWS)
    teacher = ema if config["teacher"] == "ema" else model
    loss_of = functools.partial(partial_loss, model, teacher, schedule, **{
        name: config[name] for name in ("w_rec", "w_diff", "w_cm", "max_snr", "coupling")})
    draw_options = {name: config[name] for name in ("rec_fraction", "p_drop", "label_drop", "max_gap")}
    if config["compile"] and config["fsdp"]:  # what FSDP2 does between the blocks cannot be compiled
        for block in model.blocks:
            block.compile()
    elif config["compile"]:
        loss_of = torch.compile(loss_of)
    names, since, clock = ("rec", "diff", "cm", "norm"), start, time.time()
    with tqdm(total=steps, initial=start, desc="diffusion", unit="step", disable=True if rank else None,
              leave=False) as bar:
        for step in range(start, steps):
            stop_if_asked(lambda at=step: save(at), together=world > 1)
            model.train()
            lr = learning_rate(step, steps, config["warmup"], config["lr"])
            optimizer.param_groups[0]["lr"] = lr
            x, labels = tokens.batch(batch_indices(len(tokens.x), config["batch"], seed, "diffusion", step))
            drawn = draw(model, x, labels, generator_for(seed, "diffusion", step, device), **draw_options)
            terms = add_gradient(model, loss_of, drawn, config["micro_batch"], config["fsdp"])
            decay = min(config["ema_decay"], (1 + step) / (10 + step))  # a short memory while weights still run
            norm = update(model, ema, optimizer, config["clip"], decay)
            # Stays on the device: reading it back each step would make the GPU wait for Python.
            history.append(torch.cat([terms, norm]))
            done = step + 1
            bar.update()
            log, keep = (done % config[name] == 0 and done < steps for name in ("log_every", "save_every"))
            if log or keep or done == steps:  # before anything is written
                means = check_finite(torch.stack(history), "denoiser", done, names, "loss or its gradient")
            if log or done == steps:
                with torch.no_grad():
                    collapse = collapse_diagnostics(whole(model.table()))
                row = {"step": done} | {name: f"{value:.4f}" for name, value in zip(names, means, strict=True)} | {
                    "lr": f"{lr:.2e}", "img/s": round((done - since) * config["batch"] / (time.time() - clock)),
                    "rank": f"{collapse['effective_rank']:.2f}", "min_dist": f"{collapse['smallest_distance']:.3f}"}
                if device.type == "cuda":
                    row["GB"] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
                if rank == 0:
                    append_row(out / "diffusion.csv", row)
                status("diffusion", row.pop("step"), steps, row)
                history, since, clock = [], done, time.time()
            if done % config["sample_every"] == 0 and done < steps:
                evaluate(done, DRAWS)
                picture(done)
            if keep:
                save(done)
    save(steps)
    picture(steps)
    metrics = evaluate(steps, FINAL_DRAWS)
    save(steps)
    if rank == 0:
        write_atomically(out / "metrics.json", lambda part: part.write_text(json.dumps(metrics, indent=2) + "\n"))
        previous(path).unlink(missing_ok=True)
    if world > 1:
        agree(0)  # all is written


def evaluate_fid(n, network, sets, out, device):
    """n samples of ckpt.pt at its defaults against the training images; the scores join metrics.json (fid.py)."""
    path = out / "metrics.json"
    metrics = json.loads(path.read_text())
    if metrics.get("fid", {}).get("n") == n:
        return print(f"fid: complete ({n:,} samples), {show(metrics['fid'])}")
    train, _ = sets()
    real = fid.cached_statistics(train, network)
    samples = fid.Samples(load_checkpoint(out / "ckpt.pt", device), n, train.labels)
    scores = fid.compare(real, fid.measure(samples, network, name="FID, samples"), device)
    if processes()[0]:
        return
    fid.report(scores, real.n, n)
    metrics["fid"] = scores | {"n": n}
    write_atomically(path, lambda partial: partial.write_text(json.dumps(metrics, indent=2) + "\n"))


# ----------------------------------------------------------------------------

def prepare(args, rank, world, held):
    """All that comes before the first step -> what the stages need, or None if that is all that was asked for."""
    if args.seed < 0:
        raise UserError("--seed must not be negative")
    if args.eval_fid is not None and args.eval_fid < 2:
        raise UserError(f"--eval-fid {args.eval_fid}: must be at least 2, and 2,048 to mean anything")
    device = choose_device(args.device)
    source = data.find(args.data, args.root)
    has_images, tokenizer_file = not isinstance(source, data.Tokens), args.tokenizer
    out = Path(args.out or Path("runs") / source.name)
    stored = read_config(out)
    if "sides" in stored:  # known since the first start: no image is opened for it again
        source.sides = tuple(stored["sides"])
    print(source.describe())
    if not has_images:  # tokens mean nothing without their tokenizer, so it decides
        tokenizer_file = args.tokenizer or source.path.parent / "tokenizer.pt"
    given_tokenizer = read_tokenizer(tokenizer_file) if tokenizer_file else None
    fixed = options_of(given_tokenizer) if given_tokenizer else {}
    config = resolve(args, source, device, fixed)
    for name, value in fixed.items():
        if config[name] != value:
            raise UserError(f"--tokenizer {tokenizer_file} has {name} {value}, this run {config[name]}: leave "
                            f"--{name.replace('_', '-')} away")
    for name, least in (("batch", 2), ("tokenizer_batch", 1)):
        if config[name] % world or config[name] < least * world:
            raise UserError(f"--{name.replace('_', '-')} {config[name]}: must be a multiple of the number of "
                            f"processes, {world}{', and at least twice as many' * (least - 1)}")
    if config["fsdp"] and world == 1:
        raise UserError("--fsdp splits the weights among processes: start them by torchrun --nproc-per-node")
    models = describe_models(config, len(source.class_names), given_tokenizer)
    with torch.device("meta"):  # every size is checked here, before any work
        parts = vqvae.make(models["tokenizer"]), EmbeddingDiffusion(**models["denoiser"])
        ShiftedCosine(**models["schedule"])
        if config["gan"]:
            make_discriminator(config)
    if config["perceptual"] and config["size"] < (least := 2 ** (len(vqvae.LPIPS.STAGES) - 1)):
        raise UserError(f"--perceptual needs images of at least {least} pixels, not {config['size']}: --perceptual 0")
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    print(f"{out}: {parts[1].N} tokens of {config['K']} codes per image, tokenizer {sizes[0]:.2f} M parameters, "
          f"denoiser {sizes[1]:.2f} M, on {device}")
    if args.dry_run:
        print("\n".join(f"  --{name.replace('_', '-')} {value}" for name, value in config.items()))
        return
    counts = source.counts()
    if args.eval_fid and not has_images:
        raise UserError("--eval-fid needs the images: give them instead of their tokens")
    inception = fid.find_weights() if args.eval_fid else None
    asked = {"seed": args.seed, "data": source.name, "train_images": counts[0], "held_out_images": counts[1],
             "classes": source.class_names, "lpips": stored.get("lpips", "none"),
             "tokenizer": vqvae.digest(given_tokenizer["tokenizer"]) if given_tokenizer else "own",
             **({"sides": list(source.sizes())} if has_images else {}), **config}
    if args.lpips_weights and (given_tokenizer or not config["perceptual"]):
        raise UserError("--lpips-weights: no tokenizer is trained here that uses them (--perceptual)")
    lpips, open_question = None, stored.get("lpips") != "none" and not (out / "tokens.npy").exists()
    if config["perceptual"] and not given_tokenizer and (open_question or args.lpips_weights):
        lpips, asked["lpips"] = load_lpips(args.lpips_weights, device)
    compare(out, stored, asked)
    skipped = data.read_skipped(out / "skipped.txt") if stored else None
    sets = functools.lru_cache(lambda: source.load(config["size"], skipped))  # decoded only if a stage needs images
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(out))
        if has_images and not stored:
            look_at_images(source, sets, out, args.allow_bad)
        write_atomically(out / "config.json", lambda partial: partial.write_text(json.dumps(asked, indent=2) + "\n"))
        if given_tokenizer and not (out / "tokenizer.pt").exists():
            given_tokenizer["config"] = models["tokenizer"]
            write_atomically(out / "tokenizer.pt", lambda partial: torch.save(given_tokenizer, partial))
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return SimpleNamespace(config=config, models=models, source=source, sets=sets, out=out, device=device, lpips=lpips,
                           inception=inception)


def first_alone(rank, world, work):
    """work() by process 0 while the others wait -> its result, None for them. If it fails, it fails for all."""
    done, result = 0, None
    try:
        if rank == 0:
            result, done = work(), 1
    finally:
        if world > 1 and not agree(done) and rank:
            sys.exit(1)  # process 0 says why
    return result


def run(args, rank, world, held):
    """Process 0 looks at everything first; then the others find a run to continue, and all train together."""
    ready = first_alone(rank, world, lambda: prepare(args, rank, world, held))
    if world > 1 and not agree(int(ready is not None)):
        return
    ready = ready if rank == 0 else prepare(args, rank, world, held)
    if not ready:
        return
    if args.stage in ("all", "tokenizer"):
        train_tokenizer(ready.config, ready.models, ready.sets, ready.out, args.seed, ready.device, ready.lpips)
    if args.stage in ("all", "tokens"):
        first_alone(rank, world, lambda: encode_tokens(ready.config, ready.models, ready.source, ready.sets, ready.out,
                                                       ready.device))
    if args.stage not in ("all", "diffusion"):
        return
    try:
        train_diffusion(ready.config, ready.models, ready.source.class_names, ready.out, args.seed, ready.device)
    except torch.OutOfMemoryError as error:
        own = ready.config["micro_batch"] or ready.config["batch"] // world
        raise RunError(f"not enough memory on {ready.device} for {own} images at once: add --micro-batch "
                       f"{max(own // 2, 1)}, or --activation-checkpointing, and the run goes on") from error
    if args.eval_fid:
        stop_if_asked(together=world > 1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # all is saved
        evaluate_fid(args.eval_fid, fid.load_inception(ready.inception, ready.device), ready.sets, ready.out,
                     ready.device)
    print(f"complete. Draw images:  python sample.py {ready.out / 'ckpt.pt'}    Train longer: the same with --steps")


def main():
    args = parse_arguments()
    rank, world = processes()
    if rank:  # process 0 speaks for all
        sys.stdout = open(os.devnull, "w")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it waits
    try:
        with contextlib.ExitStack() as held:
            run(args, rank, world, held)
    except (UserError, data.DataError, CheckpointError, ValueError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"train.py: error: {error}; what was saved before is kept. See that there is room and permission to "
              "write, then give the same command again", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError:
        print("train.py: error: not enough memory for the tokenizer: choose another --out and lower --tokenizer-batch",
              file=sys.stderr)
        sys.exit(1)
    except RunError as error:
        if rank == 0:  # all have come to the same
            print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the first step, or twice
        print("train.py: stopped", file=sys.stderr)
        sys.exit(130)
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"train.py: error: torch.compile does not work here ({str(error).strip().splitlines()[0]}): leave "
              "--compile away, and the run goes on", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
