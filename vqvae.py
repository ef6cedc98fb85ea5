"""The tokenizer: a VQ-VAE (van den Oord et al. 2017) that turns an image into a small grid of discrete tokens.

    image (B, 3, H, W) in [-1, 1]  ->  encoder  ->  z_e (B, h, w, C)  ->  nearest code  ->  tokens (B, h * w)
    tokens  ->  their codes z_q (B, h, w, C)  ->  decoder  ->  image,            h = H / f, w = W / f

    L = |x - x_hat|^2  +  beta |z_e - sg[z_q]|^2  +  |sg[z_e] - z_q|^2
        reconstruction    commitment (encoder)       codebook (codes)

sg = stop-gradient. The decoder's gradient passes straight through the quantiser to the encoder. The codebook is either
moved by the third term (`gradient`) or replaced by running means of the encoder's outputs (`ema`, the default, in
which case the third term is reported but not trained). It starts from data, and codes that are no longer used
restart at encoder outputs of the current batch. The paper uses such a tokenizer, pre-trained; the network here is ours.

    python vqvae.py report runs/toy/tokenizer.pt --data toy         how good is it? A published VQGAN's checkpoint, too.
"""

import argparse
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


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


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of K codes (squared Euclidean distance, computed in float32).

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

    def nearest(self, z):
        """z (M, C) -> indices (M,) of the nearest codes."""
        return nearest_codes(z, self.codebook)

    def forward(self, z_e, generator=None):
        """z_e (B, C, h, w) -> straight-through z_q (B, C, h, w), tokens (B, h w), commitment and codebook loss.

        In training mode the codebook moves too. generator: torch.Generator on the CPU that picks the vectors from
        which codes start; needed for the first training batch.
        """
        B, C, h, w = z_e.shape
        z = z_e.permute(0, 2, 3, 1).reshape(-1, C).float()                                         # (M, C), M = B h w
        if self.training and not self.initialised:
            self.initialise(z.detach(), generator)
        tokens = self.nearest(z)                                                                   # (M,)
        z_q = F.embedding(tokens, self.codebook)                                                   # (M, C)
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
            nearest = (codes.square().sum(1) - 2 * z @ codes.T).argmin(1)
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
        counts = torch.bincount(tokens, minlength=self.K).to(z.dtype)
        self.running_count.lerp_(counts, 1 - self.decay)
        if self.update == "ema":
            self.running_sum.lerp_(torch.zeros_like(self.codebook).index_add_(0, tokens, z), 1 - self.decay)
            self.codebook.copy_(self.running_sum / self.running_count.clamp(min=1e-6)[:, None])

    @torch.no_grad()
    def restart_dead_codes(self, z_e, generator, threshold=0.05):
        """Codes used less than threshold times the mean restart at vectors of the batch. Returns how many (tensor).

        Vectors far from their code are the likelier to be chosen (probability ~ squared distance): they are badly
        served now.
        """
        z = z_e.permute(0, 2, 3, 1).reshape(-1, z_e.shape[1]).float()                              # (M, C)
        mean_count = self.running_count.mean()
        dead = self.running_count < threshold * mean_count                                         # (K,)
        error = (z - self.codebook[self.nearest(z)]).square().sum(1).cpu() + 1e-12                 # (M,)
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
    width, blocks: channels of the first level and residual blocks per level.
    """

    def __init__(self, size, f=4, K=512, code_dim=16, width=64, blocks=1, update="ema", bf16=False):
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

    def encode_continuous(self, images):
        """uint8 images (B, 3, H, W) -> z_e (B, C, h, w) in float32."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.encoder(to_float(images).to(memory_format=torch.channels_last)).float()

    def decode_continuous(self, z_q):
        """Codes (B, C, h, w) -> images (B, 3, H, W) in float32, about [-1, 1]."""
        with torch.autocast(z_q.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.decoder(z_q.to(memory_format=torch.channels_last)).float()

    def forward(self, images, generator=None):
        """uint8 images (B, 3, H, W) -> dict: the three loss terms, tokens (B, N) and z_e (B, C, h, w)."""
        z_e = self.encode_continuous(images)
        z_q, tokens, commitment, codebook = self.quantizer(z_e, generator)
        reconstruction = (self.decode_continuous(z_q) - to_float(images)).square().mean()
        return {"reconstruction": reconstruction, "commitment": commitment, "codebook": codebook,
                "tokens": tokens, "z_e": z_e.detach()}

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


class Inert:
    """Stands for what a pickle names beside tensors: it can be called and filled, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def ignore(self, *args, **kwargs):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = update = ignore


class InertPickle:
    """A pickle module for torch.load that builds tensors and plain containers, and imports nothing.

    What the libraries that wrote such files left in them becomes Inert; any other name in the pickle is refused.
    """

    class Unpickler(pickle.Unpickler):
        BUILT = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"),
                 ("torch._utils", "_rebuild_parameter"), ("torch", "Size")}
        LEFT_ALONE = {"pytorch_lightning", "lightning", "omegaconf", "numpy", "argparse", "pathlib", "collections",
                      "torch", "taming", "ldm", "main", "_codecs", "copyreg"}
        PLAIN = {"set", "frozenset", "list", "dict", "tuple", "object", "int", "float", "bool", "complex", "bytearray"}

        def find_class(self, module, name):
            is_storage = module == "torch" and name.isidentifier() and name.endswith("Storage")
            if (module, name) in self.BUILT or is_storage:
                return super().find_class(module, name)
            plain = module in ("builtins", "__builtin__") and name in self.PLAIN
            if plain or module.split(".")[0] in self.LEFT_ALONE:
                return Inert
            raise TokenizerError(f"it names {module}.{name}, which has no place in a checkpoint")

    @classmethod
    def load(cls, file, **options):
        return cls.Unpickler(file, **options).load()


PUBLISHED_PARTS = ("encoder.", "decoder.", "quantize.embedding.weight", "quant_conv.", "post_quant_conv.")


def read_published(path):
    """State dict {name: float32 tensor} of the first stage in a checkpoint of taming-transformers or latent-diffusion.

    Such files hold pickled objects of other libraries beside the weights. Nothing of theirs is imported or executed.
    Discriminator and LPIPS weights are left out. TokenizerError if this is no such file.
    """
    try:
        content = torch.load(path, map_location="cpu", pickle_module=InertPickle, weights_only=False)
    except TokenizerError as error:
        raise TokenizerError(f"{path} is refused: {error}") from error
    except Exception as error:  # damaged files raise all sorts of things here
        raise TokenizerError(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {str(name).removeprefix("first_stage_model."): value for name, value in state.items()}
    if "quantize.embed.weight" in state:
        raise TokenizerError(f"{path} is a VQGAN with Gumbel quantiser, which is not supported: take one without")
    state = {name: value.float() for name, value in state.items()
             if name.startswith(PUBLISHED_PARTS) and isinstance(value, torch.Tensor)}
    missing = [part for part in PUBLISHED_PARTS if not any(name.startswith(part) for name in state)]
    if missing:
        raise TokenizerError(f"{path} is neither a tokenizer of train.py nor a VQGAN of taming-transformers or "
                             f"latent-diffusion: it has no {missing[0].rstrip('.')}")
    return state


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
def evaluate(model, dataset, device, batch=256):
    """Over a whole data.ImageSet: {"psnr" in dB, "ssim", "usage", "perplexity"}.

    PSNR = 10 log10(255^2 / MSE), the MSE over all pixels and channels of the set, reconstructions rounded to uint8.
    SSIM: mean over the images.
    """
    model.eval()
    squared_error, similar, counts = 0.0, 0.0, torch.zeros(model.K, dtype=torch.int64)
    for start in range(0, len(dataset), batch):
        images = dataset.batch(range(start, min(start + batch, len(dataset)))).to(device)
        tokens = model.encode(images)
        decoded = model.decode(tokens)
        squared_error += float((decoded.int() - images.int()).square().sum(dtype=torch.int64))
        similar += float(ssim(images, decoded).sum())
        counts += torch.bincount(tokens.flatten(), minlength=model.K).cpu()
    mse = squared_error / (len(dataset) * 3 * model.size ** 2)
    psnr = 10 * float(torch.log10(torch.tensor(255.0 ** 2 / max(mse, 1e-10), dtype=torch.float64)))
    usage, perplexity = usage_and_perplexity(counts)
    return {"psnr": psnr, "ssim": similar / len(dataset), "usage": usage, "perplexity": perplexity}


@torch.no_grad()
def encode_sets(model, train, test, path, device, should_stop=lambda: False, batch=256, flip=False):
    """Encodes two data.ImageSets into one memory-mapped file, training images first. True when it is complete.

    path: a .npy of one structured row per image: x (N,) uint16, label int32, test bool. With flip, all training images
    follow once more, mirrored. The file appears when all is done; till then a .part.npy, in which label -1 marks the
    rows to do, lets a second call go on where the first stopped. The next images are read while these are encoded.
    """
    model.eval()
    partial, starts = path.with_suffix(".part.npy"), [0, len(train)][:1 + flip]
    total = len(starts) * len(train) + len(test)
    dtype = [("x", np.uint16, (model.grid[0] * model.grid[1],)), ("label", np.int32), ("test", bool)]
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
    found = evaluate(model, held_out, device)
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
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--out", default="report.png", help="the picture to write (default: report.png)")
    try:
        report(parser.parse_args())
    except ValueError as error:  # TokenizerError, DataError, CheckpointError are
        print(f"vqvae.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
