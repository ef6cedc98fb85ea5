"""`python sample.py CKPT --serve`: a page in the browser, to play with a model. Called by extras/sample_command.py.

The page is extras/serve.html, all in one file. It asks for two things: /draw streams a line for each step and then the
images; /crop makes the model's square of an image file. Image i is image i of `python sample.py` with its class and the
same seed and settings. Who may ask, and how much, is in extras/local_server.py.
"""

import base64
import io
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import load_image
from engine.process import UserError, user_error
from extras.local_server import LARGEST_BODY, Server
from sample import SAMPLERS, check_settings, sample_images

LIMITS = {"n": (int, 1, 16), "seed": (int, 0, 2 ** 53 - 1), "steps": (int, 1, 200), "guidance": (float, -1e4, 1e4),
          "temperature": (float, 0.01, 100.0)}  # the page's numbers, and their bounds
FIELDS = {*LIMITS, "classes", "sampler", "trajectory", "image", "cells"}
FRAMES = 10  # of a trajectory


# ----------------------------------------------------------------------------
# From JSON to what sample_images takes. UserError for what makes no sense.

def read_number(name, value):
    kind, low, high = LIMITS[name]
    if type(value) not in (int, kind) or not low <= value <= high:  # NaN is neither above nor below
        raise UserError(f"{name} must be a {'whole ' if kind is int else ''}number from {low:,} to {high:,}")
    return kind(value)


def read_list(name, values, end):
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < end for value in values):
        raise UserError(f"{name} must be a list of whole numbers, at least 0 and below {end}")
    return values


def read_image(text, size):
    """An image file in base64 -> (1, 3, size, size) uint8, by the way to pixels that training takes."""
    if not isinstance(text, str):
        raise UserError("image must be an image file in base64")
    with user_error():
        content = base64.b64decode(text, validate=True)
    return torch.from_numpy(load_image(content, size))[None]


def read_wishes(pipeline, settings, wishes):
    """The JSON of /draw -> labels (n,), whether to show the trajectory, options of sample_images.

    The n images are shared out evenly among the classes. Without a class the null class draws them, as on the command
    line, and there is nothing to guide to.
    """
    if not isinstance(wishes, dict) or wishes.keys() != FIELDS:
        raise UserError(f"the request must have these fields and no others: {', '.join(sorted(FIELDS))}")
    if wishes["sampler"] not in SAMPLERS or type(wishes["trajectory"]) is not bool:
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, and trajectory true or false")
    given = {name: read_number(name, wishes[name]) for name in LIMITS}
    names, n, seed = pipeline.class_names, given.pop("n"), given.pop("seed")
    chosen = read_list("classes", wishes["classes"], len(names))
    if not chosen:
        if names and not pipeline.config["training"]["label_drop"]:
            raise UserError("this model was trained with --label-drop 0 and has to know the class: choose one")
        chosen, given["guidance"] = [pipeline.model.num_classes], 0.0
    if names and given["guidance"] and not pipeline.config["training"]["label_drop"]:
        raise UserError("this model was trained with --label-drop 0: guidance must be 0")
    options = settings | given | {"sampler": wishes["sampler"]}
    with user_error():
        check_settings(**options)
    cells = read_list("cells", wishes["cells"], pipeline.model.N)
    if wishes["image"] is not None:
        if not cells:
            raise UserError("paint what is to be drawn anew")
        image = read_image(wishes["image"], pipeline.tokenizer.size)
        options["inpaint"] = pipeline.tokenizer.encode(image.to(pipeline.device))                  # (1, N)
        options["inpaint"][:, cells] = -1
    return torch.tensor(chosen)[torch.arange(n) * len(chosen) // n], wishes["trajectory"], options | {"seed": seed}


# ----------------------------------------------------------------------------
# What the page asks for.

def png_texts(images):
    """uint8 images (n, 3, H, W) -> PNG files in base64, a list."""
    files = [io.BytesIO() for _ in images]
    for pixels, file in zip(images.permute(0, 2, 3, 1).cpu().numpy(), files, strict=True):
        Image.fromarray(pixels).save(file, "png")
    return [base64.b64encode(file.getvalue()).decode() for file in files]


def draw(pipeline, settings, wishes, send):
    """A line {step, t} for each step, about ten of them with the likeliest tokens decoded; then the images."""
    labels, trajectory, options = read_wishes(pipeline, settings, wishes)
    shown = {round(i) for i in np.linspace(1, options["steps"], FRAMES)} if trajectory else ()
    steps = itertools.count(1)

    def pictures(images):
        return {"labels": labels.tolist(), "images": png_texts(images)}

    def after_step(t, p):
        step = next(steps)
        send({"step": step, "t": t} | (pictures(pipeline.tokenizer.decode(p.argmax(-1))) if step in shown else {}))

    send(pictures(sample_images(pipeline, labels, show_progress=False, callback=after_step, **options)))


def crop(pipeline, wishes, send):
    if not isinstance(wishes, dict) or wishes.keys() != {"image"}:
        raise UserError("the request must have one field, image")
    send({"image": png_texts(read_image(wishes["image"], pipeline.tokenizer.size))[0]})


def make_server(args, pipeline, chosen, settings):
    """The server of --serve, with what else the command line says as the page's first settings."""
    names, tokenizer = pipeline.class_names, pipeline.tokenizer
    chosen = chosen[:None if len(chosen) <= 16 else 1] if names else []
    initial = {"n": args.n or min(max(len(chosen), 8), 16), "seed": args.seed, "temperature": 1.0} | settings
    if args.steps is None:
        initial["steps"] = min(initial["steps"], LIMITS["steps"][2])
    model = {"initial": {name: read_number(name, initial[name]) for name in LIMITS}
             | {"classes": chosen, "sampler": initial["sampler"]},
             "limits": {name: limits[1:] for name, limits in LIMITS.items()},
             "names": names, "null": bool(pipeline.config["training"]["label_drop"]), "samplers": SAMPLERS,
             "step": pipeline.step, "size": tokenizer.size, "grid": tokenizer.grid, "largest": LARGEST_BODY}
    page = Path(__file__).with_name("serve.html").read_text(encoding="utf-8")
    actions = {"/draw": lambda wishes, send: draw(pipeline, settings, wishes, send),
               "/crop": lambda wishes, send: crop(pipeline, wishes, send)}
    try:
        return Server(args.serve, page, model, actions)
    except OSError as error:
        raise UserError(f"--serve {args.serve}: {error.strerror}; give another port, or 0 for any that is free") \
            from error


def serve(args, pipeline, chosen, labels, settings):
    """--serve PORT, until Ctrl-C."""
    with make_server(args, pipeline, chosen, settings) as server:
        print(f"open http://127.0.0.1:{server.port}/ in a browser on this machine; Ctrl-C ends it", flush=True)
        server.serve_forever()
