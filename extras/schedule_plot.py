"""`python schedule.py`: lambda(t) on the left, alpha(t) and sigma(t) on the right, a colour for each shift."""

import argparse

import torch
from PIL import Image, ImageDraw, ImageFont

from engine.config import DEFAULTS
from engine.process import report_errors, user_error
from schedule import ShiftedCosine, alpha_sigma

COLOURS = ["#c0392b", "#d98c00", "#2e8b57", "#2d6cb5", "#7d4fa3", "#555555"]


def draw(shifts, path, log_snr_min, log_snr_max):
    """Writes a PNG with one colour per shift. Pillow is enough for three families of curves."""
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

    at = panel(70, "log SNR:  lambda(t)", low - 1, high + 1,
               [tick for tick in range(-50, 51, 5) if low - 1 <= tick <= high + 1])
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
    parser.add_argument("--shifts", type=float, nargs="+", default=[2.0, 1.0, DEFAULTS["shift"], 0.4, 0.2, 0.1],
                        help="shift factors s")
    parser.add_argument("--log-snr-min", type=float, default=DEFAULTS["log_snr_min"], help="lambda(1) before the shift")
    parser.add_argument("--log-snr-max", type=float, default=DEFAULTS["log_snr_max"], help="lambda(0) before the shift")
    parser.add_argument("--out", default="schedule.png", help="the PNG to write")
    args = parser.parse_args()
    with report_errors("schedule.py"), user_error():
        draw(args.shifts, args.out, args.log_snr_min, args.log_snr_max)
        print("   s   lambda(0)  lambda(.5)  lambda(1)   share of [0, 1] with SNR > 1")
        for s in args.shifts:
            schedule = ShiftedCosine(s, args.log_snr_min, args.log_snr_max)
            ends = schedule.log_snr(torch.tensor([0, 0.5, 1], dtype=torch.float64)).tolist()
            share = (schedule.log_snr(torch.linspace(0, 1, 10001, dtype=torch.float64)) > 0).double().mean()
            print(f"{s:5.2f}  {ends[0]:8.3f}  {ends[1]:9.3f}  {ends[2]:10.3f}   {share:.3f}")
        print(f"wrote {args.out}")
