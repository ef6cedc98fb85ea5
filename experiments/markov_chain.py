"""An exact toy: tokens from a known Markov chain, so that every sample has a likelihood and every bigram a probability.

    python experiments/markov_chain.py --jobs 2         the table, three seeds: 36 runs of two or three minutes each
    python experiments/markov_chain.py --only all       the other rows, too
    python experiments/markov_chain.py --only "plain cross-entropy" --seeds 1 --steps 100

Each row is VQ-LCMD with something changed, or a discrete-state diffusion (baselines.py) with the same transformer,
optimizer, steps and batches. Six tokens of ten codes, D = 8; what a row does not say is train.py's default.
One line of results.csv per row and seed; the same command again does what is missing, and writes the table (results.md)
from all lines there are.

    rank, smallest  effective rank of the embedding table's EMA, and the smallest distance of two rows
    bound           held-out bound, nats per token; the held-out tokens' own NLL is the least there is
    CE at t         -log p(x | z_t) at two times: how much the denoiser knows
    NLL             of samples under the chain, nats per token: the entropy for perfect samples, less for timid ones
    TV              total variation between the samples' bigrams and the chain's; true samples of as many have `floor`
"""

import argparse
import contextlib
import copy
import csv
import math
import multiprocessing
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import baselines  # noqa: E402

from embedding_diffusion import EmbeddingDiffusion  # noqa: E402
from engine.config import DEFAULTS  # noqa: E402
from losses import collapse_diagnostics, noise_like, vlb  # noqa: E402
from sample import sample_tokens  # noqa: E402
from schedule import ShiftedCosine, add_noise  # noqa: E402
from train import learning_rate  # noqa: E402

K, N, D, BATCH = 10, 6, 8, 256
# No output prior (Plaid's), no posterior input, no unit-RMS norm, no schedule that starts where the clip ends (ours).
PLAIN = dict(output_prior=False, posterior_input=False, norm="layer", max_drop_rate=0.0, log_snr_max=7.0)
ROWS = {  # what differs from train.py's defaults; "loss": another objective; "frozen": the table
    "rec + diff": PLAIN | dict(w_cm=0.0),
    "rec + diff, table not normalised": PLAIN | dict(w_cm=0.0, norm="none"),
    "rec + diff, exact weight": PLAIN | dict(w_cm=0.0, weight_clip=math.inf),
    "rec + diff, lambda up to 3": PLAIN | dict(w_cm=0.0, log_snr_max=3.0),
    "rec + diff + CM, markov": PLAIN,
    "rec + diff + CM, shared noise": PLAIN | dict(cm_pairs="shared"),
    "rec + CM, no diff": PLAIN | dict(w_diff=0.0),
    "rec + diff + CM, exact weight": PLAIN | dict(weight_clip=math.inf),
    "rec + diff + CM, teacher = current": PLAIN | dict(teacher="current"),
    "rec + diff + CM, gap at most 0.1": PLAIN | dict(max_gap=0.1),
    "rec + diff + CM, dropping 0.1": PLAIN | dict(max_drop_rate=0.1),
    "rec + diff + CM, frozen table": PLAIN | dict(frozen=True),
    "plain cross-entropy": PLAIN | dict(loss="cross-entropy"),
    "train.py's defaults": {},
    "defaults, CM off": dict(w_cm=0.0),
    "defaults, lambda up to 7": dict(log_snr_max=7.0),
    "defaults, cross-entropy": dict(loss="cross-entropy"),
    "defaults, shift 0.1": dict(shift=0.1),
    "defaults, shift 0.2": dict(shift=0.2),
    "defaults, shift 0.4": dict(shift=0.4),
    "defaults, shift 1": dict(shift=1.0),
} | {f"discrete: {kind}": PLAIN | dict(loss=kind) for kind in baselines.KINDS}
TABLE = ["rec + diff", "rec + diff, table not normalised", "rec + diff, exact weight", "rec + diff + CM, markov",
         "rec + diff + CM, shared noise", "rec + CM, no diff", "plain cross-entropy", "train.py's defaults",
         "defaults, CM off", *(f"discrete: {kind}" for kind in baselines.KINDS)]


