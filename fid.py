"""FID and its relatives, with the numbers of the reference tools.

    python fid.py REAL FAKE                          two folders, zips or .npz files of images, as they are
    python fid.py imagenet-256.npz samples.npz       ADM's reference file and sample file (mu, sigma; arr_0)
    python fid.py toy runs/toy/ckpt.pt --n 10000     the training images against samples drawn on the way
    python fid.py REAL --save-stats real.npz         once; then give real.npz in place of REAL
    torchrun --nproc-per-node 8 fid.py REAL FAKE     every process takes a share

FID (Heusel et al. 2017) is the squared Frechet distance of two Gaussians. They have the means and covariances
of a network's features of real and of generated images. The network, Inception-v3, is in extras/inception.py.
KID, Inception Score, precision and recall come from the same features; sFID (Nash et al. 2021) is FID of
other features. Compare scores of as many images only: FID falls as N grows, by about 1/N.
"""

import dataclasses
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from engine.distributed import all_reduce_sum, gather, rank_and_world
from engine.process import look_ahead, write_atomically
from engine.validate import UserError
from extras.inception import WEIGHTS_SHA256

MAX_KEPT = 50_000  # generated images whose features are kept for KID, precision and recall
REAL_KEPT = 10_000  # real ones, as many as ADM's file for ImageNet has; their features take 82 MB in a file
MIN_IMAGES = 2048  # width of the features: with no more images than this their covariance is singular


# ----------------------------------------------------------------------------
# The formula, in float64.

def covariance_factor(sigma):
    """F (d, r) with F F^T = sigma (d, d), r its numerical rank: Cholesky with pivoting (LAPACK's dpstrf)."""
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    factor = np.zeros((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower[:, :rank])
    return factor


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the squared distance of two Gaussians.

    mu: (d,), sigma: (d, d) symmetric, of any rank. Heusel et al. 2017, eq. 6. With sigma_i = F_i F_i^T,
    sigma1 sigma2 has the eigenvalues of G G^T, G = F_1^T F_2, and that is symmetric: no square root of a
    general matrix, no complex numbers, nothing added to the diagonal, and no digits lost where N < d.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, mu2, sigma1, sigma2))
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1] or sigma1.shape != sigma2.shape:
        raise UserError(f"statistics of different widths: mu {mu1.shape} and {mu2.shape}, sigma "
                        f"{sigma1.shape} and {sigma2.shape}; both sides must come from the same layer")
    if not all(np.isfinite(value).all() for value in (mu1, mu2, sigma1, sigma2)):
        raise UserError("statistics that are not finite; a covariance needs at least two images")
    f1, f2 = sorted((covariance_factor(sigma1), covariance_factor(sigma2)), key=lambda f: f.shape[1])
    g = f1.T @ f2                                                                   # (r1, r2), r1 <= r2
    trace = np.sqrt(np.linalg.eigvalsh(g @ g.T).clip(0)).sum() if g.size else 0.0
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)  # equal Gaussians may come out at -1e-12


# ----------------------------------------------------------------------------
# Its relatives, in float64.

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


# ----------------------------------------------------------------------------
# One pass over a set of images.

@dataclasses.dataclass
class Statistics:
    """Means and covariances of the features of n images, and features and logits of single images, if kept.

    mean: {"2048": (2048,), "spatial": (2023,)}, cov: {"2048": (2048, 2048), ...}, divided by n - 1: float64.
    features (m, 2048), logits (m, 1008): tensors or None. n, resize (the preprocessing): None if unknown.
    """

    n: int
    mean: dict
    cov: dict
    resize: str
    features: torch.Tensor = None
    logits: torch.Tensor = None

    def save(self, path):
        """An .npz as pytorch-fid's (mu, sigma) and ADM's (mu_s, sigma_s too), with n, resize and features."""
        arrays = {
            "mu": self.mean["2048"],
            "sigma": self.cov["2048"],
            "mu_s": self.mean.get("spatial"),
            "sigma_s": self.cov.get("spatial"),
            "n": self.n,
            "resize": self.resize,
            "features": None if self.features is None else self.features.numpy(),
            "weights": WEIGHTS_SHA256 if self.resize else None,  # unknown of somebody else's statistics
        }
        arrays = {name: value for name, value in arrays.items() if value is not None}

        def write(partial):
            with partial.open("wb") as file:
                np.savez(file, **arrays)

        write_atomically(Path(path), write)


