"""Tokenizers for --tokenizer FILE: VQGANs of taming-transformers (Esser et al. 2021) and the first stages
vq-f4, f8, f16 of latent-diffusion (Rombach et al. 2022), which share one layout.
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine.validate import UserError, check_finite, load_weights, reading
from vqvae import VQVAE, to_float


class PublishedVQGAN(nn.Module):
    """A published first stage, with the interface of VQVAE but for training. size: pixels a side.

    shapes: {published name: shape} of its weights, which say what levels, attention and widths there are.
    """

    def __init__(self, shapes, size, bf16=False):
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.zeros(shape), requires_grad=False))
        self.size, self.bf16 = size, bf16
        self.f, self.K, _ = read_geometry(shapes)
        if size % self.f:
            raise ValueError(f"this tokenizer reduces by {self.f}, and {size} pixels are no multiple of it")
        self.grid = (size // self.f, size // self.f)

    @property
    def codebook(self):
        return self.quantize.embedding.weight

    def encode_continuous(self, images):
        """uint8 images (B, 3, H, W) -> z_e (B, C, h, w) in float32."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            h = conv(to_float(images), self.encoder.conv_in)
            for level in numbered(self.encoder.down):
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
            for level in reversed(numbered(self.decoder.up)):
                h = through_level(h, level)
                if hasattr(level, "upsample"):
                    h = conv(F.interpolate(h, scale_factor=2.0, mode="nearest"), level.upsample.conv)
            return through_end(h, self.decoder).float()

    encode = VQVAE.encode
    decode = VQVAE.decode


def read_geometry(shapes):
    """{name: shape} of a published tokenizer -> its down-sampling factor, number of codes and their width."""
    levels = sum("downsample.conv.weight" in name for name in shapes)
    K, code_dim = shapes["quantize.embedding.weight"]
    if levels > 8 or not 2 <= K <= 1 << 16:
        raise ValueError(f"it reduces by 2^{levels} and has {K:,} codes, not by 1 to 256 and 2 to 65,536")
    return 2 ** levels, K, code_dim


def numbered(module):
    """The children "0", "1", ... of a module, in order."""
    return [getattr(module, str(i)) for i in range(len(module._modules))]


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
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)           # (B, C, h, w)
    return x + conv(h, weights.proj_out, padding=0)


def through_level(h, level):
    attentions = numbered(level.attn) if hasattr(level, "attn") else []
    for i, block in enumerate(numbered(level.block)):
        h = residual(h, block)
        if i < len(attentions):
            h = attention(h, attentions[i])
    return h


def through_middle(h, mid):
    return residual(attention(residual(h, mid.block_1), mid.attn_1), mid.block_2)


def through_end(h, part, mid=None):
    return conv(F.silu(norm(through_middle(h, mid) if mid else h, part.norm_out)), part.conv_out)


PARTS = ("encoder.", "decoder.", "quantize.embedding.weight", "quant_conv.", "post_quant_conv.")


def first_stage(path, state):
    """{name: float32 tensor} of the first stage in a published state dict; UserError if this is none.

    Other weights are left out. Four tokens are encoded and decoded: do the layers fit together?
    """
    with reading(path, "its layers do not fit together"):
        state = {name.removeprefix("first_stage_model."): value for name, value in state.items()}
        if "quantize.embed.weight" in state:
            raise UserError(f"{path} has a Gumbel quantiser, which is not supported: take one without")
        state = {name: value for name, value in state.items() if name.startswith(PARTS)}
        for part in PARTS:
            if not any(name.startswith(part) for name in state):
                raise UserError(f"{path} is neither of train.py nor a VQGAN of taming-transformers or "
                                f"latent-diffusion: it has no {part.rstrip('.')}")
        for name, value in state.items():
            check_finite(f"{path}: {name[:100]}", value)
            state[name] = value.float()
        shapes = {name: list(value.shape) for name, value in state.items()}
        size = 2 * read_geometry(shapes)[0]
        model = load_weights(path, lambda: PublishedVQGAN(shapes, size), state)
        image = model.decode(model.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8)))
        if image.shape != (1, 3, size, size):
            raise ValueError(f"of {size} x {size} pixels it makes {list(image.shape)}")
    return state
