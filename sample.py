"""Draw images with a trained VQ-LCMD:

    python sample.py runs/toy/ckpt.pt --class heart,star --guidance 2               a grid, samples.png
    python sample.py runs/toy/ckpt.pt --n 50000 --out samples.npz           or a .zip, or a folder; resumable
    python sample.py runs/toy/ckpt.pt --grid-of guidance=0,1,2,4            or --trajectory, --interpolate 0,1
    python sample.py runs/toy/ckpt.pt --inpaint star.png --mask mask.png    or --vary star.png --strength 0.6
    python sample.py runs/toy/ckpt.pt --serve                               a page in the browser, to play

    z_1 ~ N(0, I);  for t from 1 down to 0:  logits = denoiser(z_t, t, class),  e_hat = softmax(logits) E,
    z_s ~ q(z_s | z_t, e_hat);  at t = 0:  tokens ~ p_theta(x | z_0);  image = tokenizer's decoder(tokens).

In few steps the tokens are drawn before t = 0 is reached (default_end, ours).

The checkpoint holds everything: configuration, tokenizer, denoiser (its EMA), class names, default settings.
Every image has a random generator of its own, seeded by (seed, i) and drawing on the CPU, so image i is the
same for any number of images, any batch size and any device, up to the rounding of the network itself.

A third sampler is a function like ancestral_step, one branch in sample_tokens, and its name in SAMPLERS.
"""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.distributed import all_gather_cat, rank_and_world
from engine.randomness import image_generators
from schedule import add_noise, alpha_sigma, posterior

SAMPLERS = ("ancestral", "ddim")
COLUMNS = 8  # images in a row of the grid; with classes, image i has class (i // COLUMNS) mod C


def ancestral_step(z_t, e_hat, log_snr_t, log_snr_s, eps):
    """z_s ~ q(z_s | z_t, e_hat): the reverse step. Shapes as in schedule.posterior."""
    mean, std = posterior(z_t, e_hat, log_snr_t, log_snr_s)
    return mean + std * eps


def ddim_step(z_t, e_hat, log_snr_t, log_snr_s):
    """z_s = alpha_s e_hat + sigma_s (z_t - alpha_t e_hat) / sigma_t: deterministic (Song et al. 2021)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    eps_hat = (z_t - alpha_t[:, None, None] * e_hat) / sigma_t[:, None, None]
    return alpha_s[:, None, None] * e_hat + sigma_s[:, None, None] * eps_hat


def default_end(steps, guidance=0.0, t=1.0):
    """The time at which 2 to 15 steps draw their tokens: 0.8 t / steps^2, guided 0.3 t; else 0 (ours).

    t: where they start. The e_hat of a large step is a mean of embeddings, and guidance leaves little of its
    variety. At t = 0 the noise is too small to leave it again, so all images become alike; earlier p_theta(x
    | z_end) still has a choice. --end 0.45 can help more with strong guidance, 0.3 with a lower temperature
    without.
    """
    return t * (0.3 if guidance > 0 else 0.8 / steps ** 2) if 1 < steps < 16 else 0.0


def check_settings(steps, guidance, sampler, temperature=1.0, interval=(0.0, 1.0), end=None, t=1.0):
    """ValueError, in one line, for settings of sample_tokens that make no sense. t: where the grid starts."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
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
        raise ValueError(f"time goes down from t = {t} to the end at {end}: both must lie in [0, 1], the end "
                         "lower")


