"""FID and its relatives, with the numbers of the reference tools.

    python fid.py REAL FAKE                          two folders, zips or .npz files of images, as they are
    python fid.py imagenet-256.npz samples.npz       ADM's reference file and sample file (mu, sigma; arr_0)
    python fid.py toy runs/toy/ckpt.pt --n 10000     the training images against samples drawn on the way
    python fid.py REAL --save-stats real.npz         once; then give real.npz in place of REAL
    torchrun --nproc-per-node 8 fid.py REAL FAKE     every process takes a share

FID (Heusel et al. 2017) is the squared Frechet distance of two Gaussians: those with the means and covariances of a
network's features of real and of generated images. The network, Inception-v3, is in extras/inception.py; KID,
Inception Score, precision and recall, from the same features, in extras/metrics.py; sFID (Nash et al. 2021) is FID of
other features. Compare a score only with one of as many images: FID falls as N grows, by about 1/N.
"""

from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from engine.distributed import all_reduce_sum, gather, rank_and_world
from engine.process import UserError, look_ahead, write_atomically
from extras.archives import read_statistics
from extras.inception import WEIGHTS_SHA256
from extras.metrics import inception_score, kernel_distance, precision_recall

MAX_KEPT = 50_000  # features kept for KID, precision and recall, spread evenly over a larger set: of generated images
REAL_KEPT = 10_000  # and of real ones, as many as ADM's file for ImageNet has images; in a file they take 82 MB
MIN_IMAGES = 2048  # width of the features: with no more images than this their covariance is singular


class FIDError(UserError):
    """One line: what is wrong and what to do."""


# ----------------------------------------------------------------------------
# The formula, in float64.

def covariance_factor(sigma):
    """F (d, r) with F F^T = sigma (d, d), r its numerical rank: Cholesky's factor with pivoting (LAPACK's dpstrf)."""
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    factor = np.zeros((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower[:, :rank])
    return factor


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), the squared distance of two Gaussians.

    mu: (d,), sigma: (d, d) symmetric, of any rank. Heusel et al. 2017, eq. 6. With sigma_i = F_i F_i^T, sigma1 sigma2
    has the eigenvalues of G G^T, G = F_1^T F_2, and that is symmetric: no square root of a general matrix, no
    complex numbers, nothing added to the diagonal, and no digits lost where N < d.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, mu2, sigma1, sigma2))
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1] or sigma1.shape != sigma2.shape:
        raise FIDError(f"statistics of different widths: mu {mu1.shape} and {mu2.shape}, sigma {sigma1.shape} and "
                       f"{sigma2.shape}; both sides must come from the same layer")
    if not all(np.isfinite(value).all() for value in (mu1, mu2, sigma1, sigma2)):
        raise FIDError("statistics that are not finite; a covariance needs at least two images")
    f1, f2 = sorted((covariance_factor(sigma1), covariance_factor(sigma2)), key=lambda f: f.shape[1])
    g = f1.T @ f2                                                                                  # (r1, r2), r1 <= r2
    trace = np.sqrt(np.linalg.eigvalsh(g @ g.T).clip(0)).sum() if g.size else 0.0
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)  # equal Gaussians may come out at -1e-12


# ----------------------------------------------------------------------------
# One pass over a set of images.

class Statistics:
    """What is known of one set: n images, means and covariances by tap, and, if kept, features and logits.

    mean: {"2048": (2048,), "spatial": (2023,)}, cov: the same, squares, divided by n - 1; float64 arrays. features
    (m, 2048), logits (m, 1008): tensors or None. resize: the preprocessing they were made with, None if unknown.
    """

    def __init__(self, n, mean, cov, resize, features=None, logits=None):
        self.n, self.mean, self.cov, self.resize = n, mean, cov, resize
        self.features, self.logits = features, logits

    def save(self, path):
        """As pytorch-fid (mu, sigma) and ADM (mu_s, sigma_s for sFID) do; n, resize, weights and features beside them.

        Features are float32, 8 kB an image, so that KID, precision and recall are those of the images themselves.
        """
        known = {"mu": self.mean["2048"], "sigma": self.cov["2048"], "mu_s": self.mean.get("spatial"),
                 "sigma_s": self.cov.get("spatial"), "n": self.n, "resize": self.resize,
                 "features": None if self.features is None else self.features.numpy(),
                 "weights": WEIGHTS_SHA256 if self.resize else None}  # of somebody else's statistics it is not known

        def write(partial):
            with partial.open("wb") as file:
                np.savez(file, **{name: value for name, value in known.items() if value is not None})

        write_atomically(Path(path), write)

    @staticmethod
    def load(path):
        """From a file of save, pytorch-fid, clean-fid or ADM; what it does not hold is None."""
        known = read_statistics(path)
        mean, cov = ({"2048": known[name]} for name in ("mu", "sigma"))
        if "mu_s" in known:
            mean["spatial"], cov["spatial"] = known["mu_s"], known["sigma_s"]
        features = torch.from_numpy(known["features"]) if "features" in known else None
        return Statistics(known.get("n"), mean, cov, known.get("resize"), features)


