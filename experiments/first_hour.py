"""The first hour on a GPU, in ten minutes: does it compute what the CPU computes, in the memory and the time
that --dry-run foretells?

    python experiments/first_hour.py                        no data, no network
    python experiments/first_hour.py --only memory processes --processes 2 4

After each part, report.md has what was found beside what was expected. A part that fails says why, and the
next one goes on. On a CPU everything is tiny, which shows only that the program works.
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
from types import SimpleNamespace

import speed
import torch
from common import HERE, markdown

from engine.config import DEFAULTS, PRESETS, describe_models
from engine.distributed import choose_device
from extras.cost import chip_of, estimate

TOY = ["--data", "toy", "--preset", "toy"]
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


def memory(here):
    """Time, and on a GPU peak memory, of a step of every preset's denoiser, as shares of --dry-run's."""
    chip, cuda = chip_of(here.device), here.device.type == "cuda"
    rate = speed.matrix_rate(here.device, chip.bf16)
    yield finding("rate of a large matrix product, of the chip's peak", rate / chip.flops, 0.5, math.inf)
    for preset in ["32", "64", "256", "ffhq", "mnist", "imagenet"] if cuda else ["toy"]:
        config = DEFAULTS | PRESETS[preset]
        cost = estimate(config, describe_models(config, 10), (50000, 2000), chip)
        if not cost.fits["diffusion"]:
            yield [preset, "not tried", "does not fit", ""]
            continue
        before = torch.cuda.memory_allocated() if cuda else 0
        step = speed.training_step(speed.prepare(config | {"micro_batch": cost.micro_batch}, here.device))
        seconds, peak = speed.measure({preset: step}, here.device, 2, 1)[preset]
        del step
        if cuda:
            share = (peak - before) / cost.stages["diffusion"].total
            yield finding(f"{preset}: memory, of what was foretold", share, 0.85, 1.15)
        share = seconds / (3600 * cost.hours["diffusion"] / config["steps"])
        yield finding(f"{preset}: time of a step, of what was foretold", share, 0.5, 2)


def start(here, name, *words, processes=1, bf16=False):
    """train.py, under torchrun if need be -> its run directory."""
    program, out = here.runs / "program.py", here.runs / name
    program.write_text(PROGRAM)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    sizes = [] if here.device.type == "cuda" else TINY
    command += [program, "--device", here.device.type, *TOY, *sizes, *words, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BF16": str(bf16)}
    subprocess.run([str(word) for word in command], env=environment, check=True, timeout=here.limit)
    return out


def train_tokenizer(here):
    return start(here, "tokenizer", "--stage", "tokenizer", "--tokenizer-steps", 300) / "tokenizer.pt"


def precision(here):
    """500 steps of the built-in set: bfloat16 ends nearer to float32 than another seed does."""
    steps = 500 if here.device.type == "cuda" else 20
    ends, words = [], ["--tokenizer", train_tokenizer(here), "--steps", steps, "--sample-every", steps]
    for bf16, seed in (False, 0), (False, 1), (True, 0):
        out = start(here, f"precision-{bf16}-{seed}", *words, "--seed", seed, bf16=bf16)
        ends.append(json.loads((out / "metrics.json").read_text())["vlb"]["total"])
    print("bits per token of float32, another seed, bfloat16:", *ends)
    share = abs(ends[2] - ends[0]) / abs(ends[1] - ends[0])
    yield finding("bits per token: bfloat16 from float32, of the distance of two seeds", share, 0, 1)


def processes(here):
    """Several processes, in passes of two images, against one, in float32. NCCL on GPUs, gloo on a CPU."""
    words = ["--tokenizer", train_tokenizer(here), "--steps", 20, "--sample-every", 20]
    expected = start(here, "processes-1", *words)
    for world in here.processes:
        found = start(here, f"processes-{world}", *words, "--micro-batch", 2, processes=world)
        same = (found / "tokens.npy").read_bytes() == (expected / "tokens.npy").read_bytes()
        yield finding(f"{world} processes: tokens are those of one", same, 1, 1)
        a, b = (torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)["model"]
                for out in (found, expected))
        difference = max(float((a[name] - b[name]).abs().max()) for name in a)
        yield finding(f"{world} processes: largest difference of a weight", difference, 0, 1e-4)


PARTS = {part.__name__: part for part in (memory, precision, processes)}


def main():
    parser = argparse.ArgumentParser(description="Is everything on this GPU as it was predicted without one?")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=PARTS,
                        help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], metavar="W", help="default: 2")
    parser.add_argument("--limit", type=float, default=180, help="seconds of a run (default: 180)")
    parser.add_argument("--out", default="runs/first_hour", help="default: runs/first_hour")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    args = parser.parse_args()
    device, out = choose_device(args.device), Path(args.out)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, where everything is tiny"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    report = f"# The first hour on {name}, torch {torch.__version__}\n"
    with tempfile.TemporaryDirectory() as runs:
        here = SimpleNamespace(device=device, runs=Path(runs), processes=args.processes, limit=args.limit)
        for part in args.only:
            rows = []
            try:
                rows += PARTS[part](here)
            except Exception as error:  # a kernel that is not there, say: the next part may do better
                traceback.print_exc()
                rows.append(["ended early", f"{type(error).__name__}: {str(error)[:200]}", "", "**no**"])
            report += f"\n## {part}\n\n" + markdown(["what", "found", "expected", ""], rows)
            (out / "report.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
