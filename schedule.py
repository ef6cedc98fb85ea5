"""The shifted cosine noise schedule: how much signal and how much noise at each time t in [0, 1].

    z_t = alpha_t e(x) + sigma_t eps,   alpha_t^2 = sigmoid(lambda_t),   sigma_t^2 = sigmoid(-lambda_t)

lambda_t = log SNR(t) = log(alpha_t^2 / sigma_t^2) falls from t = 0 (clean) to t = 1 (noise), with train.py's
settings from 2.3 to -10.7. The signal is variance preserving: alpha_t^2 + sigma_t^2 = 1.

Why "clean" is no cleaner than 2.3 (ours; Plaid learns both ends): above log 5 = 1.6 the weight of L_diff is
clipped, and a clipped weight rewards collapse (losses.py). So we start a little above that (measured), and
what is cleaner is left to L_rec, whose weight needs no clip.

Why a shift (paper, "shifted cosine noise schedule"): K well separated embeddings in D dimensions can be told
apart until the SNR is quite low. With the plain cosine schedule the network would spend much of [0, 1] on
noise levels where every token is plainly visible. A shift s < 1 multiplies the SNR by s^2 at every t' and
moves the time to where there is something to decide.

Run alone, this file prints a table for several shifts and draws the curves:  python schedule.py
"""

import math

import torch


class ShiftedCosine:
    """lambda(t) = -2 log tan(pi t'/2) + 2 log s, where t' = t0 + w t (paper: shifted cosine schedule).

    The affine map t -> t' gives lambda(0) = log_snr_max and lambda(1) = log_snr_min (ours). All methods work
    element by element in the dtype of t.
    """

    def __init__(self, shift, log_snr_min, log_snr_max):
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        if not log_snr_min < log_snr_max:
            raise ValueError(f"log_snr_min ({log_snr_min}) must lie below log_snr_max ({log_snr_max})")
        self.shift, self.log_snr_min, self.log_snr_max = shift, log_snr_min, log_snr_max
        # Solve lambda = -2 log tan(pi t'/2) + 2 log s for the two ends: t' = (2/pi) atan(s e^{-lambda/2}).
        first, last = (lam - 2 * math.log(shift) for lam in (log_snr_max, log_snr_min))
        self.t0 = 2 / math.pi * math.atan(math.exp(-first / 2))
        self.w = 2 / math.pi * math.atan(math.exp(-last / 2)) - self.t0

    def log_snr(self, t):
        """lambda(t) for t in [0, 1], any shape."""
        return -2 * torch.log(torch.tan(math.pi / 2 * (self.t0 + self.w * t))) + 2 * math.log(self.shift)

    def d_log_snr(self, t):
        """lambda'(t) = -2 pi w / sin(pi t'): negative."""
        return -2 * math.pi * self.w / torch.sin(math.pi * (self.t0 + self.w * t))


def alpha_sigma(log_snr):
    """(alpha, sigma) of a log-SNR, any shape: sqrt(sigmoid(lambda)), sqrt(sigmoid(-lambda))."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def add_noise(e, log_snr, eps):
    """z = alpha e + sigma eps, a draw of q(z_t | x).  e, eps: (B, N, D); log_snr: (B,)."""
    alpha, sigma = alpha_sigma(log_snr)                                                    # (B,)
    return alpha[:, None, None] * e + sigma[:, None, None] * eps                           # (B, N, D)


def posterior(z_t, e, log_snr_t, log_snr_s):
    """Mean and standard deviation of q(z_s | z_t, x), the step back from time t to an earlier time s < t.

        c = 1 - e^{lambda_t - lambda_s},  mean = alpha_s ((1 - c) z_t / alpha_t + c e),  var = sigma_s^2 c

    Why, by Bayes' rule for Gaussians:
      1. z_t = (alpha_t / alpha_s) z_s + new noise, of variance sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2.
         This is sigma_t^2 c: put SNR = alpha^2 / sigma^2 = e^lambda into c.
      2. Two facts about z_s: it lies at alpha_s e, with precision 1 / sigma_s^2 (before z_t is seen); and at
         (alpha_s / alpha_t) z_t, with precision (alpha_t / alpha_s)^2 / (sigma_t^2 c)
         = (1 - c) / (c sigma_s^2).
      3. Precisions add up, to 1 / (c sigma_s^2), and each fact has a share in the mean: c and 1 - c.

    The sampler puts the predicted embedding e_hat for e; the CM loss uses the true one to draw markov pairs.
    z_t, e: (B, N, D); log_snr_t, log_snr_s: (B,). Returns (B, N, D) and (B, 1, 1).
    """
    log_snr_t, log_snr_s = log_snr_t[:, None, None], log_snr_s[:, None, None]              # (B, 1, 1)
    # expm1 keeps all digits when the two times are close; next to each other, rounding could make c negative.
    c = (-torch.expm1(log_snr_t - log_snr_s)).clamp(min=0)
    alpha_t, _ = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    return alpha_s * ((1 - c) / alpha_t * z_t + c * e), sigma_s * c.sqrt()


if __name__ == "__main__":
    from extras.schedule_plot import main
    main()
