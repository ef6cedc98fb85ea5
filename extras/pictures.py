"""Special pictures of sample.py: what a setting does, what happens over time, images made from an image or
between two. Each function draws one picture from the command line's arguments (extras/sample_command.py).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import load_image
from engine.process import user_error, write_atomically
from engine.randomness import image_generators
from engine.validate import UserError
from extras.grids import grid_page, save_grid
from sample import COLUMNS, check_settings, sample_images


def words(pipeline, labels):
    """Labels (n,) -> their class names, or None without classes."""
    return [pipeline.class_names[label] for label in labels.tolist()] if pipeline.class_names else None


def draw_grid_of(args, pipeline, chosen, labels, settings):
    """--grid-of NAME=V,V: a row for each value, with the images that the plain grid has, in one row."""
    kinds = {"guidance": float, "steps": int, "temperature": float, "end": float}
    name, _, values = args.grid_of.partition("=")
    try:
        rows = [settings | {name: kinds[name](value)} for value in values.split(",")]
    except (KeyError, ValueError):
        raise UserError(f"--grid-of {args.grid_of}: give NAME=V,V,... of {', '.join(kinds)}") from None
    with user_error():
        for row in rows:
            check_settings(**row)
    images = [sample_images(pipeline, labels, seed=args.seed, batch=args.batch, **row) for row in rows]
    save_grid(torch.cat(images), args.out, len(labels), row_labels=[f"{name} {row[name]:g}" for row in rows])


def draw_trajectory(args, pipeline, chosen, labels, settings):
    """--trajectory: the likeliest tokens of p_theta(x | z_t), decoded: ten in OUT.png, all in OUT.gif."""
    seen, steps = [], settings["steps"]  # (t, tokens), for all steps of the first batch, then of the next
    sample_images(pipeline, labels, seed=args.seed, batch=args.batch,
                  callback=lambda t, p: seen.append((t, p.argmax(-1))), **settings)
    times = [t for t, _ in seen[:steps]]
    frames = [torch.cat([pipeline.tokenizer.decode(tokens).cpu() for _, tokens in seen[i::steps]])
              for i in range(steps)]
    some = sorted({round(i) for i in np.linspace(0, steps - 1, 10)})
    save_grid(torch.stack([frames[i] for i in some], 1).flatten(0, 1), args.out, len(some),
              row_labels=words(pipeline, labels), column_labels=[f"t {times[i]:.2f}" for i in some])
    # The labels make all frames different: Pillow would leave out one that is the same as the last.
    columns = min(COLUMNS, len(labels))
    pages = [grid_page(frame, columns, column_labels=[f"{i + 1}/{steps}", f"t {times[i]:.2f}"])
             for i, frame in enumerate(frames)]
    milliseconds = [100] * (steps - 1) + [2000]
    write_atomically(Path(args.out).with_suffix(".gif"), lambda partial: pages[0].save(
        partial, "gif", save_all=True, append_images=pages[1:], duration=milliseconds, loop=0))


def read_image(flag, path, size=None):
    """data.load_image, the way to pixels that training takes, with errors that name the flag."""
    try:
        return load_image(path, size)
    except UserError as error:
        raise UserError(f"{flag} {path}: {error}") from error


def read_mask(path, tokenizer):
    """A mask image -> (N,) bool, True where a token is to be drawn: a pixel of its f x f cell is white."""
    pixels, size, f = read_image("--mask", path), tokenizer.size, tokenizer.f              # (3, H, W) uint8
    (height, width), side = pixels.shape[1:], min(pixels.shape[1:])
    left, top = (width - side) // 2, (height - side) // 2  # the centre square, as load_image takes it
    mask = Image.fromarray(pixels.min(0)).resize((size, size), Image.Resampling.NEAREST,
                                                 box=(left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(mask) >= 128).view(size // f, f, size // f, f).any(3).any(1).flatten()


def draw_from_image(args, pipeline, chosen, labels, settings):
    """--inpaint and --vary: the image, for --inpaint also without its masked cells, then the new images.

    With --class a row per class; without, one row by the null class, which stands for any class.
    """
    tokenizer, n, flag = pipeline.tokenizer, len(labels), "--vary" if args.inpaint is None else "--inpaint"
    if pipeline.class_names and not args.classes and not pipeline.config["training"]["label_drop"]:
        raise UserError(f"{flag}: this model was trained with --label-drop 0: give --class")
    pixels = read_image(flag, args.inpaint or args.vary, tokenizer.size)
    image = torch.from_numpy(pixels)[None]                                                 # (1, 3, H, W)
    tokens = tokenizer.encode(image.to(pipeline.device))                                   # (1, N)
    columns = {"image": image}
    if flag == "--vary":
        strength = 0.6 if args.strength is None else args.strength
        with user_error():
            check_settings(**settings, t=strength)
        options = {"init": (tokens, strength)}
    else:
        drawn = read_mask(args.mask, tokenizer)                                            # (N,)
        if not drawn.any():
            raise UserError(f"--mask {args.mask} has no white pixel: paint white what is to be drawn anew")
        cells = drawn.view(tokenizer.grid).repeat_interleave(tokenizer.f, 0).repeat_interleave(tokenizer.f, 1)
        columns["mask"] = image.where(~cells, 128)
        options = {"inpaint": tokens.masked_fill(drawn.to(pipeline.device), -1)}
    if not args.classes:
        chosen, settings = [pipeline.model.num_classes], settings | {"guidance": 0.0}  # nothing to guide to
    labels = torch.tensor(chosen).repeat_interleave(n)
    images = sample_images(pipeline, labels, seed=args.seed, batch=args.batch,
                           indices=list(range(n)) * len(chosen), **options, **settings)
    before = torch.cat(list(columns.values())).expand(len(chosen), -1, -1, -1, -1)
    page = torch.cat([before, images.view(len(chosen), n, *images.shape[1:])], 1).flatten(0, 1)
    save_grid(page, args.out, len(columns) + n, column_labels=list(columns),
              row_labels=words(pipeline, torch.tensor(chosen)) if args.classes else None)


def slerp(a, b, n):
    """a, b (N, D) -> (n, N, D), from a to b along the circle: straight lines would be too short to be noise.

    a sin((1 - w) angle) / sin(angle) + b sin(w angle) / sin(angle), w = 0, ..., 1; both ends are exact.
    """
    w = torch.linspace(0, 1, n, dtype=torch.float64)[:, None, None]
    angle = F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).acos()
    return (((1 - w) * angle).sin() / angle.sin() * a + (w * angle).sin() / angle.sin() * b).to(a.dtype)


def draw_interpolation(args, pipeline, chosen, labels, settings):
    """--interpolate A,B: from image 0 of seed A to the first noise of seed B, all else of A."""
    seeds, n, rows = args.interpolate.split(","), len(labels), torch.tensor(chosen[:16])
    model = pipeline.model
    if len(seeds) != 2 or not all(s.strip().isdecimal() for s in seeds) or int(seeds[0]) == int(seeds[1]):
        raise UserError(f"--interpolate {args.interpolate}: give two different seeds, as 0,1")
    ends = [torch.randn(model.N, model.D, generator=image_generators(int(seed), [0])[0]) for seed in seeds]
    noise = slerp(*ends, n).repeat(len(rows), 1, 1)                                        # (rows n, N, D)
    images = sample_images(pipeline, rows.repeat_interleave(n), seed=int(seeds[0]), batch=args.batch,
                           indices=[0] * n * len(rows), noise=noise, **settings)
    save_grid(images, args.out, n, row_labels=words(pipeline, rows),
              column_labels=[f"seed {seeds[0]}"] + [""] * (n - 2) + [f"seed {seeds[1]}"])


SPECIAL = {"grid_of": draw_grid_of, "trajectory": draw_trajectory, "inpaint": draw_from_image,
           "vary": draw_from_image, "interpolate": draw_interpolation}
