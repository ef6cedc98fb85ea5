"""Metrics beside FID, from the same features, in float64: KID (Binkowski et al. 2018), Inception Score
(Salimans et al. 2016), precision and recall (Kynkaanniemi et al. 2019). Called by fid.compute_scores.
"""

import numpy as np
import torch

from engine.validate import UserError


def kernel_distance(real, fake, subsets=100, size=1000):
    """(mean, standard deviation over subsets) of KID: unbiased MMD^2 with k(a, b) = (a.b / d + 1)^3.

    Binkowski et al. 2018, eq. 4. Features (n, d). Subsets are drawn as in torch-fidelity, the generated set
    first. The result may be negative.
    """
    size = min(size, len(real), len(fake))
    if size < 2:
        raise UserError("KID needs at least two images a side")
    rng, values = np.random.RandomState(2020), []
    for _ in range(subsets):
        y, x = (f[torch.from_numpy(rng.choice(len(f), size, replace=False)).to(f.device)].double()
                for f in (fake, real))
        kxx, kyy, kxy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (size * (size - 1))
        values.append(within - 2 * kxy.mean())
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


def inception_score(logits, splits=10):
    """(mean, standard deviation over splits) of exp E[KL(p(y|x) || p(y))].

    Salimans et al. 2016. Logits without bias (n, 1008). Shuffled and split as torch-fidelity does.
    """
    order = torch.from_numpy(np.random.RandomState(2020).permutation(len(logits)))
    log_p = logits[order.to(logits.device)].double().log_softmax(1)
    values, n, splits = [], len(logits), min(splits, len(logits))
    for i in range(splits):
        part = log_p[i * n // splits:(i + 1) * n // splits]
        values.append((part.exp() * (part - part.exp().mean(0).log())).sum(1).mean().exp())
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


def squared_distances(a, b):
    """(n, d), (m, d) float64 -> (n, m)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def precision_recall(real, fake, k=3, tile=1000):
    """(share of generated points in the manifold of the real, share of real points in that of the generated).

    Manifold: the balls around all points that reach to their k-th nearest neighbour. Features (n, d).
    Kynkaanniemi et al. 2019, eq. 2.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need at least {k + 1} images a side")
    real, fake = real.double(), fake.double()

    def radii(points):  # each point is its own nearest neighbour
        return torch.cat([squared_distances(part, points).kthvalue(k + 1).values
                          for part in points.split(tile)])

    def covered(points, centres, squared_radii):
        inside = [(squared_distances(part, centres) <= squared_radii).any(1) for part in points.split(tile)]
        return float(torch.cat(inside).double().mean())

    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))
