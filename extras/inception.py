"""Inception-v3 of December 2015 for TensorFlow, on which all published FID figures rest. torchvision's has
other weights (1000 classes) and other pools. Weights, 96 MB, and names of parameters are pytorch-fid's.
"""

import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from extras.downloads import find_weights

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299  # pixels; the network's input
POOLS = {  # "avg" as in TensorFlow: a mean over the pixels that are there
    "avg": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "max, stride 2": partial(F.max_pool2d, kernel_size=3, stride=2)}


class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU. At stride 1 the padding keeps the size, unless it is given."""
    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding if stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, concatenated in this order. Steps are numbered where a name ends with _.

    A branch is a chain of steps: a convolution (out, kernel[, stride]), a pool by its name, or a list of
    convolutions, a and b, that both read what came before them and are concatenated.
    """

    def __init__(self, channels, **branches):
        super().__init__()
        self.chains = [[] for _ in branches]  # of lists of functions
        for chain, (branch, steps) in zip(self.chains, branches.items(), strict=True):
            width = channels
            for number, step in enumerate(steps, 1):
                name = f"{branch}{number}" if branch.endswith("_") else branch
                if isinstance(step, str):
                    chain.append([POOLS[step]])
                    continue
                shapes = step if isinstance(step, list) else [step]
                names = [name] if len(shapes) == 1 else [name + "a", name + "b"]
                chain.append([ConvBN(width, *shape) for shape in shapes])
                for name, convolution in zip(names, chain[-1], strict=True):
                    self.add_module(name, convolution)
                width = sum(out for out, *_ in shapes)

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            y = x
            for first, *others in chain:
                y = torch.cat([first(y), *(other(y) for other in others)], 1) if others else first(y)
            outputs.append(y)
        return torch.cat(outputs, 1)


def block_a(c, pooled):  # 35 x 35
    return Mixed(c, branch1x1=[(64, 1)], branch5x5_=[(48, 1), (64, 5)],
                 branch3x3dbl_=[(64, 1), (96, 3), (96, 3)], branch_pool=["avg", (pooled, 1)])


def block_c(c, w):  # 17 x 17, 7x7 convolutions as 1x7 and 7x1
    return Mixed(c, branch1x1=[(192, 1)], branch7x7_=[(w, 1), (w, (1, 7)), (192, (7, 1))],
                 branch7x7dbl_=[(w, 1), (w, (7, 1)), (w, (1, 7)), (w, (7, 1)), (192, (1, 7))],
                 branch_pool=["avg", (192, 1)])


def block_e(c, pool):  # 8 x 8
    halves = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(c, branch1x1=[(320, 1)], branch3x3_=[(384, 1), halves],
                 branch3x3dbl_=[(448, 1), (384, 3), halves], branch_pool=[pool, (192, 1)])


class InceptionV3(nn.Module):
    """uint8 images (B, 3, H, W), or a list of (3, H, W) of any sizes -> dict of features (B, width) float32.

    "64", "192", "768", "2048": means over the positions after the two stem pools, Mixed_6e and Mixed_7c.
    "spatial": (B, 17 * 17 * 7), the first 7 channels of Mixed_6d, channels last, for sFID.
    "logits_unbiased": (B, 1008) without the last bias, for the Inception Score.
    resize: "tf" (TensorFlow 1: the FID paper, ADM, EDM, torch-fidelity), "pytorch-fid", "clean" (clean-fid).
    """
    widths = {"2048": 2048, "spatial": 17 * 17 * 7}  # of those whose covariances are measured

    def __init__(self, resize="tf"):
        super().__init__()
        self.resize = resize
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = Mixed(288, branch3x3=[(384, 3, 2)], branch3x3dbl_=[(64, 1), (96, 3), (96, 3, 2)],
                              pool=["max, stride 2"])
        self.Mixed_6b, self.Mixed_6c = block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = Mixed(768, branch3x3_=[(192, 1), (320, 3, 2)],
                              branch7x7x3_=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
                              pool=["max, stride 2"])
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "avg"), block_e(2048, "max")  # as in the 2015 graph
        self.fc = nn.Linear(2048, 1008)

    def prepare(self, images):
        """What the first convolution reads: (B, 3, 299, 299), about [-1, 1]. The aspect ratio is not kept."""
        if isinstance(images, list):
            if len({image.shape for image in images}) > 1:
                return torch.cat([self.prepare(image[None]) for image in images])
            images = torch.stack(images)
        return PREPROCESS[self.resize](images.to(self.fc.weight.device).to(self.fc.weight.dtype))

    @torch.no_grad()
    def forward(self, images):
        taps = {}
        # TF32 would round the features to three digits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self.prepare(images).contiguous(memory_format=torch.channels_last)      # (B, 3, 299, 299)
            x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))                               # (B, 32, 147, 147)
            x = F.max_pool2d(self.Conv2d_2b_3x3(x), 3, 2)                               # (B, 64, 73, 73)
            taps["64"] = x.mean((2, 3))
            x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)           # (B, 192, 35, 35)
            taps["192"] = x.mean((2, 3))
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))           # (B, 768, 17, 17)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
            taps["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1)                   # (B, 2023)
            x = self.Mixed_6e(x)
            taps["768"] = x.mean((2, 3))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                          # (B, 2048, 8, 8)
            taps["2048"] = x.mean((2, 3))
            taps["logits_unbiased"] = F.linear(taps["2048"], self.fc.weight)
        return taps


def resize_tf1(x):
    """(B, 3, H, W) float -> (B, 3, 299, 299): TensorFlow 1's bilinear, pixel i at i H / 299, no antialias."""
    for dim in (3, 2):
        size = x.shape[dim]
        at = torch.arange(SIDE, dtype=torch.float32, device=x.device) * torch.tensor(size / SIDE)
        low = at.long()
        x, after = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1))
        x = x + (after - x) * (at - low).view(-1, *[1] * (3 - dim))
    return x


def resize_clean(x):
    """(B, 3, H, W) float -> (B, 3, 299, 299): Pillow's antialiased bicubic, in float64 as its positions."""
    wide = (x.cpu() if x.is_mps else x).double()
    return F.interpolate(wide, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255).to(x)


PREPROCESS = {  # float 0 ... 255 -> what the first convolution reads
    "tf": lambda x: (resize_tf1(x) - 128) / 128,
    "pytorch-fid": lambda x: 2 * F.interpolate(x / 255, (SIDE, SIDE), mode="bilinear") - 1,
    "clean": lambda x: (resize_clean(x) - 128) / 128,
}


def fold_batch_norm(network):
    """In place, for speed: each batch norm goes into its convolution, in float64; weights channels_last."""
    network.eval().double()
    for module in network.modules():
        if isinstance(module, ConvBN):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return network.float().to(memory_format=torch.channels_last).requires_grad_(False)


def find_inception(given=None, may_download=True):
    """The file of its weights: --weights, $FID_WEIGHTS, torch's cache (pytorch-fid's too), or a download."""
    given, instead = given or os.environ.get("FID_WEIGHTS"), "give --weights PATH, or set $FID_WEIGHTS"
    return find_weights(WEIGHTS, WEIGHTS_URL, WEIGHTS_SHA256, instead, given, may_download)


def load_inception(path, device, resize="tf"):
    """The network, ready for use, from a file that find_inception returned."""
    network, state = InceptionV3(resize), torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(state))  # a plain dict may lack num_batches_tracked, which nothing needs
    return fold_batch_norm(network).to(device)
