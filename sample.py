"""Draw images with a trained VQ-LCMD:

    python sample.py runs/toy/ckpt.pt --class heart,star --guidance 2               a grid, samples.png
    python sample.py runs/toy/ckpt.pt --n 50000 --out samples.npz                   or a .zip, or a folder; resumable
    python sample.py runs/toy/ckpt.pt --grid-of guidance=0,1,2,4                    also --trajectory, --interpolate 0,1
    python sample.py runs/toy/ckpt.pt --inpaint star.png --mask mask.png            also --vary star.png --strength 0.6

    z_1 ~ N(0, I);  for t from 1 down to 0:  logits = denoiser(z_t, t, class),  e_hat = softmax(logits) E,
    z_s ~ q(z_s | z_t, e_hat);  at t = 0:  tokens ~ p_theta(x | z_0);  image = tokenizer's decoder(tokens).

In few steps the tokens are drawn a little before t = 0 (default_end, ours).

The checkpoint holds everything: configuration, tokenizer, denoiser (its EMA), class names, default settings. Every
image has a random generator of its own, seeded by (seed, i) and drawing on the CPU, so image i is the same for any
number of images, any batch size and any device, up to the rounding of the network itself.
"""

import argparse
import datetime
import io
import math
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import vqvae
from data import DataError, grid_page, load_image, save_grid
from embedding_diffusion import EmbeddingDiffusion
from engine.checkpoint import CheckpointError, detect_container
from schedule import ShiftedCosine, add_noise, alpha_sigma, posterior

CHECKPOINT_FORMAT = "vq-lcmd checkpoint 1"
COLUMNS = 8  # images in a row of the grid; with classes, image i has class (i // COLUMNS) mod C


# ----------------------------------------------------------------------------
# The sampler.

def ancestral_step(z_t, e_hat, log_snr_t, log_snr_s, eps):
    """z_s ~ q(z_s | z_t, e_hat), the reverse step with the predicted embedding.  Shapes as in schedule.posterior."""
    mean, std = posterior(z_t, e_hat, log_snr_t, log_snr_s)
    return mean + std * eps


