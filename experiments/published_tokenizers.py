"""Do our PublishedVQGAN and the original code encode and decode alike, with the same weights?

    git clone https://github.com/CompVis/taming-transformers; git clone https://github.com/CompVis/latent-diffusion
    python experiments/published_tokenizers.py taming-transformers latent-diffusion

Builds the original models from their source with random weights, saves them as their training does, with a pickled
callback beside the weights, reads them with read_published and compares tokens and images. What their modules
import and do not need here (PyTorch Lightning, einops) is stood in for. Where torchvision is installed, which their
perceptual loss needs, that is compared too: read by read_lpips from the same kind of file.
"""

import argparse
import hashlib
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from extras.published_vqgan import PublishedVQGAN, read_published  # noqa: E402
from extras.vqgan_losses import LPIPS, read_lpips  # noqa: E402
from vqvae import to_float  # noqa: E402

LAYOUTS = {  # channels, their multiples by level, levels with attention, z channels, code width, codes
    "taming f16, K = 1024": (128, (1, 1, 2, 2, 4), {4}, 256, 256, 1024),
    "latent-diffusion vq-f4": (128, (1, 2, 4), set(), 3, 3, 8192),
    "latent-diffusion vq-f8": (128, (1, 2, 2, 4), {3}, 4, 4, 16384),
}


