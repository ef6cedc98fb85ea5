"""`python losses.py`: smallest exact examples of why embeddings collapse and why the pairs of L_CM matter.

Two tokens, x = +1 or -1 equally often, D = 1, e(x) = x d / 2, and the best denoiser there is,
p(+1 | z) = sigmoid(alpha d z / sigma^2). Everything by quadrature over the noise, in float64.
"""

import argparse
import math

import torch
import torch.nn.functional as F

from engine.config import DEFAULTS
from engine.process import report_errors, user_error
from losses import sample_z_s
from schedule import ShiftedCosine, alpha_sigma


def two_tokens(distances, schedule, weight_clip):
    """Terms of the objective at the exact posterior, (distances, 4): L_rec, exact, clipped L_diff, L_CM."""
    eps = torch.linspace(-9, 9, 361, dtype=torch.float64)
    density = torch.exp(-eps.square() / 2) / torch.exp(-eps.square() / 2).sum()
    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    log_snr = schedule.log_snr(torch.cat([torch.zeros_like(t[:1]), t]))  # 0 for L_rec, then t
    rows = []
    for d in distances:
        alpha, sigma = alpha_sigma(log_snr[:, None])
        z = alpha * d / 2 + sigma * eps  # of x = +1, as good as the other             (2001, 361)
        log_odds = alpha * d * z / sigma.square()
        entropy = (F.softplus(-log_odds) * density).sum(1)  # H(x | z_t) = E[ -log p(x | z_t) ]
        error = ((d * torch.sigmoid(-log_odds)).square() * density).sum(1)[1:]  # E |e - e_hat|^2
        exact, clipped = ((-0.5 * schedule.d_log_snr(t) * log_snr[1:].exp().clamp(max=clip) * error).mean()
                          for clip in (float("inf"), weight_clip))
        earlier = entropy[1:].cumsum(0) / torch.arange(1, 2001)  # mean over s in [0, t)
        rows.append(torch.stack([entropy[0], exact, clipped, (entropy[1:] - earlier).mean()]))
    return torch.stack(rows)


def mean_target(cm_pairs, z_t=0.8, log_snr_t=-1.0, log_snr_s=0.0):
    """(p(+1 | z_t), the mean of p(+1 | z_s), which L_CM teaches at z_t) for e = +-1; they should be equal."""
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
        z_s = sample_z_s(cm_pairs, z_t.expand_as(e), e, eps, log_snr_t, log_snr_s, eps_s.view(1, -1, 1))
        target += float(p_x) * float((p_plus(z_s.flatten(), log_snr_s) * density).sum())
    return float(p), target


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=(
        "Why embeddings collapse, and why the pairs of L_CM matter: two tokens, exactly."))
    parser.add_argument("--shift", type=float, default=DEFAULTS["shift"], help="s of the schedule")
    parser.add_argument("--weight-clip", "--max-snr", type=float, default=DEFAULTS["weight_clip"],
                        help="largest e^lambda in the weight of the trained L_diff")
    parser.add_argument("--log-snr-max", type=float, default=7 + 2 * math.log(0.7),
                        help="lambda(0) of all but the last column")
    args = parser.parse_args()
    with report_errors("losses.py"), user_error():
        long, ours = (ShiftedCosine(args.shift, DEFAULTS["log_snr_min"], log_snr_max)
                      for log_snr_max in (args.log_snr_max, DEFAULTS["log_snr_max"]))
        start = float(ours.log_snr(torch.tensor(0.0)))
        distances = (0.03, 0.1, 0.3, 1.0, 2.0, 4.0)
        print(f"Two tokens at a distance, the best denoiser there is, nats (log 2 = {math.log(2):.4f}).")
        print("The exact bound does not care how close they are. With a clipped weight the sum falls as\n"
              "they come closer, down to about 0.3; below, L_rec makes it rise again. In the last column\n"
              "the schedule starts about where the clip ends, as train.py does; the rest is L_rec's.\n")
        print("distance    L_rec   L_diff      sum  | L_diff, weight <= clip      sum    L_CM  | "
              f"sum, lambda <= {start:.1f}")
        for d, row, short in zip(distances, two_tokens(distances, long, args.weight_clip),
                                 two_tokens(distances, ours, args.weight_clip), strict=True):
            rec, exact, clipped, cm = row.tolist()
            print(f"{d:8.2f} {rec:8.4f} {exact:8.4f} {rec + exact:8.4f}  | "
                  f"{clipped:22.4f} {rec + clipped:8.4f} {cm:7.4f}  | {short[0] + short[2]:17.4f}")
        print("\nWhat consistency matching teaches on average, tokens at +1, -1, z_t = 0.8, lambda -1 to 0:")
        for cm_pairs in ("markov", "shared"):
            p, target = mean_target(cm_pairs)
            print(f"{cm_pairs:>8}: posterior {p:.6f}, mean target {target:.6f}"
                  + ("" if abs(p - target) < 1e-6 else "   over-confident"))
