"""A short experiment for a class: watch embeddings collapse, and what holds them apart.

    python experiments/collapse.py                      80 seconds on one CPU core

Four denoisers learn the same toy, side by side: six tokens of ten codes from a known Markov chain
(markov_chain.py), each code a point in the plane, so that the table can be looked at. The weight of L_diff is
clipped at 1 and the table is not normalised, which rewards points that lie close together: naive, with L_CM,
with four times L_CM, and with the output prior in the logits ("closed form").

    collapse.png   distances over training, the tables at the end, bigrams of samples beside the true ones
    collapse.gif   the tables as they move
    results.csv    step, mean and smallest distance, held-out bits per token, of each
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from common import append, held_out_bound, pyplot, schedule_of
from markov_chain import Chain, K, N, bigrams
from tqdm import tqdm

from embedding_diffusion import EmbeddingDiffusion
from engine.randomness import generator_for, image_generators
from losses import collapse_diagnostics, sample_noise, training_loss
from sample import sample_tokens
from schedule import ShiftedCosine
from train import learning_rate

ROWS = {"naive": dict(w_cm=0.0), "L_CM": dict(w_cm=1.0), "4 L_CM": dict(w_cm=4.0),
        "closed form": dict(w_cm=0.0, output_prior=True)}
COLUMNS = ["row", "step", "effective_rank", "smallest_distance", "mean_distance", "bits"]
BATCH, FRAMES, SAMPLES = 128, 60, 2000


class Row:
    """One denoiser, its tables (K, 2) over training, and a line of results.csv for each of them."""

    def __init__(self, name, seed, w_cm, output_prior=False):
        self.name, self.w_cm, self.tables, self.lines = name, w_cm, [], []
        torch.manual_seed(seed)  # the same start for all
        self.model = EmbeddingDiffusion(K, (1, N), 2, width=48, depth=2, heads=3, norm="none",
                                        output_prior=output_prior, posterior_input=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.0,
                                           fused=True)

    def measure(self, step, schedule, held_out):
        table = self.model.table().detach().clone()
        bits = held_out_bound(self.model, schedule, held_out, 0 * held_out[:, 0], 0, len(held_out), 500)
        self.tables.append(table)
        self.lines.append({"row": self.name, "step": step, **collapse_diagnostics(table), "bits": bits})


def train(rows, chain, steps, seed):
    """Trains all rows on the same tokens and the same noise -> the schedule."""
    rng, schedule = np.random.default_rng(seed), ShiftedCosine(**schedule_of(0.7, 7.0))
    held_out = torch.from_numpy(chain.draw(500, np.random.default_rng(10 ** 6)))
    frames = set(np.linspace(0, steps, FRAMES + 1).astype(int).tolist())
    for step in tqdm(range(steps + 1), "collapse", unit="step", disable=None):
        if step in frames:
            for row in rows.values():
                row.measure(step, schedule, held_out)
        if step == steps:
            return schedule
        x = torch.from_numpy(chain.draw(BATCH, rng))
        for row in rows.values():
            noise = sample_noise(row.model, x, 0 * x[:, 0], generator_for(seed, "diffusion", step),
                                 rec_fraction=0.25, max_drop_rate=0.0, label_drop=0.0, max_gap=1.0)
            row.optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 50, 5e-3)
            loss, _ = training_loss(row.model, row.model, schedule, *noise, w_rec=1.0, w_diff=1.0,
                                    w_cm=row.w_cm, weight_clip=1.0, cm_pairs="markov")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(row.model.parameters(), 1.0)
            row.optimizer.step()
            row.optimizer.zero_grad(set_to_none=True)


def draw_figure(plt, rows, found, chain, extent):
    """Above: distances and bits over training, tables at the end. Below: bigrams of samples.

    found: {row or "true": (bigrams (K, K), their total variation from the true ones)}.
    """
    figure, axes = plt.subplots(2, len(rows) + 1, figsize=(3.4 * (len(rows) + 1), 7))
    bits, *tables = axes[0, 2:]
    for name, row in rows.items():
        for panel, column in zip(axes[0], ("mean_distance", "smallest_distance", "bits"), strict=False):
            panel.plot([line["step"] for line in row.lines], [line[column] for line in row.lines], label=name)
            panel.set(title=column.replace("_", " "), xlabel="training step", ylim=(0, None))
        for panel in tables:
            panel.scatter(*row.tables[-1].T, label=name, s=25)
    bits.axhline(chain.entropy() / math.log(2), color="grey", ls=":", label="entropy of the chain")
    bits.set(title="held-out bits per token ≤", ylim=(1, 4))
    bits.legend(fontsize=8)
    for panel, title, end in zip(tables, ("tables at the end", "closer"), (extent, extent / 3), strict=True):
        panel.set(title=title, xlim=(-end, end), ylim=(-end, end), aspect="equal")
    for panel, (name, (matrix, tv)) in zip(axes[1], found.items(), strict=True):
        panel.imshow(np.sqrt(matrix), cmap="magma_r", vmin=0, vmax=math.sqrt(chain.bigrams.max()))
        panel.set(title=f"{name}: TV {tv:.3f}" if name != "true" else f"true bigrams: floor {tv:.3f}",
                  xticks=[], yticks=[])
    figure.tight_layout()
    return figure


def draw_film(plt, rows, extent, path):
    """All tables of all rows, one after the other; the last ones stay for a while."""
    from matplotlib.animation import FuncAnimation
    figure, axes = plt.subplots(1, len(rows), figsize=(3 * len(rows), 3.2))

    def draw_frame(i):
        for panel, (name, row) in zip(axes, rows.items(), strict=True):
            line = row.lines[i]
            panel.clear()
            panel.scatter(*row.tables[i].T, c=plt.get_cmap("tab10").colors[:K], s=40)
            panel.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal",
                      title=f"{name}, step {line['step']}\nmean distance {line['mean_distance']:.2f}")

    draw_frame(0)
    figure.tight_layout()
    last = len(rows["naive"].tables) - 1
    frames = [*range(last), *[last] * 5]
    FuncAnimation(figure, draw_frame, frames, init_func=lambda: None).save(path, "pillow", fps=8, dpi=70)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="training steps of each (default: 800)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and noise (default: 0)")
    parser.add_argument("--out", default="runs/collapse", help="run directory (default: runs/collapse)")
    args = parser.parse_args()
    plt, out, chain = pyplot(), Path(args.out), Chain()
    out.mkdir(parents=True, exist_ok=True)
    rows = {name: Row(name, args.seed, **options) for name, options in ROWS.items()}
    schedule = train(rows, chain, args.steps, args.seed)
    found = {"true": (chain.bigrams, chain.score(chain.draw(SAMPLES, np.random.default_rng(10 ** 7)))[1])}
    for name, row in rows.items():
        x = sample_tokens(row.model, schedule, torch.zeros(SAMPLES, dtype=torch.int64),
                          image_generators(0, range(SAMPLES)), 16, 0.0, "ancestral").numpy()
        found[name] = bigrams(x), chain.score(x)[1]
    path = out / "results.csv"
    path.unlink(missing_ok=True)
    for line in (line for row in rows.values() for line in row.lines):
        append(path, line, COLUMNS)
    extent = 1.1 * max(float(table.abs().max()) for row in rows.values() for table in row.tables)
    draw_figure(plt, rows, found, chain, extent).savefig(out / "collapse.png", dpi=80)
    draw_film(plt, rows, extent, out / "collapse.gif")
    print(f"entropy {chain.entropy() / math.log(2):.2f} bits, TV of true samples {found['true'][1]:.2f}")
    for name, row in rows.items():
        line = row.lines[-1]
        print(f"{name:12}  mean distance {row.lines[0]['mean_distance']:.2f} -> {line['mean_distance']:.2f}, "
              f"smallest {line['smallest_distance']:.2f}, {line['bits']:.2f} bits, TV {found[name][1]:.3f}")


if __name__ == "__main__":
    main()
