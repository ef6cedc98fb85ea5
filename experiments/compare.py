"""VQ-LCMD beside discrete-state diffusion and beside itself with something changed, on real images.

    python experiments/compare.py --data mnist --only VQ-LCMD absorbing --seeds 0 1 2

Every row has the same tokens, transformer, optimizer, batches and number of steps (--budget); "VQ-LCMD" is
train.py, bit for bit. All other words go to train.py, which makes the tokenizer and says the network's sizes.

    tokens/, classifier.pt     the tokenizer's run; whose features measure (features.py)
    ROW-SEED-BUDGET.pt         weights
    ROW-SAMPLER-STEPS.png      samples of a row, seed 0
    results.csv, results.md    a line per row, seed and setting of sampling; the table over the seeds

The same command again goes on. Two of them with different rows or seeds may share one directory.
"""

import argparse
import functools
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import baselines
import common
import numpy as np
import torch
from features import Evaluator, spread_out
from tqdm import tqdm

from engine.build import load_tokenizer
from engine.config import describe_models
from engine.distributed import choose_device
from engine.process import write_atomically
from engine.randomness import batch_indices, generator_for, image_generators
from engine.tokens import TokenDataset
from extras.datasets import find
from extras.pictures import save_grid
from losses import LOSS_ARGS, NOISE_ARGS, collapse_diagnostics
from sample import default_end, sample_tokens
from schedule import ShiftedCosine
from train import build_denoiser

# What differs from train.py's settings. "loss": another objective. "frozen": the table is not trained.
PLAIN = dict(output_prior=False, posterior_input=False)  # without what tells of Gaussian noise
PAPER = PLAIN | dict(embedding_init="random") | common.schedule_of(0.4, 7.0)  # as we know it
NAIVE = PAPER | dict(w_cm=0.0, max_drop_rate=0.0)
AUXILIARY = {"": 0.0, ", auxiliary": 5e-4, ", auxiliary 0.01": 0.01, ", auxiliary 0.1": 0.1}
METHODS = {
    "VQ-LCMD": {},
    "absorbing": PLAIN | dict(loss="absorbing"),  # D3PM, MDLM
    "uniform": PLAIN | dict(loss="uniform"),  # D3PM, multinomial diffusion
    "mask-and-replace": PLAIN | dict(loss="mask-and-replace"),  # VQ-Diffusion
    "cross-entropy": dict(loss="cross-entropy"),  # CDCD
    # With their own closed-form term, as VQ-LCMD has its output prior; the better of a kind counts.
    **{f"{kind} + likelihood{said}": PLAIN | dict(loss=kind, analytic=True, auxiliary=weight)
       for kind in ("uniform", "mask-and-replace") for said, weight in AUXILIARY.items()},
}
ABLATIONS = {
    "paper": PAPER,
    "naive": NAIVE,
    "naive, not normalised": NAIVE | dict(norm="none"),
    "without CM": dict(w_cm=0.0),
    "without L_diff": dict(w_diff=0.0),
    "without dropping": dict(max_drop_rate=0.0),
    "random start": dict(embedding_init="random"),
    "frozen codebook table": dict(frozen=True),
    "frozen random table": dict(embedding_init="random", frozen=True),
    "table not normalised": dict(norm="none"),
    "exact weight": dict(weight_clip=math.inf),
    **{f"log_snr_max {end:g}": common.schedule_of(log_snr_max=end) for end in (7.0, 5.0, 4.0, 3.0, 1.5)},
    **{f"shift {shift:g}": common.schedule_of(shift) for shift in (0.1, 0.2, 0.4, 0.7, 1.0)},
    **{f"w_cm {weight:g}": dict(w_cm=weight) for weight in (3.0, 10.0)},
}
ROWS = METHODS | ABLATIONS
SETTINGS = (*NOISE_ARGS, *LOSS_ARGS, "norm", "embedding_init", "teacher", "shift", "log_snr_min",
            "log_snr_max", "batch", "lr", "warmup", "weight_decay", "clip", "ema_decay")  # of weights
OMEGAS, GUIDED_STEPS = (0.0, 0.5, 1.0, 2.0, 4.0), 16  # of the sweep of guidance
HELD_OUT, DRAWS = 2000, 20000  # images of the bound at most, draws in all; standard error 0.01 to 0.02 bit
MEASURES = ["distance", "kid", "precision", "recall"]
COLUMNS = ["row", "lr", "seed", "budget", "purpose", "calls", "sampler", "steps", "guidance", "guided_below",
           "temperature", "gumbel", "end", "n", *MEASURES, "bound", "rank", "smallest", "train_seconds",
           "sample_seconds", "features", "commit", "device", "command"]


def is_discrete(name):
    return ROWS[name].get("loss") in baselines.KINDS


