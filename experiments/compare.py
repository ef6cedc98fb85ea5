"""VQ-LCMD beside discrete-state diffusion and beside itself with something changed, on real images.

    python experiments/compare.py --data mnist --budget 1500                      everything, one row after the other
    python experiments/compare.py --data mnist --budget 1500 --only methods --seeds 0 1 2

Every row has the same tokens, transformer, optimizer, batches and number of steps (--budget); "VQ-LCMD" is train.py,
bit for bit. The tokenizer comes from train.py, to which all other words of the command line go (--preset, --size, ...;
its network and settings are taken from there, too). In the run directory:

    tokens/                          tokenizer and tokens
    classifier.pt                    whose features measure
    ROW-SEED-BUDGET.pt               weights, and the table's collapse over training; spaces in ROW become _; while it
                                     trains, ROW-SEED-BUDGET.partial.pt, from which the same command goes on
    ROW-BUDGET-SAMPLER-STEPS.png     samples of a row, seed 0
    results.csv                      a line per row, seed, sampler, steps and guidance
    results.md, *.png                tables, curves, and samples of every row side by side

The same command again does what is missing; two of them with different rows or seeds may share one directory.

Measures. Fréchet distance, KID, precision and recall with the formulas of fid.py, against 10,000 training images: on
the features of Inception-v3, if its weights are there (then it is FID), or of a classifier trained here on the training
images on their classes, and then it is never called FID. Images without classes take the classifier of another set
(--features-of cifar10), as FID takes that of ImageNet; else one that tells a rotation by 0, 90, 180 or 270 degrees,
which sees layout and hardly quality. Agreement: how often the classifier of their classes sees the class asked for.
Bound: bits per token of held-out images.
"""

import argparse
import copy
import csv
import functools
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import agreement  # noqa: E402
import baselines  # noqa: E402

from embedding_diffusion import EmbeddingDiffusion  # noqa: E402
from engine.build import load_tokenizer  # noqa: E402
from engine.config import describe_models  # noqa: E402
from engine.distributed import bf16_works, choose_device  # noqa: E402
from engine.process import write_atomically  # noqa: E402
from engine.randomness import STAGES, batch_indices, generator_for, image_generators, seed_for  # noqa: E402
from engine.tokens import TokenDataset  # noqa: E402
from extras.datasets import find  # noqa: E402
from extras.downloads import DownloadError  # noqa: E402
from extras.grids import save_grid  # noqa: E402
from extras.inception import find_inception, load_inception  # noqa: E402
from extras.metrics import kernel_distance, precision_recall  # noqa: E402
from fid import frechet_distance  # noqa: E402
from losses import LOSS_ARGS, NOISE_ARGS, collapse_diagnostics, held_out_bound  # noqa: E402
from sample import sample_tokens  # noqa: E402
from schedule import ShiftedCosine  # noqa: E402
from train import learning_rate, update  # noqa: E402
from vqvae import to_float  # noqa: E402

