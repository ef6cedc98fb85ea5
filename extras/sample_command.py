"""`python sample.py`: a grid, images one by one, a special picture, a page in the browser, or --export."""

import argparse
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import sample
from data import decoders
from engine.checkpoint import CHECKPOINT_FORMAT, digest, read_checkpoint
from engine.distributed import broadcast, choose_device, init_distributed, rank_and_world
from engine.process import report_errors, shared_work, write_atomically
from engine.validate import UserError
from extras.pictures import SPECIAL, save_grid, words
from extras.sampling_options import add_sampling_flags, check_flags, labels_to_draw, open_checkpoint
from extras.serve import serve
from sample import COLUMNS, sample_images, sample_together

EXPORTED = ("format", "config", "class_names", "class_counts", "sampling", "metrics", "step")  # and weights
INSTEAD = SPECIAL | {"serve": serve}  # of a grid or a folder: {flag: function}


def main():
    parser = argparse.ArgumentParser("sample.py", description=sample.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="the ckpt.pt that train.py wrote, or what --export made of it")
    add_sampling_flags(parser, n="how many (default: 64, or 8 of each of up to 16 classes)",
                       batch="images at a time; they stay the same (default: 256, or what fits)")
    add("--out", default="samples.png", help="a .png for a grid; .npz, .zip or a folder for single images")
    add("--list-classes", action="store_true", help="print the numbers and names of the classes")
    add("--export", type=Path, metavar="FILE.pt", help="only write a checkpoint to share, five times smaller")
    group = parser.add_argument_group("special pictures, one at a time")
    add = group.add_mutually_exclusive_group().add_argument
    add("--grid-of", metavar="NAME=V,V,...", help="a row per value of guidance, steps, temperature or end")
    add("--trajectory", action="store_true", default=None, help="a row per image, and all of it as .gif")
    add("--inpaint", metavar="IMAGE", help="draw the white part of --mask anew; a row per class of --class")
    add("--vary", metavar="IMAGE", help="noise an image up to --strength and back; rows as for --inpaint")
    add("--interpolate", metavar="A,B", help="from seed A to seed B, a row per class; smoothest with ddim")
    add("--serve", type=int, nargs="?", const=8000, metavar="PORT", help="a page in the browser")
    group.add_argument("--mask", metavar="IMAGE", help="for --inpaint: white where tokens are to be drawn")
    group.add_argument("--strength", type=float, help="for --vary, up to 1, where all changes (default: 0.6)")
    args = parser.parse_args()
    stopped = "stopped; the same command goes on" if Path(args.out).suffix != ".png" else "stopped"
    with report_errors("sample.py", stopped, "give --batch, or a lower one; the images stay the same"):
        draw(args)


def check_arguments(args, special):
    """UserError for what is wrong whatever the checkpoint. special: a name in INSTEAD, or None."""
    check_flags(args)
    out, is_grid, flag = Path(args.out), args.out.endswith(".png"), f"--{special}".replace("_", "-")
    for wrong, message in (
            (out.suffix not in (".png", ".npz", ".zip", ""),
             f"--out {out}: must end in .png, .npz or .zip, or be a folder without an ending"),
            (not is_grid and out.exists(), f"--out {out} is there already: remove it, or give another name"),
            (args.export and args.export.exists(), f"--export {args.export} is there already: remove it"),
            (special and not is_grid, f"--out {out}: {flag} writes no files of samples"),
            (args.class_counts and is_grid, "--class-counts: a grid has rows of one class, name a folder"),
            (special and rank_and_world()[1] > 1, f"{flag} is for one process: start it with python"),
            ((args.inpaint is None) != (args.mask is None), "--inpaint and --mask belong together"),
            (args.strength is not None and not (args.vary and 0 < args.strength <= 1),
             "--strength is for --vary, above 0, at most 1"),
            (special == "serve" and args.compile, "--compile is not for --serve")):
        if wrong:
            raise UserError(message)