def measure(images, network, batch=None, keep=MAX_KEPT, name="images"):
    """One pass of images (a source of extras/fid_sources.py) through the network -> Statistics.

    Each process takes a contiguous share (images.share, if the source has one); sums are float64 and meet in one
    all-reduce, so means and covariances are the same on every process. The next images are read while the network
    works. keep: at most so many features and logits, spread evenly, are kept, of all processes on process 0; 0: none.
    """
    rank, world = rank_and_world()
    if images.n < 2:
        raise FIDError(f"{name}: {images.n} image; a covariance needs at least two, and a score thousands")
    if images.n < world:
        raise FIDError(f"{name}: {images.n} images for {world} processes: start fewer")
    device = network.fc.weight.device
    batch = batch or (16 if device.type == "cpu" else 128)  # 16 fits a CPU's cache best
    exact = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    kept = torch.zeros(images.n, dtype=torch.bool)
    kept[np.linspace(0, images.n - 1, min(keep, images.n)).astype(int)] = True
    sums = {tap: torch.zeros(d + 1, d, dtype=torch.float64, device=exact) for tap, d in network.widths.items()}
    rows = {"2048": [], "logits_unbiased": []}
    first, last = getattr(images, "share", (images.n * rank // world, images.n * (rank + 1) // world))
    step = max(images.chunk, batch)
    starts = range(first, last, step)
    parts = look_ahead(lambda i: images.read(i, min(i + step, last)), starts)
    with tqdm(total=last - first, desc=name, unit="img", leave=False, disable=None if rank == 0 else True) as bar:
        for i, part in zip(starts, parts, strict=True):
            taps = [network(part[j:j + batch]) for j in range(0, len(part), batch)]
            chosen = kept[i:i + len(part)].to(device)
            for tap, total in sums.items():
                f = torch.cat([t[tap] for t in taps]).to(exact).double()                           # (B, d)
                total[0] += f.sum(0)
                total[1:].addmm_(f.T, f)
            for tap, kept_rows in rows.items():
                kept_rows.append(torch.cat([t[tap] for t in taps])[chosen].cpu())
            bar.update(len(part))
    all_reduce_sum(list(sums.values()))
    rows = {tap: torch.cat(kept_rows) for tap, kept_rows in rows.items()}
    gathered = gather(rows)
    if rank == 0:
        rows = {tap: torch.cat([r[tap] for r in gathered]) for tap in rows}
    mean = {tap: total[0] / images.n for tap, total in sums.items()}
    cov = {tap: (total[1:] - images.n * torch.outer(mean[tap], mean[tap])) / (images.n - 1)
           for tap, total in sums.items()}
    mean, cov = ({tap: value.cpu().numpy() for tap, value in both.items()} for both in (mean, cov))
    features, logits = (rows[tap] if keep else None for tap in ("2048", "logits_unbiased"))
    return Statistics(images.n, mean, cov, network.resize, features, logits)


def compute_scores(real, fake, device="cpu"):
    """All scores that two Statistics allow: fid, sfid, kid, kid_std, precision, recall, is, is_std; a dict."""
    scores = {"fid": frechet_distance(real.mean["2048"], real.cov["2048"], fake.mean["2048"], fake.cov["2048"])}
    if "spatial" in real.mean and "spatial" in fake.mean:
        scores["sfid"] = frechet_distance(real.mean["spatial"], real.cov["spatial"],
                                          fake.mean["spatial"], fake.cov["spatial"])
    if real.features is not None and fake.features is not None:
        f1, f2 = real.features.to(device), fake.features.to(device)
        scores["kid"], scores["kid_std"] = kernel_distance(f1, f2)
        if min(len(f1), len(f2)) > 3:
            scores["precision"], scores["recall"] = precision_recall(f1, f2)
    if fake.logits is not None:
        scores["is"], scores["is_std"] = inception_score(fake.logits.to(device))
    return scores


def print_scores(scores, n_real, n_fake):
    """Prints the scores with the number of generated images in their names, "FID-50k"; None where it is not known."""
    count = "" if n_fake is None else f"-{n_fake / 1000:g}k" if n_fake >= 1000 else f"-{n_fake}"
    for key, name, digits in (("fid", "FID", 4), ("sfid", "sFID", 4), ("kid", "KID", 6), ("is", "IS", 4),
                              ("precision", "precision", 4), ("recall", "recall", 4)):
        if key in scores:
            spread = f" ± {scores[key + '_std']:.{digits}f}" if key + "_std" in scores else ""
            print(f"{name + count:<16} {scores[key]:.{digits}f}{spread}")
    if any(n is not None and n <= MIN_IMAGES for n in (n_real, n_fake)):
        print(f"warning: no more than {MIN_IMAGES:,} images, so the covariance of {MIN_IMAGES:,} features has not full "
              "rank and FID comes out too high, the more so the fewer they are. Do not compare it with published ones")


if __name__ == "__main__":
    from extras.fid_command import main
    main()
