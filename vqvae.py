"""The tokenizer: a VQ-VAE (van den Oord et al. 2017) that turns an image into a grid of discrete tokens.

    image (B, 3, H, W) in [-1, 1]  ->  encoder  ->  z_e (B, h, w, C)  ->  nearest code  ->  tokens (B, h * w)
    tokens  ->  their codes z_q (B, h, w, C)  ->  decoder  ->  image,            h = H / f, w = W / f

    L = |x - x_hat|^2  +  beta |z_e - sg[z_q]|^2  +  |sg[z_e] - z_q|^2
        reconstruction    commitment (encoder)       codebook (codes)

sg = stop-gradient. The decoder's gradient passes straight through the quantiser to the encoder. The codebook
is either moved by the third term (`gradient`) or replaced by running means of the encoder's outputs (`ema`,
the default, in which case the third term is reported but not trained). It starts from data, and codes that
are no longer used restart at encoder outputs of the current batch. Codes are narrower than the encoder's
features (factorised codes, Yu et al. 2021): code_dim against up to 4 x width. The paper uses such a
tokenizer, pre-trained; the network here is ours.

From 64 pixels up |x - x_hat|^2 alone blurs; LPIPS and a patch discriminator can join it
(extras/vqgan_losses.py). A published VQGAN can stand in the place of this one (engine/published_vqgan.py).

    python vqvae.py report runs/toy/tokenizer.pt --data toy      how good is it? A published VQGAN, too.
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine.distributed import all_gather_cat, all_reduce_sum, copy_from_first, rank_and_world


def normed(channels):
    return [nn.GroupNorm(max(1, channels // 16), channels), nn.SiLU()]


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(*normed(channels), nn.Conv2d(channels, channels, 3, padding=1),
                                    *normed(channels), nn.Conv2d(channels, channels, 3, padding=1))
        nn.init.zeros_(self.branch[-1].weight)  # the block starts as the identity
        nn.init.zeros_(self.branch[-1].bias)

    def forward(self, h):
        return h + self.branch(h)


def make_encoder(f, width, blocks, code_dim):
    """(B, 3, H, W) -> (B, code_dim, H/f, W/f). Stride-2 convolutions; width doubles up to 4x."""
    channels = [min(width * 2 ** i, width * 4) for i in range(f.bit_length() - 1)]
    layers = [nn.Conv2d(3, channels[0], 4, stride=2, padding=1)]
    for i, c in enumerate(channels):
        if i > 0:
            layers += [*normed(channels[i - 1]), nn.Conv2d(channels[i - 1], c, 4, stride=2, padding=1)]
        layers += [ResBlock(c) for _ in range(blocks)]
    return nn.Sequential(*layers, *normed(channels[-1]), nn.Conv2d(channels[-1], code_dim, 1))


def make_decoder(f, width, blocks, code_dim):
    """(B, code_dim, h, w) -> (B, 3, h f, w f). Sub-pixel convolutions."""
    channels = [min(width * 2 ** i, width * 4) for i in range(f.bit_length() - 1)][::-1]
    layers = [nn.Conv2d(code_dim, channels[0], 3, padding=1)]
    for i, c in enumerate(channels):
        layers += [ResBlock(c) for _ in range(blocks)]
        out = channels[i + 1] if i + 1 < len(channels) else 3
        layers += [*normed(c), nn.Conv2d(c, 4 * out, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)


def nearest_codes(z, codebook):
    """z (M, C), codebook (K, C) -> (M,) indices: argmin_k |z - c_k|^2 = argmin_k |c_k|^2 - 2 z.c_k."""
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = z.detach().float(), codebook.detach().float()
        return (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of K codes, in float32.

    update: "ema" (running means, decay per step) or "gradient" (the codebook is a parameter).
    """

    def __init__(self, K, code_dim, update="ema", decay=0.99):
        super().__init__()
        if update not in ("ema", "gradient"):
            raise ValueError(f"codebook update must be ema or gradient, got {update!r}")
        self.K, self.update, self.decay = K, update, decay
        codebook = torch.randn(K, code_dim)
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("running_sum", codebook.clone())
        self.register_buffer("running_count", torch.ones(K))  # how often each code is used per step, averaged
        self.register_buffer("initialised", torch.tensor(False))
        self.has_codes = False  # the same, once it was read: on a GPU that takes a wait

    def flatten(self, z_e):
        """z_e (B, C, h, w) -> (B h w, C) in float32."""
        return z_e.permute(0, 2, 3, 1).reshape(-1, z_e.shape[1]).float()

    def forward(self, z_e, generator=None):
        """z_e (B, C, h, w) -> straight-through z_q (B, C, h, w), tokens (B, h w), two losses.

        In training mode the codebook moves too. generator: torch.Generator on the CPU that picks the vectors
        from which codes start; needed for the first training batch, and equal in all processes.
        """
        B, C, h, w = z_e.shape
        z = self.flatten(z_e)                                                              # (M, C), M = B h w
        if self.training and not self.has_codes:
            if not self.initialised:
                self.initialise(all_gather_cat(z.detach()), generator)
            self.has_codes = True
        tokens = nearest_codes(z, self.codebook)                                           # (M,)
        z_q = F.embedding(tokens, self.codebook)                                           # (M, C)
        # |z_e - sg[z_q]|^2 trains the encoder only, |sg[z_e] - z_q|^2 the codebook only.
        commitment = (z - z_q.detach()).square().mean()
        codebook = (z.detach() - z_q).square().mean()
        if self.training:
            self.count(z.detach(), tokens)  # the codebook moves here, before the gradient is known
        # Straight-through, after the losses: forward z_q, backward the decoder's gradient, unchanged.
        z_q = z + (z_q - z).detach()
        return z_q.view(B, h, w, C).permute(0, 3, 1, 2), tokens.view(B, h * w), commitment, codebook

    @torch.no_grad()
    def initialise(self, z, generator):
        """Data-dependent start: codes are encoder outputs of the first batch, then a few k-means rounds."""
        codes = z[torch.randint(len(z), (self.K,), generator=generator).to(z.device)].clone()
        codes += 1e-3 * z.std(0) * torch.randn(codes.shape, generator=generator).to(z.device)  # no two alike
        for _ in range(10):
            nearest = nearest_codes(z, codes)
            counts = torch.bincount(nearest, minlength=self.K).to(z.dtype)
            sums = torch.zeros_like(codes).index_add_(0, nearest, z)
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
        self.codebook.data.copy_(codes)
        self.running_count.fill_(len(z) / self.K)
        if self.update == "ema":
            self.running_sum.copy_(codes * self.running_count[:, None])
        self.initialised.fill_(True)
        copy_from_first(self.state_dict().values())  # sums on a GPU differ in their last bits

    @torch.no_grad()
    def count(self, z, tokens):
        """Running use of each code and, with ema, c_k = (running sum of its vectors) / (running count)."""
        counts = torch.zeros_like(self.running_count).index_add_(0, tokens, torch.ones_like(z[:, 0]))  # (K,)
        sums = torch.zeros_like(self.codebook).index_add_(0, tokens, z)                    # (K, C)
        all_reduce_sum([counts, sums])
        self.running_count.lerp_(counts, 1 - self.decay)
        if self.update == "ema":
            self.running_sum.lerp_(sums, 1 - self.decay)
            self.codebook.copy_(self.running_sum / self.running_count.clamp(min=1e-6)[:, None])

    @torch.no_grad()
    def restart_dead_codes(self, z_e, generator, threshold=0.05):
        """Codes used less than threshold times the mean restart at vectors of the batch. Returns how many.

        Vectors far from their code are the likelier to be chosen (probability ~ squared distance): they are
        badly served now. Every process sees all vectors and draws the same ones.
        """
        z = all_gather_cat(self.flatten(z_e))                                              # (M, C)
        mean_count = self.running_count.mean()
        dead = self.running_count < threshold * mean_count                                 # (K,)
        error = (z - self.codebook[nearest_codes(z, self.codebook)]).square().sum(1).cpu() + 1e-12  # (M,)
        # Two codes at one place would be one code: without replacement, as long as there are vectors enough.
        chosen = torch.multinomial(error, self.K, replacement=len(z) < self.K, generator=generator)
        chosen = chosen.to(z.device)
        fresh = torch.where(dead[:, None], z[chosen], self.codebook)
        # A fresh code must not die at the next look: give it half the mean use.
        count = torch.where(dead, 0.5 * mean_count, self.running_count)
        self.codebook.data.copy_(fresh)
        if self.update == "ema":
            self.running_sum.copy_(torch.where(dead[:, None], fresh * count[:, None], self.running_sum))
        self.running_count.copy_(count)
        copy_from_first(self.state_dict().values())
        return dead.sum()


