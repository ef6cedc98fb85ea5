"""The shifted cosine noise schedule: how much signal and how much noise at each time t in [0, 1].

    z_t = alpha_t e(x) + sigma_t eps,   alpha_t^2 = sigmoid(lambda_t),   sigma_t^2 = sigmoid(-lambda_t)

lambda_t = log SNR(t) = log(alpha_t^2 / sigma_t^2) falls from about +5 at t = 0 (clean) to about -12 at t = 1
(noise), with train.py's settings. The signal is variance preserving: alpha_t^2 + sigma_t^2 = 1.

Why a shift (paper, "shifted cosine noise schedule"): K well separated embeddings in D dimensions can be told
apart until the SNR is quite low. With the plain cosine schedule the network would spend much of [0, 1] on noise
levels where every token is plainly visible. A shift s < 1 multiplies the SNR by s^2 at every t and moves the time
to where there is something to decide.

Run alone, this file draws lambda(t), alpha(t) and sigma(t) for several shifts:  python schedule.py --out schedule.png
"""

import argparse
import math

import torch


class ShiftedCosine:
    """lambda(t) = -2 log tan(pi t'/2) + 2 log s, where t' = t0 + w t (paper: shifted cosine schedule).

    The affine map t -> t' keeps lambda, before the shift, inside [log_snr_min, log_snr_max] (ours); the real range
    is [log_snr_min + 2 log s, log_snr_max + 2 log s]. All methods work element by element in the dtype of t.
    """

    def __init__(self, shift=1.0, log_snr_min=-10.0, log_snr_max=10.0):
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        if not log_snr_min < log_snr_max:
            raise ValueError(f"log_snr_min ({log_snr_min}) must lie below log_snr_max ({log_snr_max})")
        self.shift, self.log_snr_min, self.log_snr_max = shift, log_snr_min, log_snr_max
        # Solve -2 log tan(pi t'/2) = lambda for the two ends: t' = (2/pi) atan(e^{-lambda/2}).
        self.t0 = 2 / math.pi * math.atan(math.exp(-log_snr_max / 2))
        self.w = 2 / math.pi * math.atan(math.exp(-log_snr_min / 2)) - self.t0

    def log_snr(self, t):
        """lambda(t) for t in [0, 1], any shape."""
        return -2 * torch.log(torch.tan(math.pi / 2 * (self.t0 + self.w * t))) + 2 * math.log(self.shift)

    def d_log_snr(self, t):
        """lambda'(t) = -2 pi w / sin(pi t'): negative, and the same for every shift."""
        return -2 * math.pi * self.w / torch.sin(math.pi * (self.t0 + self.w * t))


