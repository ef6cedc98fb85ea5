"""Losses that keep a tokenizer sharp from 64 pixels up, as in VQGAN (Esser et al. 2021): the perceptual loss LPIPS and
a patch discriminator. Each can be switched off. Called by train.py and extras/tokenizer_report.py.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from engine.distributed import all_reduce_sum
from engine.read_back import UserError, check_weights
from extras.downloads import find_weights
from extras.foreign_checkpoint import read_state


class LPIPS(nn.Module):
    """Learned perceptual distance of two images (Zhang et al. 2018, version 0.1, VGG-16), over five depths l:

        sum_l mean_hw sum_c w_lc (f_lc / |f_l| - g_lc / |g_l|)^2,     f_l, g_l (B, C_l, H_l, W_l) features of both.

    state: {name: tensor} of read_lpips; without it the weights are random, for tests. Nothing here is trained, and
    there is no dropout to switch off. In float32: on a GPU its convolutions use TF32.
    """

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, state=None):
        super().__init__()
        layers, channels = [], 3
        for widths in self.STAGES:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)  # numbered as in torchvision's vgg16
        self.lin = nn.ParameterList(torch.rand(widths[-1]) for widths in self.STAGES)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        if state is not None:
            self.load_state_dict(state)
        self.requires_grad_(False)

    def stages(self, x):
        """The normalised features after each stage."""
        h = (x.float() - self.shift) / self.scale
        for layer, following in zip(self.features, [*self.features[1:], nn.MaxPool2d(2)], strict=True):
            h = layer(h)
            if isinstance(following, nn.MaxPool2d):
                # F.normalize has a gradient where all features are 0; x / (|x| + eps) would give NaN there.
                yield F.normalize(h, dim=1, eps=1e-10)

    def forward(self, x, x_hat):
        """Images (B, 3, H, W) in [-1, 1], of 16 pixels at least -> (B,) distances, 0 for equal ones.

        The gradient goes into x_hat alone.
        """
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                target = list(self.stages(x))
            return sum(((f - g).square() * w[:, None, None]).sum(1).mean((1, 2))
                       for f, g, w in zip(target, self.stages(x_hat), self.lin, strict=True))


LPIPS_FILES = {  # name in the cache: (URL, SHA-256). The network of torchvision, and the weights w_lc
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth",
                           "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "lpips-vgg-v0.1.pth": ("https://github.com/richzhang/PerceptualSimilarity/raw/"
                           "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth",
                           "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")}


def find_lpips(given=None, may_download=True):
    """The files that hold the LPIPS weights: those given, or both of LPIPS_FILES in torch's cache, else a download."""
    for file in given or []:
        if not Path(file).is_file():
            raise UserError(f"--lpips-weights {file}: no such file")
    if given:
        return [Path(file) for file in given]
    return [find_weights(name, url, sha256, "give --lpips-weights", may_download=may_download)
            for name, (url, sha256) in LPIPS_FILES.items()]


def read_lpips(paths):
    """State dict of LPIPS from the two published files, or from any that holds all: the lpips package's, a VQGAN's."""
    state, missing = {}, set(LPIPS().state_dict())
    for path in paths:
        for name, value in read_state(path).items():
            feature = re.search(r"(?:^|[.])(?:features|slice[1-5])[.](\d+)[.](weight|bias)$", name)
            linear = re.search(r"(?:^|[.])lin(\d)[.]model[.]\d[.]weight$", name)
            ours = f"features.{feature[1]}.{feature[2]}" if feature else f"lin.{linear[1]}" if linear else None
            if ours in missing:
                state[ours] = value.float().flatten() if linear else value.float()
    if len(state) < len(missing):
        absent = sorted(missing - set(state))
        raise UserError(f"{', '.join(map(str, paths))}: {len(absent)} of LPIPS' {len(missing)} weights are not "
                            f"there, {absent[0]} for one: give {' and '.join(LPIPS_FILES)}, or a file that has both")
    check_weights(", ".join(map(str, paths)), LPIPS().state_dict(), state)
    return state


class PatchDiscriminator(nn.Module):
    """Real or reconstructed? One logit per overlapping patch (PatchGAN, Isola et al. 2017).

    Strided convolutions down to an eighth (small images: less). Group instead of batch normalisation (ours): no image's
    logits depend on the others, nor on how many processes there are.
    """

    def __init__(self, size, width=64, bf16=False):
        super().__init__()
        if size < 8:
            raise ValueError(f"the discriminator needs images of at least 8 pixels, not {size}: --gan 0")
        self.bf16, self.layers = bf16, nn.ModuleList([nn.Conv2d(3, width, 4, stride=2, padding=1)])
        levels = min(3, max(1, size.bit_length() - 4))
        for i in range(1, levels + 1):
            before, after = width * 2 ** (i - 1), width * 2 ** i
            self.layers.append(nn.Sequential(nn.Conv2d(before, after, 4, 2 if i < levels else 1, 1, bias=False),
                                             nn.GroupNorm(16, after)))
        self.layers.append(nn.Conv2d(width * 2 ** levels, 1, 4, padding=1))

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> logits (B, 1, h, w) in float32, high for real."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            for layer in self.layers[:-1]:
                x = F.leaky_relu(layer(x), 0.2)
            return self.layers[-1](x).float()


def make_discriminator(config, bf16=False):
    return PatchDiscriminator(config["size"], 32 if config["tokenizer_width"] < 64 else 64, bf16)


def hinge_loss(real, fake):
    """L_D = 1/2 E[ max(0, 1 - D(x)) ] + 1/2 E[ max(0, 1 + D(x_hat)) ]; the decoder's side is L_G = -E[ D(x_hat) ]."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction, adversarial, last_layer, largest=100.0):
    """|d L_rec / d W| / |d L_G / d W|, W the decoder's last layer: both losses pull equally hard there (Esser et al.).

    In float32 and clamped: where the discriminator has no gradient the quotient explodes. The same in all processes.
    """
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
                 for loss in (reconstruction, adversarial)]
    all_reduce_sum(gradients)
    a, b = (gradient.norm() for gradient in gradients)
    return (a / (b + 1e-6)).clamp(max=largest).detach()
