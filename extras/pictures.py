"""Images on a page, and the special pictures of sample.py, each from the command line's arguments."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import load_image
from engine.process import user_error, write_atomically
from engine.randomness import image_generators
from engine.validate import UserError, reading
from sample import COLUMNS, check_settings, sample_images


def contact_sheet(images, path):
    """A page of an ImageSet: a row for each of up to 16 classes; without classes, 64 images of it."""
    names = images.class_names[:16]
    rows = [torch.nonzero(images.labels == c).flatten()[:COLUMNS].tolist() for c in range(len(names))]
    if not rows or min(map(len, rows)) < COLUMNS:  # no classes, or too few images for a row of each
        rows = [np.linspace(0, len(images) - 1, min(len(images), 8 * COLUMNS)).astype(int).tolist()]
        names = None
    save_grid(images.batch(sum(rows, [])), path, COLUMNS, row_labels=names)


def save_pairs(above, below, path):
    """Rows of images (n, 3, H, W), each over its counterpart: originals over reconstructions."""
    columns = min(COLUMNS, len(above))
    white = torch.full_like(above[:-len(above) % columns], 255)  # fills the last row
    above, below = (torch.cat([images, white]) for images in (above, below))
    rows = [images[i:i + columns] for i in range(0, len(above), columns) for images in (above, below)]
    save_grid(torch.cat(rows), path, columns)


def grid_page(images, columns, row_labels=None, column_labels=None):
    """uint8 images (n, 3, H, W) row by row on a Pillow image, 2 pixels apart; labels: a word each."""
    n, _, height, width = images.shape
    scale = max(1, round(64 / width))  # a whole number, without smoothing
    rows, tile_h, tile_w = -(-n // columns), height * scale + 2, width * scale + 2
    font = ImageFont.load_default(15)
    margin = 0 if not row_labels else 12 + max(int(font.getlength(str(word))) for word in row_labels)
    top = 20 if column_labels else 0
    page = Image.new("RGB", (margin + 2 + columns * tile_w, top + 2 + rows * tile_h), "white")
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        page.paste(tile, (margin + 2 + i % columns * tile_w, top + 2 + i // columns * tile_h))
    pen = ImageDraw.Draw(page)
    for row, word in enumerate(row_labels or []):
        pen.text((6, top + 2 + (row + 0.5) * tile_h), str(word), fill="black", font=font, anchor="lm")
    for column, word in enumerate(column_labels or []):
        pen.text((margin + 2 + (column + 0.5) * tile_w, 12), str(word), fill="black", font=font, anchor="mm")
    return page


def save_grid(images, path, columns, **options):
    page = grid_page(images, columns, **options)
    write_atomically(Path(path), lambda partial: page.save(partial, "png"))


def words(pipeline, labels):
    """Labels (n,) -> their class names, or None without classes."""
    return [pipeline.class_names[label] for label in labels.tolist()] if pipeline.class_names else None


def draw_grid_of(args, pipeline, chosen, labels, settings):
    """--grid-of NAME=V,V: a row for each value, with the images that the plain grid has, in one row."""
    kinds = {"guidance": float, "steps": int, "temperature": float, "end": float}
    name, _, values = args.grid_of.partition("=")
    with reading(f"--grid-of {args.grid_of}", f"give NAME=V,V,... of {', '.join(kinds)}"):
        rows = [settings | {name: kinds[name](value)} for value in values.split(",")]
        for row in rows:
            check_settings(**row)
    images = [sample_images(pipeline, labels, seed=args.seed, batch=args.batch, **row) for row in rows]
    save_grid(torch.cat(images), args.out, len(labels), row_labels=[f"{name} {row[name]:g}" for row in rows])


def draw_trajectory(args, pipeline, chosen, labels, settings):
    """--trajectory: the likeliest tokens of p_theta(x | z_t), decoded: ten of them, and all in OUT.gif."""
    seen, steps = [], settings["steps"]  # (t, tokens), for all steps of the first batch, then of the next
    sample_images(pipeline, labels, seed=args.seed, batch=args.batch,
                  callback=lambda t, p: seen.append((t, p.argmax(-1))), **settings)
    times = [f"t {t:.2f}" for t, _ in seen[:steps]]
    frames = [torch.cat([pipeline.tokenizer.decode(tokens).cpu() for _, tokens in seen[i::steps]])
              for i in range(steps)]
    some = sorted({round(i) for i in np.linspace(0, steps - 1, 10)})
    save_grid(torch.stack([frames[i] for i in some], 1).flatten(0, 1), args.out, len(some),
              row_labels=words(pipeline, labels), column_labels=[times[i] for i in some])
    # The labels make all frames different: Pillow would leave out one that is the same as the last.
    pages = [grid_page(frame, min(COLUMNS, len(labels)), column_labels=[f"{i + 1}/{steps}", times[i]])
             for i, frame in enumerate(frames)]
    milliseconds = [100] * (steps - 1) + [2000]
    write_atomically(Path(args.out).with_suffix(".gif"), lambda partial: pages[0].save(
        partial, "gif", save_all=True, append_images=pages[1:], duration=milliseconds, loop=0))


def read_image(args, name, size=None):
    """The image of this flag, read as in training, with errors that name the flag and the file."""
    try:
        return load_image(getattr(args, name), size)
    except UserError as error:
        raise UserError(f"--{name} {getattr(args, name)}: {error}") from error


def read_mask(args, tokenizer):
    """--mask -> (N,) bool, True where a token is to be drawn: a pixel of its f x f cell is white."""
    pixels, size, f = read_image(args, "mask").min(0), tokenizer.size, tokenizer.f         # (H, W) uint8
    side = min(pixels.shape)
    top, left = ((length - side) // 2 for length in pixels.shape)  # the centre square, as load_image takes it
    square = Image.fromarray(pixels[top:top + side, left:left + side])
    mask = np.asarray(square.resize((size, size), Image.Resampling.NEAREST)) >= 128
    return torch.from_numpy(mask).view(size // f, f, size // f, f).any(3).any(1).flatten()


def draw_from_image(args, pipeline, chosen, labels, settings):
    """--inpaint and --vary: the image, perhaps without its masked cells, then new ones; a row per --class."""
    tokenizer, n = pipeline.tokenizer, len(labels)
    if pipeline.class_names and not args.classes and not pipeline.config["training"]["label_drop"]:
        raise UserError("this model was trained with --label-drop 0 and has to know the class: give --class")
    pixels = read_image(args, "inpaint" if args.inpaint else "vary", tokenizer.size)
    image = torch.from_numpy(pixels)[None]                                                 # (1, 3, H, W)
    tokens = tokenizer.encode(image.to(pipeline.device))                                   # (1, N)
    columns = {"image": image}
    if args.vary:
        options = {"init": (tokens, args.strength or 0.6)}
        with user_error():
            check_settings(**settings, t=args.strength or 0.6)
    else:
        drawn = read_mask(args, tokenizer)                                                 # (N,)
        if not drawn.any():
            raise UserError(f"--mask {args.mask} has no white pixel: paint white what is to be drawn anew")
        cells = drawn.view(tokenizer.grid).repeat_interleave(tokenizer.f, 0).repeat_interleave(tokenizer.f, 1)
        columns["mask"] = image.where(~cells, 128)
        options = {"inpaint": tokens.masked_fill(drawn.to(pipeline.device), -1)}
    if not args.classes:
        chosen = [pipeline.model.num_classes]  # the null class
    images = sample_images(pipeline, torch.tensor(chosen).repeat_interleave(n), seed=args.seed,
                           batch=args.batch, indices=list(range(n)) * len(chosen), **options, **settings)
    before = torch.cat(list(columns.values())).expand(len(chosen), -1, -1, -1, -1)
    page = torch.cat([before, images.view(len(chosen), n, *images.shape[1:])], 1).flatten(0, 1)
    save_grid(page, args.out, len(columns) + n, column_labels=list(columns),
              row_labels=words(pipeline, torch.tensor(chosen)) if args.classes else None)


def slerp(a, b, n):
    """a, b (N, D) -> (n, N, D), from a to b along the circle: straight lines would be too short for noise."""
    w = torch.linspace(0, 1, n, dtype=torch.float64)[:, None, None]
    angle = F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).acos()
    return (((1 - w) * angle).sin() / angle.sin() * a + (w * angle).sin() / angle.sin() * b).to(a.dtype)


def draw_interpolation(args, pipeline, chosen, labels, settings):
    """--interpolate A,B: image 0 of seed A, but its first noise turns to that of seed B; a row per class."""
    seeds, n, model = args.interpolate.split(","), len(labels), pipeline.model
    rows = torch.tensor(chosen if args.classes else chosen[:16])
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