@torch.no_grad()
def sample_tokens(model, schedule, labels, generators, steps, guidance, sampler, *, temperature=1.0,
                  interval=(0.0, 1.0), end=None, inpaint=None, init=None, noise=None, callback=None):
    """Tokens (B, N) for labels (B,), one torch.Generator (on the CPU) per image.

    steps counts calls of the network: steps - 1 moves on a grid uniform in t from 1 to end (None:
    default_end), then the tokens are drawn from p_theta(x | z_end). guidance is omega; 0 is the plain
    conditional model.

    temperature: p_theta is softmax(logits / temperature), at every step. interval: omega counts for t in
    [low, high] only, elsewhere it is 0 (Kynkaanniemi et al. 2024). inpaint: tokens (B or 1, N) int64 to keep,
    -1 where new ones are drawn. Where a token is kept e_hat is its embedding, and an ancestral step is
    exactly q(z_s | z_t, x). init: (tokens (B or 1, N), strength), for image to image: noised up to t =
    strength, and back. noise: (B, N, D), the first noise, in place of the generators' (which still draw it,
    so that their later numbers stay the same). callback(t, p (B, N, K)): called after each step.
    """
    start = 1.0 if init is None else init[1]
    check_settings(steps, guidance, sampler, temperature, interval, end, start)
    end = default_end(steps, guidance, start) if end is None else end
    table, device, B = model.table(), labels.device, len(labels)

    def random(*shape, source=torch.randn):
        """Drawn on the CPU, image by image, and copied while the GPU still works on the step before."""
        numbers = torch.empty(B, *shape, dtype=table.dtype, pin_memory=device.type == "cuda")
        for row, generator in zip(numbers, generators, strict=True):
            source(*shape, generator=generator, dtype=table.dtype, out=row)
        return numbers.to(device, non_blocking=device.type != "mps")

    # The grid in float64: lambda is steep at both ends.
    times = torch.linspace(start, end, steps, dtype=torch.float64)
    log_snrs = schedule.log_snr(times).to(table.dtype).to(device)                          # (steps,)
    z = random(model.N, model.D)                                                           # (B, N, D)
    if noise is not None:
        z = noise.to(z)
    if init is not None:
        z = add_noise(F.embedding(init[0], table), log_snrs[0].expand(B), z)
    if inpaint is not None:
        one_hot = F.one_hot(inpaint.clamp(min=0), model.K).to(table.dtype)                 # (B or 1, N, K)
    for i, t in enumerate(times.tolist()):
        log_snr_t = log_snrs[i].expand(B)                                                  # (B,)
        omega = guidance if interval[0] <= t <= interval[1] else 0.0
        logits = model.guided(z, log_snr_t, labels, omega, table=table)                    # (B, N, K)
        p = (logits if temperature == 1 else logits / temperature).softmax(-1)             # (B, N, K)
        if inpaint is not None:
            p = torch.where(inpaint[..., None] < 0, p, one_hot)
        if i + 1 < steps:
            with torch.autocast(device.type, enabled=False):  # as in training_loss
                e_hat = p @ table                                                          # (B, N, D)
            log_snr_s = log_snrs[i + 1].expand(B)
            if sampler == "ddim":
                z = ddim_step(z, e_hat, log_snr_t, log_snr_s)
            else:
                z = ancestral_step(z, e_hat, log_snr_t, log_snr_s, random(model.N, model.D))
        if callback is not None:
            callback(t, p)
    # Categorical draw by inversion, one uniform number per token: the first k whose cumulated p exceeds u.
    u = random(model.N, 1, source=torch.rand)                                              # (B, N, 1)
    cumulated = p.cumsum(-1)
    tokens = torch.searchsorted(cumulated, u * cumulated[..., -1:], right=True)            # (B, N, 1)
    return tokens.squeeze(-1).clamp(max=model.K - 1)


def sample_images(pipeline, labels, *, seed=0, first=0, indices=None, noise=None, steps, guidance, sampler,
                  batch=256, show_progress=True, callback=None, **options):
    """uint8 images (n, 3, H, W) for labels (n,), by what load_checkpoint returns.

    They are the images first, first + 1, ... of this seed, or those of indices. noise: (n, N, D). The other
    options are those of sample_tokens; the tokens of inpaint and init are the same for all images.
    """
    images, indices = [], range(first, first + len(labels)) if indices is None else indices

    def after_step(t, p):
        bar.update()
        if callback is not None:
            callback(t, p)

    with tqdm(total=-(-len(labels) // batch) * steps, desc="sampling", unit="step", leave=False,
              disable=None if show_progress else True) as bar:
        for start in range(0, len(labels), batch):
            here = slice(start, start + batch)
            tokens = sample_tokens(pipeline.model, pipeline.schedule, labels[here].to(pipeline.device),
                                   image_generators(seed, indices[here]), steps, guidance, sampler,
                                   noise=None if noise is None else noise[here], callback=after_step,
                                   **options)
            images.append(pipeline.tokenizer.decode(tokens).cpu())
    return torch.cat(images)


def sample_together(pipeline, labels, **options):
    """sample_images, shared out among all ranks. Each gets all images; they are those of one process."""
    (rank, world), n = rank_and_world(), len(labels)
    each = -(-n // world)  # the last ranks repeat the last image, so that all gather equally many
    mine = labels[(torch.arange(each) + rank * each).clamp(max=n - 1)]
    images = sample_images(pipeline, mine, first=rank * each, show_progress=rank == 0, **options)
    return all_gather_cat(images)[:n]


def default_labels(n, num_classes):
    """(n,) labels: rows of COLUMNS images of one class, class after class; zeros without classes."""
    return (torch.arange(n) // COLUMNS) % max(num_classes, 1)


def class_labels(n, chosen, counts=None):
    """(n,) labels: image i has the class chosen[i mod C]: any number is spread evenly, as by ADM and DiT.

    counts: how often each class of the model is to come (in any unit), one after the other.
    """
    if counts is None:
        return torch.tensor(chosen)[torch.arange(n) % len(chosen)]
    ends = torch.tensor([counts[label] for label in chosen]).cumsum(0)
    if not ends[-1]:
        raise ValueError("--class-counts training: there is no training image of these classes")
    positions = (torch.arange(n, dtype=torch.float64) + 0.5) * ends[-1] / n
    return torch.tensor(chosen)[torch.searchsorted(ends.double(), positions, right=True)]


if __name__ == "__main__":
    from extras.sample_command import main
    main()