def measure(images, network, batch=None, keep=MAX_KEPT, name="images"):
    """One pass of images (a source of extras/fid_sources.py) through the network -> Statistics.

    Each process takes a contiguous share. Sums are float64 and meet in one all-reduce, so every process has
    the same means and covariances. keep: so many features and logits, spread evenly over the images, are kept
    on process 0; 0: none.
    """
    rank, world = rank_and_world()
    if images.n < max(2, world):
        raise UserError(f"{name}: {images.n} images are too few: at least two, and one for each process")
    device = network.fc.weight.device
    batch = batch or (16 if device.type == "cpu" else 128)  # 16 fits a CPU's cache best
    exact = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    kept = torch.zeros(images.n, dtype=torch.bool)
    kept[np.linspace(0, images.n - 1, min(keep, images.n)).astype(int)] = True
    count = torch.zeros(1, dtype=torch.float64, device=exact)  # of those that can be used
    sums = {tap: torch.zeros(width + 1, width, dtype=torch.float64, device=exact)
            for tap, width in network.widths.items()}
    rows = {"2048": [], "logits_unbiased": []}

    first, last = images.n * rank // world, images.n * (rank + 1) // world
    step = max(images.chunk, batch)
    starts = range(first, last, step)
    parts = look_ahead(lambda i: images.read(i, min(i + step, last)), starts)  # reads while the network works
    quiet = None if rank == 0 else True
    with tqdm(total=last - first, desc=name, unit="img", leave=False, disable=quiet) as bar:
        for i, part in zip(starts, parts, strict=True):
            bar.update(min(step, last - i))
            if not len(part):
                continue
            taps = [network(part[j:j + batch]) for j in range(0, len(part), batch)]
            count += len(part)
            chosen = kept[i:i + len(part)].to(device)
            for tap, total in sums.items():
                f = torch.cat([t[tap] for t in taps]).to(exact).double()              # (B, d)
                total[0] += f.sum(0)
                total[1:].addmm_(f.T, f)
            for tap, kept_rows in rows.items():
                kept_rows.append(torch.cat([t[tap] for t in taps])[chosen].cpu())

    all_reduce_sum([count, *sums.values()])
    n, mean, cov = int(count), {}, {}
    for tap, total in sums.items():
        mu = total[0] / n
        sigma = (total[1:] - n * torch.outer(mu, mu)) / (n - 1)
        mean[tap] = mu.cpu().numpy()
        cov[tap] = sigma.cpu().numpy()
    gathered = gather({tap: torch.cat(kept_rows) for tap, kept_rows in rows.items()})
    if rank != 0 or not keep:
        return Statistics(n, mean, cov, network.resize)
    features, logits = (torch.cat([of_one[tap] for of_one in gathered]) for tap in rows)
    return Statistics(n, mean, cov, network.resize, features, logits)


def compute_scores(real, fake, device="cpu"):
    """A dict of what two Statistics allow: fid, sfid, kid, kid_std, precision, recall, is, is_std."""
    scores, device = {}, "cpu" if torch.device(device).type == "mps" else device  # mps has no float64
    for name, tap in (("fid", "2048"), ("sfid", "spatial")):
        if tap in real.mean and tap in fake.mean:
            scores[name] = frechet_distance(real.mean[tap], real.cov[tap], fake.mean[tap], fake.cov[tap])
    if real.features is not None and fake.features is not None:
        f1, f2 = real.features.to(device), fake.features.to(device)
        scores["kid"], scores["kid_std"] = kernel_distance(f1, f2)
        if min(len(f1), len(f2)) > 3:
            scores["precision"], scores["recall"] = precision_recall(f1, f2)
    if fake.logits is not None:
        scores["is"], scores["is_std"] = inception_score(fake.logits.to(device))
    return scores


def print_scores(scores, n_real, n_fake):
    """Prints scores; their names say how many images were generated, "FID-50k", unless that is None."""
    count = ""
    if n_fake is not None:
        count = f"-{n_fake / 1000:g}k" if n_fake >= 1000 else f"-{n_fake}"
    for key, name, digits in (("fid", "FID", 4), ("sfid", "sFID", 4), ("kid", "KID", 6), ("is", "IS", 4),
                              ("precision", "precision", 4), ("recall", "recall", 4)):
        if key in scores:
            spread = f" ± {scores[key + '_std']:.{digits}f}" if key + "_std" in scores else ""
            print(f"{name + count:<16} {scores[key]:.{digits}f}{spread}")
    if any(n is not None and n <= MIN_IMAGES for n in (n_real, n_fake)):
        print(f"warning: no more than {MIN_IMAGES:,} images, so the covariance of {MIN_IMAGES:,} features "
              "has not full rank and FID comes out too high, the more so the fewer they are. Do not compare "
              "it with published ones")


if __name__ == "__main__":
    from extras.fid_command import main
    main()
