"""The training objective of VQ-LCMD: joint variational bound (VLB), consistency matching (CM), dropping.

Run alone, this file computes the smallest exact examples of why embeddings collapse and why the coupling of
the two times in CM matters:  python losses.py

    symbol        code             shape            meaning
    B, N, K, D                                      batch, tokens per image, codebook size, embedding width
    x             x                (B, N) int64     tokens
    E, e(x)       table, e         (K, D), (B, N, D) learned embeddings, normalised; those of the tokens
    t, s          t, s             (B,) in [0, 1]   times, s < t; 0 is clean
    lambda(t)     log_snr          (B,)             log of the signal-to-noise ratio, see schedule.py
    z_t           z_t              (B, N, D)        alpha_t e(x) + sigma_t eps
    p_theta(x|z)  logits           (B, N, K)        the denoiser's output
    e_hat         e_hat            (B, N, D)        sum_k p_theta(k | z_t) E_k

Per token and in nats, an upper bound on -log p(x) / N (paper: joint embedding-diffusion variational bound):

    L_prior = KL( N(alpha_1 e, sigma_1^2 I) || N(0, I) )
    L_rec   = E[ -log p_theta(x | z_0) ]
    L_diff  = 1/2 E_t[ -lambda'(t) e^lambda(t) |e(x) - e_hat(z_t, t)|^2 ]

Trained naively the embeddings collapse: |e - e_hat|^2 is small when all embeddings are close together. With
the exact weight and an optimal network the bound of one token does not care how far apart they are
(test_all.py). Two things reward closeness: a *clipped* weight, which most use for stability, and a network
that is not good yet. L_rec does stop the collapse, but late: at t = 0 there is so little noise that even
close embeddings can be told apart (`python losses.py`: the sum falls down to a distance of about 0.3, and
rises again only below). The cure (ours: also a schedule that starts a little above the clip, and leaves what
is cleaner to L_rec):

    L_CM = E_{s<t} KL( sg[ p_theta'(. | z_s, s) ] || p_theta(. | z_t, t) )      (paper: consistency matching)

p_theta' is the teacher: the model's EMA (the default) or the model itself; sg = stop-gradient. L_CM pushes
embeddings apart: its target is held fixed, so its gradient is that of a cross-entropy at z_t, which falls
when tokens are easier to tell apart there. (Its value rises with the distance, up to about 2, as the teacher
then knows more. Without sg it would reward collapse.)

The objective is w_rec L_rec + w_diff L_diff + w_cm L_CM. L_prior has no gradient for a normalised table.
(With --norm none it has one, tiny at lambda(1) = -10.7, and is left out.)

Two ways to draw the pair (z_s, z_t), and the choice matters (the question is ours, test_all.py has the exact
example):
  markov   z_s ~ q(z_s | z_t, x). Then E[ p(x | z_s) | z_t ] = p(x | z_t), the tower rule: the true posterior
           is the fixed point of L_CM for every gap between s and t.
  shared   the same noise in z_s and z_t, as in consistency training. Given both, e(x) is known exactly, the
           tower rule fails, and the fixed point is over-confident: the posterior at the end of the ODE's
           path, not at z_t.
"""

import math

import torch
import torch.nn.functional as F

from engine.distributed import all_reduce_sum, rank_and_world
from schedule import add_noise, posterior


def stratified(count, generator, device):
    """(count,) times in [0, 1): (u + i / count) mod 1, one u for all. Together they cover [0, 1)."""
    u = torch.rand((), generator=generator, device=device)
    return (u + torch.arange(count, device=device) / count) % 1


def noise_like(e, generator):
    return torch.randn(e.shape, generator=generator, device=e.device, dtype=e.dtype)


# ----------------------------------------------------------------------------
# The terms. Each returns one value per token, (B, N), in nats: summed over D, not yet averaged over anything.

def prior_loss(e, log_snr_1):
    """L_prior = KL( N(alpha_1 e, sigma_1^2 I) || N(0, I) )
               = 1/2 [ D (sigma_1^2 - 1 - log sigma_1^2) + alpha_1^2 |e|^2 ].

    For a table of mean square 1 this is the constant D/2 log(1 + e^lambda(1)).  e: (B, N, D), log_snr_1: ().
    """
    D = e.shape[-1]
    alpha2 = torch.sigmoid(log_snr_1)
    log_sigma2 = F.logsigmoid(-log_snr_1)
    # sigma^2 - 1 = -alpha^2, and the two alpha^2 terms are joined before they can cancel badly.
    return 0.5 * (alpha2 * (e.square().sum(-1) - D) - D * log_sigma2)