def alpha_sigma(log_snr):
    """(alpha, sigma) of a log-SNR, any shape: sqrt(sigmoid(lambda)), sqrt(sigmoid(-lambda))."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def add_noise(e, log_snr, eps):
    """z = alpha e + sigma eps, a draw of q(z_t | x).  e, eps: (B, N, D); log_snr: (B,)."""
    alpha, sigma = alpha_sigma(log_snr)                                                            # (B,)
    return alpha[:, None, None] * e + sigma[:, None, None] * eps                                   # (B, N, D)


def posterior(z_t, e, log_snr_t, log_snr_s):
    """Mean and standard deviation of q(z_s | z_t, x), the step back from time t to an earlier time s < t.

        c = 1 - e^{lambda_t - lambda_s},   mean = alpha_s ((1 - c) z_t / alpha_t + c e),   variance = sigma_s^2 c

    The sampler puts the predicted embedding e_hat for e; the CM loss uses the true one to draw its markov pairs.
    z_t, e: (B, N, D); log_snr_t, log_snr_s: (B,). Returns (B, N, D) and (B, 1, 1).
    """
    log_snr_t, log_snr_s = log_snr_t[:, None, None], log_snr_s[:, None, None]                      # (B, 1, 1)
    c = -torch.expm1(log_snr_t - log_snr_s)  # expm1 keeps all digits when the two times are close
    alpha_t, _ = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    return alpha_s * ((1 - c) / alpha_t * z_t + c * e), sigma_s * c.sqrt()


# ----------------------------------------------------------------------------
# The picture: lambda(t) on the left, alpha(t) and sigma(t) on the right.

COLOURS = ["#c0392b", "#d98c00", "#2e8b57", "#2d6cb5", "#7d4fa3", "#555555"]


def draw(shifts, path, log_snr_min=-10.0, log_snr_max=10.0):
    """Writes a PNG with one colour per shift. Pillow is enough for three families of curves."""
    from PIL import Image, ImageDraw, ImageFont
    image = Image.new("RGB", (1040, 460), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    curves = [ShiftedCosine(s, log_snr_min, log_snr_max) for s in shifts]
    log_snrs = [schedule.log_snr(t) for schedule in curves]
    low = min(float(values.min()) for values in log_snrs)
    high = max(float(values.max()) for values in log_snrs)

    def panel(left, title, bottom_value, top_value, ticks):
        width, height, top = 420, 350, 50
        pen.rectangle([left, top, left + width, top + height], outline="#888888")
        pen.text((left + width / 2, top - 12), title, fill="black", font=font, anchor="ms")

        def at(x, y):
            return left + x * width, top + height * (1 - (y - bottom_value) / (top_value - bottom_value))

        for tick in ticks:
            pen.line([at(0, tick), at(1, tick)], fill="#e4e4e4")
            pen.text((left - 8, at(0, tick)[1]), f"{tick:g}", fill="black", font=font, anchor="rm")
        for tick in (0, 0.25, 0.5, 0.75, 1):
            pen.text((at(tick, 0)[0], top + height + 8), f"{tick:g}", fill="black", font=font, anchor="mt")
        pen.text((left + width / 2, top + height + 30), "t", fill="black", font=font, anchor="mt")
        return at

    at = panel(70, "log SNR:  lambda(t)", low - 1, high + 1, range(-15, 16, 5))
    for i, (s, values) in enumerate(zip(shifts, log_snrs, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        points = [at(x, y) for x, y in zip(t.tolist(), values.tolist(), strict=True)]
        pen.line(points, fill=colour, width=2)
        pen.text((475, 62 + 19 * i), f"s = {s:g}", fill=colour, font=font, anchor="ra")
    at = panel(590, "alpha(t) falls, sigma(t) rises", 0, 1, (0, 0.25, 0.5, 0.75, 1))
    for i, values in enumerate(log_snrs):
        for y in alpha_sigma(values):
            points = [at(x, v) for x, v in zip(t.tolist(), y.tolist(), strict=True)]
            pen.line(points, fill=COLOURS[i % len(COLOURS)], width=2)
    image.save(path)


def main():
    parser = argparse.ArgumentParser(description="Draw the shifted cosine schedule for several shifts.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shifts", type=float, nargs="+", default=[2.0, 1.0, 0.6, 0.4, 0.2, 0.1],
                        help="shift factors s")
    parser.add_argument("--log-snr-min", type=float, default=-10.0, help="lambda(1) before the shift")
    parser.add_argument("--log-snr-max", type=float, default=10.0, help="lambda(0) before the shift")
    parser.add_argument("--out", default="schedule.png", help="the PNG to write")
    args = parser.parse_args()
    try:
        draw(args.shifts, args.out, args.log_snr_min, args.log_snr_max)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("   s   lambda(0)  lambda(.5)  lambda(1)   share of [0, 1] with SNR > 1")
    for s in args.shifts:
        schedule = ShiftedCosine(s, args.log_snr_min, args.log_snr_max)
        ends = schedule.log_snr(torch.tensor([0, 0.5, 1], dtype=torch.float64)).tolist()
        share = (schedule.log_snr(torch.linspace(0, 1, 10001, dtype=torch.float64)) > 0).double().mean()
        print(f"{s:5.2f}  {ends[0]:8.3f}  {ends[1]:9.3f}  {ends[2]:10.3f}   {share:.3f}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