def prepare(args, words):
    """Tokenizer and tokens by train.py, the evaluator -> what all rows share. words: for train.py."""
    out, device = Path(args.out or f"runs/compare-{Path(args.data).stem}"), choose_device(args.device)
    command = [sys.executable, common.HERE.parent / "train.py", "--data", args.data, "--out", out / "tokens",
               "--device", args.device, *(["--root", args.root] if args.root else []), *words]
    for stage in ("tokenizer", "tokens"):
        if subprocess.run([*map(str, command), "--stage", stage]).returncode:
            sys.exit(f"train.py could not make the {stage}: see above")
    config = json.loads((out / "tokens" / "config.json").read_text())
    models = describe_models(config, len(config["classes"]))
    tokenizer, _ = load_tokenizer(models["tokenizer"], out / "tokens", device)
    rows = np.load(out / "tokens" / "tokens.npy", mmap_mode="r")
    test = rows[rows["test"]]
    test = test[spread_out(len(test), HELD_OUT)]
    images, unseen = find(args.data, args.root).load(config["size"])
    shared = SimpleNamespace(out=out, device=device, config=config, classes=config["classes"],
                             tokenizer=tokenizer, tokens=TokenDataset(rows[~rows["test"]], device),
                             held_out=TokenDataset(test, device).batch(np.arange(len(test))),
                             images=images, unseen=unseen)
    shared.evaluator = Evaluator(args, shared)
    return shared


def weights_of(out, name, seed, budget):
    return out / f"{name.replace(' ', '_')}-{seed}-{budget}.pt"


def train_row(name, seed, budget, shared):
    """(averaged weights, schedule, {"settings", "seconds"}) of a row, from its file if there."""
    device, config = shared.device, shared.config | ROWS[name]
    models, settings = describe_models(config, len(shared.classes)), {key: config[key] for key in SETTINGS}
    run = SimpleNamespace(config=config, models=models, seed=seed, device=device, init={})
    model, ema, optimizer = build_denoiser(run, shared.tokenizer, None).values()
    model.embedding.requires_grad_(not config.get("frozen", False))
    path, schedule = weights_of(shared.out, name, seed, budget), ShiftedCosine(**models["schedule"])
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        if state["settings"] != settings:
            sys.exit(f"{path} was made with other settings: give another --out, or remove it")
        ema.load_state_dict(state["ema"])
        return ema, schedule, state
    start = time.perf_counter()

    def batch(step):
        indices = batch_indices(len(shared.tokens), config["batch"], seed, "diffusion", step)
        return *shared.tokens.batch(indices), generator_for(seed, "diffusion", step, device)

    baselines.train(config, model, ema, schedule, optimizer, budget, batch)
    state = {"ema": ema.state_dict(), "settings": settings, "seconds": time.perf_counter() - start}
    write_atomically(path, functools.partial(torch.save, state))
    return ema, schedule, state


def bound(name, model, schedule, shared, seed):
    """Bits per token of HELD_OUT held-out images by DRAWS draws, an upper bound. seed: of the noise."""
    x, labels = shared.held_out
    if not is_discrete(name):
        return common.held_out_bound(model, schedule, x, labels, seed, DRAWS, shared.config["eval_batch"])
    noise, row = generator_for(seed, "evaluation", 0, shared.device), ROWS[name]
    parts = (torch.arange(DRAWS, device=x.device) % len(x)).split(256)
    with torch.no_grad():
        nats = [baselines.loss(row["loss"], model, schedule, x[part], noise, labels[part],
                               row.get("analytic", False)) for part in parts]
    return float(torch.cat(nats).mean()) / math.log(2)


def plain(name, steps, sampler="ancestral", guidance=0.0):
    """A setting of sampling without anything tuned, for draw."""
    return dict(sampler=sampler, steps=steps, guidance=guidance, guided_below=1.0, temperature=1.0,
                gumbel=1.0, end="" if is_discrete(name) else default_end(steps, guidance))


def draw(name, model, schedule, shared, n, *, sampler, steps, guidance, guided_below, temperature, gumbel,
         end, batch=250):
    """uint8 images (n, 3, H, W), class i mod C. guided_below: guidance at t up to this alone."""
    images = []
    for start in tqdm(range(0, n, batch), name, leave=False, disable=None):
        indices = torch.arange(start, min(start + batch, n), device=shared.device)
        labels = indices % max(len(shared.classes), 1)
        noise = torch.Generator(shared.device).manual_seed(start)
        options = dict(labels=labels if shared.classes else None, guidance=guidance, temperature=temperature,
                       guided_below=guided_below)
        if not is_discrete(name):
            tokens = sample_tokens(model, schedule, labels, image_generators(0, indices.tolist()), steps,
                                   guidance, sampler, temperature=temperature, end=end,
                                   interval=(0.0, guided_below))
        elif sampler == "confidence":
            tokens = baselines.sample_by_confidence(model, schedule, len(labels), steps, noise, gumbel=gumbel,
                                                    **options)
        else:
            tokens = baselines.sample(ROWS[name]["loss"], model, schedule, len(labels), steps, noise,
                                      end=end or None, analytic=ROWS[name].get("analytic", False), **options)
        images.append(shared.tokenizer.decode(tokens).cpu())
    return torch.cat(images)