def ddim_step(z_t, e_hat, log_snr_t, log_snr_s):
    """Deterministic: z_s = alpha_s e_hat + sigma_s (z_t - alpha_t e_hat) / sigma_t  (Song et al. 2021, eta = 0)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    eps_hat = (z_t - alpha_t[:, None, None] * e_hat) / sigma_t[:, None, None]
    return alpha_s[:, None, None] * e_hat + sigma_s[:, None, None] * eps_hat


def default_end(steps, t=1.0):
    """The time at which few steps draw their tokens: 0.8 t / steps^2 below 16 steps, else 0 (ours, measured).

    The e_hat of a large step is a mean of embeddings. At t = 0 the noise is too small to leave it again, so all images
    become alike; a little earlier p_theta(x | z_end) still has a choice. The gain is in experiments/README.md.
    """
    return 0.8 * t / steps ** 2 if 1 < steps < 16 else 0.0


def check_settings(steps=50, guidance=0.0, sampler="ancestral", temperature=1.0, interval=(0.0, 1.0), end=None, t=1.0):
    """ValueError, in one line, for settings of sample_tokens that make no sense. t: where the grid starts."""
    if sampler not in ("ancestral", "ddim"):
        raise ValueError(f"sampler must be ancestral or ddim, got {sampler!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance interval {interval[0]} {interval[1]}: must be 0 <= LOW <= HIGH <= 1")
    end = end or 0.0  # default_end is always before t
    if not 0 <= end < t <= 1:
        raise ValueError(f"time goes down from t = {t} to the end at {end}: both must lie in [0, 1], the end lower")


@torch.no_grad()
def sample_tokens(model, schedule, labels, generators, steps=50, guidance=0.0, sampler="ancestral", *, temperature=1.0,
                  interval=(0.0, 1.0), end=None, known=None, start=None, noise=None, watch=None):
    """Tokens (B, N) for labels (B,), one torch.Generator (on the CPU) per image.

    steps counts calls of the network: steps - 1 moves on a grid uniform in t from 1 to end (None: default_end), then
    the tokens are drawn from p_theta(x | z_end). guidance is omega; 0 is the plain conditional model.

    temperature: p_theta is softmax(logits / temperature), at every step. interval: omega counts for t in [low, high]
    only, elsewhere it is 0 (Kynkaanniemi et al. 2024). known: tokens (B or 1, N) int64 to keep, -1 where free: there
    e_hat is the known embedding, and an ancestral step is exactly q(z_s | z_t, x). start: (tokens (B or 1, N), t), the
    image to start at and how far it is noised. noise: (B, N, D) for the first noise, z_1 or start's eps, in place of
    the generators', which go on as if they had been asked. watch(t, p (B, N, K)): called after each step.
    """
    t = 1.0 if start is None else start[1]
    check_settings(steps, guidance, sampler, temperature, interval, end, t)
    end = default_end(steps, t) if end is None else end
    table, device, B = model.table(), labels.device, len(labels)

    def draw(*shape, source=torch.randn):
        """On the CPU while the GPU still works on what it was given before: from pinned memory nobody waits."""
        numbers = torch.empty(B, *shape, dtype=table.dtype, pin_memory=device.type == "cuda")
        for row, generator in zip(numbers, generators, strict=True):
            source(*shape, generator=generator, dtype=table.dtype, out=row)
        return numbers.to(device, non_blocking=True)

    # The grid in float64: lambda is steep at both ends.
    times = torch.linspace(t, end, steps, dtype=torch.float64)
    log_snrs = schedule.log_snr(times).to(table.dtype).to(device)                                  # (steps,)
    z = draw(model.N, model.D)                                                                     # (B, N, D)
    if noise is not None:
        z = noise.to(z)
    if start is not None:
        z = add_noise(F.embedding(start[0], table), log_snrs[0].expand(B), z)
    if known is not None:
        one_hot = F.one_hot(known.clamp(min=0), model.K).to(table.dtype)                           # (B or 1, N, K)
    for i, t in enumerate(times.tolist()):
        log_snr_t = log_snrs[i].expand(B)                                                          # (B,)
        omega = guidance if interval[0] <= t <= interval[1] else 0.0
        p = model.guided(z, log_snr_t, labels, omega, table=table)                                 # logits (B, N, K)
        p = (p if temperature == 1 else p / temperature).softmax(-1)                               # (B, N, K)
        if known is not None:
            p = torch.where(known[..., None] < 0, p, one_hot)
        if i + 1 < steps:
            e_hat = p @ table                                                                      # (B, N, D)
            log_snr_s = log_snrs[i + 1].expand(B)
            if sampler == "ddim":
                z = ddim_step(z, e_hat, log_snr_t, log_snr_s)
            else:
                z = ancestral_step(z, e_hat, log_snr_t, log_snr_s, draw(model.N, model.D))
        if watch is not None:
            watch(t, p)
    # Categorical draw by inversion, one uniform number per token: the first k whose cumulated p exceeds u.
    u = draw(model.N, 1, source=torch.rand)                                                        # (B, N, 1)
    cumulated = p.cumsum(-1)
    return torch.searchsorted(cumulated, u * cumulated[..., -1:], right=True).squeeze(-1).clamp(max=model.K - 1)


def image_generators(seed, indices):
    """One CPU generator per image, seeded by (seed, index)."""
    seeds = [np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] for i in indices]
    return [torch.Generator().manual_seed(int(s >> np.uint64(1))) for s in seeds]


def sample_images(bundle, labels, *, seed=0, first=0, indices=None, noise=None, steps, guidance, sampler, batch=256,
                  show_progress=True, watch=None, **options):
    """uint8 images (n, 3, H, W) for labels (n,), by a bundle of load_checkpoint (or the like, from train.py).

    They are the images first, first + 1, ... of this seed, or those of indices. noise: (n, N, D). The other options
    are those of sample_tokens, and known and the tokens of start are the same for all images.
    """
    images, indices = [], range(first, first + len(labels)) if indices is None else indices

    def after_step(t, p):
        bar.update()
        if watch is not None:
            watch(t, p)

    with tqdm(total=-(-len(labels) // batch) * steps, desc="sampling", unit="step", leave=False,
              disable=None if show_progress else True) as bar:
        for start in range(0, len(labels), batch):
            here = slice(start, start + batch)
            tokens = sample_tokens(bundle.model, bundle.schedule, labels[here].to(bundle.device),
                                   image_generators(seed, indices[here]), steps, guidance, sampler,
                                   noise=None if noise is None else noise[here], watch=after_step, **options)
            images.append(bundle.tokenizer.decode(tokens).cpu())
    return torch.cat(images)


def sample_together(bundle, labels, **options):
    """sample_images, shared out among all processes. Each gets all images; they are those of a single process."""
    (rank, world), n = processes(), len(labels)
    each = -(-n // world)  # for the last ones some in vain: FSDP wants the model to be called equally often by all
    mine = labels[(torch.arange(each) + rank * each).clamp(max=n - 1)]
    images = sample_images(bundle, mine, first=rank * each, show_progress=rank == 0, **options)
    if world == 1:
        return images
    parts = [torch.empty_like(images) for _ in range(world)]
    dist.all_gather(parts, images)
    return torch.cat(parts)[:n]


def sample_files(bundle, labels, out, batch, seed, **settings):
    """Image i of labels (n,) as it is, for measuring: a folder or .zip of 000000.png ..., or an .npz as ADM's.

    The .npz holds arr_0 (n, H, W, 3) uint8 and arr_1 (n,), the labels. Till all is done the images lie in OUT.part.npy,
    with a mark for each, so that the same command goes on where it was stopped; processes share out the batches.
    """
    (rank, world), n, (h, w) = processes(), len(labels), (bundle.tokenizer.size,) * 2
    part = out.with_name(out.name + ".part.npy")
    made = vqvae.digest(bundle.model.state_dict() | {"labels": labels}) + f" seed {seed} {settings}"
    dtype = np.dtype([((made, "image"), np.uint8, (h, w, 3)), ("done", bool)])
    if rank == 0 and not part.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = part.with_suffix(".new")
        with fresh.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": dtype.descr, "fortran_order": False, "shape": (n,)})
            file.truncate(file.tell() + n * dtype.itemsize)  # zeros: nothing is done
        fresh.replace(part)
    wait_for_all()
    rows = np.load(part, mmap_mode="r+")
    if rows.dtype != dtype or len(rows) != n:
        raise ValueError(f"{part} holds images of another model, seed or setting: delete it, or give another --out")
    with tqdm(total=n, initial=int(rows["done"].sum()), desc="sampling", unit="img",
              disable=True if rank else None) as bar:
        for start in range(rank * batch, n, world * batch):
            here = slice(start, min(start + batch, n))
            if rows["done"][here].all():
                continue
            images = sample_images(bundle, labels[here], seed=seed, first=start, batch=batch, show_progress=False,
                                   **settings)
            rows["image"][here] = images.permute(0, 2, 3, 1).numpy()
            rows.flush()  # the images are on the disk before the marks say so
            rows["done"][here] = True
            bar.update(len(images) * world)
    rows.flush()
    wait_for_all()
    if rank == 0:
        pack(rows["image"], labels.numpy(), out)
        part.unlink()


def pack(images, labels, out):
    """images (n, H, W, 3) uint8 into a folder, a .zip or an .npz, which appears when it is complete."""
    partial = out.with_name(out.name + ".part")

    def png(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        return file.getvalue()

    if out.suffix == ".npz":
        with partial.open("wb") as file:
            np.savez(file, arr_0=images, arr_1=labels)
    elif out.suffix == ".zip":
        with zipfile.ZipFile(partial, "w") as file:
            for i, image in enumerate(images):
                file.writestr(f"{i:06d}.png", png(image))
    else:
        partial.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            (partial / f"{i:06d}.png").write_bytes(png(image))
    partial.replace(out)


def default_labels(n, num_classes):
    """(n,) labels: rows of COLUMNS images of one class, class after class; zeros (the null class) without classes."""
    return (torch.arange(n) // COLUMNS) % max(num_classes, 1)


def words(bundle, labels):
    """Labels (n,) -> their class names, or None without classes."""
    return [bundle.class_names[label] for label in labels.tolist()] if bundle.class_names else None


# ----------------------------------------------------------------------------
# Special pictures: what a setting does, what happens over time, images made from an image or between two.

def draw_grid_of(args, bundle, chosen, labels, settings):
    """--grid-of NAME=V,V: a row for each value, with the images that the plain grid has, in one row."""
    kinds = {"guidance": float, "steps": int, "temperature": float, "end": float}
    name, _, values = args.grid_of.partition("=")
    try:
        rows = [settings | {name: kinds[name](value)} for value in values.split(",")]
    except (KeyError, ValueError):
        raise ValueError(f"--grid-of {args.grid_of}: give NAME=VALUE,VALUE,... of {', '.join(kinds)}") from None
    for row in rows:
        check_settings(**row)
    images = [sample_images(bundle, labels, seed=args.seed, batch=args.batch, **row) for row in rows]
    save_grid(torch.cat(images), args.out, len(labels), row_labels=[f"{name} {row[name]:g}" for row in rows])


def draw_trajectory(args, bundle, chosen, labels, settings):
    """--trajectory: the likeliest tokens of p_theta(x | z_t), decoded: about ten times in OUT.png, all in OUT.gif."""
    seen, steps = [], settings["steps"]  # (t, tokens), for all steps of the first batch, then of the next
    sample_images(bundle, labels, seed=args.seed, batch=args.batch,
                  watch=lambda t, p: seen.append((t, p.argmax(-1))), **settings)
    times = [t for t, _ in seen[:steps]]
    frames = [torch.cat([bundle.tokenizer.decode(tokens).cpu() for _, tokens in seen[i::steps]]) for i in range(steps)]
    shown = sorted({round(i) for i in np.linspace(0, steps - 1, 10)})
    save_grid(torch.stack([frames[i] for i in shown], 1).flatten(0, 1), args.out, len(shown),
              row_labels=words(bundle, labels),
              column_labels=[f"t {times[i]:.2f}" for i in shown])
    # The labels make all frames different: Pillow would leave out one that is the same as the last.
    pages = [grid_page(frame, min(COLUMNS, len(labels)), column_labels=[f"{i + 1}/{steps}", f"t {t:.2f}"])
             for i, (t, frame) in enumerate(zip(times, frames, strict=True))]
    partial = Path(args.out).with_suffix(".gif.part")
    pages[0].save(partial, "gif", save_all=True, append_images=pages[1:], duration=[100] * (steps - 1) + [2000], loop=0)
    partial.replace(Path(args.out).with_suffix(".gif"))


def read_image(flag, path, size=None):
    """data.load_image, the way to pixels that training takes, with errors that name the flag."""
    try:
        return load_image(path, size)
    except DataError as error:
        raise DataError(f"{flag} {path}: {error}") from error


def read_mask(path, tokenizer):
    """A mask image -> (N,) bool, True where a token is to be drawn: a pixel of its f x f cell is white."""
    pixels, size, f = read_image("--mask", path), tokenizer.size, tokenizer.f                      # (3, H, W) uint8
    (height, width), side = pixels.shape[1:], min(pixels.shape[1:])
    left, top = (width - side) // 2, (height - side) // 2  # the centre square, as load_image takes it of the image
    mask = Image.fromarray(pixels.min(0)).resize((size, size), Image.Resampling.NEAREST,
                                                 box=(left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(mask) >= 128).view(size // f, f, size // f, f).any(3).any(1).flatten()


def draw_from_image(args, bundle, chosen, labels, settings):
    """--inpaint and --vary: the image, for --inpaint also the image without its masked cells, then the new images.

    With --class a row per class; without, one row by the null class, by which the model draws images of any class.
    """
    tokenizer, n, flag = bundle.tokenizer, len(labels), "--vary" if args.inpaint is None else "--inpaint"
    if bundle.class_names and not args.classes and not bundle.config["training"]["label_drop"]:
        raise ValueError(f"{flag}: this model was trained with --label-drop 0 and has to know the class: give --class")
    image = torch.from_numpy(read_image(flag, args.inpaint or args.vary, tokenizer.size))[None]    # (1, 3, H, W)
    tokens = tokenizer.encode(image.to(bundle.device))                                             # (1, N)
    if flag == "--vary":
        columns, options = {"image": image}, {"start": (tokens, 0.6 if args.strength is None else args.strength)}
        check_settings(**settings, t=options["start"][1])
    else:
        drawn = read_mask(args.mask, tokenizer)                                                    # (N,)
        if not drawn.any():
            raise ValueError(f"--mask {args.mask} has no white pixel: paint white what is to be drawn anew")
        cells = drawn.view(tokenizer.grid).repeat_interleave(tokenizer.f, 0).repeat_interleave(tokenizer.f, 1)
        columns = {"image": image, "mask": image.where(~cells, 128)}
        options = {"known": tokens.masked_fill(drawn.to(bundle.device), -1)}
    if not args.classes:
        chosen, settings = [bundle.model.num_classes], settings | {"guidance": 0.0}  # no class to be guided to
    images = sample_images(bundle, torch.tensor(chosen).repeat_interleave(n), seed=args.seed, batch=args.batch,
                           indices=list(range(n)) * len(chosen), **options, **settings)
    before = torch.cat(list(columns.values())).expand(len(chosen), -1, -1, -1, -1)
    save_grid(torch.cat([before, images.view(len(chosen), n, *images.shape[1:])], 1).flatten(0, 1), args.out,
              len(columns) + n, column_labels=list(columns),
              row_labels=words(bundle, torch.tensor(chosen)) if args.classes else None)


def slerp(a, b, n):
    """a, b (N, D) -> (n, N, D), from a to b along the circle: straight ones in between would be too short to be noise.

    a sin((1 - w) angle) / sin(angle) + b sin(w angle) / sin(angle), w = 0, ..., 1; both ends are exact.
    """
    w = torch.linspace(0, 1, n, dtype=torch.float64)[:, None, None]
    angle = F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).acos()
    return (((1 - w) * angle).sin() / angle.sin() * a + (w * angle).sin() / angle.sin() * b).to(a.dtype)


def draw_interpolation(args, bundle, chosen, labels, settings):
    """--interpolate A,B: from image 0 of seed A to the first noise of seed B, all else that of A; a row per class."""
    seeds, n, rows, model = args.interpolate.split(","), len(labels), torch.tensor(chosen[:16]), bundle.model
    if len(seeds) != 2 or not all(seed.strip().isdecimal() for seed in seeds) or int(seeds[0]) == int(seeds[1]):
        raise ValueError(f"--interpolate {args.interpolate}: give two different seeds, as 0,1")
    ends = [torch.randn(model.N, model.D, generator=image_generators(int(seed), [0])[0]) for seed in seeds]
    images = sample_images(bundle, rows.repeat_interleave(n), seed=int(seeds[0]), batch=args.batch,
                           indices=[0] * n * len(rows), noise=slerp(*ends, n).repeat(len(rows), 1, 1), **settings)
    save_grid(images, args.out, n, row_labels=words(bundle, rows),
              column_labels=[f"seed {seeds[0]}"] + [""] * (n - 2) + [f"seed {seeds[1]}"])


# ----------------------------------------------------------------------------
# Checkpoints and the command line.

def previous(path):
    """Where train.py keeps the checkpoint before the last one while it trains: ckpt.pt, ckpt.previous.pt."""
    return path.with_suffix(".previous.pt")


def read_checkpoint(path, expected=CHECKPOINT_FORMAT):
    """The dict in a checkpoint file, on the CPU. Nothing in the file is executed (detect_container, weights_only)."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the ckpt.pt that train.py wrote, e.g. runs/toy/ckpt.pt")
    detect_container(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types here; all mean the same to a user
        older = f"; {previous(path)} is the one before" if previous(path).exists() else ""
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is no file of "
                              f"train.py, or it is damaged{older}") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != expected:
        error = CheckpointError(f"{path} is {found or 'a file of another program'!r}, not {expected!r}: "
                                "give the ckpt.pt that train.py wrote at the end")
        error.found = found
        raise error
    return checkpoint