def reconstruction_loss(logits, x):
    """L_rec: -log p_theta(x | z_0).  logits (B, N, K) at t = 0, x (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none").view_as(x)


def diffusion_loss(e, e_hat, log_snr, d_log_snr, weight_clip):
    """L_diff: 1/2 (-lambda'(t)) min(e^lambda(t), weight_clip) |e(x) - e_hat|^2.

    e, e_hat: (B, N, D); log_snr, d_log_snr: (B,).

    weight_clip = inf is the exact bound. A finite one (after Min-SNR, Hang et al. 2023) reduces the variance;
    it leaves the network's optimum as it is, but not the table's: it rewards collapse, which L_rec and L_CM
    have to hold back.
    """
    weight = -0.5 * d_log_snr * log_snr.exp().clamp(max=weight_clip)                       # (B,)
    return weight[:, None] * (e - e_hat).square().sum(-1)                                  # (B, N)


def consistency_loss(teacher_logits, logits):
    """L_CM: KL( sg[p_teacher(. | z_s)] || p_theta(. | z_t) ).  Both logits: (B, N, K)."""
    # Two softmaxes, not log_q.exp(): where it underflows, exp is thirty times slower on a CPU.
    q, log_q = (f(teacher_logits.detach(), -1) for f in (torch.softmax, torch.log_softmax))  # (B, N, K)
    return (q * (log_q - logits.log_softmax(-1))).sum(-1)


def sample_z_s(cm_pairs, z_t, e, eps, log_snr_t, log_snr_s, eps_s):
    """z_s (B, N, D) of the trajectory of z_t = alpha_t e + sigma_t eps, without gradient.

    cm_pairs: "markov" or "shared", see the top of this file. eps_s: new noise.
    """
    z_t, e = z_t.detach(), e.detach()
    if cm_pairs == "shared":
        return add_noise(e, log_snr_s, eps)
    mean, std = posterior(z_t, e, log_snr_t, log_snr_s)
    return mean + std * eps_s


# ----------------------------------------------------------------------------
# One training step: first all random numbers of the batch are drawn, then the loss of its rows is computed.

NOISE_ARGS = ("rec_fraction", "max_drop_rate", "label_drop", "max_gap")  # keyword arguments of sample_noise
LOSS_ARGS = ("w_rec", "w_diff", "w_cm", "weight_clip", "cm_pairs")      # and of training_loss

@torch.no_grad()
def sample_noise(model, x, labels, generator, *, rec_fraction, max_drop_rate, label_drop, max_gap):
    """All random numbers of a step -> (rows, n_rec, counts), what training_loss takes.

    x (B, N) int64, labels (B,) int64; generator lives on their device. rows: dict of tensors, their first
    axis the batch. The first n_rec = rec_fraction B rows sit at t = 0 and give L_rec; the others give L_diff
    and L_CM at stratified times. counts (3,): the tokens in L_rec, L_diff and L_CM. s is uniform between
    max(0, t - max_gap) and t.
    """
    B, N = x.shape
    e = F.embedding(x, model.table())  # only its shape and type count                     (B, N, D)
    n_rec = min(max(1, round(rec_fraction * B)), B - 1)
    # Times: 0 for the first rows, stratified over the others alone, so that no interval of t is left out.
    t = torch.cat([torch.zeros(n_rec, device=x.device), stratified(B - n_rec, generator, x.device)])
    least = (t - max_gap).clamp(min=0)
    s = least + (t - least) * torch.rand(B, generator=generator, device=x.device)          # (B,)
    eps = noise_like(e, generator)
    # Random dropping (its exact form is ours): a rate per image in [0, max_drop_rate]; the network is told.
    rate = max_drop_rate * torch.rand(B, 1, generator=generator, device=x.device)
    mask = torch.rand(B, N, generator=generator, device=x.device) < rate                   # (B, N)
    # Classifier-free guidance: now and then the label is the null class.
    drop = torch.rand(B, generator=generator, device=x.device) < label_drop
    labels = torch.where(drop, model.num_classes, labels)                                  # (B,)
    eps_s = noise_like(e, generator)
    kept = (~mask[n_rec:]).sum().clamp(min=1)
    counts = torch.stack([torch.full_like(kept, n_rec * N), kept, torch.full_like(kept, (B - n_rec) * N)])
    return dict(x=x, labels=labels, t=t, s=s, eps=eps, eps_s=eps_s, mask=mask), n_rec, counts


def training_loss(model, teacher, schedule, rows, n_rec, counts, *, w_rec, w_diff, w_cm, weight_clip,
                  cm_pairs):
    """The objective w_rec L_rec + w_diff L_diff + w_cm L_CM, by one pass of the model and one of the teacher.

    rows, n_rec, counts: of sample_noise. teacher: the model itself or its EMA.
    Returns (loss, terms): a scalar to differentiate and (3,) detached: L_rec, L_diff and L_CM in nats.
    (Where a batch is computed in parts, rows are some of its rows and counts those of all: losses and
    gradients of the parts add up to those of the batch.)
    """
    x, labels, t, mask = rows["x"], rows["labels"], rows["t"], rows["mask"]
    table = model.table()                                                                  # (K, D)
    e = F.embedding(x, table)                                                              # (B, N, D)
    log_snr = schedule.log_snr(t)                                                          # (B,)
    # Of the live table: L_diff reaches it through z_t, e and e_hat, all three.
    z_t = add_noise(e, log_snr, rows["eps"])                                               # (B, N, D)

    if w_cm > 0:  # the teacher goes first: its memory is free again when the model's pass begins
        with torch.no_grad():
            log_snr_s = schedule.log_snr(rows["s"][n_rec:])
            z_s = sample_z_s(cm_pairs, z_t[n_rec:], e[n_rec:], rows["eps"][n_rec:], log_snr[n_rec:],
                             log_snr_s, rows["eps_s"][n_rec:])
            # The student's table, also for an EMA teacher: z_s was made with it.
            teacher_logits = teacher(z_s, log_snr_s, labels[n_rec:], mask=mask[n_rec:], table=table.detach())

    logits = model(z_t, log_snr, labels, mask=mask, table=table)                           # (B, N, K)
    rec_logits, logits = logits.split([n_rec, len(x) - n_rec])
    # L_rec and L_CM count dropped positions, too: their tokens have to come from their neighbours.
    rec = reconstruction_loss(rec_logits, x[:n_rec]).sum()
    with torch.autocast(x.device.type, enabled=False):  # never in bf16, whatever the caller says
        e_hat = logits.softmax(-1) @ table                                                 # (B', N, D)
    diff = diffusion_loss(e[n_rec:], e_hat, log_snr[n_rec:], schedule.d_log_snr(t[n_rec:]), weight_clip)
    # L_diff does not count them: at a large weight their unavoidable errors would swamp everything.
    diff = (diff * ~mask[n_rec:]).sum()
    cm = consistency_loss(teacher_logits, logits).sum() if w_cm > 0 else torch.zeros_like(diff)
    terms = torch.stack([rec, diff, cm]) / counts                                          # (3,)
    return w_rec * terms[0] + w_diff * terms[1] + w_cm * terms[2], terms.detach()


# ----------------------------------------------------------------------------
# Measurements: nothing is dropped, every weight is exact.

@torch.no_grad()
def vlb(model, schedule, x, labels, generator, chunk=None):
    """Monte-Carlo estimate of L_prior, L_rec and L_diff, exact weights: (3, B), nats per token.

    Every row gives one draw of z_0 and one of z_t, t stratified over the rows. The sum of the means bounds
    -log p(x) / N from above. chunk: rows at a time, for the memory; the noise is that of all rows at once.
    """
    e = F.embedding(x, model.table())                                                      # (B, N, D)
    t = stratified(len(x), generator, x.device).to(e.dtype)
    eps_0, eps = noise_like(e, generator), noise_like(e, generator)
    parts = zip(*(value.split(chunk or len(x)) for value in (x, labels, t, eps_0, eps)), strict=True)
    return torch.cat([vlb_of(model, schedule, *part) for part in parts], dim=1)


def vlb_of(model, schedule, x, labels, t, eps_0, eps):
    """The terms of vlb, with this noise: t (B,), eps_0 and eps (B, N, D) of z_0 and z_t."""
    table = model.table()
    e = F.embedding(x, table)                                                              # (B, N, D)
    prior = prior_loss(e, schedule.log_snr(torch.ones_like(t[0])))                         # (B, N)
    log_snr_0 = schedule.log_snr(torch.zeros_like(t))
    logits = model(add_noise(e, log_snr_0, eps_0), log_snr_0, labels, table=table)
    rec = reconstruction_loss(logits, x)                                                   # (B, N)
    log_snr = schedule.log_snr(t)
    logits = model(add_noise(e, log_snr, eps), log_snr, labels, table=table)
    with torch.autocast(x.device.type, enabled=False):
        e_hat = logits.softmax(-1) @ table                                                 # (B, N, D)
    diff = diffusion_loss(e, e_hat, log_snr, schedule.d_log_snr(t), weight_clip=math.inf)  # (B, N)
    return torch.stack([prior.mean(1), rec.mean(1), diff.mean(1)])                         # (3, B)


def mean_bound(bits):
    """held_out_bits (3, draws) -> {prior, rec, diff, their total, its standard error} in bits per token."""
    total = bits.sum(0)
    return dict(zip(("prior", "rec", "diff"), bits.mean(1).tolist(), strict=True)) | {
        "total": float(total.mean()), "standard_error": float(total.std() / len(total) ** 0.5)}


@torch.no_grad()
def held_out_bits(model, schedule, x, labels, seeds, draws, batch, chunk=None):
    """The terms of the bound for each draw, (3, draws) on the CPU, in bits per token; draw i is of row i % M.

    x (M, N), labels (M,) on the model's device. Goes over the set once, or again until it has `draws` pairs
    (z_0, z_t). seeds: a function from the number of the batch to its torch.Generator, so that every call sees
    the same noise (with another batch size other noise, and another estimate within the standard error).
    chunk: see vlb. Several processes share the batches.
    """
    rank, world = rank_and_world()
    batches = (torch.arange(max(draws, len(x)), device=x.device) % len(x)).split(batch)
    parts = [torch.zeros(3, len(rows), device=x.device) for rows in batches]
    for i in range(rank, len(batches), world):
        parts[i].copy_(vlb(model, schedule, x[batches[i]], labels[batches[i]], seeds(i), chunk))  # (3, batch)
    parts = torch.cat(parts, 1)
    all_reduce_sum([parts])
    return parts.cpu().double() / math.log(2)


@torch.no_grad()
def collapse_diagnostics(table):
    """How far the (K, D) table is from collapse: effective rank, smallest and mean distance of embeddings.

    Effective rank: exp of the entropy of p_i = s_i^2 / sum s^2, s the singular values of the table with its
    mean row taken away: 1 when all embeddings lie on a line, D when they fill the space evenly (Roy &
    Vetterli 2007 use s_i; we use the variances s_i^2). Two rows that merged show as a smallest distance near
    0. For a table of mean square 1 two random rows are sqrt(2 D) apart.
    """
    table = table.detach().cpu().double()
    variance = torch.linalg.svdvals(table - table.mean(0)).square()
    p = variance / variance.sum().clamp(min=1e-300)
    smallest, total, K = math.inf, 0.0, len(table)
    for start in range(0, K, 1024):  # in blocks: all K^2 distances at once are 34 GB for 65,536 codes
        # Not by |a|^2 - 2 a.b + |b|^2, which cannot tell two merged rows.
        block = torch.cdist(table[start:start + 1024], table[start:],
                            compute_mode="donot_use_mm_for_euclid_dist")
        total += float(block[:, :1024].sum()) + 2 * float(block[:, 1024:].sum())
        block.fill_diagonal_(math.inf)
        smallest = min(smallest, float(block.min()))
    return {"effective_rank": float(torch.special.entr(p).sum().exp()),
            "smallest_distance": smallest, "mean_distance": total / (K * (K - 1))}


if __name__ == "__main__":
    from extras.two_tokens import main
    main()