class Chain:
    """First-order, stationary. transition (K, K), start (K,): its stationary distribution."""

    def __init__(self, seed=0, sharpness=3.0):
        rng = np.random.default_rng(seed)
        weights = np.exp(sharpness * rng.standard_normal((K, K)))
        self.transition = weights / weights.sum(1, keepdims=True)
        values, vectors = np.linalg.eig(self.transition.T)
        start = np.real(vectors[:, np.argmax(np.real(values))])
        self.start = start / start.sum()
        self.bigrams = self.start[:, None] * self.transition

    def entropy(self):
        """Nats per token of N tokens: (H(x_1) + (N - 1) H(x_2 | x_1)) / N."""
        first = -(self.start * np.log(self.start)).sum()
        return (first - (N - 1) * (self.bigrams * np.log(self.transition)).sum()) / N

    def draw(self, n, rng):
        """(n, N) int64."""
        u, x = rng.random((n, N)), np.zeros((n, N), np.int64)
        x[:, 0] = np.searchsorted(self.start.cumsum(), u[:, 0]).clip(max=K - 1)
        steps = self.transition.cumsum(1)
        for i in range(1, N):
            x[:, i] = (u[:, i, None] > steps[x[:, i - 1]]).sum(1).clip(max=K - 1)
        return x

    def score(self, x):
        """(mean -log p(x) / N, total variation of the bigrams) of sequences x (n, N)."""
        log_p = np.log(self.start[x[:, 0]]) + np.log(self.transition[x[:, :-1], x[:, 1:]]).sum(1)
        counts = np.bincount((K * x[:, :-1] + x[:, 1:]).ravel(), minlength=K * K).reshape(K, K)
        return -log_p.mean() / N, 0.5 * np.abs(counts / counts.sum() - self.bigrams).sum()


