"""The first hour on a GPU, in ten minutes: does it compute what the CPU computes, in the memory and time
foretold?

    python experiments/first_hour.py                            no data, no network; results in
    runs/first_hour python experiments/first_hour.py --only memory processes --processes 2 4

report.md, written anew after each part, has what was found beside what was predicted before any GPU was seen.
A part that fails says why, and the next one goes on. On a CPU everything is tiny, which shows only that the
program works. Speed, measure by measure: experiments/speed.py.
"""

import argparse
import copy
import csv
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
from extras.inception import InceptionV3, fold_batch_norm
from vqvae import VQVAE

GB = 1e9
TOY = ["--data", "toy", "--preset", "toy"]
PROGRAM = f"""import os, sys
sys.path.insert(0, {str(HERE.parent)!r})
import train
train.bf16_works = lambda device: os.environ["BF16"] == "True"
train.main()
"""


def finding(what, found, predicted="", good=None):
    """A row of the report. good: is it as predicted? None where nothing was."""
    return [what, found, predicted, {True: "yes", False: "**no**", None: ""}[good]]


def below(what, value, limit):
    return finding(what, f"{value:.3g}", f"at most {limit:g}", bool(value <= limit))


def at_least(what, value, limit):
    return finding(what, f"{value:.3g}", f"at least {limit:g}", bool(value >= limit))


# ----------------------------------------------------------------------------
# What it computes. Each part yields findings. here: device, tiny (a CPU), runs, processes, limit.

def features(here):
    """Inception with random weights: a GPU must not round to TF32."""
    torch.manual_seed(0)
    network = fold_batch_norm(InceptionV3())
    images = torch.randint(256, (2 if here.tiny else 16, 3, 64, 64), dtype=torch.uint8)
    expected = network(images)
    found = network.to(here.device)(images)
    for tap in ("64", "2048", "spatial", "logits_unbiased"):
        difference = (found[tap].cpu() - expected[tap]).double().norm() / expected[tap].double().norm()
        yield below(f"features {tap}: relative difference to the CPU", float(difference), 1e-4)


