"""The first hour on a GPU, in ten minutes: does it compute what the CPU computes, in the memory and the time
that --dry-run foretells?

    python experiments/first_hour.py            no data, no network

After each part, report.md has what was found beside what was expected. A part that fails says why, and the
next one goes on. On a CPU it shows only that the program works.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import speed
import torch
from common import HERE, markdown

from engine.config import DEFAULTS, PRESETS, describe_models
from engine.distributed import choose_device
from extras.cost import chip_of, estimate

TINY = ["--size", 8, "--tokenizer-width", 16, "--width", 32, "--heads", 1, "--batch", 8]  # on a CPU
PROGRAM = f"""import os, sys
sys.path.insert(0, {str(HERE.parent)!r})
import train
train.bf16_works = lambda device: os.environ["BF16"] == "True"
train.main()
"""


def finding(what, found, low, high):
    """A row of the report."""
    return [what, f"{found:.4g}", f"{low:g} to {high:g}", "yes" if low <= found <= high else "**no**"]


def memory(device, _):
    """Time, and on a GPU peak memory, of a step of every preset's denoiser, as shares of --dry-run's."""
    chip, cuda = chip_of(device), device.type == "cuda"
    rate = speed.matrix_rate(device, chip.bf16)
    yield finding("rate of a large matrix product, of the chip's peak", rate / chip.flops, 0.5, math.inf)
    for preset in ["32", "64", "256", "ffhq", "mnist", "imagenet"] if cuda else ["toy"]:
        config = DEFAULTS | PRESETS[preset]
        cost = estimate(config, describe_models(config, 10), (50000, 2000), chip)
        if not cost.fits["diffusion"]:
            yield [preset, "not tried", "does not fit", ""]
            continue
        before = torch.cuda.memory_allocated() if cuda else 0
        step = speed.training_step(speed.prepare(config | {"micro_batch": cost.micro_batch}, device))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = speed.measure({preset: step}, device, 2, 1)[preset]
        del step
        if cuda:
            share = (torch.cuda.max_memory_allocated() - before) / cost.stages["diffusion"].total
            yield finding(f"{preset}: memory, of what was foretold", share, 0.85, 1.15)
        share = seconds / (3600 * cost.hours["diffusion"] / config["steps"])
        yield finding(f"{preset}: time of a step, of what was foretold", share, 0.5, 2)


def start(runs, name, *words, processes=1, bf16=False):
    """train.py, under torchrun if need be -> its run directory."""
    program, out = runs / "program.py", runs / name
    program.write_text(PROGRAM)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    sizes = [] if torch.cuda.is_available() else TINY
    command += [program, "--data", "toy", "--preset", "toy", *sizes, *words, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BF16": str(bf16)}
    subprocess.run([str(word) for word in command], env=environment, check=True, timeout=180)
    return out


def train_tokenizer(runs):
    return start(runs, "tokenizer", "--stage", "tokenizer", "--tokenizer-steps", 300) / "tokenizer.pt"


def precision(device, runs):
    """500 steps of the built-in set: bfloat16 ends nearer to float32 than another seed does."""
    steps = 500 if device.type == "cuda" else 20
    ends, words = [], ["--tokenizer", train_tokenizer(runs), "--steps", steps, "--sample-every", steps]
    for bf16, seed in (False, 0), (False, 1), (True, 0):
        out = start(runs, f"precision-{bf16}-{seed}", *words, "--seed", seed, bf16=bf16)
        ends.append(json.loads((out / "metrics.json").read_text())["vlb"]["total"])
    share = abs(ends[2] - ends[0]) / abs(ends[1] - ends[0])
    yield finding("bits per token: bfloat16 from float32, of the distance of two seeds", share, 0, 1)


def processes(_, runs):
    """Two processes, in passes of two images, against one, in float32. NCCL on GPUs, gloo on a CPU."""
    if torch.cuda.device_count() == 1:
        yield ["2 processes", "not tried", "needs two GPUs", ""]
        return
    words = ["--tokenizer", train_tokenizer(runs), "--steps", 20, "--sample-every", 20]
    one = start(runs, "processes-1", *words)
    two = start(runs, "processes-2", *words, "--micro-batch", 2, processes=2)
    same = (one / "tokens.npy").read_bytes() == (two / "tokens.npy").read_bytes()
    yield finding("2 processes: tokens are those of one", same, 1, 1)
    a, b = (torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)["model"] for out in (one, two))
    difference = max(float((a[name] - b[name]).abs().max()) for name in a)
    yield finding("2 processes: largest difference of a weight", difference, 0, 1e-4)


def main():
    parser = argparse.ArgumentParser(description="Is everything on this GPU as it was predicted without one?")
    parser.add_argument("--out", type=Path, default="runs/first_hour", help="default: runs/first_hour")
    out, device = parser.parse_args().out, choose_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    report = f"# The first hour on {name}, torch {torch.__version__}\n"
    for part in (memory, precision, processes):
        rows = []
        try:
            with tempfile.TemporaryDirectory() as runs:
                rows += part(device, Path(runs))
        except Exception as error:  # a kernel that is not there, say: the next part may do better
            traceback.print_exc()
            rows.append(["ended early", f"{type(error).__name__}: {str(error)[:200]}", "", "**no**"])
        report += f"\n## {part.__name__}\n\n" + markdown(["what", "found", "expected", ""], rows)
        (out / "report.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
