"""What the experiments share: where the repository is, the optimizer's step, the bound, CSV files, tables."""

import csv
import math
import platform
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from engine.randomness import generator_for  # noqa: E402
from losses import held_out_bits, mean_bound  # noqa: E402


def schedule_of(shift=0.7, log_snr_max=3.0):
    """Options of a schedule that reaches from log_snr_max to -10 before the shift, as the rows are named."""
    moved = 2 * math.log(shift)
    return dict(shift=shift, log_snr_min=moved - 10, log_snr_max=moved + log_snr_max)


def update(model, ema, optimizer, config, step):
    """train.py's: clips the gradient, then one step of the optimizer and of the averaged weights."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    decay = min(config["ema_decay"], (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)


def held_out_bound(model, schedule, x, labels, seed, draws, batch):
    """Bits per token of tokens x (M, N) with labels (M,), an upper bound. seed: of the noise."""
    bits = held_out_bits(model, schedule, x, labels, lambda i: generator_for(
        seed, "evaluation", i, x.device), draws, batch)
    return mean_bound(bits)["total"]


def facts(device):
    """Where a line was measured: the commit, the device, the command."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"commit": commit.stdout.strip(),
            "device": f"{device.type} ({chip}), {torch.get_num_threads()} threads, torch {torch.__version__}",
            "command": " ".join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]])}


def read(path):
    """The lines of a CSV file, as dicts; none if there is no file."""
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def append(path, line, columns):
    """Adds a dict to a CSV file, by one write: several processes may share the file."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(line)


def select(lines, **wanted):
    """The lines that have these values."""
    return [line for line in lines if all(line[key] == str(value) for key, value in wanted.items())]


def values(lines, column):
    return [float(line[column]) for line in lines if line[column]]


def spread(numbers, digits=2):
    """Mean ± half the range; nothing for no numbers."""
    if not numbers:
        return ""
    mean = f"{sum(numbers) / len(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {(max(numbers) - min(numbers)) / 2:.{digits}f}"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines) + "\n"


def pyplot():
    """matplotlib.pyplot, drawing into files."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    return pyplot
