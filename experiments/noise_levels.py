"""What does the denoiser know at each noise level, and is it right about how much?

    python experiments/noise_levels.py runs/toy/ckpt.pt

For each time t of the sampler's own grid, in bits per token of held-out images:

    own         cross-entropy of what a token's own noisy embedding says: the closed-form likelihood
    CE          cross-entropy of p_theta(x | z_t): what the denoiser does not know
    H           entropy of p_theta(x | z_t): what it believes not to know; equal to CE where it is calibrated
    H, sampled  the same on the sampler's own z_t: above H, it is where the denoiser knows less than on data
    L_diff      the integrand of the bound with the exact weight, and with the clipped one of training
    bound       CE + the integral of L_diff from t to 1: what is promised of -log p(x) where the tokens are
                read out at t. Where it does not rise towards t = 0, nothing is lost at the smaller noise.

The sampler is the checkpoint's, at temperature 1 and without guidance.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from common import markdown

from engine.build import load_checkpoint
from engine.distributed import choose_device
from engine.randomness import generator_for, image_generators
from extras.datasets import find
from losses import diffusion_loss, stratified
from sample import sample_tokens
from schedule import add_noise

COLUMNS = ("own", "CE", "H", "H, sampled", "L_diff", "L_diff, clipped", "bound")
DRAWS = 8  # of L_diff per image, for its integral


def entropy(p):
    return torch.special.entr(p).sum(-1)


@torch.no_grad()
def known_at(model, schedule, x, labels, t, clip, generator):
    """Means over tokens x (B, N) at one time t, in nats: own, CE, H, L_diff, and the clipped L_diff."""
    table = model.table()
    e = F.embedding(x, table)
    times = torch.full((len(x),), t, device=x.device)
    log_snr = schedule.log_snr(torch.tensor(t, dtype=torch.float64)).to(times).expand(len(x))  # the sampler's
    z = add_noise(e, log_snr, torch.randn(e.shape, generator=generator, device=x.device))
    logits = model(z, log_snr, labels, table=table)
    own, ce = (F.cross_entropy(scores.flatten(0, 1), x.flatten()) for scores in
               (model.log_likelihood(z, log_snr, table), logits))
    p = logits.softmax(-1)
    exact, clipped = (diffusion_loss(e, p @ table, log_snr, schedule.d_log_snr(times), limit).mean()
                      for limit in (math.inf, clip))
    return torch.stack([own, ce, entropy(p).mean(), exact, clipped]).cpu().double()  # mps has no float64


@torch.no_grad()
def integrand(model, schedule, x, labels, generator):
    """Times (B,) and L_diff / their density (B,), exact weight, one draw per image of x (B, N); in nats.

    t = u^2, of density 1 / (2 u): more draws where the weight is large. The mean over t_i >= t is the
    integral from t.
    """
    table = model.table()
    u, e = stratified(len(x), generator, x.device), F.embedding(x, table)
    t = u.square()
    log_snr = schedule.log_snr(t)
    z = add_noise(e, log_snr, torch.randn(e.shape, generator=generator, device=x.device))
    e_hat = model(z, log_snr, labels, table=table).softmax(-1) @ table
    values = 2 * u * diffusion_loss(e, e_hat, log_snr, schedule.d_log_snr(t), math.inf).mean(1)
    return t.cpu().double(), values.cpu().double()


@torch.no_grad()
def noise_levels(pipeline, x, labels, steps, batch=256):
    """{t: {column: bits per token}} over x (M, N) with labels (M,), for t on the sampler's grid."""
    model, schedule, device = pipeline.model, pipeline.schedule, pipeline.device
    found, draws, clip = {}, [], pipeline.config["training"]["weight_clip"]
    sampled_at = {}  # time: entropy of p_theta along the sampler's own way

    def watch(t, p):
        sampled_at[t] = entropy(p).mean().cpu().double()

    for start in range(0, len(x), batch):
        rows, classes = (value[start:start + batch].to(device) for value in (x, labels))
        sample_tokens(model, schedule, classes, image_generators(0, range(start, start + len(rows))),
                      steps, 0.0, pipeline.sampling["sampler"], callback=watch)
        for t, sampled in sampled_at.items():
            generator = generator_for(0, "evaluation", start, device)
            known = known_at(model, schedule, rows, classes, t, clip, generator)
            line = torch.cat([known[:3], sampled[None], known[3:]])
            found[t] = found.get(t, 0) + line * len(rows) / len(x) / math.log(2)
        generator = generator_for(0, "evaluation", len(x) + start, device)
        draws += [integrand(model, schedule, rows, classes, generator) for _ in range(DRAWS)]
    times, values = (torch.cat(part) for part in zip(*draws, strict=True))
    for t, line in found.items():
        rest = (values * (times >= t)).mean() / math.log(2)
        found[t] = dict(zip(COLUMNS, [*line.tolist(), float(line[1] + rest)], strict=True))
    return found


def main():
    parser = argparse.ArgumentParser(description="What a denoiser knows at each noise level.")
    parser.add_argument("checkpoint", help="the ckpt.pt that train.py wrote")
    parser.add_argument("--data", default="toy", help="what the checkpoint was trained on (default: toy)")
    parser.add_argument("--n", type=int, default=1000, help="held-out images, and samples (default: 1000)")
    parser.add_argument("--steps", type=int, default=16, help="of the sampler (default: 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args()
    pipeline = load_checkpoint(args.checkpoint, choose_device(args.device))
    source = find(args.data, None)
    if source.class_names != pipeline.class_names:
        parser.error(f"--data {args.data} has other classes than {args.checkpoint}")
    _, test = source.load(pipeline.tokenizer.size)
    n = min(args.n, len(test))
    chosen = torch.arange(n) * len(test) // n  # evenly over all classes
    batches = (test.batch(part).to(pipeline.device) for part in chosen.split(250))
    x = torch.cat([pipeline.tokenizer.encode(batch) for batch in batches])
    labels = test.labels[chosen] if test.class_names else torch.zeros(n, dtype=torch.long)
    found = noise_levels(pipeline, x, labels, args.steps)
    print(f"bits per token, {n:,} held-out images, {args.steps} steps\n")
    rows = [[f"{t:.3f}", f"{float(pipeline.schedule.log_snr(torch.tensor(t))):.1f}",
             *(f"{line[name]:.3f}" for name in COLUMNS)] for t, line in found.items()]
    print(markdown(["t", "log-SNR", *COLUMNS], rows))


if __name__ == "__main__":
    main()
