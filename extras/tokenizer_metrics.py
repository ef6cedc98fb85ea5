"""How good is a tokenizer? PSNR, SSIM, LPIPS, codes in use and perplexity, over a whole set of images."""

import torch
import torch.nn.functional as F

from engine.distributed import all_reduce_sum, rank_and_world
from vqvae import to_float


def usage_and_perplexity(counts):
    """counts (K,) of each code over a whole data set -> (share of codes that are used, exp of the entropy).

    Perplexity K means that all codes are used equally, 1 that a single one is used.
    """
    p = counts.double() / counts.sum()
    return float((counts > 0).double().mean()), float(torch.special.entr(p).sum().exp())


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of uint8 images a, b (B, 3, H, W) -> (B,), 1 for equal ones.

    The mean over channels and over places of an 11 x 11 Gaussian window (sigma 1.5), in small images smaller.
    """
    size = min(11, min(a.shape[2:]) - 1 + min(a.shape[2:]) % 2)  # odd
    window = torch.exp(-0.5 * ((torch.arange(size, device=a.device) - size // 2) / 1.5) ** 2)
    window = window / window.sum()

    def blur(x):
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    x, y = (images.float().reshape(-1, 1, *images.shape[2:]) / 255 for images in (a, b))  # (3 B, 1, H, W)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x ** 2, blur(y * y) - mean_y ** 2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similar = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)
               / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2)))
    return similar.reshape(len(a), -1).mean(1)


@torch.no_grad()
def evaluate_tokenizer(model, dataset, device, lpips=None, batch=256):
    """Over a whole data.ImageSet: {"psnr" in dB, "ssim", "usage", "perplexity"}, and "lpips" by that network.

    PSNR is of the MSE over the whole set, reconstructions in uint8; SSIM and LPIPS are means over the images.
    Processes share out the batches, and all return the same.
    """
    model.eval()
    rank, world = rank_and_world()
    squared_error, similar, perceived, counts = 0.0, 0.0, 0.0, torch.zeros(model.K, dtype=torch.int64)
    for start in range(rank * batch, len(dataset), world * batch):
        images = dataset.batch(range(start, min(start + batch, len(dataset)))).to(device)
        tokens = model.encode(images)
        decoded = model.decode(tokens)
        squared_error += float((decoded.int() - images.int()).square().sum(dtype=torch.int64))
        similar += float(ssim(images, decoded).sum())
        if lpips is not None:
            perceived += sum(float(lpips(to_float(a), to_float(b)).sum())
                             for a, b in zip(images.split(16), decoded.split(16), strict=True))
        counts += torch.bincount(tokens.flatten(), minlength=model.K).cpu()
    sums = torch.tensor([squared_error, similar, perceived], dtype=torch.float64)
    all_reduce_sum([sums])
    all_reduce_sum([counts])
    squared_error, similar, perceived = sums / len(dataset)
    mse = (squared_error / (3 * model.size ** 2)).clamp(min=1e-10)
    usage, perplexity = usage_and_perplexity(counts)
    metrics = {"psnr": float(10 * torch.log10(255 ** 2 / mse)), "ssim": float(similar), "usage": usage,
               "perplexity": perplexity}
    return metrics if lpips is None else metrics | {"lpips": float(perceived)}