def processes():
    """(rank, number of processes): (0, 1) for plain python; under torchrun the first call joins the others.

    Tensors on GPUs travel by NCCL, those on the CPU by gloo. The others may have to wait for the first process for as
    long as it trains a tokenizer; if one of them dies, torchrun ends all.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=datetime.timedelta(days=30))
    return dist.get_rank(), dist.get_world_size()


def wait_for_all():
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def choose_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu) or a name; ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def load_checkpoint(path, device):
    """Everything needed to sample: tokenizer, model (EMA weights), schedule, class_names, sampling, config, device."""
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    tokenizer, model = vqvae.make(config["tokenizer"]), EmbeddingDiffusion(**config["denoiser"])
    tokenizer.load_state_dict(checkpoint["tokenizer"])
    model.load_state_dict(checkpoint["ema"])
    tokenizer.bf16 = model.bf16 = bf16_works(device)
    return SimpleNamespace(tokenizer=tokenizer.to(device).eval(), model=model.to(device).eval(),
                           schedule=ShiftedCosine(**config["schedule"]), class_names=checkpoint["class_names"],
                           sampling=checkpoint["sampling"], config=config, step=checkpoint["step"], device=device)


def bf16_works(device):
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def parse_classes(text, class_names):
    """ "heart,3" -> [id of heart, 3]; ValueError names the classes there are."""
    if not class_names:
        raise ValueError("--class: this model was trained without classes")
    ids = []
    for item in text.split(","):
        item = item.strip()
        if item in class_names:
            ids.append(class_names.index(item))
        elif item.isdigit() and int(item) < len(class_names):
            ids.append(int(item))
        else:
            some = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
            raise ValueError(f"--class: no class {item!r}; there are {len(class_names)}: {some}")
    return ids


def parse_arguments():
    parser = argparse.ArgumentParser(description="Draw images with a trained VQ-LCMD checkpoint.")
    parser.add_argument("checkpoint", help="the ckpt.pt that train.py wrote")
    parser.add_argument("--n", type=int, help="how many images (default: 64, or 8 of each class up to 16 classes; for "
                        "the special pictures below: 8, in each row)")
    parser.add_argument("--steps", type=int, help="calls of the network per image (default: in the checkpoint)")
    parser.add_argument("--guidance", type=float, help="omega; 0 is the plain model (default: in the checkpoint)")
    parser.add_argument("--guidance-interval", dest="interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="guide at these times only, 1 being noise and 0 the image (default: 0 1)")
    parser.add_argument("--temperature", type=float, help="below 1: likelier tokens, less variety (default: 1)")
    parser.add_argument("--end", type=float, help="the time t at which the tokens are drawn (default: 0, or "
                        "0.8 / steps^2 below 16 steps, where it makes them better)")
    parser.add_argument("--class", dest="classes", metavar="NAME[,NAME]", help="only these classes, by name or number")
    parser.add_argument("--sampler", choices=["ancestral", "ddim"], help="default: in the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone (default: 0)")
    parser.add_argument("--batch", type=int, default=256, help="images at a time (default: 256)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network; on a GPU with CUDA graphs")
    parser.add_argument("--out", default="samples.png", help="a .png, for a grid; a .npz, a .zip or a folder, for the "
                        "images one by one (default: samples.png)")
    group = parser.add_argument_group("special pictures, one at a time")
    special = group.add_mutually_exclusive_group()
    special.add_argument("--grid-of", metavar="NAME=V,V,...", help="a row for each value of guidance, steps, "
                         "temperature or end; image i has the same noise in every row")
    special.add_argument("--trajectory", action="store_true", default=None, help="what the network takes the image "
                         "for as time goes down: a row per image, and all steps in OUT.gif")
    special.add_argument("--inpaint", metavar="IMAGE", help="draw the white part of --mask anew; a row per class of "
                         "--class, or one row without class and guidance")
    special.add_argument("--vary", metavar="IMAGE", help="noise an image up to time --strength and come back; rows as "
                         "for --inpaint")
    special.add_argument("--interpolate", metavar="A,B", help="from seed A to seed B: the first noise turns, all other "
                         "numbers stay; a row per class; smoothest with --sampler ddim")
    group.add_argument("--mask", metavar="IMAGE", help="for --inpaint: white where tokens are to be drawn")
    group.add_argument("--strength", type=float, help="for --vary: near 0 nothing changes, at 1 nothing stays "
                       "(default: 0.6)")
    return parser.parse_args()


SPECIAL = {"grid_of": draw_grid_of, "trajectory": draw_trajectory, "inpaint": draw_from_image, "vary": draw_from_image,
           "interpolate": draw_interpolation}


def check_arguments(args, special):
    """ValueError for what is wrong whatever the checkpoint. special: the name of a special picture, or None."""
    for name in ("n", "steps", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    if args.seed < 0:
        raise ValueError("--seed must not be negative")
    out = Path(args.out)
    if out.suffix not in (".png", ".npz", ".zip", ""):
        raise ValueError(f"--out {out}: must end in .png, .npz or .zip, or be a folder without an ending")
    if out.suffix != ".png" and out.exists():
        raise ValueError(f"--out {out} is there already: remove it, or give another name")
    flag = f"--{special.replace('_', '-')}" if special else None
    if flag and out.suffix != ".png":
        raise ValueError(f"--out {out}: {flag} draws one picture, give a name that ends in .png")
    if flag and processes()[1] > 1:
        raise ValueError(f"{flag} is for one process: start it with python, not with torchrun")
    if (args.inpaint is None) != (args.mask is None) or (args.strength is not None and args.vary is None):
        raise ValueError("--inpaint and --mask belong together, and --strength to --vary: give both")


def draw(args):
    """Does what the command line says. ValueError, before any work, if that cannot be done."""
    rank, _ = processes()
    special = next((name for name in SPECIAL if getattr(args, name) is not None), None)
    check_arguments(args, special)
    bundle = load_checkpoint(args.checkpoint, choose_device(args.device))
    names, out = bundle.class_names, Path(args.out)
    settings = {key: getattr(args, key) if getattr(args, key) is not None else default
                for key, default in bundle.sampling.items()}
    settings |= {key: getattr(args, key) for key in ("temperature", "interval", "end")
                 if getattr(args, key) is not None}
    check_settings(**settings)
    chosen = parse_classes(args.classes, names) if args.classes else list(range(len(names))) or [0]
    n = args.n or (COLUMNS if special else COLUMNS * min(len(chosen), 16) if names else 64)
    labels = torch.tensor(chosen)[default_labels(n, len(chosen))]
    if args.compile:
        bundle.model.guided = torch.compile(bundle.model.guided, mode="reduce-overhead", dynamic=False)
    if rank == 0:
        print(f"{args.checkpoint}: step {bundle.step:,}, {n} images, seed {args.interpolate or args.seed}, "
              + ", ".join(f"{key} {value}" for key, value in settings.items()))
    if special:
        SPECIAL[special](args, bundle, chosen, labels, settings)
    elif out.suffix == ".png":
        images = sample_together(bundle, labels, seed=args.seed, batch=args.batch, **settings)
        if rank == 0:
            save_grid(images, out, COLUMNS, row_labels=words(bundle, labels[::COLUMNS]))
    else:
        sample_files(bundle, labels, out, args.batch, args.seed, **settings)
    if rank == 0:
        print(f"wrote {args.out}" + (f" and {out.with_suffix('.gif')}" if special == "trajectory" else ""))


def main():
    args = parse_arguments()
    try:
        draw(args)
    except (ValueError, OSError) as error:  # CheckpointError and DataError are ValueErrors
        print(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        print("sample.py: stopped; into a folder, .zip or .npz the same command goes on", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