PLAIN = dict(output_prior=False, posterior_input=False)  # what tells of Gaussian noise is switched off
ROWS = {  # what differs from train.py's settings; "loss": another objective, "frozen": the table
    "VQ-LCMD": {},
    "absorbing": dict(loss="absorbing", **PLAIN),                # D3PM, MDLM
    "uniform": dict(loss="uniform", **PLAIN),                    # D3PM, multinomial diffusion
    "mask-and-replace": dict(loss="mask-and-replace", **PLAIN),  # VQ-Diffusion
    "cross-entropy": dict(loss="cross-entropy"),                            # CDCD
    # The same with their own closed-form term, as VQ-LCMD has its output prior; the better of a kind counts.
    "uniform + likelihood": dict(loss="uniform", **PLAIN, analytic=True),
    "uniform + likelihood, hybrid": dict(loss="uniform", **PLAIN, analytic=True, auxiliary=0.01),
    "uniform + likelihood, hybrid 0.1": dict(loss="uniform", **PLAIN, analytic=True, auxiliary=0.1),
    "mask-and-replace + likelihood": dict(loss="mask-and-replace", **PLAIN, analytic=True),
    "mask-and-replace + likelihood, auxiliary": dict(loss="mask-and-replace", **PLAIN, analytic=True,
                                                     auxiliary=5e-4),
    "mask-and-replace + likelihood, auxiliary 0.01": dict(loss="mask-and-replace", **PLAIN, analytic=True,
                                                          auxiliary=0.01),
    "mask-and-replace + likelihood, auxiliary 0.1": dict(loss="mask-and-replace", **PLAIN, analytic=True,
                                                         auxiliary=0.1),
    # The paper's method as we know it: no closed-form term, a random table; and naive joint training beside it.
    # Where its schedule starts we do not know; where ours does is part of the cure, so these start at little noise.
    "paper": dict(**PLAIN, embedding_init="random", shift=0.4, log_snr_max=7.0),
    "paper, shift 1": dict(**PLAIN, embedding_init="random", shift=1.0, log_snr_max=7.0),
    "naive": dict(**PLAIN, embedding_init="random", shift=0.4, log_snr_max=7.0, w_cm=0.0, max_drop_rate=0.0),
    "naive, not normalised": dict(**PLAIN, embedding_init="random", shift=0.4, log_snr_max=7.0, w_cm=0.0,
                                  max_drop_rate=0.0, norm="none"),
    "without CM": dict(w_cm=0.0),
    "without L_diff": dict(w_diff=0.0),
    "without dropping": dict(max_drop_rate=0.0),
    "log_snr_max 7": dict(log_snr_max=7.0),  # the default of the rows measured before "log_snr_max 3"
    "log_snr_max 5": dict(log_snr_max=5.0),
    "log_snr_max 4": dict(log_snr_max=4.0),
    "log_snr_max 3": dict(log_snr_max=3.0),
    "log_snr_max 1.5": dict(log_snr_max=1.5),
    "log_snr_max 3, w_cm 3": dict(log_snr_max=3.0, w_cm=3.0),
    "w_cm 3": dict(w_cm=3.0),
    "w_cm 10": dict(w_cm=10.0),
    "shift 0.1": dict(shift=0.1),
    "shift 0.2": dict(shift=0.2),
    "shift 0.4": dict(shift=0.4),
    "shift 0.7": dict(shift=0.7),
    "shift 1": dict(shift=1.0),
    "shared noise": dict(cm_pairs="shared"),
    "gap at most 0.1": dict(max_gap=0.1),
    "random start": dict(embedding_init="random"),
    "frozen codebook table": dict(frozen=True),
    "frozen random table": dict(embedding_init="random", frozen=True),
    "table not normalised": dict(norm="none"),
    "teacher = current": dict(teacher="current"),
    "without posterior input": dict(posterior_input=False),
    "a quarter at t = 0": dict(rec_fraction=0.25),
    "exact weight": dict(weight_clip=math.inf),
    "without likelihood": dict(output_prior=False),  # of the output prior, which had this name when it was measured
    "cross-entropy without likelihood": dict(loss="cross-entropy", output_prior=False),
}
METHODS = list(ROWS)[:12]
GUIDANCE, GUIDED_STEPS = (0.5, 1.0, 2.0, 4.0), 16  # of the sweep; omega = 0 is measured with the others
POINTS = 20  # of the curves over training
SAVE_EVERY = 1000  # training steps
SETTINGS = (*NOISE_ARGS, *LOSS_ARGS, "norm", "embedding_init", "teacher", "shift", "log_snr_min", "log_snr_max",
            "batch", "lr", "warmup", "weight_decay", "clip", "ema_decay")  # of weights that have a file
HELD_OUT, DRAWS = 2000, 20000  # images of the bound at most, draws in all: one standard error is 0.01 to 0.02 bit
COLUMNS = ["row", "seed", "budget", "sampler", "steps", "guidance", "n", "distance", "kid", "precision", "recall",
           "agreement", "bound", "rank", "smallest", "mean_distance", "train_seconds", "sample_seconds", "features",
           "commit", "device", "command"]


