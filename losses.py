"""The training objective of VQ-LCMD: the joint variational bound (VLB), consistency matching (CM), random dropping.

Run alone, this file computes the smallest exact examples of why embeddings collapse and why the coupling of the two
times in CM matters:  python losses.py

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

Trained naively the embeddings collapse: |e - e_hat|^2 is smallest when all embeddings are close together. With the
exact weight and an optimal network the bound does not care how far apart they are (test_all.py shows it); it is a
*bounded* weight, which everybody uses for stability, and an imperfect network that reward collapse. The cure:

    L_CM = E_{s<t} KL( sg[ p_theta'(. | z_s, s) ] || p_theta(. | z_t, t) )      (paper: consistency matching)

The objective is w_rec L_rec + w_diff L_diff + w_cm L_CM. L_prior has no gradient for a normalised table.

Two ways to draw the pair (z_s, z_t), and the choice matters (ours to ask, test_all.py has the exact example):
  markov   z_s ~ q(z_s | z_t, x). Then E[ p(x | z_s) | z_t ] = p(x | z_t), the tower rule: the true posterior is the
           fixed point of L_CM for every gap between s and t.
  shared   the same noise in z_s and z_t, as in consistency training. Given both, e(x) is known exactly, the tower
           rule fails, and the fixed point is over-confident: the posterior at the end of the ODE's path, not at z_t.
"""

import argparse
import math

import torch
import torch.nn.functional as F

from schedule import ShiftedCosine, add_noise, alpha_sigma, posterior


def stratified(count, generator, device):
    """(count,) times in [0, 1): (u + i / count) mod 1 with one u for all. Each is uniform, together they cover."""
    u = torch.rand((), generator=generator, device=device)
    return (u + torch.arange(count, device=device) / count) % 1


def noise_like(e, generator):
    return torch.randn(e.shape, generator=generator, device=e.device, dtype=e.dtype)


# ----------------------------------------------------------------------------
# The terms. Each returns one value per token, (B, N), in nats: summed over D, not yet averaged over anything.

