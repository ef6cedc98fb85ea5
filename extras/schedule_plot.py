"""`python schedule.py`: a table of the ends of lambda(t), and curves, a colour for each shift."""

import argparse

import torch

from engine.config import DEFAULTS
from engine.process import report_errors, user_error
from engine.validate import UserError
from schedule import ShiftedCosine, alpha_sigma


def main():
    parser = argparse.ArgumentParser(description="Draw the shifted cosine schedule for several shifts.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, shifts = parser.add_argument, [2.0, 1.0, DEFAULTS["shift"], 0.4, 0.2, 0.1]
    add("--shifts", type=float, nargs="+", default=shifts, help="shift factors s")
    add("--log-snr-min", type=float, default=DEFAULTS["log_snr_min"], help="lambda(1)")
    add("--log-snr-max", type=float, default=DEFAULTS["log_snr_max"], help="lambda(0)")
    add("--out", default="schedule.png", help="the picture to write")
    args = parser.parse_args()
    t = torch.linspace(0, 1, 10001, dtype=torch.float64)
    with report_errors("schedule.py"), user_error():
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UserError("the picture needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(10.4, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.set(title="log SNR:  lambda(t)", xlabel="t")
        right.set(title="alpha(t) falls, sigma(t) rises", xlabel="t")
        print("   s   lambda(0)  lambda(.5)  lambda(1)   share of [0, 1] with SNR > 1")
        for i, shift in enumerate(args.shifts):
            log_snr = ShiftedCosine(shift, args.log_snr_min, args.log_snr_max).log_snr(t)
            print(f"{shift:5.2f}  {log_snr[0]:8.3f}  {log_snr[5000]:9.3f}  {log_snr[-1]:10.3f}   "
                  f"{(log_snr > 0).double().mean():.3f}")
            left.plot(t, log_snr, f"C{i}", label=f"s = {shift:g}")
            for values in alpha_sigma(log_snr):
                right.plot(t, values, f"C{i}")
        left.legend()
        figure.savefig(args.out)
        print(f"wrote {args.out}")