class VQVAE(nn.Module):
    """Encoder, quantiser, decoder.

    size: pixels a side; f: down-sampling factor, a power of two that divides size; K: codes; code_dim: their
    width C; width, blocks: channels of the first level and residual blocks per level; update: see
    VectorQuantizer.
    """

    def __init__(self, size, f, K, code_dim, width, blocks=1, update="ema", bf16=False):
        super().__init__()
        if f < 2 or f & (f - 1) or size % f:
            raise ValueError(f"f = {f} must be a power of two that divides the image size {size}")
        self.size, self.f, self.K, self.grid, self.bf16 = size, f, K, (size // f, size // f), bf16
        self.encoder = make_encoder(f, width, blocks, code_dim)
        self.quantizer = VectorQuantizer(K, code_dim, update)
        self.decoder = make_decoder(f, width, blocks, code_dim)
        self.to(memory_format=torch.channels_last)  # convolutions run faster in this layout, on CPU and GPU

    @property
    def codebook(self):
        """(K, C)"""
        return self.quantizer.codebook

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
        """uint8 images (B, 3, H, W) -> x, x_hat in [-1, 1], two losses, tokens (B, N), z_e (B, C, h, w)."""
        z_e = self.encode_continuous(images)
        z_q, tokens, commitment, codebook = self.quantizer(z_e, generator)
        return {"x": to_float(images), "x_hat": self.decode_continuous(z_q), "commitment": commitment,
                "codebook": codebook, "tokens": tokens, "z_e": z_e.detach()}

    @torch.no_grad()
    def encode(self, images):
        """uint8 images (B, 3, H, W) -> tokens (B, N) int64, row by row."""
        z = self.encode_continuous(images).permute(0, 2, 3, 1)                             # (B, h, w, C)
        return nearest_codes(z.reshape(-1, z.shape[-1]), self.codebook).view(len(images), -1)

    @torch.no_grad()
    def decode(self, tokens):
        """tokens (B, N) int64 -> uint8 images (B, 3, H, W)."""
        codes = F.embedding(tokens, self.codebook).view(len(tokens), *self.grid, -1)
        return to_uint8(self.decode_continuous(codes.permute(0, 3, 1, 2)))


def to_float(images):
    """uint8 0 ... 255 -> float32 -1 ... 1."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1 ... 1 -> uint8 0 ... 255, rounded and clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------
# How good is it?

def usage_and_perplexity(counts):
    """counts (K,) of each code over a data set -> (share of codes in use, perplexity, exp of the entropy)."""
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

    x, y = (images.float().reshape(-1, 1, *images.shape[2:]) / 255 for images in (a, b))   # (3 B, 1, H, W)
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


if __name__ == "__main__":
    from extras.tokenizer_report import main
    main()
