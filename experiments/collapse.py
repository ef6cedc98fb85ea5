"""A short experiment for a class: watch embeddings collapse, and what holds them apart.

    python experiments/collapse.py                      80 seconds on one CPU core

Four denoisers learn the same toy, side by side: six tokens of ten codes from a known Markov chain (markov_chain.py),
each code a point in the plane (D = 2), so that the table can be looked at as it is. All else is equal: network, tokens,
noise, optimizer. The weight of L_diff is clipped at 1 and the table is not normalised: the naive choice, which rewards
points that lie close together.

    naive         L_rec + L_diff
    L_CM          L_rec + L_diff + L_CM, the paper's cure
    4 L_CM        the same with four times the weight
    closed form   L_rec + L_diff, and the output prior in the logits (embedding_diffusion.py)

In the run directory (--out):

    collapse.png   the distances over training, the tables at the end, the bigrams of samples beside the true ones
    collapse.gif   the tables as they move
    results.csv    step, mean and smallest distance, held-out bits per token, of each

What to look for: the naive points draw together from the first step on, until L_rec stops them: the reconstruction at
t = 0 still needs them apart, everything else would rather not (README, "Why embeddings collapse"). L_CM pulls the other
way. What the samples are worth is their total variation (TV) from the true bigrams; as many true samples have `floor`.
"""

import argparse
import csv
import io
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from markov_chain import Chain, K, N  # noqa: E402

from embedding_diffusion import EmbeddingDiffusion  # noqa: E402
from engine.randomness import generator_for, image_generators  # noqa: E402
from losses import collapse_diagnostics, held_out_bound, sample_noise, training_loss  # noqa: E402
from sample import sample_tokens  # noqa: E402
from schedule import ShiftedCosine  # noqa: E402
from train import learning_rate  # noqa: E402

ROWS = {"naive": dict(w_cm=0.0), "L_CM": dict(w_cm=1.0), "4 L_CM": dict(w_cm=4.0),
        "closed form": dict(w_cm=0.0, output_prior=True)}
BATCH, FRAMES, SAMPLES = 128, 60, 2000


class Row:
    """One denoiser and what is remembered of its training."""

    def __init__(self, w_cm, seed, output_prior=False):
        self.w_cm = w_cm
        torch.manual_seed(seed)  # the same start for all
        self.model = EmbeddingDiffusion(K, (1, N), 2, width=48, depth=2, heads=3, norm="none",
                                        output_prior=output_prior, posterior_input=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.tables, self.lines = [], []

    def step(self, noise, schedule, lr):
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = training_loss(self.model, self.model, schedule, *noise, w_rec=1.0, w_diff=1.0, w_cm=self.w_cm,
                                weight_clip=1.0, cm_pairs="markov")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def look(self, step, schedule, held_out):
        """Remembers the table, and measures."""
        bound = held_out_bound(self.model, schedule, held_out, 0 * held_out[:, 0],
                               lambda i: generator_for(0, "evaluation", i), len(held_out), 500)
        self.tables.append(self.model.table().detach().clone())
        self.lines.append({"step": step, **collapse_diagnostics(self.tables[-1]), "bits": bound["total"]})


def train(rows, chain, steps, seed):
    rng, schedule = np.random.default_rng(seed), ShiftedCosine(0.7, -10, 7)
    held_out = torch.from_numpy(chain.draw(500, np.random.default_rng(10 ** 6)))
    looks = set(np.linspace(0, steps, FRAMES + 1).astype(int).tolist())
    for step in tqdm(range(steps + 1), "collapse", unit="step", disable=None):
        if step in looks:
            for row in rows.values():
                row.look(step, schedule, held_out)
        if step < steps:
            x = torch.from_numpy(chain.draw(BATCH, rng))
            for row in rows.values():  # the same tokens and the same noise for all
                noise = sample_noise(row.model, x, 0 * x[:, 0], generator_for(seed, "diffusion", step),
                                     rec_fraction=0.25, max_drop_rate=0.0, label_drop=0.0, max_gap=1.0)
                row.step(noise, schedule, learning_rate(step, steps, 50, 5e-3))
    return schedule


def bigrams(x):
    """(K, K): how often one token follows another."""
    counts = np.bincount((K * x[:, :-1] + x[:, 1:]).ravel(), minlength=K * K).reshape(K, K)
    return counts / counts.sum()


def figure_of(rows, found, chain):
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(rows) + 1, figsize=(3.4 * (len(rows) + 1), 7))
    mean, smallest, bits, *tables = axes[0]
    for name, row in rows.items():
        steps = [line["step"] for line in row.lines]
        for panel, column in zip((mean, smallest, bits), ("mean_distance", "smallest_distance", "bits"), strict=True):
            panel.plot(steps, [line[column] for line in row.lines], label=name)
        for panel in tables:
            panel.scatter(*row.tables[-1].T, label=name, s=25)
    bits.axhline(chain.entropy() / math.log(2), color="grey", ls=":", label="entropy of the chain")
    bits.set(title="held-out bits per token ≤", xlabel="training step", ylim=(1, 4))
    bits.legend(fontsize=8)
    for panel, title in ((mean, "mean"), (smallest, "smallest")):
        panel.set(title=title + " distance of two embeddings", xlabel="training step", ylim=(0, None))
    extent = 1.1 * max(float(table.abs().max()) for row in rows.values() for table in row.tables)
    for panel, title, size in zip(tables, ("the tables at the end", "the same, closer"), (extent, extent / 3),
                                  strict=True):
        panel.set(title=title, xlim=(-size, size), ylim=(-size, size), aspect="equal")
    for panel, (name, (matrix, tv)) in zip(axes[1], found.items(), strict=True):
        panel.imshow(np.sqrt(matrix), cmap="magma_r", vmin=0, vmax=math.sqrt(chain.bigrams.max()))
        panel.set(title=f"{name}: TV {tv:.3f}" if name != "true" else f"true bigrams: floor {tv:.3f}", xticks=[],
                  yticks=[])
    figure.tight_layout()
    return figure


