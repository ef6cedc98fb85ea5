"""What sample.py and fid.py draw from a checkpoint: the flags that both have, and one rule of classes."""

import re

import torch

from engine.build import load_checkpoint
from engine.distributed import precision
from engine.process import user_error
from engine.validate import UserError
from extras.cost import fitting_batch
from sample import SAMPLERS, check_settings, class_labels, default_labels

WNID = re.compile(r"n\d{8} ")  # "n01440764 tench"
OPTIONAL = ("steps", "guidance", "sampler", "temperature", "interval", "end")  # None: as the checkpoint says


def add_sampling_flags(parser, n, batch):
    """--n to --compile, for both programs. n, batch: their help."""
    add = parser.add_argument
    add("--n", "--samples", type=int, metavar="N", help=f"{n}; torchrun lets only --samples through")
    add("--steps", type=int, help="calls of the network per image (default: in the checkpoint)")
    add("--guidance", type=float, metavar="OMEGA", help="towards the class: DiT's cfg-scale - 1")
    add("--guidance-interval", dest="interval", type=float, nargs=2, metavar="T", help="guide only between")
    add("--temperature", type=float, help="below 1: likelier tokens, less variety (default: 1)")
    add("--end", type=float, metavar="T", help="draw the tokens at this time, in few steps before 0")
    add("--sampler", choices=SAMPLERS, help="ancestral: new noise at every step; ddim: none after the first")
    add("--class", dest="classes", metavar="NAME[,NAME]", help="only these, by name or number")
    add("--class-counts", choices=["even", "training"], help="how often classes come (default: even)")
    add("--seed", type=int, default=0, help="image i depends on (seed, i) alone (default: 0)")
    add("--batch", type=int, help=batch)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--compile", action="store_true", default=None, help="torch.compile the network")


def check_flags(args, **least):
    """UserError for numbers that are too low. least: of flags that the program has beside."""
    for name, low in ({"n": 1, "steps": 1, "batch": 1, "seed": 0} | least).items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name} must be at least {low}")


def open_checkpoint(path, args, device):
    """(pipeline, options of sample_images, numbers of the classes, images at a time) for a command line."""
    pipeline = load_checkpoint(path, device)
    names, model, batch = pipeline.class_names, pipeline.model, args.batch
    if batch is None:  # the logits of 256 images take less than 64 MB, or it is counted what fits
        batch = 256 if model.N * model.K < 1 << 16 else fitting_batch(pipeline, 256)
    settings = pipeline.sampling | {
        name: getattr(args, name) for name in OPTIONAL if getattr(args, name) is not None}
    with user_error():
        check_settings(**settings)
    if not names or not pipeline.config["training"]["label_drop"]:
        if args.guidance or (getattr(args, "grid_of", None) or "").startswith("guidance"):
            why = "with --label-drop 0, so without a null class" if names else "without classes"
            raise UserError(f"--guidance: this model was trained {why}, and there is nothing to guide to")
        settings["guidance"] = 0.0
    every = list(range(len(names))) or [0]
    chosen = every if args.classes is None else parse_classes(args.classes, names)
    if args.compile:
        model.guided = torch.compile(model.guided, mode="reduce-overhead", dynamic=False)
    return pipeline, settings, chosen, batch


def parse_classes(text, class_names):
    """ "heart,3" -> [number of heart, 3]; of ImageNet's "n01440764 tench" either word will do."""
    numbers, classes = range(len(class_names)), []
    for word in map(str.strip, text.split(",")):
        found = (
            [i for i in numbers if class_names[i] == word]
            or [i for i in numbers if WNID.match(class_names[i]) and word in class_names[i].split(" ", 1)]
            or [i for i in numbers if str(i) == word])
        if len(found) != 1:
            some = ", ".join(f"{i} ({class_names[i]})" for i in (found or numbers)[:20])
            problem = "is ambiguous" if found else "is no class of this model"
            raise UserError(f"--class: {word!r} {problem}: {some or 'it was trained without'}")
        classes += found
    return classes


def labels_to_draw(n, args, pipeline, chosen, settings, in_rows=False):
    """(n,) labels, by the rule or in the rows of a grid, and a few words on the images that will be drawn."""
    names, training = pipeline.class_names, args.class_counts == "training"
    counts = pipeline.class_counts + [0] * (len(names) - len(pipeline.class_counts))
    with user_error():
        labels = class_labels(n, chosen, counts if training and names else None)
    words = f"{len(chosen)} classes evenly"
    if not names:
        words = "no classes"
    elif in_rows:
        labels, words = torch.tensor(chosen)[default_labels(n, len(chosen))], "a class a row"
    elif training:
        words = "classes as often as in training"
    elif n < len(chosen):
        words = f"only the first {n} classes: there are fewer images than classes"
    elif max(counts) > 1.5 * min(counts):
        words += f" (of a class training has {min(counts):,} to {max(counts):,}: see --class-counts)"
    facts = [f"{n:,} images of step {pipeline.step:,}", f"seed {vars(args).get('interpolate') or args.seed}",
             words, *(f"{key} {value}" for key, value in settings.items()), precision(pipeline.device)]
    return labels, ", ".join(facts)
