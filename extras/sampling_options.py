"""What sample.py and fid.py draw from a checkpoint: the flags that both have, and one rule of classes.

Image i has class i mod C, of all C classes or of those that --class names: every n is spread evenly, 5,000 images of
1,000 classes are five of each, and more images come after the others. So do ADM and DiT, who draw classes uniformly.
With --class-counts training classes come as often as in the training set: for a FID against a set that is not balanced.
A grid is for the eye and has rows of one class (sample.default_labels). Called by extras/sample_command.py,
extras/fid_command.py and extras/fid_sources.py.
"""

import re

import numpy as np
import torch

from engine.process import UserError, user_error
from extras.cost import fitting_batch
from sample import SAMPLERS, check_settings, load_checkpoint

WNID = re.compile(r"n\d{8} ")  # "n01440764 tench"
OPTIONAL = ("steps", "guidance", "sampler", "temperature", "interval", "end")  # if None, as checkpoint or sampler say


def add_sampling_flags(parser, n, batch):
    """--n to --compile, for both programs. n, batch: their help."""
    parser.add_argument("--n", "--samples", type=int, metavar="N", help=f"{n}; under torchrun say --samples, for it "
                        "takes --n to be its own")
    parser.add_argument("--steps", type=int, help="calls of the network per image (default: in the checkpoint)")
    parser.add_argument("--guidance", type=float, metavar="OMEGA", help="how strongly images are pushed towards their "
                        "class: 0 not at all; the cfg-scale of DiT is 1 + OMEGA (default: in the checkpoint)")
    parser.add_argument("--guidance-interval", dest="interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="guide at these times only, 1 being noise and 0 the image (default: 0 1)")
    parser.add_argument("--temperature", type=float, help="below 1: likelier tokens, less variety (default: 1)")
    parser.add_argument("--end", type=float, metavar="T", help="stop at this time (1 is noise, 0 the image) and draw "
                        "the tokens there. Before 0 the network still has a choice, and few steps do not make "
                        "all images alike (default: 0; for 2 to 15 steps 0.8 / steps^2, guided 0.3)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="ancestral: new noise at every step; ddim: none after the "
                        "first (default: in the checkpoint)")
    parser.add_argument("--class", dest="classes", metavar="NAME[,NAME]", help="only these classes, by name or number "
                        "(sample.py CKPT --list-classes shows them)")
    parser.add_argument("--class-counts", choices=["even", "training"], help="image i has class i mod C, or classes "
                        "come as often as in the training set (default: even)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone (default: 0)")
    parser.add_argument("--batch", type=int, help=batch)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network; on a GPU with CUDA graphs")


def check_flags(args):
    """UserError for what is wrong whatever the checkpoint."""
    for name in ("n", "steps", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.seed < 0:
        raise UserError("--seed must not be negative")


def open_checkpoint(path, args, device):
    """(pipeline, options of sample_images, numbers of the classes, images at a time) for a command line; UserError."""
    pipeline, batch = load_checkpoint(path, device), args.batch
    if batch is None:  # 256 sets of logits, twice each with guidance: most machines have that to spare
        logits = 256 * pipeline.model.N * pipeline.model.K * 4
        batch = 256 if logits < 1 << 26 else fitting_batch(pipeline, 256)
    settings = dict(pipeline.sampling) | {name: getattr(args, name) for name in OPTIONAL
                                          if getattr(args, name) is not None}
    with user_error():
        check_settings(**settings)
    names = pipeline.class_names
    if not names or not pipeline.config["training"]["label_drop"]:
        if args.guidance or (getattr(args, "grid_of", None) or "").startswith("guidance"):
            raise UserError("--guidance: this model was trained with"
                            + ("out classes, so there is nothing to guide to" if not names else
                               " --label-drop 0, so there is nothing to guide away from"))
        settings["guidance"] = 0.0
    chosen = parse_classes(args.classes, names) if args.classes else list(range(len(names))) or [0]
    if args.compile:
        pipeline.model.guided = torch.compile(pipeline.model.guided, mode="reduce-overhead", dynamic=False)
    return pipeline, settings, chosen, batch


def parse_classes(text, class_names):
    """ "heart,3" -> [id of heart, 3]; UserError names the classes there are.

    Of ImageNet's "n01440764 tench" either word will do, if there is only one such class.
    """
    if not class_names:
        raise UserError("--class: this model was trained without classes")
    ids = []
    for item in map(str.strip, text.split(",")):
        found = [i for i, name in enumerate(class_names) if item == name] or [
            i for i, name in enumerate(class_names) if WNID.match(name) and item in name.split(" ", 1)]
        if not found and item.isdecimal() and int(item) < len(class_names):
            found = [int(item)]
        if len(found) > 1:
            raise UserError(f"--class: {item!r} is ambiguous: " + ", ".join(f"{i} ({class_names[i]})" for i in found))
        if not found:
            some = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
            raise UserError(f"--class: no class {item!r}; there are {len(class_names)}: {some}")
        ids += found
    return ids


def class_labels(n, chosen, counts=None):
    """(n,) labels of images that are drawn one by one. chosen: numbers of classes, each one or more times.

    Without counts image i has the class chosen[i mod C]. counts: how often each class of the model is to come, in any
    unit; then classes come one after the other, and each count is met but for one image.
    """
    if counts is None:
        return torch.tensor(chosen)[torch.arange(n) % len(chosen)]
    ends = np.cumsum([counts[label] for label in chosen])
    if not ends[-1]:
        raise UserError("--class-counts training: there is no training image of these classes")
    places = (np.arange(n) + 0.5) * ends[-1] / n
    return torch.tensor(chosen)[torch.from_numpy(np.searchsorted(ends, places, side="right"))]


def labels_to_draw(n, args, pipeline, chosen, real=None):
    """(n,) labels by the rule, and a few words on them. real: labels of the training images, if they are at hand."""
    C, counts = len(pipeline.class_names), pipeline.class_counts
    if not C:
        return class_labels(n, chosen), "no classes"
    if counts is None and real is not None and len(real):
        counts = torch.bincount(real, minlength=C).tolist()
    if args.class_counts == "training":
        if counts is None:
            raise UserError("--class-counts training: this checkpoint is of an earlier version and does not say how "
                            "often its classes come; fid.py counts them where REAL is the training set")
        return class_labels(n, chosen, counts + [0] * (C - len(counts))), "classes as often as in training"
    words = f"{len(chosen)} classes evenly" if len(chosen) > 1 else f"class {pipeline.class_names[chosen[0]]}"
    if n < len(chosen):
        words += f" (only the first {n}: there are fewer images than classes)"
    elif counts and (many := max(counts)) > 1.5 * (few := min(counts)):
        words += f" (training has {few:,} to {many:,} of a class: --class-counts training draws them so)"
    return class_labels(n, chosen), words
