"""`python sample.py CKPT --serve`: a page in the browser, extras/serve.html, to play with a model.

Image i of the page is image i of `python sample.py` with its class and the same seed and settings.

It listens to 127.0.0.1 alone. Against other pages in a browser here, and domains that are made to lead here,
Host must be ours, the Origin of a POST too, and its body declared as JSON, which they may not send.
"""

import base64
import io
import itertools
import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import load_image
from engine.validate import UserError, expect, reading
from sample import SAMPLERS, sample_images

LIMITS = {"n": (int, 1, 16), "seed": (int, 0, 2 ** 53 - 1), "steps": (int, 1, 200),
          "guidance": (float, -1e4, 1e4), "temperature": (float, 0.01, 100.0)}  # type and range
FRAMES = 10  # of a trajectory
LARGEST_BODY = 8 << 20  # bytes
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
          "connect-src 'self'; frame-ancestors 'none'")


def read_indices(request, name, count):
    return [expect(name, index, int, 0, count - 1) for index in expect(name, request.get(name), list)]


def read_image(request, size):
    """An image file in base64 -> (1, 3, size, size) uint8, cropped and resized as in training."""
    with reading("the image", "give another file"):
        return torch.from_numpy(load_image(base64.b64decode(request["image"]), size))[None]


def read_request(pipeline, settings, request):
    """The JSON of /draw -> labels (n,), shared out evenly; whether to send the trajectory; other options."""
    numbers = {name: limits[0](expect(name, request.get(name), *limits)) for name, limits in LIMITS.items()}
    options = settings | numbers | {"sampler": expect("sampler", request.get("sampler"), tuple(SAMPLERS))}
    n = options.pop("n")
    classes = read_indices(request, "classes", len(pipeline.class_names))
    cells = read_indices(request, "cells", pipeline.model.N)
    only_classes = pipeline.class_names and not pipeline.config["training"]["label_drop"]
    if only_classes and (not classes or options["guidance"]):
        raise UserError("this model was trained with --label-drop 0: choose a class, and guidance 0")
    if not classes:  # the null class, unguided
        classes, options["guidance"] = [pipeline.model.num_classes], 0.0
    if request.get("image") is not None:
        image = read_image(request, pipeline.tokenizer.size).to(pipeline.device)
        options["inpaint"] = pipeline.tokenizer.encode(image)                                      # (1, N)
        options["inpaint"][:, cells] = -1
    labels = torch.tensor(classes)[torch.arange(n) * len(classes) // n]
    return labels, expect("trajectory", request.get("trajectory"), bool), options


def png_texts(images):
    """uint8 images (n, 3, H, W) -> PNG files in base64, a list."""
    texts = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        texts.append(base64.b64encode(file.getvalue()).decode())
    return texts


def draw(pipeline, settings, request, send):
    """Sends a line {step, t} for each step, some with the likeliest tokens decoded, and then the images."""
    labels, trajectory, options = read_request(pipeline, settings, request)
    frames = {round(step) for step in np.linspace(1, options["steps"], FRAMES)} if trajectory else set()
    steps = itertools.count(1)

    def after_step(t, p):
        line = {"step": next(steps), "t": t}
        if line["step"] in frames:
            line["images"] = png_texts(pipeline.tokenizer.decode(p.argmax(-1)))
        send({"labels": labels.tolist()} | line)
    images = sample_images(pipeline, labels, show_progress=False, callback=after_step, **options)
    send({"labels": labels.tolist(), "images": png_texts(images)})


class Handler(BaseHTTPRequestHandler):
    """One connection with one request, in a thread of its own."""
    timeout = 10  # seconds that a client may say nothing, or take nothing
    answered = False  # has an answer begun?

    def do_GET(self):
        if self.headers["Host"] not in self.server.hosts:
            return self.send_error(403, "this server is for this machine alone")
        if self.path not in self.server.pages:
            return self.send_error(404)
        kind, content = self.server.pages[self.path]
        self.begin(200, kind)
        self.wfile.write(content)

    def do_POST(self):
        length, host = self.headers.get("Content-Length", ""), self.headers["Host"]
        if not length.isdecimal() or len(length) > 8 or int(length) > LARGEST_BODY:
            return self.send_error(413, f"a request has a Content-Length, of at most {LARGEST_BODY} bytes")
        body = self.rfile.read(int(length))  # before any other refusal, which else might not arrive
        if host not in self.server.hosts or self.headers["Origin"] != f"http://{host}":
            self.send_error(403, "only this server's own page may ask for this")
        elif self.headers["Content-Type"] != "application/json":
            self.send_error(415)
        elif self.path not in self.server.actions:
            self.send_error(404)
        elif not self.server.drawing.acquire(blocking=False):
            self.send_error(429, "another picture is being drawn: wait until it is done")
        else:
            self.act(self.server.actions[self.path], body)

    def act(self, action, body):
        try:
            with reading("the request"):
                request = expect("the request", json.loads(body), dict)
            action(request, self.send_line)
        except (ConnectionError, TimeoutError):  # the client is gone, or the server ends
            pass
        except UserError as error:
            self.send_error(400, str(error))
        except (MemoryError, torch.OutOfMemoryError):
            self.send_error(503, "not enough memory: ask for less")
        except Exception:
            traceback.print_exc()
            self.send_error(500, "something went wrong: the terminal of this server says what")
        finally:
            self.server.drawing.release()

    def begin(self, status, kind):
        self.answered = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()

    def send_line(self, line, status=200):
        """A line of JSON. ConnectionError, which ends a drawing, if the client is gone or the server ends."""
        if self.server.ending:
            raise ConnectionAbortedError
        if not self.answered:
            self.begin(status, "application/x-ndjson")
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def send_error(self, code, message=None, explain=None):
        """{"error": message}: the answer or, if that has begun, its last line."""
        self.send_line({"error": message or self.responses[code][0]}, code)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """pages: {path: (content type, bytes)}. actions: {path of a POST: function(dict, send_line)}."""
    def __init__(self, port, pages, actions):
        self.pages, self.actions = pages, actions
        self.drawing, self.ending = threading.Lock(), False
        super().__init__(("127.0.0.1", port), Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    def server_close(self):
        """A drawing ends at its next line. Python would abort if it exited while a thread is in PyTorch."""
        self.ending = True
        super().server_close()
        with self.drawing:
            pass


def make_server(args, pipeline, chosen, settings):
    """The server of --serve. What else the command line says are the first settings of the page."""
    tokenizer, names = pipeline.tokenizer, pipeline.class_names
    chosen = chosen if len(chosen) <= LIMITS["n"][2] else chosen[:1]
    initial = {"n": args.n or max(len(chosen), 8), "seed": args.seed, "temperature": 1.0} | settings
    if args.steps is None:
        initial["steps"] = min(initial["steps"], LIMITS["steps"][2])
    for name, limits in LIMITS.items():
        expect(f"--{name}", initial[name], *limits)
    initial["classes"] = chosen if names else []
    model = {"initial": initial, "limits": {name: limits[1:] for name, limits in LIMITS.items()},
             "samplers": SAMPLERS, "names": names, "null": bool(pipeline.config["training"]["label_drop"]),
             "step": pipeline.step, "size": tokenizer.size, "grid": tokenizer.grid, "largest": LARGEST_BODY}
    pages = {"/": ("text/html; charset=utf-8", Path(__file__).with_name("serve.html").read_bytes()),
             "/model": ("application/json", json.dumps(model).encode())}
    actions = {
        "/draw": lambda request, send: draw(pipeline, settings, request, send),
        "/crop": lambda request, send: send({"image": png_texts(read_image(request, tokenizer.size))[0]})}
    try:
        return Server(args.serve, pages, actions)
    except (OSError, OverflowError) as error:
        raise UserError(f"--serve {args.serve}: {error}; give another port, or 0 for any") from error


def serve(args, pipeline, chosen, labels, settings):
    with make_server(args, pipeline, chosen, settings) as server:
        print(f"open http://127.0.0.1:{server.server_port}/ in a browser on this machine; Ctrl-C ends it",
              flush=True)
        server.serve_forever()
