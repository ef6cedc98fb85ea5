"""How far is a network from the truth, at which noise, and after how much training?

    python experiments/excess.py --steps 300 600 1250 2500 5000

On the tokens of markov_chain.py the true posterior is known (forward-backward algorithm), so a bound can be taken
apart (ours; the squared error splits as it does for every conditional mean). With the marginals p*(x_i | z_t) and their
mean e*, and with p_theta and its mean e_hat, continuous diffusion has

    bound = NLL + TC + KL + E_t of w(t) |e* - e_hat|^2

    TC  what no network can know: z_0 leaves dependencies between tokens open, which are read out one by one,
        E[log p*(x | z_0) - sum_i log p*(x_i | z_0)]
    KL  of p*(x_i | z_0) and p_theta(x_i | z_0)
    the rest is L_diff with e* for e: E |e - e_hat|^2 = E |e - e*|^2 + E |e* - e_hat|^2

and absorbing diffusion bound = NLL + E_t of the sum of KL(p* || p_theta) over masked positions, / t. All in nats per
token. Columns "0 to 1/4" ... are the last term's share of four quarters of t. `check` is the bound as it is measured
without p*, minus the sum of its parts: nought, but for about one standard `error`. The same command again does what
is missing.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import baselines  # noqa: E402
import compare  # noqa: E402
import markov_chain  # noqa: E402

from engine.config import DEFAULTS  # noqa: E402
from losses import diffusion_loss, noise_like, stratified, vlb  # noqa: E402
from schedule import add_noise  # noqa: E402

QUARTERS = ["0 to 1/4", "1/4 to 1/2", "1/2 to 3/4", "3/4 to 1"]
COLUMNS = ["row", "seed", "steps", "samples", "bound", "NLL", "TC", "KL", *QUARTERS, "excess", "check", "error",
           "seconds", "commit", "device", "command"]


def true_posterior(chain, log_likelihood):
    """log p*(x_i = k | z) (B, N, K) and log p(z) (B,) for log p(z_i | x_i = k) (B, N, K), in float64."""
    start, transition = torch.from_numpy(chain.start).log(), torch.from_numpy(chain.transition).log()
    here = log_likelihood.double().unbind(1)
    forward, backward = [start + here[0]], [torch.zeros_like(here[0])]
    for now in here[1:]:
        forward.append(torch.logsumexp(forward[-1][:, :, None] + transition, 1) + now)
    for now in here[:0:-1]:
        backward.append(torch.logsumexp(transition + (now + backward[-1])[:, None, :], 2))
    joint = torch.stack(forward, 1) + torch.stack(backward[::-1], 1)                               # (B, N, K)
    evidence = torch.logsumexp(joint[:, 0], -1)
    return joint - evidence[:, None, None], evidence


def log_prior(chain, x):
    """log p(x) (B,) of tokens x (B, N)."""
    start, transition = torch.from_numpy(chain.start).log(), torch.from_numpy(chain.transition).log()
    return start[x[:, 0]] + transition[x[:, :-1], x[:, 1:]].sum(1)


def kl(log_p, log_q):
    """KL(p || q) over the last dimension; where p is nought it counts nothing."""
    return torch.where(log_p > -30, log_p.exp() * (log_p - log_q), 0).sum(-1)


def gaussian_parts(model, schedule, chain, x, generator):
    """TC, KL and the excess of L_diff at the times t: (B,) each, in nats per token."""
    table, labels = model.table(), torch.zeros_like(x[:, 0])
    e, found = F.embedding(x, table), {}
    times = stratified(len(x), generator, x.device).to(e)
    for t in (torch.zeros_like(times), times):
        log_snr = schedule.log_snr(t)
        z = add_noise(e, log_snr, noise_like(e, generator))
        own = model.log_likelihood(z, log_snr, table)
        truth, evidence = true_posterior(chain, own)
        log_p = model(z, log_snr, labels).double().log_softmax(-1)
        if not found:
            joint = log_prior(chain, x) + own.double().gather(-1, x[..., None]).sum((1, 2)) - evidence
            found["TC"] = (joint - truth.gather(-1, x[..., None]).sum((1, 2))) / x.shape[1]
            found["KL"] = kl(truth, log_p).mean(1)
    table = table.double()
    found["excess"] = diffusion_loss(truth.exp() @ table, log_p.exp() @ table, log_snr.double(),
                                     schedule.d_log_snr(t.double()), float("inf")).mean(1)
    return found, times


def absorbing_parts(model, schedule, chain, x, generator):
    """The same for absorbing diffusion, where nothing is lost but the last term."""
    number = (stratified(len(x), generator, x.device) * baselines.T).long()
    t = (number + 1) / baselines.T  # as in its bound
    x_t = baselines.corrupt("absorbing", x, model.K, t, generator)
    masked, seen = x_t == model.K, F.one_hot(x_t, model.K + 1)[..., :-1].double().log()
    truth, _ = true_posterior(chain, torch.where(masked[..., None], 0.0, seen))
    log_p = baselines.predict(model, schedule, x_t, t).double()
    excess = (kl(truth, log_p) * masked).mean(1) / t
    return {"TC": torch.zeros_like(excess), "KL": torch.zeros_like(excess), "excess": excess}, t


@torch.no_grad()
def measure(options, model, schedule, chain, samples):
    """{column: value} of held-out tokens."""
    x = torch.from_numpy(chain.draw(samples, np.random.default_rng(10 ** 6)))
    discrete, noise = options.get("loss") == "absorbing", torch.Generator().manual_seed(10 ** 6)
    bound = (baselines.loss("absorbing", model, schedule, x, noise) if discrete else
             vlb(model, schedule, x, torch.zeros_like(x[:, 0]), noise).sum(0))
    parts, t = (absorbing_parts if discrete else gaussian_parts)(model, schedule, chain, x, noise)
    nll = -log_prior(chain, x) / x.shape[1]                                                        # (samples,)
    found = {"bound": float(bound.mean()), "NLL": float(nll.mean())}
    found |= {name: float(value.mean()) for name, value in parts.items()}
    quarter = (t * 4).ceil().clamp(1, 4).long() - 1
    found |= {name: float((parts["excess"] * (quarter == i)).mean()) for i, name in enumerate(QUARTERS)}
    return found | {"check": found["bound"] - found["NLL"] - sum(found[name] for name in parts),
                    "error": float((bound - nll).std() / len(x) ** 0.5)}


def table(lines):
    """Markdown: a line per row and number of steps, mean ± half the range over the seeds."""
    shown = ["TC", "KL", *QUARTERS, "check", "error"]
    out = ["| row | steps | seeds | bound - NLL | " + " | ".join(shown) + " |", "|" + " --- |" * (4 + len(shown))]
    for key in dict.fromkeys((line["row"], line["steps"]) for line in lines):
        mine = [line for line in lines if (line["row"], line["steps"]) == key]
        cells = [compare.spread([sum(float(line[name]) for name in ("TC", "KL", "excess")) for line in mine], 3)]
        cells += [compare.spread([float(line[name]) for line in mine], 3) for name in shown]
        out.append("| " + " | ".join([*key, str(len(mine)), *cells]) + " |")
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=[
        name for name, row in markov_chain.ROWS.items() if row.get("loss") not in ("uniform", "mask-and-replace")],
        default=["train.py's defaults", "discrete: absorbing"], help="of markov_chain.py, continuous or absorbing")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 600, 1250, 2500, 5000],
                        help="lengths of training, each from the start (default: 300 600 1250 2500 5000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--samples", type=int, default=20000, help="held-out sequences (default: 20000)")
    parser.add_argument("--out", default="runs/excess", help="directory of excess.csv and excess.md")
    args = parser.parse_args()
    if min(*args.steps, args.samples) < 1:
        parser.error("--steps and --samples must be at least 1")
    torch.set_num_threads(1)  # the network is tiny: threads would wait for each other
    chain, path = markov_chain.Chain(), Path(args.out) / "excess.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    facts = {"commit": commit.stdout.strip(), "device": f"cpu, 1 thread, torch {torch.__version__}",
             "command": " ".join(["python experiments/excess.py", *sys.argv[1:]])}
    for steps in args.steps:
        for name in args.rows:
            for seed in args.seeds:
                key = {"row": name, "seed": str(seed), "steps": str(steps), "samples": str(args.samples)}
                if any(key.items() <= line.items() for line in compare.read(path)):
                    continue
                start, options = time.perf_counter(), DEFAULTS | markov_chain.ROWS[name]
                model, schedule = markov_chain.train(options, seed, steps, chain, f"{name}, {steps} steps, seed {seed}")
                found = measure(options, model, schedule, chain, args.samples)
                found |= {"seconds": time.perf_counter() - start}
                compare.append(path, key | {name: f"{value:.5f}" for name, value in found.items()} | facts, COLUMNS)
                print(f"{name}, {steps} steps, seed {seed}: bound {found['bound']:.3f}, check {found['check']:.3f}")
    text = table([line for line in compare.read(path) if line["row"] in args.rows
                  and line["samples"] == str(args.samples)])
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
