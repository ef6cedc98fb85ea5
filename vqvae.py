"""The tokenizer: a VQ-VAE (van den Oord et al. 2017) that turns an image into a small grid of discrete tokens.

    image (B, 3, H, W) in [-1, 1]  ->  encoder  ->  z_e (B, h, w, C)  ->  nearest code  ->  tokens (B, h * w)
    tokens  ->  their codes z_q (B, h, w, C)  ->  decoder  ->  image,            h = H / f, w = W / f

    L = |x - x_hat|^2  +  beta |z_e - sg[z_q]|^2  +  |sg[z_e] - z_q|^2
        reconstruction    commitment (encoder)       codebook (codes)

sg = stop-gradient. The decoder's gradient passes straight through the quantiser to the encoder. The codebook is either
moved by the third term (`gradient`) or replaced by running means of the encoder's outputs (`ema`, the default, in
which case the third term is reported but not trained). It starts from data, and codes that are no longer used
restart at encoder outputs of the current batch. Codes are narrower than the encoder's features (factorised codes, Yu et
al. 2021): code_dim against up to 4 x width. From 64 pixels up |x - x_hat|^2 alone blurs; a perceptual loss and a patch
discriminator, as in VQGAN (Esser et al. 2021), can join it. The paper uses such a tokenizer, pre-trained; the network
here is ours. Under torchrun every process holds the same codebook, that of the whole batch.

    python vqvae.py report runs/toy/tokenizer.pt --data toy         how good is it? A published VQGAN's checkpoint, too.
"""

import argparse
import hashlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import fetch
from extras.foreign_checkpoint import read_state


class TokenizerError(ValueError):
    """One line: what is wrong with a tokenizer's file and what to do."""


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        groups = max(1, channels // 16)
        self.branch = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))
        nn.init.zeros_(self.branch[-1].weight)  # the block starts as the identity
        nn.init.zeros_(self.branch[-1].bias)

    def forward(self, h):
        return h + self.branch(h)


