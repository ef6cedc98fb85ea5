"""Train VQ-LCMD from images to samples with one command; the same command again continues an interrupted run.

    python train.py                          the built-in set, minutes on two CPU cores
    python train.py --data FOLDER            your own images; a preset is chosen by their size and your device
    python train.py --data ffhq --root DIR   a published set by its name; it says how to get it if it is not there
    python train.py --data FOLDER --preset 64 --out runs/faces --device cuda

Three stages in one run directory (--out):

    (before)    what was found                         data.png, skipped.txt: images that cannot be used
    tokenizer   images -> VQ-VAE                       tokenizer.pt, reconstructions_*.png, tokenizer.csv
    tokens      every image encoded once               tokens.npy, one memory-mapped array
    diffusion   tokens -> embeddings and denoiser      ckpt.pt, samples_*.png, diffusion.csv, evaluation.csv

Every random draw comes from (seed, stage, step), so an interrupted run continues exactly where it was.
"""

import argparse
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
import fid
import vqvae
from embedding_diffusion import EmbeddingDiffusion
from losses import collapse_diagnostics, held_out_bound, training_loss
from sample import (
    CHECKPOINT_FORMAT,
    COLUMNS,
    CheckpointError,
    bf16_works,
    choose_device,
    default_labels,
    load_checkpoint,
    read_checkpoint,
    sample_images,
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
    "teacher": (("current", "ema"), "current", "weights of the CM teacher"),
    "p_drop": (float, 0.1, "highest rate of dropped embeddings, drawn per image from [0, p_drop]"),
    "label_drop": (float, 0.1, "rate of dropped labels, for classifier-free guidance"),
    # optimisation of the denoiser
    "steps": (int, 50000, "training steps of the denoiser; may be raised later"),
    "batch": (int, 256, "images per step"),
    "lr": (float, 5e-4, "peak learning rate, reached after warmup, then cosine to zero"),
    "warmup": (int, 200, "warm-up steps, both stages"),
    "weight_decay": (float, 0.0, "AdamW's, denoiser"),
    "clip": (float, 1.0, "largest gradient norm, both stages"),
    "ema_decay": (float, 0.999, "of the averaged weights that sample; shorter at the start"),
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
CHANGEABLE = {"steps", "log_every", "sample_every", "save_every", "sample_steps", "guidance", "sampler"}


class UserError(ValueError):
    """One line: what was wrong and what to do. Exit status 2."""


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
        if kind is int and name != "warmup":
            low = 2 if name in ("K", "batch") else 1
        if name in ("rec_fraction", "p_drop", "label_drop", "ema_decay", "gan_start"):
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
        return json.loads(path.read_text())
    if out.exists() and any(p.name not in ("skipped.txt", "data.png") for p in out.iterdir()):
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
    position = np.arange(step * batch, (step + 1) * batch)
    return np.array([epoch_order(n, seed, stage, p // n)[p % n] for p in position])


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up, then half a cosine to zero."""
    return peak * min(1, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def write_atomically(path, write):
    """write(partial path), down to the disk, then rename: whatever happens, there is the old file or the new one."""
    partial = path.with_name(path.name + ".part")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: is the disk full? ({' '.join(str(error).split())})") from error
    partial.replace(path)


def append_row(path, row):
    """One more line of a CSV file, with a header first."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([row.keys()] * new + [row.values()])


def trim_rows(path, last_step):
    """Drops the rows that a killed run wrote after its last checkpoint."""
    if path.exists():
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        rows = [row for row in rows if int(row[0]) <= last_step]
        write_atomically(path, lambda partial: partial.write_text("\n".join(map(",".join, [header, *rows])) + "\n"))


def on_signal(number, frame):
    if SIGNALS:  # the second one means it
        raise KeyboardInterrupt
    SIGNALS.append(number)


def stop_if_asked(save=None):
    """Between two steps: after Ctrl-C or kill, saves and leaves with the shell's status (130 or 143)."""
    if SIGNALS:
        if save is not None:
            save()
        tqdm.write("stopped; the same command continues from here")
        sys.exit(128 + SIGNALS[0])


def status(stage, step, steps, values):
    tqdm.write(f"{stage} {step:>6,}/{steps:,}  " + "  ".join(f"{name} {value}" for name, value in values.items()))


# ----------------------------------------------------------------------------
# Stage 1: images -> tokenizer.

def batches_ahead(dataset, batch, seed, start, steps):
    """(step, images) for every step; the next batch is read by a thread while this one trains."""
    def read(step):
        return dataset.batch(batch_indices(len(dataset), batch, seed, "tokenizer", step))
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


def descend(loss, module, optimizer, lr, clip):
    """One step of module's parameters down the gradient of the loss."""
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
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
    return terms, {name: value.detach() for name, value in found.items()} | {"lr": torch.tensor(lr)}


def train_tokenizer(config, models, sets, out, seed, device, lpips=None):
    """Trains until tokenizer.pt says it is complete. Returns nothing: the file is the result. lpips: a vqvae.LPIPS."""
    path, steps = out / "tokenizer.pt", 0 if "published" in models["tokenizer"] else config["tokenizer_steps"]
    state = read_checkpoint(path, TOKENIZER_FORMAT) if path.exists() else None
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
    trim_rows(out / "tokenizer.csv", start)
    shown = test.batch(np.linspace(0, len(test) - 1, min(4 * COLUMNS, len(test))).astype(int))

    def save(at):
        write_atomically(path, lambda partial: torch.save(
            {"format": TOKENIZER_FORMAT, "config": models["tokenizer"], "step": at, "metrics": metrics}
            | {name: part.state_dict() for name, part in trained.items()}, partial))

    def picture(at):
        """Rows of held-out images, each above its reconstruction."""
        model.eval()
        pairs = torch.stack([shown, model.decode(model.encode(shown.to(device))).cpu()])           # (2, n, 3, H, W)
        rows = [pairs[i, c:c + COLUMNS] for c in range(0, len(shown), COLUMNS) for i in (0, 1)]
        data.save_grid(torch.cat(rows), out / f"reconstructions_{at:06d}.png", min(COLUMNS, len(shown)))

    names = ["reconstruction", *["lpips"] * (lpips is not None), "commitment", "codebook",
             *["adversarial", "weight", "discriminator"] * bool(config["gan"])]
    sums, used = torch.zeros(len(names), device=device), torch.zeros(config["K"], device=device)
    since, clock, absent = 0, time.time(), torch.zeros((), device=device)
    with tqdm(total=steps, initial=start, desc="tokenizer", unit="step", disable=None, leave=False) as bar:
        for step, images in batches_ahead(train, config["tokenizer_batch"], seed, start, steps):
            stop_if_asked(lambda at=step: save(at))
            model.train()
            if config["flip"]:
                mirrored = torch.rand(len(images), 1, 1, 1, generator=generator_for(seed, "flips", step)) < 0.5
                images = torch.where(mirrored, images.flip(3), images)
            terms, found = tokenizer_step(config, model, trained["optimizer"], images.to(device, non_blocking=True),
                                          generator_for(seed, "tokenizer", step), step, lpips, trained.get("judge"),
                                          trained.get("judges"))
            # Sums stay on the device: reading them back each step would make the GPU wait for Python.
            sums += torch.stack([found.get(name, absent) for name in names])
            used += torch.bincount(terms["tokens"].flatten(), minlength=config["K"])
            since, done = since + 1, step + 1
            bar.update()
            if done % config["log_every"] == 0 or done == steps:
                means = check_finite(sums / since, "tokenizer", done)
                row = {"step": done} | {name: f"{mean:.5f}" for name, mean in zip(names, means, strict=True)}
                row |= {"lr": f"{float(found['lr']):.2e}", "codes": int((used > 0).sum()),
                        "img/s": round(since * config["tokenizer_batch"] / (time.time() - clock))}
                append_row(out / "tokenizer.csv", row)
                status("tokenizer", row.pop("step"), steps, row)
                sums, used, since, clock = torch.zeros_like(sums), torch.zeros_like(used), 0, time.time()
            if done % config["sample_every"] == 0 and done < steps:
                picture(done)
            if done % config["save_every"] == 0 and done < steps:
                check_finite(sums, "tokenizer", done)
                save(done)
    save(steps)
    picture(steps)
    metrics = vqvae.evaluate(model, test, device, lpips)
    save(steps)
    print(f"tokenizer: {show(metrics)} on {len(test):,} held-out images; pictures in {out}")


def check_finite(values, stage, step):
    """The tensor as a list; a loss that is not finite ends the run before anything is overwritten."""
    values = values.tolist()
    if not all(map(math.isfinite, values)):
        print(f"train.py: error: the {stage}'s loss is not finite at step {step:,}; its last checkpoint is kept. "
              "Lower the learning rate", file=sys.stderr)
        sys.exit(1)
    return values


def show(metrics):
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


# ----------------------------------------------------------------------------
# Stage 2: images -> tokens.

def load_tokenizer(models, out, device):
    """(tokenizer in eval mode, its metrics) from a complete tokenizer.pt."""
    path = out / "tokenizer.pt"
    state = read_checkpoint(path, TOKENIZER_FORMAT) if path.exists() else None
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

def to_device(rows, device):
    """Rows of tokens.npy -> x (B, N), labels (B,), int64 on the device."""
    x, labels = torch.from_numpy(rows["x"].astype(np.int64)), torch.from_numpy(rows["label"].astype(np.int64))
    return x.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def train_diffusion(config, models, class_names, out, seed, device):
    """Trains embeddings and denoiser on tokens.npy until ckpt.pt says that it is complete."""
    path, steps = out / "ckpt.pt", config["steps"]
    state = read_checkpoint(path) if path.exists() else None
    if state and state["metrics"] and state["step"] >= steps:
        return print(f"diffusion: complete ({state['step']:,} steps), bits per token: {show(state['metrics']['vlb'])}")
    tokenizer, tokenizer_metrics = load_tokenizer(models, out, device)
    if not (out / "tokens.npy").exists():
        raise UserError(f"{out / 'tokens.npy'} is not there: run --stage tokens (or all) first")
    check_maker(out / "tokens.npy", tokenizer)
    rows = np.load(out / "tokens.npy", mmap_mode="r")
    train_rows, test_rows = np.flatnonzero(~rows["test"]), np.flatnonzero(rows["test"])
    held_out = rows[test_rows[np.linspace(0, len(test_rows) - 1, min(2000, len(test_rows))).astype(int)]]
    held_out = to_device(held_out, device)
    torch.manual_seed(seed_for(seed, STAGES["weights"], 1))
    model = EmbeddingDiffusion(**models["denoiser"], bf16=bf16_works(device)).to(device)
    if config["embedding_init"] == "codebook":
        model.start_from(tokenizer.codebook)
    ema = copy.deepcopy(model).requires_grad_(False)
    schedule = ShiftedCosine(**models["schedule"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=config["weight_decay"],
                                  fused=True)
    start, metrics = 0, {}
    if state:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"diffusion: continuing at step {start:,}")
    for name in ("diffusion.csv", "evaluation.csv"):
        trim_rows(out / name, start or -1)
    settings = {"steps": config["sample_steps"], "guidance": config["guidance"], "sampler": config["sampler"]}
    bundle = SimpleNamespace(tokenizer=tokenizer, model=ema, schedule=schedule, device=device)
    labels_shown = default_labels(COLUMNS * min(len(class_names) or 8, 16), len(class_names))

    def save(at):
        write_atomically(path, lambda partial: torch.save(
            {"format": CHECKPOINT_FORMAT, "config": models | {"training": config | {"seed": seed}},
             "tokenizer": tokenizer.state_dict(), "model": model.state_dict(), "ema": ema.state_dict(),
             "optimizer": optimizer.state_dict(), "step": at, "class_names": class_names, "sampling": settings,
             "metrics": metrics}, partial))

    def evaluate(at, draws):
        ema.eval()
        bound = held_out_bound(ema, schedule, *held_out, lambda i: generator_for(seed, "evaluation", i, device), draws)
        collapse = collapse_diagnostics(ema.table())
        append_row(out / "evaluation.csv", {"step": at} | bound | {"log2_K": math.log2(config["K"])} | collapse)
        tqdm.write(f"held out at step {at:,}: {bound['total']:.3f} bits per token = prior {bound['prior']:.3f} + rec "
                   f"{bound['rec']:.3f} + diff {bound['diff']:.3f} (log2 K = {math.log2(config['K']):.2f});  "
                   f"{show(collapse)}")
        return {"vlb": bound, "collapse": collapse, "tokenizer": tokenizer_metrics}

    def picture(at):
        ema.eval()
        images = sample_images(bundle, labels_shown, seed=seed, **settings)
        words = [class_names[label] for label in labels_shown[::COLUMNS]] if class_names else None
        data.save_grid(images, out / f"samples_{at:06d}.png", COLUMNS, row_labels=words)

    if start == 0:
        evaluate(0, DRAWS)
    loss_options = {name: config[name] for name in ("w_rec", "w_diff", "w_cm", "rec_fraction", "max_snr", "coupling",
                                                    "p_drop", "label_drop")}
    sums, since, clock = torch.zeros(3, device=device), 0, time.time()
    with tqdm(total=steps, initial=start, desc="diffusion", unit="step", disable=None, leave=False) as bar:
        for step in range(start, steps):
            stop_if_asked(lambda at=step: save(at))
            model.train()
            lr = learning_rate(step, steps, config["warmup"], config["lr"])
            batch = rows[train_rows[batch_indices(len(train_rows), config["batch"], seed, "diffusion", step)]]
            x, labels = to_device(batch, device)
            teacher = ema if config["teacher"] == "ema" else model
            loss, terms = training_loss(model, teacher, schedule, x, labels,
                                        generator_for(seed, "diffusion", step, device), **loss_options)
            descend(loss, model, optimizer, lr, config["clip"])
            decay = min(config["ema_decay"], (1 + step) / (10 + step))  # a short memory while weights still run
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            sums += torch.stack([terms["rec"], terms["diff"], terms["cm"]])
            since, done = since + 1, step + 1
            bar.update()
            if done % config["log_every"] == 0 or done == steps:
                rec, diff, cm = check_finite(sums / since, "denoiser", done)
                collapse = collapse_diagnostics(model.table())
                row = {"step": done, "rec": f"{rec:.4f}", "diff": f"{diff:.4f}", "cm": f"{cm:.4f}", "lr": f"{lr:.2e}",
                       "img/s": round(since * config["batch"] / (time.time() - clock)),
                       "rank": f"{collapse['effective_rank']:.2f}", "min_dist": f"{collapse['smallest_distance']:.3f}"}
                append_row(out / "diffusion.csv", row)
                status("diffusion", row.pop("step"), steps, row)
                sums, since, clock = torch.zeros_like(sums), 0, time.time()
            if done % config["sample_every"] == 0 and done < steps:
                evaluate(done, DRAWS)
                picture(done)
            if done % config["save_every"] == 0 and done < steps:
                check_finite(sums, "denoiser", done)
                save(done)
    save(steps)
    picture(steps)
    metrics = evaluate(steps, FINAL_DRAWS)
    write_atomically(out / "metrics.json", lambda partial: partial.write_text(json.dumps(metrics, indent=2) + "\n"))
    save(steps)


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
    fid.report(scores, real.n, n)
    metrics["fid"] = scores | {"n": n}
    write_atomically(path, lambda partial: partial.write_text(json.dumps(metrics, indent=2) + "\n"))


# ----------------------------------------------------------------------------

def main():
    args = parse_arguments()
    try:
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
        models = describe_models(config, len(source.class_names), given_tokenizer)
        with torch.device("meta"):  # every size is checked here, before any work
            parts = vqvae.make(models["tokenizer"]), EmbeddingDiffusion(**models["denoiser"])
            ShiftedCosine(**models["schedule"])
            if config["gan"]:
                make_discriminator(config)
        if config["perceptual"] and config["size"] < (least := 2 ** (len(vqvae.LPIPS.STAGES) - 1)):
            raise UserError(f"--perceptual needs images of at least {least} pixels, not {config['size']}: "
                            "--perceptual 0")
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
        if has_images and not stored:
            look_at_images(source, sets, out, args.allow_bad)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.json", lambda partial: partial.write_text(json.dumps(asked, indent=2) + "\n"))
        if given_tokenizer and not (out / "tokenizer.pt").exists():
            given_tokenizer["config"] = models["tokenizer"]
            write_atomically(out / "tokenizer.pt", lambda partial: torch.save(given_tokenizer, partial))
        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)
        if args.stage in ("all", "tokenizer"):
            train_tokenizer(config, models, sets, out, args.seed, device, lpips)
        if args.stage in ("all", "tokens"):
            encode_tokens(config, models, source, sets, out, device)
        if args.stage in ("all", "diffusion"):
            train_diffusion(config, models, source.class_names, out, args.seed, device)
            if args.eval_fid:
                stop_if_asked()
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)  # all is saved
                evaluate_fid(args.eval_fid, fid.load_inception(inception, device), sets, out, device)
            print(f"complete. Draw images:  python sample.py {out / 'ckpt.pt'}    Train longer: the same with --steps")
    except (UserError, data.DataError, CheckpointError, ValueError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"train.py: error: {error}; what was saved before is kept. See that there is room and permission to "
              "write, then give the same command again", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError:
        print(f"train.py: error: not enough memory on {device}: choose another --out and lower --tokenizer-batch "
              f"(now {config['tokenizer_batch']}) or --batch (now {config['batch']}), whichever stage it was",
              file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the first step, or twice
        print("train.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
