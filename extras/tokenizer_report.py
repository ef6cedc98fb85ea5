"""How good is a tokenizer, on the held-out images of a set?

    python vqvae.py report vqgan.ckpt --data photos/ --size 256 --out photos.png
"""

import argparse

from engine.build import make_tokenizer, read_tokenizer
from engine.distributed import choose_device
from engine.process import report_errors, user_error
from engine.validate import UserError, expect
from extras.datasets import find
from extras.fid_sources import Images, from_dataset
from extras.inception import find_inception, load_inception
from extras.pictures import save_pairs
from extras.vqgan_losses import LPIPS, find_lpips, read_lpips
from fid import compute_scores, measure
from vqvae import evaluate_tokenizer


def report(args):
    """Measures a tokenizer on held-out images, and draws some of them above their reconstructions."""
    expect("--batch", args.batch, int, 1)
    with user_error():
        device = choose_device(args.device)
        state, source = read_tokenizer(args.tokenizer), find(args.data, args.root)
        size = state["config"].get("size") or args.size or source.sizes()[1]
        if args.size and args.size != size:
            raise UserError(f"{args.tokenizer} is made for images of {size} pixels: leave --size away")
        model = make_tokenizer(state["config"] | {"size": size}).to(device).eval()
    model.load_state_dict(state["tokenizer"])
    h, w = model.grid
    print(f"{args.tokenizer}: {model.K} codes, f = {model.f}, {h * w} tokens of {size} x {size} pixels")
    _, images = source.load(size)
    originals, lpips = from_dataset(images), None

    def reconstruct(i, j):
        return model.decode(model.encode(originals.read(i, j).to(device))).cpu()

    sides = originals, Images(len(images), args.batch, reconstruct)
    try:
        lpips = LPIPS(read_lpips(find_lpips(args.lpips_weights, may_download=False))).to(device)
    except UserError as error:
        print(f"no LPIPS: {error}")
    metrics = evaluate_tokenizer(model, images, device, lpips, args.batch)
    try:
        network = load_inception(find_inception(args.weights, may_download=False), device)
        metrics["rfid"] = compute_scores(*(measure(side, network, keep=0) for side in sides))["fid"]
    except UserError as error:
        print(f"no rFID: {error}")
    print(f"{len(images):,} held-out images of {args.data}: "
          + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    save_pairs(*(side.read(0, min(len(images), 16)) for side in sides), args.out)
    print(f"wrote {args.out}")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("vqvae.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("command", choices=["report"], help="measure it on held-out images")
    add("tokenizer", help="tokenizer.pt of train.py, or a published VQGAN's checkpoint")
    add("--data", default="toy", help="as for train.py (default: toy)")
    add("--root", metavar="DIR", help="where a named set lies, as for train.py")
    add("--size", type=int, help="pixels a side, for a published one (default: the images')")
    add("--weights", help="of Inception, for rFID (default: $FID_WEIGHTS or the cache)")
    add("--lpips-weights", nargs="+", metavar="FILE", help="as for train.py (or the cache)")
    add("--batch", type=int, default=32, help="images at a time (default: 32)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--out", default="report.png", help="the picture to write (default: report.png)")
    args = parser.parse_args()
    with report_errors("vqvae.py", memory_advice="lower --batch; the measures stay the same"):
        report(args)