def layout(channels, multiples, attended, z, code_dim, K, blocks=2):
    """{name: shape} of the weights that the original code makes."""
    shapes = {}

    def put(name, *shape):
        shapes[name + ".weight"], shapes[name + ".bias"] = list(shape), [shape[0]]

    def residual(name, c_in, c_out):
        put(f"{name}.norm1", c_in)
        put(f"{name}.conv1", c_out, c_in, 3, 3)
        put(f"{name}.norm2", c_out)
        put(f"{name}.conv2", c_out, c_out, 3, 3)
        if c_in != c_out:
            put(f"{name}.nin_shortcut", c_out, c_in, 1, 1)

    def attention(name, c):
        put(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            put(f"{name}.{part}", c, c, 1, 1)

    def middle(name, c):
        residual(f"{name}.block_1", c, c)
        attention(f"{name}.attn_1", c)
        residual(f"{name}.block_2", c, c)

    def level(name, c_in, c_out, n, with_attention):
        for j in range(n):
            residual(f"{name}.block.{j}", c_out if j else c_in, c_out)
            if with_attention:
                attention(f"{name}.attn.{j}", c_out)

    widths, last = [channels * m for m in multiples], len(multiples) - 1
    put("encoder.conv_in", channels, 3, 3, 3)
    for i, c in enumerate(widths):
        level(f"encoder.down.{i}", widths[i - 1] if i else channels, c, blocks, i in attended)
        if i < last:
            put(f"encoder.down.{i}.downsample.conv", c, c, 3, 3)
    put("decoder.conv_in", widths[-1], z, 3, 3)
    for i in reversed(range(len(widths))):
        level(f"decoder.up.{i}", widths[min(i + 1, last)], widths[i], blocks + 1, i in attended)
        if i > 0:
            put(f"decoder.up.{i}.upsample.conv", widths[i], widths[i], 3, 3)
    for part, c_last, c_out in (("encoder", widths[-1], z), ("decoder", widths[0], 3)):
        middle(f"{part}.mid", widths[-1])
        put(f"{part}.norm_out", c_last)
        put(f"{part}.conv_out", c_out, c_last, 3, 3)
    shapes["quantize.embedding.weight"] = [K, code_dim]
    put("quant_conv", code_dim, z, 1, 1)
    put("post_quant_conv", z, code_dim, 1, 1)
    return shapes


def digest(shapes):
    """A short hash of a list of names and shapes."""
    text = str(sorted((name, list(shape)) for name, shape in shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def random_weights(shapes, seed=0):
    """From NumPy's generator, the same everywhere; each layer keeps the scale of what it reads."""
    rng, state = np.random.default_rng(seed), {}
    for name, shape in sorted(shapes.items()):
        value = rng.standard_normal(shape) * (np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2)
        state[name] = torch.from_numpy(value + ("norm" in name and name.endswith("weight"))).float()
    return state


def test_images(size, n=2):
    """(n, 3, size, size) uint8 that needs no random numbers."""
    return torch.arange(n * 3 * size * size).view(n, 3, size, size).mul(37).remainder(256).to(torch.uint8)


class Callback:
    """As PyTorch Lightning leaves one in its checkpoints."""

    __module__ = "pytorch_lightning"


def stand_in(name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


def rearrange(x, pattern):
    return {"bchw->bhwc": lambda: x.permute(0, 2, 3, 1), "bhwc->bchw": lambda: x.permute(0, 3, 1, 2),
            "nd->dn": lambda: x.T}[pattern.replace(" ", "")]()


def original(name, taming, latent_diffusion):
    """The VQModel of the original source, in eval mode."""
    nothing = {"instantiate_from_config": lambda config: torch.nn.Identity()}
    stand_in("pytorch_lightning", LightningModule=torch.nn.Module, Callback=Callback)
    stand_in("einops", rearrange=rearrange)
    stand_in("main", **nothing)
    stand_in("ldm.util", **nothing)
    stand_in("ldm.modules.distributions.distributions", DiagonalGaussianDistribution=None)
    stand_in("ldm.modules.attention", LinearAttention=object)
    sys.path[:0] = [taming, latent_diffusion]
    if name.startswith("taming"):
        from taming.models.vqgan import VQModel
    else:
        from ldm.models.autoencoder import VQModel
    channels, multiples, attended, z, code_dim, K = LAYOUTS[name]
    config = dict(double_z=False, z_channels=z, resolution=256, in_channels=3, out_ch=3, ch=channels, dropout=0.0,
                  ch_mult=list(multiples), num_res_blocks=2, attn_resolutions=[256 >> i for i in attended])
    return VQModel(ddconfig=config, lossconfig=None, n_embed=K, embed_dim=code_dim).eval()


def compare_lpips(size):
    """The original perceptual loss, with random weights, and ours: values, and gradients into an image."""
    try:
        import torchvision.models
    except ImportError:
        return print("LPIPS: not compared, torchvision is not installed")
    network = torchvision.models.vgg16  # in its place: the same without downloaded weights
    torchvision.models.vgg16 = lambda pretrained=False: network()
    stand_in("taming.util", get_ckpt_path=None)
    from taming.modules.losses.lpips import LPIPS as TheirLPIPS
    TheirLPIPS.load_from_pretrained = lambda self: None
    torch.manual_seed(0)
    theirs = TheirLPIPS().eval()
    for name, value in theirs.named_parameters():
        if name.startswith("lin"):
            value.abs_()  # as the published ones are
    with tempfile.TemporaryDirectory() as folder:
        state = {f"loss.perceptual_loss.{name}": value for name, value in theirs.state_dict().items()}
        torch.save({"state_dict": state}, Path(folder, "last.ckpt"))
        ours = LPIPS(read_lpips([Path(folder, "last.ckpt")]))
    x, y = to_float(torch.randint(256, (2, 2, 3, size, size)))
    found = []
    for network in (theirs, ours):
        y.requires_grad_(True)
        with torch.enable_grad():
            value = network(x, y).flatten()
            found.append((value.detach(), torch.autograd.grad(value.sum(), y)[0]))
    (a, grad_a), (b, grad_b) = found
    print(f"LPIPS: {[round(v, 6) for v in a.tolist()]}, ours differs by {float(((a - b) / a).abs().max()):.1e} of it, "
          f"the gradient by {float((grad_a - grad_b).norm() / grad_a.norm()):.1e}")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Our PublishedVQGAN beside the original code.")
    parser.add_argument("taming", help="a clone of CompVis/taming-transformers")
    parser.add_argument("latent_diffusion", help="a clone of CompVis/latent-diffusion")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    args = parser.parse_args()
    for name, shape in LAYOUTS.items():
        theirs = original(name, args.taming, args.latent_diffusion)
        theirs.load_state_dict(random_weights(layout(*shape)))
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"state_dict": theirs.state_dict(), "epoch": 3, "callbacks": {Callback: Callback()}},
                       Path(folder, "last.ckpt"))
            state = read_published(Path(folder, "last.ckpt"))
        ours = PublishedVQGAN({key: value.shape for key, value in state.items()}, args.size)
        ours.load_state_dict(state)
        images = test_images(args.size)
        z = theirs.quant_conv(theirs.encoder(images / 127.5 - 1))
        codes, _, (_, _, tokens) = theirs.quantize(z)
        decoded, same = theirs.decode(codes), (ours.encode(images).flatten() == tokens.flatten()).float().mean()
        embedded = F.embedding(tokens.view(len(images), *ours.grid), ours.codebook).permute(0, 3, 1, 2)
        exact = theirs.double().decode(codes.double())  # what float32 alone costs, theirs and ours
        errors = [float((image - exact).abs().max()) for image in (ours.decode_continuous(embedded), decoded)]
        print(f"{name}: {len(state)} weights, layout {digest(layout(*shape))}; {same:.2%} of {tokens.numel()} tokens "
              f"equal ({len(tokens.unique())} different); images, deviation {decoded.std():.2f}, differ by at most "
              f"{float((ours.decode_continuous(embedded) - decoded).abs().max()):.1e}, from the original in float64 by "
              f"{errors[0]:.1e} (the original itself: {errors[1]:.1e})")
    compare_lpips(args.size)


if __name__ == "__main__":
    main()