class Shared(SimpleNamespace):
    """What all rows share; may be a key."""

    __hash__ = object.__hash__


def spread_out(n, most):
    """At most `most` of the numbers below n, evenly: a folder is sorted by class."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)


def prepare(args, words):
    """Tokenizer and tokens by train.py -> what all rows share."""
    out, device = Path(args.out), choose_device(args.device)
    command = [sys.executable, str(HERE.parent / "train.py"), "--data", args.data, "--out", str(out / "tokens"),
               "--device", args.device, *(["--root", args.root] if args.root else []), *words]
    for stage in ("tokenizer", "tokens"):
        if subprocess.run([*command, "--stage", stage]).returncode:
            raise ValueError(f"train.py could not make the {stage}: see above")
    config = json.loads((out / "tokens" / "config.json").read_text())
    models = describe_models(config, len(config["classes"]))
    tokenizer, _ = load_tokenizer(models["tokenizer"], out / "tokens", device)
    rows = np.load(out / "tokens" / "tokens.npy", mmap_mode="r")
    held_out = np.flatnonzero(rows["test"])
    held_out = held_out[spread_out(len(held_out), HELD_OUT)]
    images, unseen = find(args.data, args.root).load(config["size"])
    return Shared(out=out, device=device, config=config, tokenizer=tokenizer, classes=config["classes"],
                           tokens=TokenDataset(rows[~rows["test"]], device), images=images, unseen=unseen,
                           held_out=TokenDataset(rows[held_out], device).batch(np.arange(len(held_out))))


# ----------------------------------------------------------------------------
# One row: training and sampling.

def weights_of(out, name, seed, budget):
    return out / f"{name.replace(' ', '_')}-{seed}-{budget}.pt"


def picture_of(out, name, budget, sampler, steps):
    return out / f"{name.replace(' ', '_')}-{budget}-{sampler}-{steps}.png"


def load_weights(path, settings, device):
    """What train_row stored, or the end of the program if it was made with other settings than these."""
    state = torch.load(path, map_location=device, weights_only=True)
    for name, value in state.get("settings", settings).items():
        if value != settings[name]:
            print(f"error: {path} was made with --{name.replace('_', '-')} {value}, not {settings[name]}: give another "
                  "--out, or remove it", file=sys.stderr)
            sys.exit(2)
    return state


def train_row(name, seed, budget, shared):
    """The averaged weights of one row and how its table fared, from its file if they are there."""
    path = weights_of(shared.out, name, seed, budget)
    config, device = shared.config | ROWS[name], shared.device
    settings = {key: config[key] for key in SETTINGS}
    models = describe_models(config, len(shared.classes))
    torch.manual_seed(seed_for(seed, STAGES["weights"], 1))
    model = EmbeddingDiffusion(**models["denoiser"], bf16=bf16_works(device))
    if config["embedding_init"] == "codebook":
        model.init_from_codebook(shared.tokenizer.codebook)
    model.to(device).embedding.requires_grad_(not config.get("frozen", False))
    ema, schedule = copy.deepcopy(model).requires_grad_(False).eval(), ShiftedCosine(**models["schedule"])
    if path.exists():
        state = load_weights(path, settings, device)
        ema.load_state_dict(state["ema"])
        return ema, schedule, state
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.99),
                                  weight_decay=config["weight_decay"], fused=True)
    training, partial = {"model": model, "ema": ema, "optimizer": optimizer}, path.with_suffix(".partial.pt")
    curve, first, before, start = [], 0, 0.0, time.perf_counter()
    if partial.exists():  # it was stopped: go on there
        saved = load_weights(partial, settings, device)
        curve, first, before = saved["curve"], saved["step"], saved["seconds"]
        for key, part in training.items():
            part.load_state_dict(saved[key])
    for step in tqdm(range(first, budget), f"{name}, seed {seed}", initial=first, total=budget, leave=False,
                     disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, budget, config["warmup"], config["lr"])
        x, labels = shared.tokens.batch(batch_indices(len(shared.tokens), config["batch"], seed, "diffusion", step))
        loss = baselines.objective(config, model, ema, schedule, x, labels,
                                   generator_for(seed, "diffusion", step, device), config["label_drop"])
        loss.backward()
        update(model, ema, optimizer, config["clip"], min(config["ema_decay"], (1 + step) / (10 + step)))
        if (step + 1) % max(budget // POINTS, 1) == 0 or step == 0:
            curve.append([float(step + 1), *collapse_diagnostics(model.table()).values()])
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < budget:
            saved = {key: part.state_dict() for key, part in training.items()} | {
                "settings": settings, "curve": curve, "step": step + 1,
                "seconds": before + time.perf_counter() - start}
            write_atomically(partial, functools.partial(torch.save, saved))
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"{name}, seed {seed}: the loss is no longer finite")
    state = {"ema": ema.state_dict(), "settings": settings, "curve": curve,
             "seconds": before + time.perf_counter() - start}
    write_atomically(path, functools.partial(torch.save, state))
    partial.unlink(missing_ok=True)
    return ema, schedule, state


def bound(name, model, schedule, shared, seed=0):
    """Bits per token of HELD_OUT held-out images by DRAWS draws, an upper bound. seed: of the noise."""
    (x, labels), kind = shared.held_out, ROWS[name].get("loss")
    if kind not in baselines.KINDS:
        return held_out_bound(model, schedule, x, labels, lambda i: generator_for(seed, "evaluation", i, shared.device),
                              DRAWS, shared.config["eval_batch"])["total"]
    noise, values = generator_for(seed, "evaluation", 0, shared.device), []
    with torch.no_grad():
        for rows in (torch.arange(DRAWS, device=x.device) % len(x)).split(256):
            values.append(baselines.loss(kind, model, schedule, x[rows], noise, labels[rows],
                                         ROWS[name].get("analytic", False)))
    return float(torch.cat(values).mean()) / math.log(2)


def settings_of(name, seed, steps, classes):
    """(sampler, steps, guidance) of everything that is drawn from one row."""
    kind = ROWS[name].get("loss")
    found = [("ancestral", n, 0.0) for n in steps]
    if kind == "absorbing":
        found += [("confidence", n, 0.0) for n in steps]
    if name == METHODS[0] and seed == 0:
        found += [("ddim", n, 0.0) for n in steps]
    if name in METHODS and seed == 0 and classes:
        found += [("ancestral", GUIDED_STEPS, omega) for omega in ((0.0,) * (GUIDED_STEPS not in steps)) + GUIDANCE]
    return found


def draw(name, model, schedule, shared, n, sampler, steps, guidance, temperature=1.0, gumbel=1.0, end=None,
         guided_below=1.0, batch=250):
    """uint8 images (n, 3, H, W), class i mod C; the same noise whatever the row, as far as it can be.

    gumbel: of decoding by confidence alone; end: of the other ways. guided_below: guidance at t up to this alone.
    """
    kind, images = ROWS[name].get("loss"), []
    for start in tqdm(range(0, n, batch), f"{name}, {sampler}, {steps} steps", leave=False, disable=None):
        indices = torch.arange(start, min(start + batch, n), device=shared.device)
        labels = indices % max(len(shared.classes), 1)
        if kind in baselines.KINDS:
            generator = torch.Generator(shared.device).manual_seed(start)
            options = dict(labels=labels if shared.classes else None, guidance=guidance, temperature=temperature,
                           guided_below=guided_below)
            tokens = (baselines.sample_by_confidence(model, schedule, len(labels), steps, generator, gumbel=gumbel,
                                                     **options)
                      if sampler == "confidence" else
                      baselines.sample(kind, model, schedule, len(labels), steps, generator,
                                       analytic=ROWS[name].get("analytic", False), end=end or None, **options))
        else:
            tokens = sample_tokens(model, schedule, labels, image_generators(0, indices.tolist()), steps, guidance,
                                   sampler, temperature=temperature, end=end, interval=(0.0, guided_below))
        images.append(shared.tokenizer.decode(tokens).cpu())
    return torch.cat(images)


# ----------------------------------------------------------------------------
# Measures.

class Rotated:
    """Images without classes, four times: image i // 4 turned by i mod 4 right angles, which is its class."""

    class_names = ["0", "90", "180", "270"]

    def __init__(self, images):
        self.images, self.labels = images, torch.arange(4 * len(images)) % 4

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        indices = torch.as_tensor(indices)
        upright = self.images.batch(indices // 4)
        return torch.stack([torch.rot90(image, int(i) % 4, (1, 2)) for image, i in zip(upright, indices, strict=True)])


def feature_network(shared, steps, features_of=None):
    """(function from uint8 images to float64 features, its name, a classifier of the data's classes or None).

    features_of: (name, training images, held-out images) of another set, whose classes the classifier learns.
    """
    path, device = shared.out / f"classifier{'-' + features_of[0] if features_of else ''}.pt", shared.device
    if features_of:
        kind, train_set, test_set = f"{features_of[0]}'s classes", *features_of[1:]
    elif shared.classes:
        kind, train_set, test_set = "classes", shared.images, shared.unseen
    else:
        kind, train_set, test_set = "rotations", Rotated(shared.images), Rotated(shared.unseen)
    classifier = agreement.make_classifier(len(train_set.class_names)).to(device).eval()
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        classifier.load_state_dict(state["weights"])
    else:
        classifier = agreement.train_classifier(train_set, device, steps)
        some = torch.arange(min(len(test_set), 10000))
        rate, _ = agreement.agreement(classifier, test_set.batch(some), test_set.labels[some], device)
        state = {"weights": classifier.state_dict(), "accuracy": rate}
        write_atomically(path, lambda partial: torch.save(state, partial))
    name = f"own classifier of {kind}, {state['accuracy']:.2%} right on held-out images"
    network = classifier[:-1]
    try:
        inception = load_inception(find_inception(may_download=False), device)
        name, network = "Inception-v3", lambda images: inception(images)["2048"]
    except DownloadError:
        pass

    @torch.no_grad()
    def features(images):
        inputs = (part.to(device) for part in images.split(100))
        return torch.cat([network(part if name == "Inception-v3" else to_float(part)).cpu().double()
                          for part in inputs])

    return features, name, classifier if shared.classes and not features_of else None


class Evaluator:
    """Scores images against 10,000 training images."""

    def __init__(self, shared, classifier_steps, features_of=None):
        self.features, self.name, self.classifier = feature_network(shared, classifier_steps, features_of)
        self.device, self.classes = shared.device, max(len(shared.classes), 1)
        some = spread_out(len(shared.images), 10000)
        self.real = torch.cat([self.features(shared.images.batch(part)) for part in np.array_split(some, 10)])

    def __call__(self, images, labels=None, distance_alone=False):
        fake = self.features(images)
        statistics = [value for f in (self.real, fake) for value in (f.mean(0).numpy(), np.cov(f.numpy().T))]
        found = {"distance": frechet_distance(*statistics)}
        if distance_alone:
            return found
        found["kid"] = kernel_distance(self.real, fake)[0]
        if len(fake) > 3:
            found |= dict(zip(("precision", "recall"), precision_recall(self.real, fake), strict=True))
        if self.classifier is not None:
            labels = torch.arange(len(images)) % self.classes if labels is None else labels
            found["agreement"], _ = agreement.agreement(self.classifier, images, labels, self.device)
        return found


def other_set(args, shared):
    """What --features-of names, for Evaluator: (name, training images, held-out images), or None. ValueError."""
    if args.features_of is None:
        return None
    images, unseen = find(args.features_of, args.root).load(shared.config["size"])
    if not images.class_names:
        raise ValueError(f"--features-of {args.features_of}: has no classes, so there is nothing to learn from it")
    return Path(args.features_of).stem, images, unseen


# ----------------------------------------------------------------------------
# Reports.

def spread(values, digits=2):
    """Mean ± half the range; nothing for no values."""
    if not values:
        return ""
    middle = f"{np.mean(values):.{digits}f}"
    return middle + (f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else "")


def tables(lines, references):
    """Markdown: what is drawn without guidance, then the sweep of guidance."""
    def values(column, **wanted):
        return [float(line[column]) for line in lines if line[column]
                and all(line[key] == value for key, value in wanted.items())]

    steps = sorted({line["steps"] for line in lines}, key=int)
    columns = ["bound", "rank", "smallest", "train_seconds"]
    out = ["| row | sampler | seeds | bits per token ≤ | rank | smallest distance | seconds |"
           + "".join(f" distance, {n} steps |" for n in steps) + " KID·10³ | precision | recall | agreement |",
           "|" + " --- |" * (11 + len(steps))]
    last = max((n for n in steps if int(n) <= 50), key=int, default=steps[-1])  # of the columns at the right
    for name in ROWS:
        for sampler in ("ancestral", "ddim", "confidence"):
            mine = dict(row=name, sampler=sampler, guidance="0.0")
            if not values("distance", **mine):
                continue
            seeds = len({line["seed"] for line in lines if line["row"] == name and line["sampler"] == sampler})
            cells = [spread(values(c, **mine, steps=last), 0 if "sec" in c else 2) for c in columns]
            cells += [spread(values("distance", **mine, steps=n)) for n in steps]
            for column, scale, digits in (("kid", 1e3, 2), ("precision", 1, 3), ("recall", 1, 3), ("agreement", 1, 3)):
                cells.append(spread([scale * value for value in values(column, **mine, steps=last)], digits))
            out.append(f"| {name} | {sampler} | {seeds} | " + " | ".join(cells) + " |")
    out += [f"\nKID, precision, recall and agreement: at {last} steps. For comparison, as many "
            + "; ".join(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items())
                        for name, found in references.items()) + ".\n"]
    if any(float(line["guidance"]) for line in lines):
        out += [f"Guidance, {GUIDED_STEPS} steps, seed 0: distance / precision / recall / agreement\n",
                "| row |" + "".join(f" ω = {omega:g} |" for omega in (0.0, *GUIDANCE)),
                "|" + " --- |" * (2 + len(GUIDANCE))]
        for name in METHODS:
            cells = []
            for omega in (0.0, *GUIDANCE):
                wanted = dict(row=name, seed="0", sampler="ancestral", steps=str(GUIDED_STEPS), guidance=str(omega))
                found = [values(c, **wanted) for c in ("distance", "precision", "recall", "agreement")]
                cells.append(" / ".join(f"{v[0]:.{2 if i == 0 else 3}f}" for i, v in enumerate(found) if v))
            out.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def plots(lines, out):
    """steps.png: distance against steps. collapse.png: tables over training. guidance.png: the sweep. samples.png."""
    try:
        import matplotlib
    except ImportError:
        return print("no plots: pip install matplotlib, and give the same command again")
    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    def mean(column, **wanted):
        found = [float(line[column]) for line in lines if all(line[k] == v for k, v in wanted.items()) and line[column]]
        return np.mean(found) if found else np.nan

    def finish(figure, name):
        figure.tight_layout()
        figure.savefig(out / name, dpi=110)
        pyplot.close(figure)

    steps, drawn = sorted({line["steps"] for line in lines}, key=int), {line["row"] for line in lines}
    methods = [name for name in METHODS if name in drawn]
    figure, axes = pyplot.subplots(figsize=(7.5, 4))
    for name in methods:
        axes.plot([int(n) for n in steps], [mean("distance", row=name, sampler="ancestral", steps=n, guidance="0.0")
                                            for n in steps], "o-", label=name)
        for sampler in ("ddim", "confidence"):
            found = [mean("distance", row=name, sampler=sampler, steps=n, guidance="0.0") for n in steps]
            if not np.isnan(found).all():
                axes.plot([int(n) for n in steps], found, "o--", label=f"{name}, {sampler}", lw=1, ms=3)
    axes.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="Fréchet distance")
    axes.set_xticks([int(n) for n in steps], steps)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    finish(figure, "steps.png")
    most = max((n for n in steps if int(n) <= 50), key=int, default=steps[-1])
    shown = [(name, path) for name in ROWS if (path := picture_of(out, name, lines[0]["budget"], "ancestral",
                                                                    most)).exists()]
    curves = {name: np.array(torch.load(path, map_location="cpu", weights_only=True)["curve"]) for name in ROWS
              if ROWS[name].get("loss") not in baselines.KINDS and not name.startswith("shift")
              and (path := weights_of(out, name, 0, lines[0]["budget"])).exists()}
    below = [(name, path) for name, path in shown if name in curves]
    below = below if len(below) <= 4 else []  # samples below the curves, if there is room
    figure = pyplot.figure(figsize=(11, 5.4 if below else 4))
    top, *bottom = figure.subfigures(2, 1, height_ratios=(4, 1.4)) if below else [figure]
    both = top.subplots(1, 2)
    top.subplots_adjust(right=0.8, left=0.06, bottom=0.15)
    for axes, column, title in zip(both, (1, 2), ("effective rank of the table", "smallest distance of two embeddings"),
                                   strict=True):
        axes.set_prop_cycle(color=pyplot.get_cmap("tab20" if len(curves) > 10 else "tab10").colors)
        for name, curve in curves.items():
            axes.plot(curve[:, 0], curve[:, column], label=name, lw=1.5)
        axes.set(xlabel="training step", title=title, ylim=(0, None))
    both[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for panel, (name, path) in zip(bottom[0].subplots(1, len(below), squeeze=False)[0] if below else [], below,
                                   strict=True):
        panel.imshow(pyplot.imread(path), interpolation="nearest")
        panel.set_title(f"{name}, {most} steps", fontsize=9)
        panel.axis("off")
    if below:
        bottom[0].subplots_adjust(left=0.02, right=0.98, wspace=0.06, top=0.85, bottom=0.02)
    figure.savefig(out / "collapse.png", dpi=110)
    pyplot.close(figure)
    figure, axes = pyplot.subplots(figsize=(5.5, 4))
    for name in methods:
        wanted = dict(row=name, seed="0", sampler="ancestral", steps=str(GUIDED_STEPS))
        axes.plot(*([mean(c, guidance=str(omega), **wanted) for omega in (0.0, *GUIDANCE)]
                    for c in ("recall", "precision")), "o-", label=name)
    axes.set(xlabel="recall", ylabel="precision", title="guidance 0 to 4: fidelity against diversity")
    axes.legend()
    finish(figure, "guidance.png")
    if not shown:  # the pictures were taken away, or drawn by seeds other than 0
        return
    figure, panels = pyplot.subplots(-(-len(shown) // 2), 2, figsize=(9, 1.9 * -(-len(shown) // 2)), squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for axes, (name, path) in zip(panels.flat, shown, strict=False):
        axes.imshow(pyplot.imread(path), interpolation="nearest")
        axes.set_title(f"{name}, {most} steps", fontsize=8)
    finish(figure, "samples.png")


# ----------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Compare methods and ablations; other words go to "
                                     "train.py, which makes the tokenizer.")
    parser.add_argument("--data", default="toy", help="as for train.py (default: toy)")
    parser.add_argument("--root", metavar="DIR", help="where a named set lies, as for train.py")
    parser.add_argument("--budget", type=int, default=1500, help="training steps of every row (default: 1500)")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[*ROWS, "methods", "ablations"],
                        help=f"rows, methods or ablations (default: all): {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and batches (default: 0)")
    parser.add_argument("--sampling-steps", type=int, nargs="+", default=[8, 16, 50, 200], metavar="N",
                        help="calls of the network per sample (default: 8 16 50 200)")
    parser.add_argument("--n", type=int, default=1000, help="samples of each setting (default: 1000)")
    parser.add_argument("--classifier-steps", type=int, default=1500, help="of the feature network (default: 1500)")
    parser.add_argument("--features-of", metavar="DATA", help="another set, as for --data, whose classes the feature "
                        "network learns: for images without classes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--out", help="run directory (default: runs/compare-NAME)")
    args, words = parser.parse_known_args()
    if min([args.budget, args.classifier_steps, *args.sampling_steps]) < 1 or args.n < 4:
        parser.error("--budget, --classifier-steps and --sampling-steps must be at least 1, --n at least 4")
    args.out = args.out or f"runs/compare-{Path(args.data).stem}"
    groups = {"methods": METHODS, "ablations": [name for name in ROWS if name not in METHODS]}
    args.only = [name for word in args.only or ROWS for name in groups.get(word, [word])]
    return args, words


def main():
    args, words = parse_arguments()
    try:
        shared = prepare(args, words)
        evaluator = Evaluator(shared, args.classifier_steps, other_set(args, shared))
    except ValueError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    real, path, facts = references(evaluator, shared, args.n), shared.out / "results.csv", facts_of(evaluator, shared)
    for seed in args.seeds:
        for name in args.only:
            settings = [(name, str(seed), str(args.budget), sampler, str(steps), str(omega), str(args.n))
                        for sampler, steps, omega in settings_of(name, seed, args.sampling_steps, shared.classes)]
            done = {tuple(line[c] for c in COLUMNS[:7]) for line in read(path) if line["features"] == evaluator.name}
            if done.issuperset(settings):
                continue
            model, schedule, state = train_row(name, seed, args.budget, shared)
            about = collapse_diagnostics(model.table())
            about = {"bound": bound(name, model, schedule, shared, seed), "rank": about["effective_rank"],
                     "smallest": about["smallest_distance"], "mean_distance": about["mean_distance"],
                     "train_seconds": state["seconds"]}
            for setting in settings:
                if setting in done:
                    continue
                sampler, steps, omega = setting[3], int(setting[4]), float(setting[5])
                start = time.perf_counter()
                images = draw(name, model, schedule, shared, args.n, sampler, steps, omega)
                about["sample_seconds"] = time.perf_counter() - start
                found = evaluator(images) | about
                append(path, dict(zip(COLUMNS, setting, strict=False)) | {k: f"{v:.5f}" for k, v in found.items()}
                       | facts)
                print(f"{name}, seed {seed}, {sampler}, {steps} steps, ω = {omega:g}: distance "
                      f"{found['distance']:.2f}, bound {found['bound']:.3f}", flush=True)
                if seed == 0 and not omega:
                    save_grid(images[:30], picture_of(shared.out, name, args.budget, sampler, steps), 10)
    lines = [line for line in read(path) if (line["budget"], line["n"], line["features"])
             == (str(args.budget), str(args.n), evaluator.name)]
    if lines:
        text = f"Features: {evaluator.name}.\n\n" + tables(lines, real)
        (shared.out / "results.md").write_text(text)
        plots(lines, shared.out)
        print(text)


def references(evaluator, shared, n):
    """What n held-out images score, and their reconstructions: {name: measures}."""
    unseen = shared.unseen.batch(spread_out(len(shared.unseen), n))
    rebuilt = torch.cat([shared.tokenizer.decode(shared.tokenizer.encode(part.to(shared.device))).cpu()
                         for part in unseen.split(250)])
    found = {f"{len(unseen):,} held-out images": evaluator(unseen), "their reconstructions": evaluator(rebuilt)}
    print(f"features: {evaluator.name}; " + "; ".join(f"{name}: {f['distance']:.2f}" for name, f in found.items()))
    return found


def facts_of(evaluator, shared, program="compare.py"):
    """The last columns of every line: what measured, and where."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    chip = torch.cuda.get_device_name() if shared.device.type == "cuda" else platform.machine()
    return {"features": evaluator.name, "commit": commit.stdout.strip(),
            "device": f"{shared.device.type} ({chip}), {torch.get_num_threads()} threads, torch {torch.__version__}",
            "command": " ".join([f"python experiments/{program}", *sys.argv[1:]])}


def read(path):
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def append(path, line, columns=COLUMNS):
    with path.open("a", newline="") as file:  # one write: a line is there whole or not at all
        writer = csv.DictWriter(file, columns)
        writer.writerows([dict(zip(columns, columns, strict=True))] * (not path.stat().st_size) + [line])


if __name__ == "__main__":
    main()