def measure(path, name, seed, budget, purpose, calls, setting, n, shared):
    """One line of a CSV file, from there if it was measured before. Seed 0 leaves a picture, too."""
    trained = dict(row=name, lr=(shared.config | ROWS[name])["lr"], seed=seed, budget=budget)
    line = trained | dict(calls=calls, n=n, features=shared.evaluator.name) | setting
    known = common.select(common.read(path), **line)
    if same := common.select(known, purpose=purpose) or known:
        return same[0] | {"purpose": purpose}
    model, schedule, state = train_row(name, seed, budget, shared)
    start = time.perf_counter()
    images = draw(name, model, schedule, shared, n, **setting)
    found = {"train_seconds": state["seconds"], "sample_seconds": time.perf_counter() - start}
    found |= shared.evaluator(images, distance_alone=purpose == "tried")  # the others take long
    bounds = common.values(common.select(common.read(path), **trained), "bound")
    found["bound"] = bounds[0] if bounds else bound(name, model, schedule, shared, seed)
    collapse = collapse_diagnostics(model.table())
    found |= {"rank": collapse["effective_rank"], "smallest": collapse["smallest_distance"]}
    line |= common.facts(shared.device) | {"purpose": purpose}
    line |= {key: f"{value:.5f}" for key, value in found.items()}
    common.append(path, line, COLUMNS)
    print(f"{name}, seed {seed}, {purpose}, {setting}: distance {found['distance']:.3f}", flush=True)
    if seed == 0 and purpose == "untuned":
        save_grid(images[:30], shared.out / f"{name.replace(' ', '_')}-{setting['sampler']}-{calls}.png", 10)
    return {key: str(value) for key, value in line.items()}


def references(shared, n):
    """A line that says what n held-out images score, and their reconstructions."""
    unseen, tokenizer = shared.unseen.batch(spread_out(len(shared.unseen), n)), shared.tokenizer
    rebuilt = torch.cat([tokenizer.decode(tokenizer.encode(part.to(shared.device))).cpu()
                         for part in unseen.split(250)])
    real, best = (shared.evaluator(images, True)["distance"] for images in (unseen, rebuilt))
    return (f"Features: {shared.evaluator.name}. {n:,} samples. Distance of {len(unseen):,} held-out images: "
            f"{real:.3f}; of their reconstructions: {best:.3f}.\n")


def settings_of(name, seed, steps, classes):
    """Everything that is drawn from one row."""
    found = [plain(name, n) for n in steps]
    if ROWS[name].get("loss") == "absorbing":
        found += [plain(name, n, "confidence") for n in steps]
    if name == "VQ-LCMD" and seed == 0:
        found += [plain(name, n, "ddim") for n in steps]
    if name in METHODS and seed == 0 and classes:
        found += [plain(name, GUIDED_STEPS, guidance=omega) for omega in OMEGAS]
    return found


def table(lines):
    """Markdown: a line per row and setting of sampling, over the seeds."""
    settings, rows = ["row", "sampler", "steps", "guidance"], []
    columns = ["bound", "rank", "smallest", *MEASURES]
    for setting in dict.fromkeys(tuple(line[name] for name in settings) for line in lines):
        mine = common.select(lines, **dict(zip(settings, setting, strict=True)))
        rows.append([*setting, len(mine), *(common.spread(common.values(mine, name), 3) for name in columns)])
    return common.markdown([*settings, "seeds", *columns], rows)


def make_parser(description):
    """Arguments that tuned.py has, too."""
    parser = argparse.ArgumentParser(allow_abbrev=False,
                                     description=f"{description} Other words go to train.py.")
    parser.add_argument("--data", default="toy", help="as for train.py (default: toy)")
    parser.add_argument("--root", metavar="DIR", help="where a named set lies, as for train.py")
    parser.add_argument("--budget", type=int, default=1500, help="steps of every row (default: 1500)")
    parser.add_argument("--classifier-steps", type=int, default=1500, help="of the features (default: 1500)")
    parser.add_argument("--features-of", metavar="DATA", help="learn the features on another set's classes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--out", help="run directory (default: runs/compare-NAME)")
    return parser


def main():
    parser = make_parser("Compare methods and ablations.")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=ROWS, default=ROWS,
                        help=f"default: {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--sampling-steps", type=int, nargs="+", default=[8, 16, 50, 200], metavar="N",
                        help="calls of the network per sample (default: 8 16 50 200)")
    parser.add_argument("--n", type=int, default=1000, help="samples of each setting (default: 1000)")
    args, words = parser.parse_known_args()
    shared, lines = prepare(args, words), []
    path = shared.out / "results.csv"
    for seed, name in itertools.product(args.seeds, args.only):
        for setting in settings_of(name, seed, args.sampling_steps, shared.classes):
            lines.append(measure(path, name, seed, args.budget, "untuned", setting["steps"], setting, args.n,
                                 shared))
    text = f"{references(shared, args.n)}\n{table(lines)}"
    (shared.out / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
