"""`python sample.py`: its command line. A grid, images one by one (extras/sample_files.py), or a special picture
(extras/pictures.py), or a page in the browser (extras/serve.py).
"""

import argparse
from pathlib import Path

import torch

from engine.distributed import choose_device, init_distributed, precision, rank_and_world
from engine.process import UserError, report_errors, user_error
from extras.export import export
from extras.grids import save_grid
from extras.pictures import SPECIAL, words
from extras.sample_files import sample_files
from extras.sampling_options import add_sampling_flags, check_flags, labels_to_draw, open_checkpoint
from extras.serve import serve
from sample import COLUMNS, default_labels, sample_together

INSTEAD = SPECIAL | {"serve": serve}  # of a grid or a folder: {flag: function}
EXAMPLES = """examples:
  python sample.py runs/toy/ckpt.pt                                        a grid, samples.png
  python sample.py runs/toy/ckpt.pt --class heart,star --guidance 2 --steps 16
  python sample.py runs/toy/ckpt.pt --n 1200 --out samples.npz             one by one, a hundred of each class
  python sample.py runs/toy/ckpt.pt --class star --n 8 --grid-of guidance=0,1,2,4
  python sample.py runs/toy/ckpt.pt --export toy.pt                        a small file to share
  python sample.py runs/toy/ckpt.pt --serve                                a page in the browser, to play with"""


def parse_arguments():
    parser = argparse.ArgumentParser(description="Draw images with a trained VQ-LCMD checkpoint.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the ckpt.pt that train.py wrote, or what --export made of it")
    add_sampling_flags(parser, batch="images at a time (default: 256, or fewer if memory is short); the images stay "
                       "the same", n="how many images (default: 64, or 8 of each class up to 16 classes; for the "
                       "special pictures below: 8, in each row)")
    parser.add_argument("--out", default="samples.png", help="a .png, for a grid; a .npz, a .zip or a folder, for the "
                        "images one by one, which are resumable (default: samples.png)")
    parser.add_argument("--list-classes", action="store_true", help="print the numbers and names of the classes")
    parser.add_argument("--export", metavar="FILE.pt", help="draw nothing, but write a checkpoint to share: half as "
                        "precise and without what only training needs, so about five times smaller")
    group = parser.add_argument_group("special pictures, one at a time")
    special = group.add_mutually_exclusive_group()
    special.add_argument("--grid-of", metavar="NAME=V,V,...", help="a row for each value of guidance, steps, "
                         "temperature or end; image i has the same noise in every row")
    special.add_argument("--trajectory", action="store_true", default=None, help="what the network takes the image "
                         "for as time goes down: a row per image, and all steps in OUT.gif")
    special.add_argument("--inpaint", metavar="IMAGE", help="draw the white part of --mask anew; a row per class of "
                         "--class, or one row without class and guidance")
    special.add_argument("--vary", metavar="IMAGE", help="noise an image up to time --strength and come back; rows as "
                         "for --inpaint")
    special.add_argument("--interpolate", metavar="A,B", help="from seed A to seed B: the first noise turns, all other "
                         "numbers stay; a row per class; smoothest with --sampler ddim")
    special.add_argument("--serve", type=int, nargs="?", const=8000, metavar="PORT", help="no picture, but a page in "
                         "the browser of this machine, to play with the model (default: port 8000; 0: any free one)")
    group.add_argument("--mask", metavar="IMAGE", help="for --inpaint: white where tokens are to be drawn")
    group.add_argument("--strength", type=float, help="for --vary: near 0 nothing changes, at 1 nothing stays "
                       "(default: 0.6)")
    return parser.parse_args()


def check_arguments(args, special):
    """UserError for what is wrong whatever the checkpoint. special: a name in INSTEAD, or None."""
    check_flags(args)
    out = Path(args.out)
    if out.suffix not in (".png", ".npz", ".zip", ""):
        raise UserError(f"--out {out}: must end in .png, .npz or .zip, or be a folder without an ending")
    if out.suffix != ".png" and out.exists():
        raise UserError(f"--out {out} is there already: remove it, or give another name")
    flag = f"--{special.replace('_', '-')}" if special else None
    if flag and out.suffix != ".png":
        raise UserError(f"--out {out}: " + ("--serve writes no files" if special == "serve" else
                                            f"{flag} draws one picture, give a name that ends in .png"))
    if args.class_counts and out.suffix == ".png":
        raise UserError("--class-counts is for images one by one (--out FOLDER, .zip or .npz); a grid has rows of one "
                        "class")
    if special == "serve" and (args.compile or not 0 <= args.serve < 1 << 16):
        raise UserError(f"--serve {args.serve}: give a port from 0 to 65535, and no --compile, which would compile "
                        "anew for every number of images")
    if flag and rank_and_world()[1] > 1:
        raise UserError(f"{flag} is for one process: start it with python, not with torchrun")
    if (args.inpaint is None) != (args.mask is None) or (args.strength is not None and args.vary is None):
        raise UserError("--inpaint and --mask belong together, and --strength to --vary: give both")


def draw(args):
    """Does what the command line says. UserError, before any work, if that cannot be done."""
    rank, _ = init_distributed()
    special = next((name for name in INSTEAD if getattr(args, name) is not None), None)
    check_arguments(args, special)
    with user_error():
        device = choose_device(args.device)
    if args.export:
        return print(export(args.checkpoint, Path(args.export)))
    pipeline, settings, chosen, args.batch = open_checkpoint(args.checkpoint, args, device)
    names, out = pipeline.class_names, Path(args.out)
    if args.list_classes:
        return print("\n".join(f"{i:>4}  {name}" for i, name in enumerate(names)) or "trained without classes")
    n, how = args.n or (COLUMNS if special else COLUMNS * min(len(chosen), 16) if names else 64), ""
    labels = torch.tensor(chosen)[default_labels(n, len(chosen))]
    if out.suffix != ".png":
        labels, words_on_classes = labels_to_draw(n, args, pipeline, chosen)
        how = words_on_classes + ", "
    if special == "serve":
        print(f"{args.checkpoint}: step {pipeline.step:,}, {precision(device)}")
    elif rank == 0:
        print(f"{args.checkpoint}: step {pipeline.step:,}, {n:,} images, seed {args.interpolate or args.seed}, "
              + how + ", ".join(f"{key} {value}" for key, value in settings.items()) + f", {precision(device)}")
    if special:
        INSTEAD[special](args, pipeline, chosen, labels, settings)
    elif out.suffix == ".png":
        images = sample_together(pipeline, labels, seed=args.seed, batch=args.batch, **settings)
        if rank == 0:
            save_grid(images, out, COLUMNS, row_labels=words(pipeline, labels[::COLUMNS]))
    else:
        sample_files(pipeline, labels, out, args.batch, args.seed, **settings)
    if rank == 0:
        print(f"wrote {args.out}" + (f" and {out.with_suffix('.gif')}" if special == "trajectory" else ""))


def main():
    args = parse_arguments()
    stopped = "stopped" if args.serve is not None else "stopped; into a folder, .zip or .npz the same command goes on"
    with report_errors("sample.py", stopped,
                       "give --batch, or a lower one; the images stay the same"):
        draw(args)
