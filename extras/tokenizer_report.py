"""`python vqvae.py report`: how good is a tokenizer, on the held-out images of a set?"""

import argparse

from engine.distributed import choose_device
from engine.process import UserError, report_errors, user_error
from engine.tokens import read_tokenizer
from extras.datasets import find
from extras.downloads import DownloadError
from extras.fid_sources import Decoded
from extras.grids import save_pairs
from extras.inception import find_inception, load_inception
from extras.published_vqgan import make_tokenizer
from extras.tokenizer_metrics import evaluate_tokenizer
from extras.vqgan_losses import LPIPS, find_lpips, read_lpips
from fid import compute_scores, measure

EXAMPLES = """examples:
  python vqvae.py report runs/toy/tokenizer.pt --data toy
  python vqvae.py report vqgan.ckpt --data photos/ --size 256 --out photos.png"""


def report(args):
    """Measures a tokenizer on held-out images, and draws some of them above their reconstructions."""
    if args.batch < 1:
        raise UserError("--batch must be at least 1")
    with user_error():
        device = choose_device(args.device)
    state = read_tokenizer(args.tokenizer)
    source = find(args.data, args.root)
    size = state["config"].get("size") or args.size or source.sizes()[1]
    if args.size and args.size != size:
        raise UserError(f"{args.tokenizer} is made for images of {size} pixels: leave --size away")
    with user_error():
        model = make_tokenizer(state["config"] | {"size": size}).to(device).eval()
    model.load_state_dict(state["tokenizer"])
    tokens = model.grid[0] * model.grid[1]
    print(f"{args.tokenizer}: {model.K} codes, f = {model.f}, {tokens} tokens of {size} x {size} pixels")
    _, held_out = source.load(size)
    lpips = None
    try:
        lpips = LPIPS(read_lpips(find_lpips(args.lpips_weights, may_download=False))).to(device)
    except DownloadError as error:
        if args.lpips_weights:
            raise
        print(f"no LPIPS: {error}")
    metrics = evaluate_tokenizer(model, held_out, device, lpips, args.batch)
    try:
        network = load_inception(find_inception(args.weights, may_download=False), device)
        statistics = [measure(pictures, network, keep=0) for pictures in
                      (Decoded(held_out), Decoded(Reconstructions(model, held_out, device), args.batch))]
        metrics["rfid"] = compute_scores(*statistics)["fid"]
    except UserError as error:
        print(f"no rFID: {error}")
    print(f"{len(held_out):,} held-out images of {args.data}: "
          + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    shown = held_out.batch(range(min(len(held_out), 16)))
    save_pairs(shown, model.decode(model.encode(shown.to(device))).cpu(), args.out)
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
    parser = argparse.ArgumentParser(description="How good is a tokenizer?", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["report"], help="measure it on held-out images")
    parser.add_argument("tokenizer", help="tokenizer.pt of train.py, or a published VQGAN's checkpoint")
    parser.add_argument("--data", default="toy", help="as for train.py (default: toy)")
    parser.add_argument("--root", metavar="DIR", help="where a named set lies, as for train.py")
    parser.add_argument("--size", type=int, help="pixels a side, for a published one (default: as the images are)")
    parser.add_argument("--weights", help="the Inception weights, for rFID (default: $FID_WEIGHTS or the cache)")
    parser.add_argument("--lpips-weights", nargs="+", metavar="FILE",
                        help="for LPIPS, as for train.py (default: those in torch's cache)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--out", default="report.png", help="the picture to write (default: report.png)")
    args = parser.parse_args()
    with report_errors("vqvae.py", memory_advice="lower --batch; the measures stay the same"):
        report(args)
