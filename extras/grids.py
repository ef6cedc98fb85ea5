"""Images on a page: the grids that training and sampling write, and the page that shows a data set."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from engine.process import write_atomically


def contact_sheet(images, path, columns=8):
    """A page of an ImageSet: a row for each of up to 16 classes; without classes, 64 images of it."""
    names = images.class_names[:16]
    rows = [torch.nonzero(images.labels == c).flatten()[:columns].tolist() for c in range(len(names))]
    if not rows or min(map(len, rows)) < columns:  # no classes, or too few images for a row of each
        rows = [np.linspace(0, len(images) - 1, min(len(images), 8 * columns)).astype(int).tolist()]
        names = None
    save_grid(images.batch(sum(rows, [])), path, columns, row_labels=names)


def save_pairs(above, below, path, columns=8):
    """Rows of images (n, 3, H, W), each over its counterpart: originals over reconstructions."""
    columns = min(columns, len(above))
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
    """Writes the page of grid_page, with its options, as a PNG; the old file stays until it is complete."""
    page = grid_page(images, columns, **options)
    write_atomically(Path(path), lambda partial: page.save(partial, "png"))