def train(options, seed, steps, chain, show):
    """One row with one seed -> (averaged weights, schedule). options: all, as in DEFAULTS."""
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = EmbeddingDiffusion(K, (1, N), D, width=64, depth=3, heads=4,
                               **{name: options[name] for name in ("norm", "output_prior", "posterior_input")})
    model.embedding.requires_grad_(not options.get("frozen", False))
    schedule = ShiftedCosine(*(options[name] for name in ("shift", "log_snr_min", "log_snr_max")))
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, betas=(0.9, 0.99),
                                  weight_decay=options["weight_decay"])
    for step in tqdm(range(steps), desc=show, leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 100, 2e-3)
        optimizer.zero_grad(set_to_none=True)
        x = torch.from_numpy(chain.draw(BATCH, rng))
        baselines.objective(options, model, ema, schedule, x, torch.zeros_like(x[:, 0]), generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
        optimizer.step()
        decay = min(options["ema_decay"], (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
    return ema, schedule


def run(options, seed, steps, samples, chain, show):
    """Trains and measures one row with one seed -> {measure: value}."""
    options = DEFAULTS | options
    ema, schedule = train(options, seed, steps, chain, show)
    collapse, kind = collapse_diagnostics(ema.table()), options.get("loss")
    found = {"rank": collapse["effective_rank"], "smallest": collapse["smallest_distance"]}
    x = torch.from_numpy(chain.draw(5 * samples, np.random.default_rng(10 ** 6)))
    labels, noise = torch.zeros(len(x), dtype=torch.int64), torch.Generator().manual_seed(10 ** 6)
    many, nobody = torch.zeros(samples, dtype=torch.int64), [torch.Generator().manual_seed(i) for i in range(samples)]
    with torch.no_grad():
        if kind in baselines.KINDS:
            found["bound"] = float(baselines.loss(kind, ema, schedule, x, noise).mean())
            ways = {f"{n}": baselines.sample(kind, ema, schedule, samples, n, noise) for n in (8, 50)}
            if kind == "absorbing":
                ways |= {f"{n} by confidence": baselines.sample_by_confidence(ema, schedule, samples, n, noise)
                         for n in (3, 6)}  # more steps than tokens decode nothing in some of them
        else:
            found["bound"] = float(vlb(ema, schedule, x, labels, noise).sum(0).mean())
            e = F.embedding(x, ema.table())
            for t in (0.4, 0.95):
                log_snr = schedule.log_snr(torch.full((len(x),), t))
                logits = ema(add_noise(e, log_snr, noise_like(e, noise)), log_snr, labels)
                found[f"CE at {t}"] = float(F.cross_entropy(logits.flatten(0, 1), x.flatten()))
            ways = {f"{n}": sample_tokens(ema, schedule, many, nobody, n, 0.0, options["sampler"]) for n in (8, 50)}
    for name, tokens in ways.items():
        found[f"NLL {name}"], found[f"TV {name}"] = map(float, chain.score(tokens.numpy()))
    return found


COLUMNS = ["row", "seed", "steps", "samples", "rank", "smallest", "bound", "CE at 0.4", "CE at 0.95", "NLL 8", "TV 8",
           "NLL 50", "TV 50", "NLL 3 by confidence", "TV 3 by confidence", "NLL 6 by confidence",
           "TV 6 by confidence", "seconds", "commit", "device", "command"]


def table(lines, names):
    """Markdown: mean over seeds +- half the range, a column per measure."""
    columns = COLUMNS[4:-4]
    out = ["| row | seeds | " + " | ".join(columns) + " |", "|" + "---|" * (2 + len(columns))]
    for name in names:
        mine = [line for line in lines if line["row"] == name]
        cells = []
        for column in columns:
            values = [float(line[column]) for line in mine if line.get(column)]
            cells.append(f"{np.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}" if values else "")
        out += [f"| {name} | {len(mine)} | " + " | ".join(cells) + " |"] * bool(mine)
    return "\n".join(out) + "\n"


def work(task):
    """One line of results.csv, in a process of its own or in this one."""
    torch.set_num_threads(1)  # the network is tiny: threads would wait for each other
    name, seed, steps, samples, alone = task
    start = time.perf_counter()
    found = run(ROWS[name], seed, steps, samples, Chain(), f"{name}, seed {seed}" if alone else None)
    found = {key: f"{value:.5f}" for key, value in found.items()}
    found = {"row": name, "seed": seed, "steps": steps, "samples": samples} | found
    return found | {"seconds": f"{time.perf_counter() - start:.1f}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every row (default: 3)")
    parser.add_argument("--steps", type=int, default=2500, help="training steps of each run (default: 2500)")
    parser.add_argument("--samples", type=int, default=4000, help="of each run; bounds: five times as many held out "
                        "(default: 4000)")
    parser.add_argument("--only", nargs="+", choices=[*ROWS, "all"], metavar="ROW", default=TABLE,
                        help="these rows, or all (default: those of the table in experiments/README.md)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each (default: 1)")
    parser.add_argument("--out", default="runs/markov_chain", help="directory of results.csv and results.md")
    args = parser.parse_args()
    if min(args.jobs, args.seeds, args.steps, args.samples) < 1:
        parser.error("--jobs, --seeds, --steps and --samples must be at least 1")
    chain, out = Chain(), Path(args.out)
    sizes = args.samples, 5 * args.samples
    floor, held_out = (chain.score(chain.draw(n, np.random.default_rng(10 ** 6))) for n in sizes)
    print(f"chain: {K} codes, {N} tokens, entropy {chain.entropy():.4f} nats per token; {sizes[0]:,} true samples: NLL "
          f"{floor[0]:.4f}, TV {floor[1]:.4f} (the floor); {sizes[1]:,} held out: {held_out[0]:.4f}, the least bound")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.csv"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    facts = {"commit": commit.stdout.strip(),
             "device": f"cpu ({platform.machine()}), 1 thread, torch {torch.__version__}",
             "command": f"python experiments/markov_chain.py --steps {args.steps} --samples {args.samples}"
                        + f" --jobs {args.jobs}" * (args.jobs > 1)}
    lines = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    done = {(line["row"], line["seed"], line["steps"], line["samples"]) for line in lines}
    tasks = [(name, seed, args.steps, args.samples, args.jobs == 1) for seed in range(args.seeds)
             for name in (ROWS if "all" in args.only else args.only)
             if (name, str(seed), str(args.steps), str(args.samples)) not in done]
    with multiprocessing.get_context("spawn").Pool(args.jobs) if args.jobs > 1 else contextlib.nullcontext() as pool:
        results = pool.imap_unordered(work, tasks) if pool else map(work, tasks)
        for line in tqdm(results, "runs", len(tasks), unit="run", disable=None if pool else True):
            with path.open("a", newline="") as file:  # one write: a line is there whole or not at all
                writer = csv.DictWriter(file, COLUMNS)
                writer.writerows([dict(zip(COLUMNS, COLUMNS, strict=True))] * (file.tell() == 0) + [line | facts])
            print(f"{line['row']}, seed {line['seed']}: "
                  + ", ".join(f"{c} {float(line[c]):.3f}" for c in COLUMNS[4:-4] if c in line))
    lines = [line for line in csv.DictReader(path.open(newline=""))
             if (line["steps"], line["samples"]) == (str(args.steps), str(args.samples))]
    text = table(lines, ROWS) if lines else ""
    (out / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
