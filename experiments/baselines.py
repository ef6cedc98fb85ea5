"""What VQ-LCMD is compared with, on the same tokens and with the same transformer: discrete-state diffusion,
and continuous diffusion trained by plain cross-entropy (at the end).

Every token is corrupted on its own. At time t it is still itself with probability a(t), a uniformly drawn
code with b(t), a mask (state K) with c(t); a + b + c = 1, a(0) = 1, a(1) = 0:

    absorbing          a = 1 - t, c = t                    D3PM (Austin et al. 2021), MDLM (Sahoo et al. 2024)
    uniform            a = 1 - t, b = t                    multinomial diffusion (Hoogeboom et al. 2021)
    mask-and-replace   a = 1 - t, b = t / 10, c = 9 t / 10  VQ-Diffusion (Gu et al. 2022)

The network p(k | x_t) predicts the clean token. With Q the step from s to t, by Bayes' rule,

    q(x_s = j | x_t = i, x_0 = k) = Q[j -> i] q_s(j | k) / q_t(i | k)
    p(x_s = j | x_t = i) = sum_k p(k | x_t) q(x_s = j | x_t = i, x_0 = k)

    L = sum over T intervals (s, t] of KL( q(x_s | x_t, x_0) || p(x_s | x_t) )    (s = 0: -log p(x_0 | x_t))

bounds -log p(x_0) from above. For T -> infinity the absorbing one is MDLM's integral of -log p(x_i | x_t) / t
over masked positions. T = 1000 here, within 1 / T of it.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from common import update
from tqdm import tqdm

from losses import LOSS_ARGS, NOISE_ARGS, noise_like, sample_noise, stratified, training_loss
from schedule import add_noise
from train import learning_rate

T = 1000
KINDS = {"absorbing": (0.0, 1.0), "uniform": (1.0, 0.0), "mask-and-replace": (0.1, 0.9)}  # b(1), c(1)


def rates(kind, t):
    """a, b, c at times t, each of its shape."""
    b, c = KINDS[kind]
    return 1 - t, b * t, c * t


def reverse(kind, p, x_t, t, s):
    """p(x_s | x_t) (..., K + 1) for predictions p (..., K), x_t (...), times s < t that broadcast with x_t.

    With a one-hot p it is the true posterior q(x_s | x_t, x_0).
    """
    K = p.shape[-1]
    (a_t, b_t, c_t), (a_s, b_s, c_s) = ([r[..., None] for r in rates(kind, time)] for time in (t, s))
    keep, to_mask = a_t / a_s, 1 - (1 - c_t) / (1 - c_s)  # of one step; c_s < 1, for s < 1
    i, codes = x_t[..., None], torch.arange(K, device=p.device)
    masked, same = i == K, i == codes
    q_t = torch.where(masked, c_t, a_t * same + b_t / K)  # q(x_t | x_0 = k)
    weight = torch.where(q_t > 0, p / q_t.clamp(min=1e-30), 0)  # (..., K)
    total = weight.sum(-1, keepdim=True)
    arrive = torch.where(masked, to_mask, keep * same + (1 - keep - to_mask) / K)  # Q[j -> x_t]
    as_code = arrive * (a_s * weight + b_s / K * total)
    as_mask = masked * c_s * total  # a mask stays one
    joint = torch.cat([as_code, as_mask], -1)
    return joint / joint.sum(-1, keepdim=True).clamp(min=1e-30)


def predict(model, schedule, x_t, t, labels=None, guidance=0.0, kind=None, temperature=1.0):
    """log p(. | x_t) (B, N, K) by the transformer of VQ-LCMD: clean embeddings, its mask embedding, its time.

    labels (B,), or None for the null class. guidance: omega. kind: add the closed-form term log q(x_t | x_0 =
    k) = log(a [x_t = k] + b / K), as VQ-LCMD's output prior does; nothing where x_t is a mask.
    """
    mask, table, log_snr = x_t == model.K, model.table(), schedule.log_snr(t)
    z = F.embedding(x_t.clamp(max=model.K - 1), table)
    null = torch.full_like(x_t[:, 0], model.num_classes)
    logits = model(z, log_snr, null if labels is None else labels, mask=mask, table=table)
    if guidance and labels is not None:
        logits = (1 + guidance) * logits - guidance * model(z, log_snr, null, mask=mask, table=table)
    if kind is not None:
        a, b, _ = (rate[:, None, None] for rate in rates(kind, t))
        same = x_t[..., None] == torch.arange(model.K, device=x_t.device)  # (B, N, K)
        logits = logits + torch.where(mask[..., None], 0, (a * same + b / model.K).clamp(min=1e-30).log())
    return (logits / temperature).log_softmax(-1)


def loss(kind, model, schedule, x, generator, labels=None, analytic=False, auxiliary=0.0):
    """One draw of the bound per image, (B,), in nats per token: T times the KL of one interval, stratified.

    analytic: with the closed-form term of predict. auxiliary: weight of -log p(x_0 | x_t) beside each
    interval's KL (VQ-Diffusion: 5e-4, with 100 steps; D3PM's hybrid loss: 0.01); with it this is no bound.
    """
    number = (stratified(len(x), generator, x.device) * T).long()
    t, s = (number + 1) / T, number / T  # (B,)
    a, b, _ = (rate[:, None] for rate in rates(kind, t))
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=t.dtype)
    other = torch.randint(model.K, x.shape, generator=generator, device=x.device)
    x_t = torch.where(u < a, x, torch.where(u < a + b, other, model.K))  # K is the mask
    log_p = predict(model, schedule, x_t, t, labels, 0.0, kind if analytic else None)
    p = log_p.exp()
    truth = reverse(kind, F.one_hot(x, model.K).to(p.dtype), x_t, t[:, None], s[:, None])
    ours = reverse(kind, p, x_t, t[:, None], s[:, None])
    kl = (torch.xlogy(truth, truth) - truth * ours.clamp(min=1e-30).log()).sum(-1)  # (B, N)
    if auxiliary:
        kl = kl - auxiliary * log_p.gather(-1, x[..., None])[..., 0]
    return T * kl.mean(1)


def draw(p, generator):
    """One state per row of p (..., S)."""
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


def time_grid(steps, end=None):
    """The t of every call of sample: uniform from 1 to end, or None: to 1 / steps."""
    if end is None:
        return [i / steps for i in range(steps, 0, -1)]
    return torch.linspace(1.0, end, steps, dtype=torch.float64).tolist()


@torch.no_grad()
def sample(kind, model, schedule, n, steps, generator, labels=None, guidance=0.0, analytic=False,
           temperature=1.0, guided_below=1.0, end=None):
    """n ancestral samples (n, N): x_s ~ p(x_s | x_t) on time_grid(steps, end), then to t = 0.

    analytic: as in loss. guided_below: omega counts for t up to this time only.
    """
    device = generator.device
    start = torch.full((model.K + 1,), KINDS[kind][0] / model.K, device=device)
    start[-1] = KINDS[kind][1]
    x = draw(start.expand(n, model.N, -1), generator)
    for now, then in itertools.pairwise([*time_grid(steps, end), 0.0]):
        t, s = (torch.full((n,), j, device=device) for j in (now, then))
        omega = guidance if now <= guided_below else 0.0
        p = predict(model, schedule, x, t, labels, omega, kind if analytic else None, temperature).exp()
        p = p.clamp(min=1e-30)  # strong guidance may leave nothing in float32 for the code that is there
        x = draw(reverse(kind, p, x, t[:, None], s[:, None]), generator)
    return x


@torch.no_grad()
def sample_by_confidence(model, schedule, n, steps, generator, labels=None, guidance=0.0, temperature=1.0,
                         gumbel=1.0, guided_below=1.0):
    """MaskGIT's decoding (Chang et al. 2022) of an absorbing model: the most confident tokens are kept.

    Confidence: log p of the drawn token plus gumbel * t * Gumbel noise, t the share of steps that is left.
    """
    device, left = generator.device, model.N
    x = torch.full((n, model.N), model.K, device=device)
    for i in range(steps, 0, -1):
        masks = x == model.K  # (n, N)
        omega = guidance if i / steps <= guided_below else 0.0
        log_p = predict(model, schedule, x, masks.float().mean(1), labels, omega, temperature=temperature)
        drawn = draw(log_p.exp(), generator)
        noise = -torch.empty(n, model.N, device=device).exponential_(generator=generator).log()
        confidence = log_p.gather(-1, drawn[..., None])[..., 0] + gumbel * (i - 1) / steps * noise
        confidence = torch.where(x < model.K, torch.inf, confidence)
        # Masks after this step: at least one less.
        left = max(min(int(model.N * math.cos((steps - i + 1) / steps * math.pi / 2)), left - 1), 0)
        kept = confidence.argsort(dim=1, descending=True).argsort(dim=1) < model.N - left
        x = torch.where(kept & masks, drawn, x)
    return x


def train(options, model, ema, schedule, optimizer, steps, batch):
    """The steps of train.py, with the objective of a row. batch(step) -> tokens, labels, generator."""
    for step in tqdm(range(steps), leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, options["warmup"], options["lr"])
        objective(options, model, ema, schedule, *batch(step)).backward()
        update(model, ema, optimizer, options, step)


def objective(options, model, ema, schedule, x, labels, generator):
    """The loss of one batch x (B, N), labels (B,). options: train.py's; "loss": one of KINDS."""
    kind, label_drop = options.get("loss"), options["label_drop"]
    if kind and label_drop:
        drop = torch.rand(labels.shape, generator=generator, device=x.device) < label_drop
        labels = torch.where(drop, model.num_classes, labels)
    if kind in KINDS:
        return loss(kind, model, schedule, x, generator, labels, options.get("analytic", False),
                    options.get("auxiliary", 0.0)).mean()
    if kind == "cross-entropy":  # CDCD (Dieleman et al. 2022), t = 0 as often as in VQ-LCMD
        rec = round(options["rec_fraction"] * len(x))
        t = torch.cat([torch.zeros(rec, device=x.device), stratified(len(x) - rec, generator, x.device)])
        table, log_snr = model.table(), schedule.log_snr(t)
        e = F.embedding(x, table)
        logits = model(add_noise(e, log_snr, noise_like(e, generator)), log_snr, labels, table=table)
        return F.cross_entropy(logits.flatten(0, 1), x.flatten())
    noisy = sample_noise(model, x, labels, generator, **{name: options[name] for name in NOISE_ARGS})
    return training_loss(model, ema if options["teacher"] == "ema" else model, schedule, *noisy, **{
        name: options[name] for name in LOSS_ARGS})[0]