def export(checkpoint, out):
    """--export: a checkpoint to share, half as precise and without what only training needs."""
    state = read_checkpoint(checkpoint, CHECKPOINT_FORMAT)
    kept = {name: state[name] for name in EXPORTED}
    for part in ("tokenizer", "ema"):  # numbers too large for float16 stay in float32
        halves = {name: value.half() for name, value in state[part].items() if value.dtype == torch.float32}
        kept[part] = state[part] | {name: half for name, half in halves.items() if half.isfinite().all()}
    write_atomically(out, lambda partial: torch.save(kept, partial))
    print(f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB. Draw with it:  python sample.py {out}")


def sample_files(pipeline, labels, out, batch, seed, **settings):
    """Images of labels (n,): PNGs in a folder or .zip, or an .npz with arr_0 (n, H, W, 3) and arr_1, labels.

    PNGs are first written beside OUT, in a folder named by what makes them: the same command continues.
    """
    n, is_main = len(labels), rank_and_world()[0] == 0
    origin = digest(pipeline.model.state_dict() | {f"labels, seed {seed}, {settings}": labels})
    parts = out.with_name(f"{out.name}.{origin[:8]}.parts")
    files = [parts / f"{i:06d}.png" for i in range(n)]
    if is_main:
        parts.mkdir(parents=True, exist_ok=True)
    starts = broadcast([i for i in range(0, n, batch) if not all(f.exists() for f in files[i:i + batch])])

    def draw(starts):
        for i in starts:
            yield sample_images(pipeline, labels[i:i + batch], seed=seed, first=i, batch=batch,
                                show_progress=False, **settings).permute(0, 2, 3, 1).numpy()

    def write_png(image, path):
        write_atomically(path, lambda partial: Image.fromarray(image).save(partial, "png"))

    with tqdm(total=len(starts), desc="sampling", unit="batch", disable=None if is_main else True) as bar:
        for i, images in shared_work(starts, draw):  # on process 0; nothing on the others
            list(decoders().map(write_png, images, files[i:i + batch]))
            bar.update()
    if is_main and not out.suffix:
        parts.replace(out)
    elif is_main:
        write_atomically(out, lambda partial: pack(partial, files, labels.numpy(), out.suffix))
        shutil.rmtree(parts)


def pack(path, files, labels, suffix):
    """PNG files into a .zip, or their pixels and the labels (n,) into an .npz, in ADM's layout."""
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.name)
    else:
        shape = len(files), *np.asarray(Image.open(files[0])).shape
        rows = np.lib.format.open_memmap(files[0].with_suffix(".npy"), "w+", np.uint8, shape)  # may be 10 GB
        for row, file in zip(rows, files, strict=True):
            row[:] = np.asarray(Image.open(file))
        with path.open("wb") as file:
            np.savez(file, arr_0=rows, arr_1=labels)


def draw(args):
    """Does what the command line says. UserError, before any work, if that cannot be done."""
    is_main = init_distributed()[0] == 0
    special = next((name for name in INSTEAD if getattr(args, name) is not None), None)
    check_arguments(args, special)
    device = choose_device(args.device)
    if args.export:
        return export(args.checkpoint, args.export)
    pipeline, settings, chosen, args.batch = open_checkpoint(args.checkpoint, args, device)
    names, out = pipeline.class_names, Path(args.out)
    if (args.inpaint or args.vary) and not args.classes:
        settings["guidance"] = 0.0  # they draw without a class
    if args.list_classes:
        return print("\n".join(f"{i:>4}  {name}" for i, name in enumerate(names)) or "it has no classes")
    rows = min(len(chosen), 16) if names else 8
    n = args.n or COLUMNS * (1 if special else rows)
    labels, facts = labels_to_draw(n, args, pipeline, chosen, settings, in_rows=out.suffix == ".png")
    if is_main:
        print(f"{args.checkpoint}: {facts}")
    if special:
        INSTEAD[special](args, pipeline, chosen, labels, settings)
    elif out.suffix != ".png":
        sample_files(pipeline, labels, out, args.batch, args.seed, **settings)
    else:
        images = sample_together(pipeline, labels, seed=args.seed, batch=args.batch, **settings)
        if is_main:
            save_grid(images, out, COLUMNS, row_labels=words(pipeline, labels[::COLUMNS]))
    if is_main:
        print(f"wrote {out}" + (f" and {out.with_suffix('.gif')}" if special == "trajectory" else ""))