def normed(channels):
    return [nn.GroupNorm(max(1, channels // 16), channels), nn.SiLU()]


def make_encoder(f, width, blocks, code_dim):
    """(B, 3, H, W) -> (B, code_dim, H/f, W/f). One stride-2 convolution per factor of two; width doubles to 4x."""
    channels = [min(width * 2 ** i, width * 4) for i in range(f.bit_length() - 1)]
    layers = [nn.Conv2d(3, channels[0], 4, stride=2, padding=1)]
    for i, c in enumerate(channels):
        if i > 0:
            layers += [*normed(channels[i - 1]), nn.Conv2d(channels[i - 1], c, 4, stride=2, padding=1)]
        layers += [ResBlock(c) for _ in range(blocks)]
    return nn.Sequential(*layers, *normed(channels[-1]), nn.Conv2d(channels[-1], code_dim, 1))


def make_decoder(f, width, blocks, code_dim):
    """(B, code_dim, h, w) -> (B, 3, h f, w f). Sub-pixel convolutions: 3x3 to four times the channels, shuffled."""
    channels = [min(width * 2 ** i, width * 4) for i in range(f.bit_length() - 1)][::-1]
    layers = [nn.Conv2d(code_dim, channels[0], 3, padding=1)]
    for i, c in enumerate(channels):
        layers += [ResBlock(c) for _ in range(blocks)]
        out = channels[i + 1] if i + 1 < len(channels) else 3
        layers += [*normed(c), nn.Conv2d(c, 4 * out, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)


def nearest_codes(z, codebook):
    """z (M, C), codebook (K, C) -> (M,) indices: argmin_k |z - c_k|^2 = argmin_k |c_k|^2 - 2 z.c_k, in float32."""
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = z.detach().float(), codebook.detach().float()
        return (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)


def several_processes():
    return dist.is_available() and dist.is_initialized()


def gathered(z):
    """z (M, C) of every process, in their order -> (M', C): the codebook must see the whole batch."""
    if not several_processes():
        return z
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.contiguous())
    return torch.cat(parts)


def summed(x):
    """x, in place, added up over all processes."""
    if several_processes():
        dist.all_reduce(x)
    return x


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of K codes, in float32.

    update: "ema" (running means, decay per step) or "gradient" (the codebook is a parameter). distance: "euclidean", or
    "cosine": vectors and codes are set to length sqrt(C), so that only their directions count (Yu et al. 2021).
    """

    def __init__(self, K, code_dim, update="ema", distance="euclidean", decay=0.99):
        super().__init__()
        if update not in ("ema", "gradient"):
            raise ValueError(f"codebook update must be ema or gradient, got {update!r}")
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"codebook distance must be euclidean or cosine, got {distance!r}")
        self.K, self.update, self.distance, self.decay = K, update, distance, decay
        codebook = torch.randn(K, code_dim)
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("running_sum", codebook.clone())
        self.register_buffer("running_count", torch.ones(K))  # how often each code is used per step, averaged
        self.register_buffer("initialised", torch.tensor(False))

    def at_length(self, z):
        """z (..., C), with the cosine distance at length sqrt(C)."""
        return F.normalize(z, dim=-1) * z.shape[-1] ** 0.5 if self.distance == "cosine" else z

    @property
    def codes(self):
        """(K, C), as they are used."""
        return self.at_length(self.codebook)

    def rows(self, z_e):
        """z_e (B, C, h, w) -> (B h w, C) in float32, at their length."""
        return self.at_length(z_e.permute(0, 2, 3, 1).reshape(-1, z_e.shape[1]).float())

    def forward(self, z_e, generator=None):
        """z_e (B, C, h, w) -> straight-through z_q (B, C, h, w), tokens (B, h w), commitment and codebook loss.

        In training mode the codebook moves too. generator: torch.Generator on the CPU that picks the vectors from
        which codes start; needed for the first training batch, and equal in all processes.
        """
        B, C, h, w = z_e.shape
        z = self.rows(z_e)                                                                         # (M, C), M = B h w
        if self.training and not self.initialised:
            self.initialise(gathered(z.detach()), generator)
        codes = self.codes
        tokens = nearest_codes(z, codes)                                                           # (M,)
        z_q = F.embedding(tokens, codes)                                                           # (M, C)
        # |z_e - sg[z_q]|^2 trains the encoder only, |sg[z_e] - z_q|^2 the codebook only.
        commitment = (z - z_q.detach()).square().mean()
        codebook = (z.detach() - z_q).square().mean()
        if self.training:
            self.count(z.detach(), tokens)
        # Straight-through, after the losses: forward z_q, backward the decoder's gradient to the encoder unchanged.
        z_q = z + (z_q - z).detach()
        return z_q.view(B, h, w, C).permute(0, 3, 1, 2), tokens.view(B, h * w), commitment, codebook

    @torch.no_grad()
    def initialise(self, z, generator):
        """Data-dependent start: codes are encoder outputs of the first batch, then a few k-means rounds."""
        codes = z[torch.randint(len(z), (self.K,), generator=generator).to(z.device)].clone()
        codes += 1e-3 * z.std(0) * torch.randn(codes.shape, generator=generator).to(z.device)  # no two alike
        for _ in range(10):
            nearest = nearest_codes(z, self.at_length(codes))
            counts = torch.bincount(nearest, minlength=self.K).to(z.dtype)
            sums = torch.zeros_like(codes).index_add_(0, nearest, z)
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
        self.codebook.data.copy_(codes)
        self.running_count.fill_(len(z) / self.K)
        if self.update == "ema":
            self.running_sum.copy_(codes * self.running_count[:, None])
        self.initialised.fill_(True)

    @torch.no_grad()
    def count(self, z, tokens):
        """Running use of each code and, with ema, c_k = (running sum of its vectors) / (running count)."""
        counts = summed(torch.bincount(tokens, minlength=self.K).to(z.dtype))
        self.running_count.lerp_(counts, 1 - self.decay)
        if self.update == "ema":
            sums = summed(torch.zeros_like(self.codebook).index_add_(0, tokens, z))
            self.running_sum.lerp_(sums, 1 - self.decay)
            self.codebook.copy_(self.running_sum / self.running_count.clamp(min=1e-6)[:, None])

    @torch.no_grad()
    def restart_dead_codes(self, z_e, generator, threshold=0.05):
        """Codes used less than threshold times the mean restart at vectors of the batch. Returns how many (tensor).

        Vectors far from their code are the likelier to be chosen (probability ~ squared distance): they are badly
        served now. Every process sees all vectors and draws the same ones.
        """
        z = gathered(self.rows(z_e))                                                               # (M, C)
        mean_count = self.running_count.mean()
        dead = self.running_count < threshold * mean_count                                         # (K,)
        codes = self.codes
        error = (z - codes[nearest_codes(z, codes)]).square().sum(1).cpu() + 1e-12                 # (M,)
        # Two codes at one place would be one code: without replacement, as long as there are vectors enough.
        chosen = torch.multinomial(error, self.K, replacement=len(z) < self.K, generator=generator).to(z.device)
        fresh = torch.where(dead[:, None], z[chosen], self.codebook)
        # A fresh code must not die at the next look: give it half the mean use.
        count = torch.where(dead, 0.5 * mean_count, self.running_count)
        self.codebook.data.copy_(fresh)
        if self.update == "ema":
            self.running_sum.copy_(torch.where(dead[:, None], fresh * count[:, None], self.running_sum))
        self.running_count.copy_(count)
        return dead.sum()


class VQVAE(nn.Module):
    """Encoder, quantiser, decoder.

    size: pixels a side; f: down-sampling factor, a power of two that divides size; K: codes; code_dim: their width C;
    width, blocks: channels of the first level and residual blocks per level; update, distance: see VectorQuantizer.
    """

    def __init__(self, size, f=4, K=512, code_dim=16, width=64, blocks=1, update="ema", distance="euclidean",
                 bf16=False):
        super().__init__()
        if f < 2 or f & (f - 1) or size % f:
            raise ValueError(f"f = {f} must be a power of two that divides the image size {size}")
        self.size, self.f, self.K, self.grid, self.bf16 = size, f, K, (size // f, size // f), bf16
        self.encoder = make_encoder(f, width, blocks, code_dim)
        self.quantizer = VectorQuantizer(K, code_dim, update, distance)
        self.decoder = make_decoder(f, width, blocks, code_dim)
        self.to(memory_format=torch.channels_last)  # convolutions run faster in this layout, on CPU and GPU

    @property
    def codebook(self):
        """(K, C)"""
        return self.quantizer.codes

    @property
    def last_layer(self):
        """The weights that give the pixels."""
        return self.decoder[-2].weight

    def encode_continuous(self, images):
        """uint8 images (B, 3, H, W) -> z_e (B, C, h, w) in float32."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.encoder(to_float(images).to(memory_format=torch.channels_last)).float()

    def decode_continuous(self, z_q):
        """Codes (B, C, h, w) -> images (B, 3, H, W) in float32, about [-1, 1]."""
        with torch.autocast(z_q.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.decoder(z_q.to(memory_format=torch.channels_last)).float()

    def forward(self, images, generator=None):
        """uint8 images (B, 3, H, W) -> dict: x, x_hat in [-1, 1], two losses, tokens (B, N) and z_e (B, C, h, w)."""
        z_e = self.encode_continuous(images)
        z_q, tokens, commitment, codebook = self.quantizer(z_e, generator)
        return {"x": to_float(images), "x_hat": self.decode_continuous(z_q), "commitment": commitment,
                "codebook": codebook, "tokens": tokens, "z_e": z_e.detach()}

    @torch.no_grad()
    def encode(self, images):
        """uint8 images (B, 3, H, W) -> tokens (B, N) int64, row by row."""
        z = self.encode_continuous(images).permute(0, 2, 3, 1)                                     # (B, h, w, C)
        return nearest_codes(z.reshape(-1, z.shape[-1]), self.codebook).view(len(images), -1)

    @torch.no_grad()
    def decode(self, tokens):
        """tokens (B, N) int64 -> uint8 images (B, 3, H, W)."""
        codes = F.embedding(tokens, self.codebook).view(len(tokens), *self.grid, -1)
        return to_uint8(self.decode_continuous(codes.permute(0, 3, 1, 2)))


# ----------------------------------------------------------------------------
# Losses for 64 pixels and up (VQGAN, Esser et al. 2021). Each can be switched off.

def pixel_loss(x, x_hat, kind):
    """Mean of |x - x_hat|^2 ("l2") or |x - x_hat| ("l1") over everything."""
    return F.mse_loss(x_hat, x) if kind == "l2" else F.l1_loss(x_hat, x)


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
    """The files that hold the LPIPS weights: those given, or both of LPIPS_FILES in torch's cache, else a download.

    TokenizerError (or DataError from the download) says what to do.
    """
    if given:
        missing = [file for file in given if not Path(file).is_file()]
        if missing:
            raise TokenizerError(f"--lpips-weights {missing[0]}: no such file")
        return [Path(file) for file in given]
    folder, paths = Path(torch.hub.get_dir()) / "checkpoints", []
    for name, (url, checksum) in LPIPS_FILES.items():
        paths.append(folder / name)
        if not paths[-1].is_file():
            if not may_download:
                raise TokenizerError(f"no {name} in {folder}: fetch {url}, or give --lpips-weights")
            folder.mkdir(parents=True, exist_ok=True)
            fetch([url], paths[-1], checksum, "give --lpips-weights")
        elif hashlib.sha256(paths[-1].read_bytes()).hexdigest() != checksum:
            raise TokenizerError(f"{paths[-1]} is cut short or altered: delete it, and fetch {url}")
    return paths


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
        raise TokenizerError(f"{', '.join(map(str, paths))}: {len(absent)} of LPIPS' {len(missing)} weights are not "
                             f"there, {absent[0]} for one: give {' and '.join(LPIPS_FILES)}, or a file that has both")
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


def hinge_loss(real, fake):
    """L_D = 1/2 E[ max(0, 1 - D(x)) ] + 1/2 E[ max(0, 1 + D(x_hat)) ]; the decoder's side is L_G = -E[ D(x_hat) ]."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction, adversarial, last_layer, largest=100.0):
    """|d L_rec / d W| / |d L_G / d W|, W the decoder's last layer: both losses pull equally hard there (Esser et al.).

    In float32 and clamped: where the discriminator has no gradient the quotient explodes. The same in all processes.
    """
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
                 for loss in (reconstruction, adversarial)]
    a, b = (summed(gradient).norm() for gradient in gradients)
    return (a / (b + 1e-6)).clamp(max=largest).detach()


# ----------------------------------------------------------------------------
# Published tokenizers: the VQGANs of taming-transformers (Esser et al. 2021) and the vq-f4, f8, f16 first stages of
# latent-diffusion (Rombach et al. 2022), which share one layout.

class PublishedVQGAN(nn.Module):
    """A published first stage, to encode and decode with. The same interface as VQVAE, without training.

    shapes: {published name: shape} of its weights, as read_published returns them; there is no other configuration:
    levels, attention and widths are read off the names and shapes. size: pixels a side.
    """

    def __init__(self, shapes, size, bf16=False):
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(torch.zeros(shape), requires_grad=False))
        self.shapes, self.size, self.bf16 = {name: list(shape) for name, shape in shapes.items()}, size, bf16
        self.f, self.K, _ = read_off(shapes)
        if size % self.f:
            raise TokenizerError(f"this tokenizer reduces by {self.f}, and {size} pixels are no multiple of it")
        self.grid = (size // self.f, size // self.f)

    @property
    def codebook(self):
        return self.quantize.embedding.weight

    def encode_continuous(self, images):
        """uint8 images (B, 3, H, W) -> z_e (B, C, h, w) in float32."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            h = conv(to_float(images), self.encoder.conv_in)
            for _, level in sorted(self.encoder.down.named_children(), key=by_number):
                h = through_level(h, level)
                if hasattr(level, "downsample"):
                    h = conv(F.pad(h, (0, 1, 0, 1)), level.downsample.conv, stride=2, padding=0)
            return conv(through_end(h, self.encoder, self.encoder.mid), self.quant_conv, padding=0).float()

    def decode_continuous(self, z_q):
        """Codes (B, C, h, w) -> images (B, 3, H, W) in float32, about [-1, 1]."""
        with torch.autocast(z_q.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            h = z_q.contiguous()  # channels first: PyTorch's group norm rounds less in this layout
            h = conv(conv(h, self.post_quant_conv, padding=0), self.decoder.conv_in)
            h = through_middle(h, self.decoder.mid)
            for _, level in sorted(self.decoder.up.named_children(), key=by_number, reverse=True):
                h = through_level(h, level)
                if hasattr(level, "upsample"):
                    h = conv(F.interpolate(h, scale_factor=2.0, mode="nearest"), level.upsample.conv)
            return through_end(h, self.decoder).float()

    encode = VQVAE.encode
    decode = VQVAE.decode


def read_off(shapes):
    """{name: shape} of a published tokenizer -> its down-sampling factor, number of codes and their width."""
    return (2 ** sum("downsample.conv.weight" in name for name in shapes), *shapes["quantize.embedding.weight"])


def by_number(item):
    return int(item[0])


def conv(x, weights, stride=1, padding=1):
    return F.conv2d(x, weights.weight, weights.bias, stride, padding)


def norm(x, weights):
    return F.group_norm(x, 32, weights.weight, weights.bias, eps=1e-6)


def residual(x, weights):
    h = conv(F.silu(norm(x, weights.norm1)), weights.conv1)
    h = conv(F.silu(norm(h, weights.norm2)), weights.conv2)
    return h + (conv(x, weights.nin_shortcut, padding=0) if hasattr(weights, "nin_shortcut") else x)


def attention(x, weights):
    """One head over all positions, as wide as there are channels."""
    h = norm(x, weights.norm)
    q, k, v = (conv(h, w, padding=0).flatten(2).transpose(1, 2) for w in (weights.q, weights.k, weights.v))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)                   # (B, C, h, w)
    return x + conv(h, weights.proj_out, padding=0)


def through_level(h, level):
    attentions = dict(level.attn.named_children()) if hasattr(level, "attn") else {}
    for name, block in sorted(level.block.named_children(), key=by_number):
        h = residual(h, block)
        if name in attentions:
            h = attention(h, attentions[name])
    return h


def through_middle(h, mid):
    return residual(attention(residual(h, mid.block_1), mid.attn_1), mid.block_2)


def through_end(h, part, mid=None):
    return conv(F.silu(norm(through_middle(h, mid) if mid else h, part.norm_out)), part.conv_out)


PUBLISHED_PARTS = ("encoder.", "decoder.", "quantize.embedding.weight", "quant_conv.", "post_quant_conv.")


def read_published(path):
    """State dict {name: float32 tensor} of the first stage in a checkpoint of taming-transformers or latent-diffusion.

    Such files hold pickled objects of other libraries beside the weights, of which nothing is imported or executed.
    Discriminator and LPIPS weights are left out. TokenizerError if this is no such file.
    """
    state = {name.removeprefix("first_stage_model."): value for name, value in read_state(path).items()}
    if "quantize.embed.weight" in state:
        raise TokenizerError(f"{path} is a VQGAN with Gumbel quantiser, which is not supported: take one without")
    state = {name: value.float() for name, value in state.items() if name.startswith(PUBLISHED_PARTS)}
    missing = [part for part in PUBLISHED_PARTS if not any(name.startswith(part) for name in state)]
    if missing:
        raise TokenizerError(f"{path} is neither a tokenizer of train.py nor a VQGAN of taming-transformers or "
                             f"latent-diffusion: it has no {missing[0].rstrip('.')}")
    return state


def digest(weights):
    """A short hash of {name: tensor}."""
    content = hashlib.sha256()
    for name, value in sorted(weights.items()):
        content.update(name.encode() + value.cpu().numpy().tobytes())
    return content.hexdigest()[:16]


def make(config, bf16=False):
    """The tokenizer that a checkpoint's configuration describes: a VQVAE, or a PublishedVQGAN."""
    if "published" in config:
        return PublishedVQGAN(config["published"], config["size"], bf16)
    return VQVAE(**config, bf16=bf16)


# ----------------------------------------------------------------------------

def to_float(images):
    """uint8 0 ... 255 -> float32 -1 ... 1."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1 ... 1 -> uint8 0 ... 255, rounded and clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def usage_and_perplexity(counts):
    """counts (K,) of each code over a whole data set -> (share of codes used at least once, exp of the entropy).

    Perplexity K means that all codes are used equally, 1 that a single one is used. Both are taken over every token
    of the set, never over a batch.
    """
    p = counts.double() / counts.sum()
    return float((counts > 0).double().mean()), float(torch.special.entr(p).sum().exp())


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of two batches of uint8 images (B, 3, H, W) -> (B,), 1 for equal ones.

    Per channel, in an 11 x 11 Gaussian window (sigma 1.5), where the window lies inside the image; the means of both.
    In images of less than 11 pixels the window is as large as fits.
    """
    size = min(11, min(a.shape[2:]) - 1 + min(a.shape[2:]) % 2)  # odd
    window = torch.exp(-0.5 * ((torch.arange(size, device=a.device) - size // 2) / 1.5) ** 2)
    window = window / window.sum()

    def blur(x):
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    x, y = (images.float().reshape(-1, 1, *images.shape[2:]) / 255 for images in (a, b))           # (3 B, 1, H, W)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x ** 2, blur(y * y) - mean_y ** 2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similar = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)
               / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2)))
    return similar.reshape(len(a), -1).mean(1)


@torch.no_grad()
def evaluate(model, dataset, device, lpips=None, batch=256):
    """Over a whole data.ImageSet: {"psnr" in dB, "ssim", "usage", "perplexity"}, and "lpips" by a network LPIPS.

    PSNR = 10 log10(255^2 / MSE), the MSE over all pixels and channels of the set, reconstructions rounded to uint8.
    SSIM, LPIPS: means over the images.
    """
    model.eval()
    squared_error, similar, perceived, counts = 0.0, 0.0, 0.0, torch.zeros(model.K, dtype=torch.int64)
    for start in range(0, len(dataset), batch):
        images = dataset.batch(range(start, min(start + batch, len(dataset)))).to(device)
        tokens = model.encode(images)
        decoded = model.decode(tokens)
        squared_error += float((decoded.int() - images.int()).square().sum(dtype=torch.int64))
        similar += float(ssim(images, decoded).sum())
        if lpips is not None:
            perceived += sum(float(lpips(to_float(a), to_float(b)).sum())
                             for a, b in zip(images.split(16), decoded.split(16), strict=True))
        counts += torch.bincount(tokens.flatten(), minlength=model.K).cpu()
    mse = squared_error / (len(dataset) * 3 * model.size ** 2)
    psnr = 10 * float(torch.log10(torch.tensor(255.0 ** 2 / max(mse, 1e-10), dtype=torch.float64)))
    usage, perplexity = usage_and_perplexity(counts)
    return {"psnr": psnr, "ssim": similar / len(dataset), "usage": usage, "perplexity": perplexity,
            **({"lpips": perceived / len(dataset)} if lpips is not None else {})}


@torch.no_grad()
def encode_sets(model, train, test, path, device, should_stop=lambda: False, batch=256, flip=False):
    """Encodes two data.ImageSets into one memory-mapped file, training images first. True when it is complete.

    path: a .npy of one structured row per image: x (N,) uint16, label int32, test bool; the title of the field x names
    the tokenizer by its hash. With flip, all training images follow once more, mirrored. The file appears when all is
    done; till then a .part.npy, in which label -1 marks the rows to do, lets a second call go on where the first
    stopped. The next images are read while these are encoded.
    """
    model.eval()
    partial, starts = path.with_suffix(".part.npy"), [0, len(train)][:1 + flip]
    total = len(starts) * len(train) + len(test)
    maker = f"tokenizer {digest(model.state_dict())}"
    dtype = [((maker, "x"), np.uint16, (model.grid[0] * model.grid[1],)), ("label", np.int32), ("test", bool)]
    if not partial.exists():
        fresh = path.with_suffix(".new.npy")  # half a file without marks would look like a finished one
        np.lib.format.open_memmap(fresh, mode="w+", dtype=dtype, shape=(total,))["label"] = -1
        fresh.replace(partial)
    rows, todo = np.load(partial, mmap_mode="r+"), []
    if rows.shape != (total,) or rows.dtype != np.dtype(dtype):
        raise ValueError(f"{partial} is of other images or another tokenizer: delete it")
    for dataset, offsets in ((train, starts), (test, [total - len(test)])):
        for first in range(0, len(dataset), batch):
            indices = range(first, min(first + batch, len(dataset)))
            places = [slice(offset + first, offset + indices.stop) for offset in offsets]
            if any((rows["label"][here] < 0).any() for here in places):
                todo.append((dataset, indices, places))

    def read(i):
        return todo[i][0].batch(todo[i][1]) if i < len(todo) else None

    remaining = sum(len(indices) * len(places) for _, indices, places in todo)
    with ThreadPoolExecutor(1) as reader, tqdm(total=total, initial=total - remaining, desc="tokens", unit="img",
                                               disable=None, leave=False) as bar:
        ahead = reader.submit(read, 0)
        for i, (dataset, indices, places) in enumerate(todo):
            if should_stop():
                return False
            images, ahead = ahead.result().to(device), reader.submit(read, i + 1)
            for here, oriented in zip(places, (images, images.flip(3)), strict=False):
                rows["x"][here] = model.encode(oriented).cpu().numpy()
                rows["test"][here] = dataset is test
                bar.update(len(images))
            rows.flush()  # tokens are on the disk before the labels say so, whatever happens in between
            for here in places:
                rows["label"][here] = dataset.labels[indices.start:indices.stop].numpy()
    rows.flush()
    del rows
    partial.replace(path)
    return True


# ----------------------------------------------------------------------------
# python vqvae.py report TOKENIZER --data ...

def report(args):
    """Measures a tokenizer on held-out images, and draws some of them above their reconstructions."""
    import data  # the command line alone needs the other files
    import fid
    from sample import choose_device
    from train import read_tokenizer
    device = choose_device(args.device)
    state = read_tokenizer(args.tokenizer)
    source = data.find(args.data, args.root)
    size = state["config"].get("size") or args.size or source.sizes()[1]
    if args.size and args.size != size:
        raise TokenizerError(f"{args.tokenizer} is made for images of {size} pixels: leave --size away")
    model = make(state["config"] | {"size": size}).to(device).eval()
    model.load_state_dict(state["tokenizer"])
    tokens = model.grid[0] * model.grid[1]
    print(f"{args.tokenizer}: {model.K} codes, f = {model.f}, {tokens} tokens of {size} x {size} pixels")
    _, held_out = source.load(size)
    lpips = None
    try:
        lpips = LPIPS(read_lpips(find_lpips(args.lpips_weights, may_download=False))).to(device)
    except TokenizerError as error:
        if args.lpips_weights:
            raise
        print(f"no LPIPS: {error}")
    found = evaluate(model, held_out, device, lpips)
    try:
        network = fid.load_inception(fid.find_weights(args.weights, may_download=False), device)
        statistics = [fid.measure(pictures, network, keep=0) for pictures in
                      (fid.Decoded(held_out), fid.Decoded(Reconstructions(model, held_out, device)))]
        found["rfid"] = fid.compare(*statistics)["fid"]
    except fid.FIDError as error:
        print(f"no rFID: {error}")
    print(f"{len(held_out):,} held-out images of {args.data}: "
          + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    shown = held_out.batch(range(min(len(held_out), 16)))
    columns = min(8, len(shown))
    decoded = model.decode(model.encode(shown.to(device))).cpu()
    rows = [images[i:i + columns] for i in range(0, len(shown), columns) for images in (shown, decoded)]
    data.save_grid(torch.cat(rows), args.out, columns)
    print(f"wrote {args.out}")


class Reconstructions:
    """A data.ImageSet as a tokenizer returns it."""

    def __init__(self, model, dataset, device):
        self.model, self.dataset, self.device, self.labels = model, dataset, device, dataset.labels

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices):
        return self.model.decode(self.model.encode(self.dataset.batch(indices).to(self.device))).cpu()


def main():
    parser = argparse.ArgumentParser(description="How good is a tokenizer?")
    parser.add_argument("command", choices=["report"], help="measure it on held-out images")
    parser.add_argument("tokenizer", help="tokenizer.pt of train.py, or a published VQGAN's checkpoint")
    parser.add_argument("--data", default="toy", help="as for train.py (default: toy)")
    parser.add_argument("--root", metavar="DIR", help="where a named set lies, as for train.py")
    parser.add_argument("--size", type=int, help="pixels a side, for a published one (default: as the images are)")
    parser.add_argument("--weights", help="the Inception weights, for rFID (default: $FID_WEIGHTS or the cache)")
    parser.add_argument("--lpips-weights", nargs="+", metavar="FILE",
                        help="for LPIPS, as for train.py (default: those in torch's cache)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--out", default="report.png", help="the picture to write (default: report.png)")
    try:
        report(parser.parse_args())
    except ValueError as error:  # TokenizerError, DataError, CheckpointError are
        print(f"vqvae.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