def film_of(rows):
    """One picture per look: the tables."""
    from matplotlib import pyplot
    extent = 1.1 * max(float(table.abs().max()) for row in rows.values() for table in row.tables)
    colours = pyplot.get_cmap("tab10").colors
    for i in range(FRAMES + 1):
        figure, axes = pyplot.subplots(1, len(rows), figsize=(3 * len(rows), 3.2))
        for panel, (name, row) in zip(axes, rows.items(), strict=True):
            line = row.lines[i]
            panel.scatter(*row.tables[i].T, c=colours[:K], s=40)
            panel.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal",
                      title=f"{name}, step {line['step']}\nmean distance {line['mean_distance']:.2f}")
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=70)
        pyplot.close(figure)
        yield Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=32)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="training steps of each (default: 800)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and noise (default: 0)")
    parser.add_argument("--out", default="runs/collapse", help="run directory (default: runs/collapse)")
    args = parser.parse_args()
    if args.steps < FRAMES:
        parser.error(f"--steps {args.steps}: must be at least {FRAMES}")
    try:
        import matplotlib
    except ImportError:
        parser.error("the pictures need matplotlib: pip install matplotlib")
    matplotlib.use("agg")
    out, chain, start = Path(args.out), Chain(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    rows = {name: Row(seed=args.seed, **options) for name, options in ROWS.items()}
    schedule = train(rows, chain, args.steps, args.seed)
    true = chain.draw(SAMPLES, np.random.default_rng(10 ** 7))
    found = {"true": (chain.bigrams, chain.score(true)[1])}
    for name, row in rows.items():
        x = sample_tokens(row.model, schedule, torch.zeros(SAMPLES, dtype=torch.int64),
                          image_generators(0, range(SAMPLES)), 16, 0.0, "ancestral").numpy()
        found[name] = bigrams(x), chain.score(x)[1]
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["row", *rows["naive"].lines[0]])
        writer.writeheader()
        writer.writerows({"row": name, **line} for name, row in rows.items() for line in row.lines)
    figure_of(rows, found, chain).savefig(out / "collapse.png", dpi=80)
    first, *rest = film_of(rows)
    first.save(out / "collapse.gif", save_all=True, append_images=rest, duration=[120] * FRAMES + [3000], loop=0)
    for name, row in rows.items():
        line = row.lines[-1]
        print(f"{name:12}  mean distance {row.lines[0]['mean_distance']:.2f} -> {line['mean_distance']:.2f}, smallest "
              f"{line['smallest_distance']:.2f}, {line['bits']:.2f} bits per token (entropy "
              f"{chain.entropy() / math.log(2):.2f}), bigrams of samples: TV {found[name][1]:.3f} (floor "
              f"{found['true'][1]:.3f})")
    print(f"{time.perf_counter() - start:.0f} seconds; look at {out / 'collapse.png'} and {out / 'collapse.gif'}")


if __name__ == "__main__":
    main()
