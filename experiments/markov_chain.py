"""An exact toy: tokens of a known Markov chain, whose likelihood and bigrams can be computed.

    python experiments/markov_chain.py         three seeds: 36 runs of two or three minutes each
    python experiments/markov_chain.py --only "plain cross-entropy" --seeds 1 --steps 100

Each row is VQ-LCMD with something changed, or a discrete-state diffusion (baselines.py) with the same
transformer, optimizer, steps and batches. results.csv has a line per row and seed, results.md the table; the
same command again does what is missing.

    rank, smallest  effective rank of the embedding table's EMA, and the smallest distance of two rows
    bound           held-out bound, nats per token; the held-out tokens' own NLL is the least there is
    NLL             of samples under the chain, nats per token: the entropy for perfect samples
    TV              total variation between the samples' bigrams and the chain's
"""

import argparse
import copy
import itertools
import math
import time
from pathlib import Path

import baselines
import numpy as np
import torch
from common import append, facts, markdown, read, schedule_of, select, spread, values

from embedding_diffusion import EmbeddingDiffusion
from engine.config import DEFAULTS, describe_models
from losses import collapse_diagnostics, vlb
from sample import sample_tokens
from schedule import ShiftedCosine

K, N, D, BATCH, SAMPLES = 10, 6, 8, 256, 4000
# Without Plaid's output prior, and without ours: posterior input, RMS norm, the start of the schedule.
PLAIN = dict(output_prior=False, posterior_input=False, norm="layer", max_drop_rate=0.0)
PLAIN |= schedule_of(log_snr_max=7.0)
ROWS = {  # what differs from train.py's defaults; "loss": another objective
    "rec + diff": PLAIN | dict(w_cm=0.0),
    "rec + diff, table not normalised": PLAIN | dict(w_cm=0.0, norm="none"),
    "rec + diff, exact weight": PLAIN | dict(w_cm=0.0, weight_clip=math.inf),
    "rec + diff + CM, markov": PLAIN,
    "rec + diff + CM, shared noise": PLAIN | dict(cm_pairs="shared"),
    "rec + CM, no diff": PLAIN | dict(w_diff=0.0),
    "plain cross-entropy": PLAIN | dict(loss="cross-entropy"),
    "train.py's defaults": {},
    "defaults, CM off": dict(w_cm=0.0),
} | {f"discrete: {kind}": PLAIN | dict(loss=kind) for kind in baselines.KINDS}


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
        return -log_p.mean() / N, 0.5 * np.abs(bigrams(x) - self.bigrams).sum()


def bigrams(x):
    """(K, K): how often one token follows another in x (n, N)."""
    counts = np.bincount((K * x[:, :-1] + x[:, 1:]).ravel(), minlength=K * K).reshape(K, K)
    return counts / counts.sum()


def train(options, seed, steps, chain):
    """One row with one seed -> (averaged weights, schedule). options: all, as in DEFAULTS."""
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    models = describe_models(options | dict(K=K, D=D, width=64, depth=3, heads=4), 0)
    model = EmbeddingDiffusion(**models["denoiser"] | {"grid": (1, N)})
    schedule = ShiftedCosine(**models["schedule"])
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=options["weight_decay"])

    def batch(_):
        x = torch.from_numpy(chain.draw(BATCH, rng))
        return x, torch.zeros_like(x[:, 0]), generator

    options = options | dict(lr=2e-3, warmup=100, label_drop=0.0)
    baselines.train(options, model, ema, schedule, optimizer, steps, batch)
    return ema, schedule


@torch.no_grad()
def measure(options, ema, schedule, chain):
    """{measure: value} of a trained row."""
    kind, collapse = options.get("loss"), collapse_diagnostics(ema.table())
    found = {"rank": collapse["effective_rank"], "smallest": collapse["smallest_distance"]}
    x = torch.from_numpy(chain.draw(5 * SAMPLES, np.random.default_rng(10 ** 6)))
    noise = torch.Generator().manual_seed(10 ** 6)
    if kind in baselines.KINDS:
        found["bound"] = float(baselines.loss(kind, ema, schedule, x, noise).mean())
        drawn = {f"{n}": baselines.sample(kind, ema, schedule, SAMPLES, n, noise) for n in (8, 50)}
    else:
        labels, noises = torch.zeros_like(x[:, 0]), [torch.Generator().manual_seed(i) for i in range(SAMPLES)]
        found["bound"] = float(vlb(ema, schedule, x, labels, noise).sum(0).mean())
        drawn = {f"{n}": sample_tokens(ema, schedule, labels[:SAMPLES], noises, n, 0.0, options["sampler"])
                 for n in (8, 50)}
    for name, tokens in drawn.items():
        found[f"NLL {name}"], found[f"TV {name}"] = map(float, chain.score(tokens.numpy()))
    return found


MEASURES = ["rank", "smallest", "bound", "NLL 8", "TV 8", "NLL 50", "TV 50"]
COLUMNS = ["row", "seed", "steps", "samples", *MEASURES, "seconds", "commit", "device", "command"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of every row (default: 3)")
    parser.add_argument("--steps", type=int, default=2500, help="training steps of each run (default: 2500)")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=ROWS, help="these rows")
    parser.add_argument("--out", default="runs/markov_chain", help="directory of results.csv and results.md")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the network is tiny: threads would wait for each other
    chain, path = Chain(), Path(args.out) / "results.csv"
    nll, distance = chain.score(chain.draw(SAMPLES, np.random.default_rng(10 ** 6)))
    print(f"entropy {chain.entropy():.4f} nats per token; true samples: NLL {nll:.4f}, TV {distance:.4f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = dict(steps=args.steps, samples=SAMPLES)
    for seed, name in itertools.product(range(args.seeds), args.only):
        if not select(read(path), row=name, seed=seed, **sizes):
            options, start = DEFAULTS | ROWS[name], time.perf_counter()
            found = measure(options, *train(options, seed, args.steps, chain), chain)
            found["seconds"] = time.perf_counter() - start
            line = dict(row=name, seed=seed, **sizes) | {key: f"{value:.5f}" for key, value in found.items()}
            append(path, line | facts(torch.device("cpu")), COLUMNS)
            print(line, flush=True)
    lines = {name: select(read(path), row=name, **sizes) for name in ROWS}
    text = markdown(["row", "seeds", *MEASURES], [
        [name, len(mine), *(spread(values(mine, column), 3) for column in MEASURES)]
        for name, mine in lines.items() if mine])
    (path.parent / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