def tokens(here):
    """A tokenizer of preset 256 with random weights and codes that k-means found."""
    config = DEFAULTS | PRESETS["toy" if here.tiny else "256"]
    torch.manual_seed(0)
    model = VQVAE(**describe_models(config, 0)["tokenizer"])
    images = torch.randint(256, (64 if here.tiny else 16, 3, *[config["size"] // 8] * 2), dtype=torch.uint8)
    images = torch.nn.functional.interpolate(images.float(), [config["size"]] * 2,
                                             mode="bilinear").to(torch.uint8)
    model.train()(images, torch.Generator().manual_seed(0))
    expected = model.eval().encode(images)
    for bf16, least in (False, 0.98), (True, 0.8):
        other = copy.deepcopy(model).to(here.device)
        other.bf16 = bf16
        same = (other.encode(images.to(here.device)).cpu() == expected).double().mean()
        yield at_least(f"tokens equal to the CPU's, {'bfloat16' if bf16 else 'float32'}", float(same), least)


# ----------------------------------------------------------------------------
# Memory and time.

def memory(here):
    """Peak memory and time of a step of every preset's denoiser, beside what --dry-run says. On a CPU:
    time."""
    chip = chip_of(here.device)
    yield at_least(f"rate of a large matrix product, of {chip.flops / 1e12:.3g} TFLOP/s, as --dry-run has it",
                   speed.matrix_rate(here.device, chip.bf16) / chip.flops, 0.5)
    for preset in ["toy"] if here.tiny else ["32", "64", "256", "ffhq", "mnist", "imagenet"]:
        config = DEFAULTS | PRESETS[preset]
        price = estimate(config, describe_models(config, 10), (50000, 2000), chip)
        foretold, what = price.stages["diffusion"], f"{preset}: GB at peak"
        if not price.fits["diffusion"]:
            yield finding(what, "not tried", f"{foretold.total / GB:.2f}: does not fit")
            continue
        before = 0 if here.tiny else torch.cuda.memory_allocated()
        step = speed.training_step(speed.prepare(config | {"micro_batch": price.micro_batch}, here.device))
        seconds, peak = speed.measure({preset: step}, here.device, 2, 1)[preset]
        del step
        if not here.tiny:
            yield finding(what, f"{(peak - before) / GB:.3f}", f"{foretold.total / GB:.3f}, within 15 %",
                          abs((peak - before) / foretold.total - 1) < 0.15)
        ratio = seconds / foretold.seconds
        yield finding(f"{preset}: time of a step, of what was foretold", f"{ratio:.2f}", "0.5 to 2",
                      0.5 <= ratio <= 2)


# ----------------------------------------------------------------------------
# Whole runs of train.py.

def start(here, name, words, processes=1, bf16=False):
    """train.py, under torchrun if need be -> its run directory."""
    program, out = here.runs / "program.py", here.runs / name
    program.write_text(PROGRAM)
    command = [sys.executable, program, "--device", here.device.type, *words, "--out", out]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BF16": str(bf16)}
    subprocess.run([str(word) for word in command], env=environment, check=True, timeout=here.limit)
    return out


def tokenizer_of(here):
    """A short tokenizer of the built-in set -> its file."""
    steps = 300 if here.tiny else 2000
    return start(here, "tokenizer", [*TOY, "--stage", "tokenizer", "--tokenizer-steps",
                                     steps]) / "tokenizer.pt"


def difference(a, b):
    """The largest of |a - b| over all weights in two runs' checkpoints."""
    a, b = (torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)["model"] for out in (a, b))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def precision(here):
    """300 steps of the built-in set, 500 on a GPU: bfloat16 ends where float32 does."""
    steps, ends = 300 if here.tiny else 500, []
    words = [*TOY, "--tokenizer", tokenizer_of(here), "--steps", steps, "--sample-every", steps,
             "--log-every", 10]
    for name, bf16, seed in ("float32", False, 0), ("float32, another seed", False, 1), ("bfloat16", True, 0):
        out = start(here, f"precision-{bf16}-{seed}", [*words, "--seed", seed], bf16=bf16)
        with (out / "diffusion.csv").open() as file:
            rows = list(csv.DictReader(file))
        losses = [float(row[key]) for row in rows for key in ("rec", "diff", "cm", "norm")]
        ends.append(json.loads((out / "metrics.json").read_text())["vlb"]["total"])
        yield finding(f"{name}: bits per token after {steps} steps; all losses finite", f"{ends[-1]:.4f}",
                      "finite", all(map(math.isfinite, losses)))
    yield below("bfloat16 against float32, of the distance of two seeds",
                abs(ends[2] - ends[0]) / abs(ends[1] - ends[0]), 1)


def processes(here):
    """Several processes against one, in float32: 20 steps, batch 64. NCCL on GPUs, gloo on a CPU."""
    words = ["--preset", "toy", "--tokenizer", tokenizer_of(here), "--steps", 20, "--sample-every", 20]
    one = start(here, "processes-1", ["--data", "toy", *words])
    for world in here.processes:
        every = start(here, f"processes-{world}", ["--data", "toy", *words], world)
        same = (every / "tokens.npy").read_bytes() == (one / "tokens.npy").read_bytes()
        yield finding(f"{world} processes: tokens are those of one, bit for bit", same, "True", same)
        words_of_passes = ["--data", one / "tokens.npy", *words, "--micro-batch", 4]
        passes = start(here, f"processes-{world}-passes", words_of_passes, world)
        for name, out in ("", every), (", in passes", passes):
            yield below(f"{world} processes{name}: largest difference of a weight after 20 steps",
                        difference(one, out), 1e-5 if here.tiny else 1e-4)


# ----------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (features, tokens, memory, precision, processes)}


def run_part(here, part):
    """Its rows of the report; the last one says why it ended early, if it did."""
    rows = []
    try:
        for row in PARTS[part](here):
            print(part, *row, sep=" | ", flush=True)
            rows.append(row)
    except Exception as error:  # out of memory, a kernel that is not there: the next part may do better
        traceback.print_exc()
        rows.append(finding("ended early", f"{type(error).__name__}: {str(error)[:200]}", "", False))
    return rows


def write_report(path, name, results):
    """results: {part: its rows}."""
    wrong = [row for rows in results.values() for row in rows if row[3] == "**no**"]
    text, header = f"# The first hour on {name}\n", ["what", "found", "predicted", ""]
    for title, rows in {f"Not as predicted: {len(wrong)}": wrong, **results}.items():
        text += f"\n## {title}\n\n{markdown(header, rows)}"
    path.write_text(text)


def main():
    parser = argparse.ArgumentParser(description="Is everything on this GPU as it was predicted without one?")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=PARTS,
                        help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], metavar="W", help="default: 2")
    parser.add_argument("--limit", type=float, default=180,
                        help="seconds for a run of train.py (default: 180)")
    parser.add_argument("--out", default="runs/first_hour", help="default: runs/first_hour")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    args = parser.parse_args()
    device = choose_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, where everything is tiny"
    out, results = Path(args.out), {}
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs:
        here = SimpleNamespace(device=device, tiny=device.type == "cpu", runs=Path(runs),
                               processes=args.processes, limit=args.limit)
        for part in args.only:
            results[part] = run_part(here, part)
            write_report(out / "report.md", f"{name}, torch {torch.__version__}", results)
    print(f"wrote {out / 'report.md'}")


if __name__ == "__main__":
    main()