def prior_loss(e, log_snr_1):
    """L_prior = KL( N(alpha_1 e, sigma_1^2 I) || N(0, I) ) = 1/2 [ D (sigma^2 - 1 - log sigma^2) + alpha^2 |e|^2 ].

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


def diffusion_loss(e, e_hat, log_snr, d_log_snr, max_snr=float("inf")):
    """L_diff: 1/2 (-lambda'(t)) min(e^lambda(t), max_snr) |e(x) - e_hat|^2.  e, e_hat (B, N, D), the others (B,).

    max_snr = inf is the exact bound. A finite one (ours) reduces the variance; it leaves the network's optimum as it
    is, but not the table's: it rewards collapse, which L_rec and L_CM then have to hold back.
    """
    weight = -0.5 * d_log_snr * log_snr.exp().clamp(max=max_snr)                                   # (B,)
    return weight[:, None] * (e - e_hat).square().sum(-1)                                          # (B, N)


def consistency_loss(teacher_logits, log_p):
    """L_CM: KL( sg[p_teacher] || p_theta ).  teacher_logits, log_p = log p_theta(. | z_t): (B, N, K)."""
    log_q = teacher_logits.detach().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def draw_earlier(coupling, z_t, e, eps, log_snr_t, log_snr_s, eps_s):
    """z_s (B, N, D) of the same trajectory as z_t = alpha_t e + sigma_t eps, without gradient; eps_s is new noise."""
    z_t, e = z_t.detach(), e.detach()
    if coupling == "shared":
        return add_noise(e, log_snr_s, eps)
    mean, std = posterior(z_t, e, log_snr_t, log_snr_s)
    return mean + std * eps_s


# ----------------------------------------------------------------------------
# One training step's loss. First all random numbers of the batch are drawn, then its rows are computed: all at once, in
# several passes, or by several processes. Whoever computes a part draws everything and takes its share. So neither the
# numbers nor, up to rounding, the gradient depend on how the work is divided.

@torch.no_grad()
def draw(model, x, labels, generator, *, rec_fraction=0.25, p_drop=0.0, label_drop=0.1, max_gap=1.0):
    """All random numbers of a step -> (rows, n_rec, counts).

    x (B, N) int64, labels (B,) int64; generator lives on their device. rows: dict of tensors, their first axis the
    batch. The first n_rec = rec_fraction B rows sit at t = 0 and give L_rec; the others give L_diff and L_CM at
    stratified times. counts (3,): the tokens in L_rec, L_diff and L_CM. s is uniform in [t - max_gap, t), or [0, t).
    """
    (B, N), e = x.shape, F.embedding(x, model.table())                                             # (B, N, D)
    n_rec = min(max(1, round(rec_fraction * B)), B - 1)
    # Times: 0 for the first rows, stratified over the others alone, so that no interval of t is left out.
    t = torch.cat([torch.zeros(n_rec, device=x.device), stratified(B - n_rec, generator, x.device)])
    least = (t - max_gap).clamp(min=0)
    s = least + (t - least) * torch.rand(B, generator=generator, device=x.device)                  # < t
    eps = noise_like(e, generator)
    # Random dropping (ours in its exact form): a rate per image in [0, p_drop]; the network is told which.
    rate = p_drop * torch.rand(B, 1, generator=generator, device=x.device)
    mask = torch.rand(B, N, generator=generator, device=x.device) < rate                           # (B, N)
    # Classifier-free guidance: now and then the label is the null class.
    drop = torch.rand(B, generator=generator, device=x.device) < label_drop
    labels = torch.where(drop, model.num_classes, labels)                                          # (B,)
    eps_s = noise_like(e, generator)
    kept = (~mask[n_rec:]).sum().clamp(min=1)
    counts = torch.stack([torch.full_like(kept, n_rec * N), kept, torch.full_like(kept, (B - n_rec) * N)])
    return dict(x=x, labels=labels, t=t, s=s, eps=eps, eps_s=eps_s, mask=mask), n_rec, counts


def share(rows, n_rec, counts, part, parts):
    """Every parts-th row from row `part` on, so that all parts have about as much work of each kind."""
    return {name: value[part::parts] for name, value in rows.items()}, len(range(part, n_rec, parts)), counts


def partial_loss(model, teacher, schedule, rows, n_rec, counts, *, w_rec=1.0, w_diff=1.0, w_cm=1.0,
                 max_snr=float("inf"), coupling="markov"):
    """What some rows contribute to the objective and to its terms, by one pass of the model and one of the teacher.

    rows, n_rec, counts: of draw, or of share: sums over its rows are divided by the counts of the whole batch, so the
    results of all shares, and their gradients, add up to those of the batch. teacher: the model itself or its EMA.
    Returns (loss, terms): a scalar to differentiate and (3,) detached: L_rec, L_diff and L_CM in nats.
    """
    x, labels, t, mask = rows["x"], rows["labels"], rows["t"], rows["mask"]
    table = model.table()                                                                          # (K, D)
    e = F.embedding(x, table)                                                                      # (B, N, D)
    log_snr = schedule.log_snr(t)                                                                  # (B,)
    z_t = add_noise(e, log_snr, rows["eps"])  # the live table: L_diff reaches it through z_t, e and e_hat, all three

    logits = model(z_t, log_snr, labels, mask=mask, table=table)                                   # (B, N, K)

    rec = reconstruction_loss(logits[:n_rec], x[:n_rec]).sum()
    # From here on, the rows at t > 0.
    t, log_snr, e, z_t, mask, labels = (value[n_rec:] for value in (t, log_snr, e, z_t, mask, labels))
    log_p = logits[n_rec:].log_softmax(-1)                                                         # (B', N, K)
    with torch.autocast(x.device.type, enabled=False):  # never in bf16, whatever the caller says
        e_hat = log_p.exp() @ table                                                                # (B', N, D)
    diff = diffusion_loss(e, e_hat, log_snr, schedule.d_log_snr(t), max_snr)
    diff = (diff * ~mask).sum()  # a dropped position, at the exact weight, would swamp everything
    cm = torch.zeros_like(diff)
    if w_cm > 0:
        with torch.no_grad():
            log_snr_s = schedule.log_snr(rows["s"][n_rec:])
            z_s = draw_earlier(coupling, z_t, e, rows["eps"][n_rec:], log_snr, log_snr_s, rows["eps_s"][n_rec:])
            teacher_logits = teacher(z_s, log_snr_s, labels, mask=mask, table=table.detach())
        cm = consistency_loss(teacher_logits, log_p).sum()
    terms = torch.stack([rec, diff, cm]) / counts                                                  # (3,)
    return w_rec * terms[0] + w_diff * terms[1] + w_cm * terms[2], terms.detach()


def training_loss(model, teacher, schedule, x, labels, generator, *, rec_fraction=0.25, p_drop=0.0, label_drop=0.1,
                  max_gap=1.0, **options):
    """(loss, {"rec", "diff", "cm"}) of a whole batch in one piece: draw, then partial_loss with its options."""
    drawn = draw(model, x, labels, generator, rec_fraction=rec_fraction, p_drop=p_drop, label_drop=label_drop,
                 max_gap=max_gap)
    loss, terms = partial_loss(model, teacher, schedule, *drawn, **options)
    return loss, dict(zip(("rec", "diff", "cm"), terms.unbind(), strict=True))


# ----------------------------------------------------------------------------
# Measurements: nothing is dropped, every weight is exact.

@torch.no_grad()
def vlb(model, schedule, x, labels, generator):
    """Monte-Carlo estimate of the three terms of the bound, exact weights: dict of (B,) tensors, nats per token.

    Every row gives one draw of z_0 and one of z_t, t stratified over the rows. The sum of the means bounds
    -log p(x) / N from above.
    """
    table = model.table()
    e = F.embedding(x, table)                                                                      # (B, N, D)
    t = stratified(len(x), generator, x.device).to(e.dtype)
    zero = torch.zeros_like(t)
    prior = prior_loss(e, schedule.log_snr(torch.ones_like(t[0])))                                 # (B, N)
    log_snr_0 = schedule.log_snr(zero)
    logits = model(add_noise(e, log_snr_0, noise_like(e, generator)), log_snr_0, labels, table=table)
    rec = reconstruction_loss(logits, x)                                                           # (B, N)
    log_snr = schedule.log_snr(t)
    logits = model(add_noise(e, log_snr, noise_like(e, generator)), log_snr, labels, table=table)
    with torch.autocast(x.device.type, enabled=False):
        e_hat = logits.softmax(-1) @ table                                                         # (B, N, D)
    diff = diffusion_loss(e, e_hat, log_snr, schedule.d_log_snr(t))                                # (B, N)
    return {"prior": prior.mean(1), "rec": rec.mean(1), "diff": diff.mean(1)}


def held_out_bound(model, schedule, x, labels, seeds, draws, batch=256, rank=0, world=1):
    """The bound over a whole set in bits per token: dict of prior, rec, diff, their total and its standard error.

    x (M, N), labels (M,) on the model's device. Goes over the set once, or again until it has `draws` pairs (z_0, z_t).
    seeds: a function from the number of the batch to its torch.Generator, so that every call sees the same noise.
    Process `rank` of `world` computes every world-th batch.
    """
    order = (torch.arange(max(draws, len(x)), device=x.device) % len(x)).split(batch)
    parts = [torch.zeros(3, len(rows), device=x.device) for rows in order]
    for i in range(rank, -(-len(order) // world) * world, world):  # all call the model equally often, as FSDP demands
        rows = order[i % len(order)]
        found = torch.stack(list(vlb(model, schedule, x[rows], labels[rows], seeds(i)).values()))  # (3, batch)
        if i < len(order):
            parts[i].copy_(found)
    parts = torch.cat(parts, 1)
    if world > 1:
        torch.distributed.all_reduce(parts)
    bits = parts.double().cpu() / math.log(2)                                                      # (3, draws)
    total = bits.sum(0)
    return dict(zip(("prior", "rec", "diff"), bits.mean(1).tolist(), strict=True)) | {
        "total": float(total.mean()), "standard_error": float(total.std() / len(total) ** 0.5)}


@torch.no_grad()
def collapse_diagnostics(table):
    """How far the (K, D) table is from collapse: effective rank, smallest and mean distance between two rows.

    Effective rank: exp of the entropy of p_i = s_i^2 / sum s^2, s the singular values of the table with its mean row
    taken away: 1 when all rows lie on a line, D when they fill the space evenly (Roy & Vetterli 2007 use s_i; we
    use the variances s_i^2). Two rows that merged show as a smallest distance near 0. For a table of mean square 1 two
    random rows are sqrt(2 D) apart.
    """
    table = table.detach().cpu().double()
    variance = torch.linalg.svdvals(table - table.mean(0)).square()
    p = variance / variance.sum().clamp(min=1e-300)
    distances = torch.pdist(table)
    return {"effective_rank": float(torch.special.entr(p).sum().exp()),
            "smallest_distance": float(distances.min()), "mean_distance": float(distances.mean())}


# ----------------------------------------------------------------------------
# python losses.py: two tokens, x = +1 or -1 equally often, D = 1, e(x) = x d / 2, and the best denoiser there
# is, p(+1 | z) = sigmoid(alpha d z / sigma^2). Everything by quadrature over the noise, in float64.

def two_tokens(distances, schedule, max_snr):
    """Terms of the objective at the exact posterior, (len(distances), 4): L_rec, L_diff exact and bounded, L_CM."""
    eps = torch.linspace(-9, 9, 361, dtype=torch.float64)
    density = torch.exp(-eps.square() / 2) / torch.exp(-eps.square() / 2).sum()
    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    log_snr = schedule.log_snr(torch.cat([torch.zeros_like(t[:1]), t]))  # 0 for L_rec, then t
    rows = []
    for d in distances:
        alpha, sigma = alpha_sigma(log_snr[:, None])
        z = alpha * d / 2 + sigma * eps  # of x = +1, as good as the other                             (2001, 361)
        odds = alpha * d * z / sigma.square()
        entropy = (F.softplus(-odds) * density).sum(1)  # H(x | z_t) = E[ -log p(x | z_t) ]
        error = ((d * torch.sigmoid(-odds)).square() * density).sum(1)[1:]  # E |e - e_hat|^2
        exact, bounded = ((-0.5 * schedule.d_log_snr(t) * log_snr[1:].exp().clamp(max=bound) * error).mean()
                          for bound in (float("inf"), max_snr))
        earlier = entropy[1:].cumsum(0) / torch.arange(1, 2001)  # mean over s in [0, t)
        rows.append(torch.stack([entropy[0], exact, bounded, (entropy[1:] - earlier).mean()]))
    return torch.stack(rows)


def mean_target(coupling, z_t=0.8, log_snr_t=-1.0, log_snr_s=0.0):
    """(p(+1 | z_t), what L_CM teaches at z_t: the mean of p(+1 | z_s)) for e = +-1. They should be the same."""
    def p_plus(z, log_snr):
        return torch.sigmoid(2 * z * log_snr.exp() / torch.sigmoid(log_snr).sqrt())  # 2 alpha z / sigma^2

    z_t, log_snr_t, log_snr_s = (torch.tensor([v], dtype=torch.float64) for v in (z_t, log_snr_t, log_snr_s))
    eps_s = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    density = torch.exp(-eps_s.square() / 2) / torch.exp(-eps_s.square() / 2).sum()
    alpha, sigma = alpha_sigma(log_snr_t)
    p, target = p_plus(z_t, log_snr_t), 0
    for x, p_x in ((1.0, p), (-1.0, 1 - p)):
        e = torch.full((1, 1801, 1), x, dtype=torch.float64)
        eps = (z_t - alpha * e) / sigma  # given z_t and the token, it is known
        z_s = draw_earlier(coupling, z_t.expand_as(e), e, eps, log_snr_t, log_snr_s, eps_s.view(1, -1, 1))
        target += float(p_x) * float((p_plus(z_s.flatten(), log_snr_s) * density).sum())
    return float(p), target


def main():
    parser = argparse.ArgumentParser(description="Why embeddings collapse, and why the coupling matters: two tokens, "
                                     "exactly.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shift", type=float, default=0.4, help="s of the schedule")
    parser.add_argument("--max-snr", type=float, default=5.0, help="bound on e^lambda in the trained L_diff")
    args = parser.parse_args()
    if not args.shift > 0:
        parser.error(f"--shift {args.shift}: must be positive")
    distances = (0.03, 0.1, 0.3, 1.0, 2.0, 4.0)
    print(f"Two tokens at a distance, the best denoiser there is, nats (log 2 = {math.log(2):.4f}).")
    print("The exact bound does not care how close they are. With a bounded weight the loss falls as they collapse.\n")
    print("distance    L_rec   L_diff      sum  | L_diff, weight <= max_snr      sum    L_CM")
    for d, row in zip(distances, two_tokens(distances, ShiftedCosine(args.shift, -10, 7), args.max_snr), strict=True):
        rec, exact, bounded, cm = row.tolist()
        print(f"{d:8.2f} {rec:8.4f} {exact:8.4f} {rec + exact:8.4f}  | {bounded:25.4f} {rec + bounded:8.4f} {cm:7.4f}")
    print("\nConsistency matching at z_t = 0.8, lambda from -1 to 0, tokens at +1 and -1: what it teaches on average.")
    for coupling in ("markov", "shared"):
        p, target = mean_target(coupling)
        print(f"{coupling:>8}: posterior {p:.6f}, mean target {target:.6f}"
              + ("" if abs(p - target) < 1e-6 else "   over-confident"))


if __name__ == "__main__":
    main()
