"""Losses that keep a tokenizer sharp from 64 pixels up, as in VQGAN (Esser et al. 2021)."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from engine.checkpoint import read_torch, tensors_of
from engine.distributed import all_reduce_sum
from engine.validate import check_file, check_finite, check_weights
from extras.downloads import find_weights

GAN_WARMUP, GAN_RAMP = 0.05, 0.1  # shares of the steps: discriminator alone, then its weight rises
LPIPS_FILES = {  # name in the cache: (URL, SHA-256). torchvision's network, and the weights w_lc
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth",
                           "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "lpips-vgg-v0.1.pth": ("https://github.com/richzhang/PerceptualSimilarity/raw/"
                           "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1/vgg.pth",
                           "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")}


class LPIPS(nn.Module):
    """Learned perceptual distance of two images (Zhang et al. 2018, version 0.1, VGG-16), over five depths l:

        sum_l mean_hw sum_c w_lc (f_lc / |f_l| - g_lc / |g_l|)^2,    f_l, g_l: features (B, C_l, H_l, W_l).

    state: of read_lpips; without it the weights are random. Nothing here is trained.
    """

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, state=None):
        super().__init__()
        layers, channels = [], 3
        for widths in self.STAGES:
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])  # numbered as in torchvision's vgg16
        self.lin = nn.ParameterList(torch.rand(widths[-1]) for widths in self.STAGES)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        if state is not None:
            self.load_state_dict(state)
        self.requires_grad_(False)

    def stages(self, x):
        """The normalised features after each stage."""
        h = (x.float() - self.shift) / self.scale
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):  # normalize has a gradient even where all features are 0
                yield F.normalize(h, dim=1, eps=1e-10)
            h = layer(h)
        yield F.normalize(h, dim=1, eps=1e-10)

    def forward(self, x, x_hat):
        """Images (B, 3, H, W) in [-1, 1], of 16 pixels at least -> (B,) distances. Trains x_hat alone."""
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                target = list(self.stages(x))
            return sum(((f - g).square() * w[:, None, None]).sum(1).mean((1, 2))
                       for f, g, w in zip(target, self.stages(x_hat), self.lin, strict=True))


def find_lpips(given=None, may_download=True):
    """The files of the weights: those given, or LPIPS_FILES from torch's cache or a download."""
    if given:
        return [check_file(file) for file in given]
    return [find_weights(name, url, sha256, "give --lpips-weights", may_download=may_download)
            for name, (url, sha256) in LPIPS_FILES.items()]


def read_lpips(paths):
    """State dict of LPIPS from the two published files, or from one with all, such as a VQGAN's."""
    state, wanted = {}, LPIPS().state_dict()
    for path in paths:
        for name, value in tensors_of(path, read_torch(path)).items():
            ours = re.sub(r".*(features|slice[1-5])[.](\d+[.](weight|bias))$", r"features.\2", str(name))
            ours = re.sub(r".*lin(\d)[.]model[.]\d[.]weight$", r"lin.\1", ours)
            if ours in wanted:
                check_finite(f"{path}: {name}", value)
                state[ours] = value.float().flatten() if ours.startswith("lin") else value.float()
    check_weights(f"{', '.join(map(str, paths))} (give both of {', '.join(LPIPS_FILES)})", wanted, state)
    return state


class PatchDiscriminator(nn.Module):
    """Real or reconstructed? One logit per overlapping patch (PatchGAN, Isola et al. 2017)."""
    def __init__(self, size, width=64, bf16=False):
        super().__init__()
        if size < 8:
            raise ValueError(f"the discriminator needs images of at least 8 pixels, not {size}: --gan 0")
        self.bf16, self.layers = bf16, nn.ModuleList([nn.Conv2d(3, width, 4, stride=2, padding=1)])
        levels = min(3, max(1, size.bit_length() - 4))  # down to an eighth, or less for small images
        for i in range(1, levels + 1):
            conv = nn.Conv2d(width, 2 * width, 4, stride=2 if i < levels else 1, padding=1, bias=False)
            width *= 2  # group, not batch norm (ours): no image's logits depend on another's
            self.layers.append(nn.Sequential(conv, nn.GroupNorm(16, width)))
        self.layers.append(nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> logits (B, 1, h, w) in float32, high for real."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            for layer in self.layers[:-1]:
                x = F.leaky_relu(layer(x), 0.2)
            return self.layers[-1](x).float()


def make_discriminator(config, bf16=False):
    return PatchDiscriminator(config["size"], 32 if config["tokenizer_width"] < 64 else 64, bf16)


def hinge_loss(real, fake):
    """L_D = 1/2 E[ max(0, 1 - D(x)) ] + 1/2 E[ max(0, 1 + D(x_hat)) ]; the decoder's is -E[ D(x_hat) ]."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction, adversarial, last_layer, largest=100.0):
    """|d L_rec / d W| / |d L_G / d W|, W the decoder's last layer: both losses pull equally hard there."""
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
                 for loss in (reconstruction, adversarial)]
    all_reduce_sum(gradients)
    quotient = gradients[0].norm() / (gradients[1].norm() + 1e-6)  # explodes without a gradient
    return quotient.clamp(max=largest).detach()


def tokenizer_loss(config, model, discriminator, outputs, progress, lpips=None):
    """(loss of the tokenizer, {name: term}). outputs: of VQVAE. progress: share of the training that is over.

        L = pixels + perceptual LPIPS + gan ramp adaptive_weight L_G + beta commitment (+ codebook)
    """
    x, x_hat = outputs["x"], outputs["x_hat"]
    loss = F.mse_loss(x_hat, x) if config["pixel_loss"] == "l2" else F.l1_loss(x_hat, x)
    terms = {"reconstruction": loss, "commitment": outputs["commitment"], "codebook": outputs["codebook"]}
    if lpips is not None:
        terms["lpips"] = lpips(x, x_hat).mean()
        loss = loss + config["perceptual"] * terms["lpips"]
    if discriminator is not None:
        names = ("adversarial", "weight", "discriminator", "discriminator_norm")
        terms |= dict.fromkeys(names, torch.zeros_like(loss))
        if progress >= config["gan_start"] + GAN_WARMUP:
            ramp = min(1.0, (progress - config["gan_start"] - GAN_WARMUP) / GAN_RAMP)
            discriminator.requires_grad_(False)
            terms["adversarial"] = -discriminator(x_hat).mean()
            terms["weight"] = adaptive_weight(loss, terms["adversarial"], model.last_layer)
            loss = loss + config["gan"] * ramp * terms["weight"] * terms["adversarial"]
    loss = loss + config["beta"] * outputs["commitment"]
    if config["codebook_update"] == "gradient":
        loss = loss + outputs["codebook"]
    return loss, terms


def build_discriminator(config, bf16, device):
    model = make_discriminator(config, bf16).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.5, 0.9), weight_decay=0, fused=True)
    return {"discriminator": model, "discriminator_optimizer": optimizer}


def discriminator_step(judge, parts, outputs, lr, clip):
    """One step of the discriminator -> {name: loss or norm}. judge: it, or its DistributedDataParallel."""
    discriminator, optimizer = parts["discriminator"].requires_grad_(True), parts["discriminator_optimizer"]
    optimizer.param_groups[0]["lr"] = lr
    loss = hinge_loss(judge(outputs["x"]), judge(outputs["x_hat"].detach()))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), clip)
    optimizer.step()
    return {"discriminator": loss, "discriminator_norm": norm}
