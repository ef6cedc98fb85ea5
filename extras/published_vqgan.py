"""Published tokenizers: the VQGANs of taming-transformers (Esser et al. 2021) and the vq-f4, f8, f16 first stages of
latent-diffusion (Rombach et al. 2022), which share one layout. Called by engine/tokens.py for --tokenizer FILE.
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine.read_back import check_tensor, load_weights, reason_of
from extras.foreign_checkpoint import CheckpointError, read_state
from vqvae import VQVAE, to_float


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
        self.f, self.K, _ = read_geometry(shapes)
        if size % self.f:
            raise CheckpointError(f"this tokenizer reduces by {self.f}, and {size} pixels are no multiple of it")
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


def read_geometry(shapes):
    """{name: shape} of a published tokenizer -> its down-sampling factor, number of codes and their width."""
    levels, codebook = sum("downsample.conv.weight" in name for name in shapes), shapes["quantize.embedding.weight"]
    if levels > 8 or len(codebook) != 2 or not 2 <= codebook[0] <= 1 << 16:
        raise CheckpointError(f"a published tokenizer reduces by 1 to 256 and has 2 to 65,536 codes, this one by "
                              f"2^{levels} and a codebook of shape {list(codebook)}")
    return 2 ** levels, *codebook


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
    Discriminator and LPIPS weights are left out. Four tokens are encoded and decoded: do the layers fit together?
    CheckpointError if this is no such file.
    """
    state = {name.removeprefix("first_stage_model."): value for name, value in read_state(path).items()}
    if "quantize.embed.weight" in state:
        raise CheckpointError(f"{path} is a VQGAN with Gumbel quantiser, which is not supported: take one without")
    state = {name: value.float() for name, value in state.items() if name.startswith(PUBLISHED_PARTS)}
    missing = [part for part in PUBLISHED_PARTS if not any(name.startswith(part) for name in state)]
    if missing:
        raise CheckpointError(f"{path} is neither a tokenizer of train.py nor a VQGAN of taming-transformers or "
                              f"latent-diffusion: it has no {missing[0].rstrip('.')}")
    for name, value in state.items():
        check_tensor(f"{path}: {name}", value)
    try:
        shapes = {name: list(value.shape) for name, value in state.items()}
        size = 2 * read_geometry(shapes)[0]
        model = load_weights(path, lambda: PublishedVQGAN(shapes, size), state)
        image = model.decode(model.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8)))
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # a layer that is not there, or of another shape
        raise CheckpointError(f"{path} is refused: its layers do not fit together ({reason_of(error)})") from error
    if image.shape != (1, 3, size, size):
        raise CheckpointError(f"{path} is refused: of {size} x {size} pixels it makes {list(image.shape)}")
    return state


def make_tokenizer(config, bf16=False):
    """The tokenizer that a checkpoint's configuration describes: a VQVAE, or a PublishedVQGAN."""
    if "published" in config:
        return PublishedVQGAN(config["published"], config["size"], bf16)
    return VQVAE(**config, bf16=bf16)
