"""FID, sFID, KID, Inception Score, precision and recall, with the numbers of the reference tools.

    python fid.py REAL FAKE                          two folders, zips or .npz files of images, as they are
    python fid.py imagenet-256.npz samples.npz       ADM's reference file and sample file (mu, sigma; arr_0)
    python fid.py toy runs/toy/ckpt.pt --n 10000     the training images against samples drawn on the way
    python fid.py REAL --save-stats real.npz         once; then give real.npz in place of REAL
    torchrun --nproc-per-node 8 fid.py REAL FAKE     every process takes a share

Five parts: the network, its weights, the formulas, one pass over a set of images, and where images come from.
The network is Google's Inception-v3 of December 2015 for TensorFlow, not torchvision's: other weights (1008 classes),
other pools. All published FID figures rest on it. Definitions: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID),
Salimans et al. 2016 (Inception Score), Kynkaanniemi et al. 2019 (precision and recall), Nash et al. 2021 (sFID).
Compare a score only with one of as many images: FID falls as N grows, by about 1/N.
"""

import argparse
import hashlib
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import data
from extras.archives import open_npz, read_npz_array

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299  # pixels; the network's input
MAX_KEPT = 50_000  # features kept for KID, precision and recall, spread evenly over a larger set
MIN_IMAGES = 2048  # width of the features: with fewer images their covariance is singular


class FIDError(ValueError):
    """One line: what is wrong and what to do."""


# ----------------------------------------------------------------------------
# 1. The network. Parameters are named as in the published file, so load_state_dict(strict=True) takes it as it is.

class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU. Padding keeps the size at stride 1 unless it is given."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:
            padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


POOLS = {
    "avg": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),  # TensorFlow's border
    "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "max, stride 2": partial(F.max_pool2d, kernel_size=3, stride=2),
}


class Mixed(nn.Module):
    """Branches side by side, concatenated in this order.

    A branch is a chain of steps: a convolution (name, in, out, kernel[, stride]), a pool by its name, or a list of
    convolutions that all read what came before them and are concatenated.
    """

    def __init__(self, *branches):
        super().__init__()
        self.branches = branches
        for step in (step for branch in branches for step in branch if not isinstance(step, str)):
            for name, *shape in step if isinstance(step, list) else [step]:
                self.add_module(name, ConvBN(*shape))

    def forward(self, x):
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                if isinstance(step, str):
                    y = POOLS[step](y)
                elif isinstance(step, list):
                    y = torch.cat([getattr(self, name)(y) for name, *_ in step], 1)
                else:
                    y = getattr(self, step[0])(y)
            outputs.append(y)
        return torch.cat(outputs, 1)


def block_a(c, pooled):  # 35 x 35
    return Mixed([("branch1x1", c, 64, 1)],
                 [("branch5x5_1", c, 48, 1), ("branch5x5_2", 48, 64, 5)],
                 [("branch3x3dbl_1", c, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3)],
                 ["avg", ("branch_pool", c, pooled, 1)])


def block_b(c):  # 35 x 35 -> 17 x 17
    return Mixed([("branch3x3", c, 384, 3, 2)],
                 [("branch3x3dbl_1", c, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3, 2)],
                 ["max, stride 2"])


def block_c(c, w):  # 17 x 17, 7x7 convolutions as 1x7 and 7x1
    return Mixed([("branch1x1", c, 192, 1)],
                 [("branch7x7_1", c, w, 1), ("branch7x7_2", w, w, (1, 7)), ("branch7x7_3", w, 192, (7, 1))],
                 [("branch7x7dbl_1", c, w, 1), ("branch7x7dbl_2", w, w, (7, 1)), ("branch7x7dbl_3", w, w, (1, 7)),
                  ("branch7x7dbl_4", w, w, (7, 1)), ("branch7x7dbl_5", w, 192, (1, 7))],
                 ["avg", ("branch_pool", c, 192, 1)])


