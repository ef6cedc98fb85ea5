"""`python schedule.py`: a table of the ends of lambda(t), and curves, a colour for each shift."""

import argparse

import torch

from engine.config import DEFAULTS
from engine.process import report_errors, user_error
from engine.validate import UserError
from schedule import ShiftedCosine, alpha_sigma


def draw(schedules, path):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the picture needs matplotlib: pip install matplotlib") from error
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(title="log SNR:  lambda(t)", xlabel="t")
    right.set(title="alpha(t) falls, sigma(t) rises", xlabel="t")
    for i, schedule in enumerate(schedules):
        left.plot(t, schedule.log_snr(t), f"C{i}", label=f"s = {schedule.shift:g}")
        for values in alpha_sigma(schedule.log_snr(t)):
            right.plot(t, values, f"C{i}")
    left.legend()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description="Draw the shifted cosine schedule for several shifts.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    shifts = [2.0, 1.0, DEFAULTS["shift"], 0.4, 0.2, 0.1]
    add("--shifts", type=float, nargs="+", default=shifts, help="shift factors s")
    add("--log-snr-min", type=float, default=DEFAULTS["log_snr_min"], help="lambda(1) before the shift")
    add("--log-snr-max", type=float, default=DEFAULTS["log_snr_max"], help="lambda(0) before the shift")
    add("--out", default="schedule.png", help="the picture to write")
    args = parser.parse_args()
    with report_errors("schedule.py"), user_error():
        schedules = [ShiftedCosine(shift, args.log_snr_min, args.log_snr_max) for shift in args.shifts]
        print("   s   lambda(0)  lambda(.5)  lambda(1)   share of [0, 1] with SNR > 1")
        for schedule in schedules:
            ends = schedule.log_snr(torch.tensor([0, 0.5, 1], dtype=torch.float64)).tolist()
            share = (schedule.log_snr(torch.linspace(0, 1, 10001, dtype=torch.float64)) > 0).double().mean()
            print(f"{schedule.shift:5.2f}  {ends[0]:8.3f}  {ends[1]:9.3f}  {ends[2]:10.3f}   {share:.3f}")
        draw(schedules, args.out)
        print(f"wrote {args.out}")