def block_d(c):  # 17 x 17 -> 8 x 8
    return Mixed([("branch3x3_1", c, 192, 1), ("branch3x3_2", 192, 320, 3, 2)],
                 [("branch7x7x3_1", c, 192, 1), ("branch7x7x3_2", 192, 192, (1, 7)),
                  ("branch7x7x3_3", 192, 192, (7, 1)), ("branch7x7x3_4", 192, 192, 3, 2)],
                 ["max, stride 2"])


def block_e(c, pool):  # 8 x 8
    return Mixed([("branch1x1", c, 320, 1)],
                 [("branch3x3_1", c, 384, 1),
                  [("branch3x3_2a", 384, 384, (1, 3)), ("branch3x3_2b", 384, 384, (3, 1))]],
                 [("branch3x3dbl_1", c, 448, 1), ("branch3x3dbl_2", 448, 384, 3),
                  [("branch3x3dbl_3a", 384, 384, (1, 3)), ("branch3x3dbl_3b", 384, 384, (3, 1))]],
                 [pool, ("branch_pool", c, 192, 1)])


class InceptionV3(nn.Module):
    """uint8 images (B, 3, H, W), or a list of (3, H, W) of any sizes -> dict of features, each (B, width) float32.

    "64", "192", "768", "2048": means over the positions after the two stem pools, Mixed_6e and Mixed_7c. "spatial":
    (B, 17 * 17 * 7), the first 7 channels of Mixed_6d, channels last (sFID). "logits": (B, 1008), and
    "logits_unbiased": the same without the last bias (Inception Score).
    resize: "tf" (TensorFlow 1, as the FID paper, ADM, EDM and torch-fidelity), "pytorch-fid" or "clean" (clean-fid).
    """

    def __init__(self, resize="tf"):
        super().__init__()
        if resize not in PREPROCESS:
            raise ValueError(f"resize must be one of {', '.join(PREPROCESS)}, got {resize!r}")
        self.resize = resize
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b, self.Mixed_6c = block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "avg"), block_e(2048, "max")  # as in the 2015 graph
        self.fc = nn.Linear(2048, 1008)

    def prepare(self, images):
        """What the first convolution reads: (B, 3, 299, 299), about [-1, 1]. The aspect ratio is not kept."""
        if isinstance(images, list):
            if len({image.shape for image in images}) > 1:
                return torch.cat([self.prepare(image[None]) for image in images])
            images = torch.stack(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 of shape (B, 3, H, W), got {images.dtype} {tuple(images.shape)}; "
                             "from floats in [-1, 1]: (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)")
        return PREPROCESS[self.resize](images.to(self.fc.weight.device).to(self.fc.weight.dtype))

    @torch.no_grad()
    def forward(self, images):
        taps = {}
        # TF32 would round the features to three digits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self.prepare(images).contiguous(memory_format=torch.channels_last)                 # (B, 3, 299, 299)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))                      # (B, 64, 147, 147)
            x = F.max_pool2d(x, 3, 2)
            taps["64"] = x.mean((2, 3))
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)                      # (B, 192, 35, 35)
            taps["192"] = x.mean((2, 3))
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))                      # (B, 768, 17, 17)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
            taps["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)                              # (B, 2023)
            x = self.Mixed_6e(x)
            taps["768"] = x.mean((2, 3))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                                     # (B, 2048, 8, 8)
            taps["2048"] = x.mean((2, 3))
            taps["logits_unbiased"] = F.linear(taps["2048"], self.fc.weight)
            taps["logits"] = taps["logits_unbiased"] + self.fc.bias
        return taps


def resize_tf1(x):
    """(B, 3, H, W) float -> (B, 3, 299, 299): TensorFlow 1's bilinear, pixel i at i * H / 299, no antialias."""
    def positions(size):
        at = torch.arange(SIDE, dtype=torch.float32, device=x.device) * torch.tensor(size / SIDE, dtype=torch.float32)
        low = at.long()
        return low, (low + 1).clamp(max=size - 1), (at - low).to(x.dtype)

    low, high, weight = positions(x.shape[3])
    left = x[..., low]
    x = left + (x[..., high] - left) * weight
    low, high, weight = positions(x.shape[2])
    top = x[:, :, low]
    return top + (x[:, :, high] - top) * weight[:, None]


def resize_clean(x):
    """(B, 3, H, W) float -> (B, 3, 299, 299): Pillow's bicubic with antialias, in float64 as Pillow's positions are."""
    wide = (x.cpu() if x.is_mps else x).double()
    return F.interpolate(wide, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255).to(x)


PREPROCESS = {  # float 0 ... 255 -> what the first convolution reads
    "tf": lambda x: (resize_tf1(x) - 128) / 128,
    "pytorch-fid": lambda x: 2 * F.interpolate(x / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1,
    "clean": lambda x: (resize_clean(x) - 128) / 128,
}


def fold_batch_norm(network):
    """In place: each batch norm goes into the convolution before it (in float64), weights channels_last. Faster."""
    network.eval().double()
    for module in network.modules():
        if isinstance(module, ConvBN):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return network.float().to(memory_format=torch.channels_last).requires_grad_(False)


# ----------------------------------------------------------------------------
# 2. The weights, 96 MB.

def find_weights(path=None, may_download=True):
    """--weights, or $FID_WEIGHTS, or the cache that pytorch-fid uses too, or a download into it; else an error."""
    given = path or os.environ.get("FID_WEIGHTS")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rsplit("/", 1)[1]
    path = Path(given).expanduser() if given else cached
    if given and not path.is_file():
        raise FIDError(f"no Inception weights at {path}: download {WEIGHTS_URL} to there, or leave --weights and "
                       "$FID_WEIGHTS away")
    if not path.is_file() and not may_download:
        raise FIDError(f"no Inception weights at {path}: any FID of fid.py downloads them, or fetch {WEIGHTS_URL}")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        data.fetch([WEIGHTS_URL], path, WEIGHTS_SHA256, "anywhere, and give --weights PATH or set $FID_WEIGHTS")
    if hashlib.sha256(path.read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise FIDError(f"{path} is not the published file of Inception weights (its SHA-256 does not begin with "
                       f"{WEIGHTS_SHA256[:8]}): cut short or altered; delete it, and download {WEIGHTS_URL}")
    return path


def load_inception(path, device, resize="tf"):
    """The network, ready for use, from a file that find_weights returned."""
    network = InceptionV3(resize)
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(state))  # a plain dict may lack num_batches_tracked, which nothing here needs
    return fold_batch_norm(network).to(device)


# ----------------------------------------------------------------------------
# 3. The formulas. All of them in float64.

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


def kernel_distance(real, fake, subsets=100, size=1000):
    """(mean, standard deviation over subsets) of KID: unbiased MMD^2, k(a, b) = (a.b / d + 1)^3. Features (n, d).

    Binkowski et al. 2018, eq. 4. Subsets as torch-fidelity draws them, the generated set first. May be negative.
    """
    size = min(size, len(real), len(fake))
    if size < 2:
        raise FIDError("KID needs at least two images a side")
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
    """(mean, standard deviation over splits) of exp E[KL(p(y|x) || p(y))], from logits without bias (n, 1008).

    Salimans et al. 2016. Shuffled and split as torch-fidelity does.
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
    """Share of generated points inside the manifold of the real ones, and of real ones inside that of the generated.

    Manifold: the balls around all points that reach to their k-th nearest neighbour. Kynkaanniemi et al. 2019, eq. 2.
    Features (n, d).
    """
    if min(len(real), len(fake)) <= k:
        raise FIDError(f"precision and recall need at least {k + 1} images a side")
    real, fake = real.double(), fake.double()

    def radii(points):  # each point is its own nearest neighbour
        return torch.cat([squared_distances(part, points).kthvalue(k + 1).values for part in points.split(tile)])

    def covered(points, centres, squared_radii):
        inside = [(squared_distances(part, centres) <= squared_radii).any(1) for part in points.split(tile)]
        return float(torch.cat(inside).double().mean())

    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))


# ----------------------------------------------------------------------------
# 4. One pass over a set of images.

class Statistics:
    """What is known of one set: n images, means and covariances by tap, and, if kept, features and logits.

    mean: {"2048": (2048,), "spatial": (2023,)}, cov: the same, squares, divided by n - 1; float64 arrays. features
    (m, 2048), logits (m, 1008): tensors or None. resize: the preprocessing they were made with, None if unknown.
    """

    def __init__(self, n, mean, cov, resize, features=None, logits=None):
        self.n, self.mean, self.cov, self.resize = n, mean, cov, resize
        self.features, self.logits = features, logits

    def save(self, path):
        """As pytorch-fid (mu, sigma) and ADM (mu_s, sigma_s for sFID) do, and n, resize, weights beside them."""
        known = {"mu": self.mean["2048"], "sigma": self.cov["2048"], "mu_s": self.mean.get("spatial"),
                 "sigma_s": self.cov.get("spatial"), "n": self.n, "resize": self.resize,
                 "weights": WEIGHTS_SHA256 if self.resize else None}  # of somebody else's statistics it is not known
        part = Path(path).with_name(Path(path).name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, **{name: value for name, value in known.items() if value is not None})
        part.replace(path)

    @staticmethod
    def load(path):
        """From a file of save, pytorch-fid, clean-fid or ADM; n and resize are None where it does not hold them."""
        with open_npz(path) as file:
            mean, cov = ({"2048": read_npz_array(file, name)} for name in ("mu", "sigma"))
            if "mu_s" in file:
                mean["spatial"], cov["spatial"] = (read_npz_array(file, name) for name in ("mu_s", "sigma_s"))
            return Statistics(int(file["n"]) if "n" in file else None, mean, cov,
                              str(file["resize"]) if "resize" in file else None)


def processes():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def measure(images, network, batch=None, keep=MAX_KEPT, name="images"):
    """One pass of a source (part 5) through the network -> Statistics, the same on every process.

    Each process takes a contiguous share; sums are float64 and meet in one all-reduce. The next images are read while
    the network works. keep: at most so many features and logits, spread evenly, are kept (on process 0); 0 for none.
    """
    rank, world = processes()
    if images.n < 2:
        raise FIDError(f"{name}: {images.n} image; a covariance needs at least two, and a score thousands")
    if images.n < world:
        raise FIDError(f"{name}: {images.n} images for {world} processes: start fewer")
    device = network.fc.weight.device
    batch = batch or (16 if device.type == "cpu" else 128)  # 16 fits a CPU's cache best
    exact = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
    kept = torch.zeros(images.n, dtype=torch.bool)
    kept[np.linspace(0, images.n - 1, min(keep, images.n)).astype(int)] = True
    widths = {"2048": 2048, "spatial": 17 * 17 * 7}
    sums = {tap: torch.zeros(d + 1, d, dtype=torch.float64, device=exact) for tap, d in widths.items()}
    rows = {"2048": [], "logits_unbiased": []}
    first, last = images.n * rank // world, images.n * (rank + 1) // world
    step = max(images.chunk, batch)
    with ThreadPoolExecutor(1) as pool, tqdm(total=last - first, desc=name, unit="img", leave=False,
                                             disable=None if rank == 0 else True) as bar:
        ahead = pool.submit(images.read, first, min(first + step, last))
        for i in range(first, last, step):
            part = ahead.result()
            if i + step < last:
                ahead = pool.submit(images.read, i + step, min(i + 2 * step, last))
            taps = [network(part[j:j + batch]) for j in range(0, len(part), batch)]
            chosen = kept[i:i + len(part)].to(device)
            for tap, total in sums.items():
                f = torch.cat([t[tap] for t in taps]).to(exact).double()                           # (B, d)
                total[0] += f.sum(0)
                total[1:].addmm_(f.T, f)
            for tap, found in rows.items():
                found.append(torch.cat([t[tap] for t in taps])[chosen].cpu())
            bar.update(len(part))
    rows = {tap: torch.cat(found) for tap, found in rows.items()}
    if world > 1:
        everything = torch.cat([total.flatten() for total in sums.values()])
        dist.all_reduce(everything)
        for total, merged in zip(sums.values(), everything.split([t.numel() for t in sums.values()]), strict=True):
            total.copy_(merged.view_as(total))
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(rows, gathered)
        rows = {tap: torch.cat([r[tap] for r in gathered]) for tap in rows} if rank == 0 else rows
    mean = {tap: total[0] / images.n for tap, total in sums.items()}
    cov = {tap: (total[1:] - images.n * torch.outer(mean[tap], mean[tap])) / (images.n - 1)
           for tap, total in sums.items()}
    mean, cov = ({tap: value.cpu().numpy() for tap, value in both.items()} for both in (mean, cov))
    features, logits = (rows[tap] if keep else None for tap in ("2048", "logits_unbiased"))
    return Statistics(images.n, mean, cov, network.resize, features, logits)


def cached_statistics(dataset, network):
    """Statistics of a data.ImageSet without features; measured once, then found again by the content of the images."""
    some = range(len(dataset)) if dataset.pixels is not None else np.linspace(0, len(dataset) - 1, 4096).astype(int)
    digest = hashlib.sha256(f"{WEIGHTS_SHA256} {network.resize} {len(dataset)}".encode())
    for i in range(0, len(some), 256):
        digest.update(dataset.batch(some[i:i + 256]).numpy().tobytes())
    path = Path(torch.hub.get_dir()).parent / "vq-lcmd" / f"fid-{digest.hexdigest()[:16]}.npz"
    if path.exists():
        return Statistics.load(path)
    found = measure(Decoded(dataset), network, keep=0, name="FID, training images")
    if processes()[0] == 0:
        found.save(path)
    return found


def compare(real, fake, device="cpu"):
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


# ----------------------------------------------------------------------------
# 5. Where images come from. A source has n, chunk (images to read at a time) and read(i, j) -> the images i ... j - 1,
#    a uint8 tensor (j - i, 3, H, W) or a list of (3, H, W); it is read forwards only.

class Pictures:
    """All images of a source of data.py, as they are (size None) or centre-cropped and resized as for training."""

    chunk = 64

    def __init__(self, source, size=None):
        self.source, self.size, self.items = source, size, np.sort(np.concatenate([source.train, source.test]))
        self.n = len(self.items)

    def load(self, item):
        try:
            return torch.from_numpy(data.load_image(self.source.read(item), self.size))
        except data.DataError as error:
            raise FIDError(f"{self.source.title(item)} cannot be used ({error}): repair it or take it out") from error

    def read(self, i, j):
        return list(data.decoders().map(self.load, self.items[i:j]))


class Array:
    """arr_0 of an .npz, uint8 (n, H, W, 3), streamed: it may be larger than the memory."""

    chunk = 64

    def __init__(self, path):
        self.file = zipfile.ZipFile(path).open("arr_0.npy")
        version = np.lib.format.read_magic(self.file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(self.file)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise FIDError(f"{path}: arr_0 must be uint8 of shape (n, H, W, 3), is {dtype} {shape}")
        self.n, self.shape, self.at = shape[0], shape[1:], 0

    def read(self, i, j):
        size = int(np.prod(self.shape))
        while self.at < i:  # another process has these
            self.file.read(size)
            self.at += 1
        content, self.at = bytearray(self.file.read((j - i) * size)), j
        return torch.frombuffer(content, dtype=torch.uint8).view(j - i, *self.shape).permute(0, 3, 1, 2)


class Decoded:
    """A data.ImageSet."""

    chunk = 256

    def __init__(self, dataset):
        self.dataset, self.n, self.labels = dataset, len(dataset), dataset.labels

    def read(self, i, j):
        return self.dataset.batch(range(i, j))


class Samples:
    """n images that a checkpoint's bundle (sample.load_checkpoint) draws, image i as sample.py would draw it.

    labels: of the real images, if there are any: the classes are drawn as often as there. settings: steps, ...
    """

    chunk = 256

    def __init__(self, bundle, n, labels=None, seed=0, **settings):
        self.bundle, self.n, self.seed, self.settings = bundle, n, seed, bundle.sampling | settings
        classes = max(len(bundle.class_names), 1)
        if labels is None or len(labels) == 0:
            self.labels = torch.arange(n) % classes
        else:
            self.labels = labels.sort().values[np.linspace(0, len(labels) - 1, n).astype(int)]

    def read(self, i, j):
        from sample import sample_images  # only here: the rest of this file works without the model
        return sample_images(self.bundle, self.labels[i:j], seed=self.seed, first=i, show_progress=False,
                             **self.settings)


def open_side(word, root, size, trained_on):
    """A word of the command line -> (Statistics or None, source of images or None, a few words on it).

    size: None for images as they are. trained_on: read them as training did, without its held-out part.
    """
    path = Path(word).expanduser()
    if path.suffix == ".npz" and path.is_file():
        with open_npz(path) as file:
            names = set(file.files)
        if "arr_0" not in names and not {"mu", "sigma"} <= names:
            raise FIDError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}: expected arr_0 (images), or mu and "
                           "sigma (statistics)")
        statistics, source = Statistics.load(path) if "mu" in names else None, Array(path) if "arr_0" in names else None
        return statistics, source, "statistics" if statistics else f"{source.n:,} images, {source.shape[0]} px"
    source = data.find(word, root)
    if trained_on or word in ("toy", *data.DATASETS):
        size = size or source.sizes()[1]
        train, _ = source.load(size)
        return None, Decoded(train), f"{len(train):,} training images, cropped and resized to {size} px"
    source = Pictures(source, size)
    return None, source, f"{source.n:,} images, " + (f"cropped and resized to {size} px" if size else "as they are")


def report(scores, n_real, n_fake):
    """Prints the scores with the number of generated images in their names, "FID-50k"; None where it is not known."""
    count = "" if n_fake is None else f"-{n_fake / 1000:g}k" if n_fake >= 1000 else f"-{n_fake}"
    for key, name, digits in (("fid", "FID", 4), ("sfid", "sFID", 4), ("kid", "KID", 6), ("is", "IS", 4),
                              ("precision", "precision", 4), ("recall", "recall", 4)):
        if key in scores:
            spread = f" ± {scores[key + '_std']:.{digits}f}" if key + "_std" in scores else ""
            print(f"{name + count:<16} {scores[key]:.{digits}f}{spread}")
    if min(n_real or MIN_IMAGES, n_fake or MIN_IMAGES) < MIN_IMAGES:
        print(f"warning: fewer than {MIN_IMAGES:,} images, so the covariance of {MIN_IMAGES:,} features has not full "
              "rank and FID comes out too high, the more so the fewer they are. Do not compare it with published ones")


def run(args, rank):
    """The whole command, on each process."""
    import sample  # the command line alone needs the model's files; everything above works without them
    device = sample.choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
                                  if args.device == "auto" and torch.cuda.is_available() else args.device)
    words = [word for word in (args.real, args.fake) if word]
    checkpoints = [word for word in words if word.endswith(".pt")]
    if len(words) == 1 and not args.save_stats:
        raise FIDError("give REAL and FAKE, or one of them and --save-stats FILE")
    if len(checkpoints) > 1 or args.real in checkpoints:
        raise FIDError("a checkpoint can only stand at FAKE: first the real images, then the generated ones")
    if not checkpoints and (args.n or args.steps or args.guidance is not None):
        raise FIDError("--n, --steps and --guidance are for a checkpoint at FAKE")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        raise FIDError(f"--save-stats {args.save_stats}: the name must end in .npz")
    for file in (args.save_stats, args.json):  # before any long work
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    bundle = sample.load_checkpoint(args.fake, device) if checkpoints else None
    size = args.size or (bundle.tokenizer.size if bundle else None)
    sides = [open_side(word, args.root, size, bool(bundle)) for word in words if word not in checkpoints]
    if bundle:
        settings = {key: getattr(args, key) for key in ("steps", "guidance") if getattr(args, key) is not None}
        source = Samples(bundle, args.n or 50_000, getattr(sides[0][1], "labels", None), args.seed, **settings)
        sides.append((None, source, f"{source.n:,} samples of step {bundle.step:,}, seed {args.seed}, " + ", ".join(
            f"{key} {value}" for key, value in source.settings.items())))
    for word, (statistics, source, what) in zip(words, sides, strict=True):
        if rank == 0:
            print(f"{word}: {what}")
        if source and source.n < 2:
            raise FIDError(f"{word}: {source.n} image; a covariance needs at least two, and a score thousands")
        if statistics and statistics.resize not in (None, args.resize):
            raise FIDError(f"{word} was made with --resize {statistics.resize}, not {args.resize}: both sides must be "
                           "made alike")
        if rank == 0 and statistics and statistics.resize is None:
            print(f"{word} does not say how images were resized for it; taken as --resize {args.resize}")
    network = None
    if any(source for _, source, _ in sides):
        path = find_weights(args.weights) if rank == 0 else None  # downloads, if need be; the others wait
        if dist.is_initialized():
            dist.barrier()
        network = load_inception(path or find_weights(args.weights), device, args.resize)
    measured = []
    for word, (statistics, source, _) in zip(words, sides, strict=True):
        found = measure(source, network, args.batch, name=word) if source else statistics
        if source and statistics:  # ADM's reference file: statistics of the whole set, and some of its images
            found = Statistics(statistics.n, statistics.mean, statistics.cov, args.resize, found.features,
                               found.logits)
        measured.append(found)
    if rank != 0:
        return
    if args.save_stats:
        measured[0].save(args.save_stats)
        print(f"wrote {args.save_stats}")
    if len(measured) == 2:
        scores = compare(*measured, device="cpu" if device.type == "mps" else device)
        n_real, n_fake = (m.n for m in measured)
        report(scores, n_real, n_fake)
        if args.json:
            facts = {"real": args.real, "fake": args.fake, "n_real": n_real, "n_fake": n_fake, "resize": args.resize}
            Path(args.json).write_text(json.dumps(scores | facts, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description="FID, sFID, KID, Inception Score, precision and recall.")
    parser.add_argument("real", metavar="REAL", help="a folder, zip, ... of images, whatever train.py takes as --data "
                        "(of a named set, its training images); or an .npz with arr_0 (images), or mu and sigma")
    parser.add_argument("fake", metavar="FAKE", nargs="?", help="the same, or a checkpoint of train.py to sample from")
    parser.add_argument("--n", type=int, help="samples to draw from a checkpoint (default: 50000)")
    parser.add_argument("--steps", type=int, help="calls of its network per image (default: in the checkpoint)")
    parser.add_argument("--guidance", type=float, help="omega (default: in the checkpoint)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--size", type=int, help="centre-crop and resize files to so many pixels, as for training "
                        "(default: the checkpoint's, if there is one; else files are taken as they are)")
    parser.add_argument("--root", metavar="DIR", help="where a named set lies, as for train.py")
    parser.add_argument("--resize", choices=list(PREPROCESS), default="tf", help="how images become 299 pixels: as "
                        "TensorFlow, ADM and torch-fidelity do, as pytorch-fid, or as clean-fid (default: tf)")
    parser.add_argument("--weights", help="file of the Inception weights (default: $FID_WEIGHTS, or the cache, or "
                        "a download)")
    parser.add_argument("--save-stats", metavar="FILE", help="write the statistics of REAL as an .npz")
    parser.add_argument("--json", metavar="FILE", help="write the scores")
    parser.add_argument("--batch", type=int, help="images at a time (default: 16 on a CPU, else 128)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    rank, _ = processes()
    try:
        for name in ("n", "steps", "size", "batch"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise FIDError(f"--{name} must be at least 1")
        if args.seed < 0:
            raise FIDError("--seed must not be negative")
        run(args, rank)
    except (ValueError, OSError, zipfile.BadZipFile) as error:  # FIDError, DataError, CheckpointError are ValueErrors
        print(f"fid.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
