"""sample.py --serve: what the page gets, and what everybody else gets."""

import base64
import contextlib
import hashlib
import http.client
import io
import json
import queue
import re
import select
import socket
import sys
import threading
import time
import tracemalloc
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from data import load_image
from extras import local_server, sample_command, serve
from sample import load_checkpoint, sample_images
from tests.common import HERE, call

WISHES = dict(n=8, seed=3, steps=3, guidance=2.0, temperature=1.0, classes=[1], sampler="ancestral", trajectory=False,
              image=None, cells=[])


@contextlib.contextmanager
def serving(pipeline, **options):
    """A server in a thread, its settings those of the checkpoint; options: what else the command line says."""
    args = SimpleNamespace(**{"serve": 0, "n": None, "seed": 0, "steps": None} | options)
    with serve.make_server(args, pipeline, list(range(len(pipeline.class_names))), pipeline.sampling) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def pipeline(one_thread, run):
    return load_checkpoint(run / "ckpt.pt", torch.device("cpu"))


@pytest.fixture
def site(pipeline):
    with serving(pipeline) as server:
        yield server


def start(server, method="POST", path="/draw", body=None, **headers):
    """A connection that has sent a request as our page does; headers: others, None for none of that name."""
    host = f"127.0.0.1:{server.port}"
    sent = {"Host": host}
    if method == "POST":
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent |= {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin", "Content-Type": "application/json",
                 "Content-Length": len(body)}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in (sent | {name.replace("_", "-"): value for name, value in headers.items()}).items():
        for one in value if isinstance(value, list) else [value] if value is not None else []:
            connection.putheader(name, str(one))
    connection.endheaders(body)
    return connection


def ask(*args, **options):
    """(status, the lines of the answer as JSON)."""
    with contextlib.closing(start(*args, **options)) as connection:
        answer = connection.getresponse()
        return answer.status, [json.loads(line) for line in answer.read().splitlines()]


def free(server):
    """Waits until nothing is drawn."""
    assert server.busy.acquire(timeout=5)
    server.busy.release()


def pixels(texts):
    """PNG files in base64 -> (n, 3, H, W)."""
    return np.stack([load_image(base64.b64decode(text)) for text in texts])


def png_text(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def test_the_page(pipeline):
    """It is there, needs nothing from elsewhere, and may run its own script alone; names come as JSON and as text."""
    pipeline.class_names = ["<img src=x onerror=alert(1)>", "</script>"]
    with serving(pipeline, n=5, seed=7) as server, contextlib.closing(start(server, "GET", "/")) as connection:
        answer = connection.getresponse()
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
        status, [model] = ask(server, "GET", "/model", Host=f"localhost:{server.port}")
    assert answer.status == status == 200 and page == (HERE / "extras" / "serve.html").read_text(encoding="utf-8")
    for kind in ("script", "style"):
        [inline] = re.findall(f"<{kind}[^>]*>(.*?)</{kind}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
    assert not re.search(r"https?:|//\w|innerHTML|insertAdjacent|document\.write|eval\(| on\w+=|style=", page)
    assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Content-Type-Options"] == "nosniff"
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert "Python" not in str(answer.headers)
    assert model["names"] == pipeline.class_names and model["initial"]["n"] == 5 and model["initial"]["seed"] == 7
    assert model["size"] == 8 and model["grid"] == [2, 2] and model["initial"]["steps"] == 3
    assert server.server_address[0] == "127.0.0.1"


def test_what_is_drawn(pipeline, site, run, tmp_path):
    """The very images of the command line; the trajectory on the way; known tokens are kept."""
    words = ["--class", "dog", "--n", 8, "--seed", 3, "--guidance", 1e3, "--temperature", 0.5, "--sampler", "ddim",
             "--steps", 4]
    assert call("sample.py", run / "ckpt.pt", *words, "--out", tmp_path / "dogs") == 0
    torch.set_num_threads(1)
    wishes = WISHES | dict(guidance=1000, temperature=0.5, sampler="ddim", steps=4)
    status, lines = ask(site, body=wishes)
    expected = np.stack([load_image(tmp_path / "dogs" / f"{i:06d}.png") for i in range(8)])
    assert status == 200 and [line.get("step") for line in lines] == [1, 2, 3, 4, None]
    assert np.array_equal(pixels(lines[-1]["images"]), expected) and lines[-1]["labels"] == [1] * 8
    assert not any("images" in line for line in lines[:-1])

    settings, seen = pipeline.sampling | {"guidance": 2.0, "steps": 12}, []
    labels = torch.tensor([0, 0, 1, 1, 1])  # shared out; image i is image i of its class
    images = sample_images(pipeline, labels, seed=3, callback=lambda t, p: seen.append((t, p.argmax(-1))), **settings)
    _, lines = ask(site, body=WISHES | dict(n=5, classes=[0, 1], steps=12, trajectory=True))
    assert np.array_equal(pixels(lines[-1]["images"]), images) and sorted(lines[-1]["labels"]) == lines[-1]["labels"]
    labels = torch.tensor(lines[-1]["labels"])
    frames = [(line["step"], line["t"], line["images"]) for line in lines[:-1] if "images" in line]
    assert len(frames) == 10 and frames[0][0] == 1 and frames[-1][0] == 12
    for step, t, texts in frames:
        assert t == seen[step - 1][0]
        assert np.array_equal(pixels(texts), pipeline.tokenizer.decode(seen[step - 1][1]))

    # Part of an image, with a class and without one: then there is no guidance.
    upload = torch.randint(256, (10, 14, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    _, [line] = ask(site, path="/crop", body={"image": png_text(upload)})
    image = load_image(upload, 8)
    assert np.array_equal(pixels([line["image"]])[0], image)
    known = pipeline.tokenizer.encode(torch.from_numpy(image)[None])
    known[:, [0, 3]] = -1
    for classes, label, guidance in (([1], 1, 2.0), ([], 2, 0.0)):
        images = sample_images(pipeline, torch.full((3,), label), seed=3, inpaint=known,
                               **pipeline.sampling | {"guidance": guidance})
        for sent in (png_text(upload), line["image"]):
            _, lines = ask(site, body=WISHES | dict(n=3, classes=classes, image=sent, cells=[3, 0]))
            assert np.array_equal(pixels(lines[-1]["images"]), images)
    pipeline.config["training"]["label_drop"] = 0.0
    status, [line] = ask(site, body=WISHES | {"classes": []})
    assert status == 400 and "has to know the class" in line["error"]


def test_hostile_requests(site, monkeypatch):
    """Each gets a status and one line, which repeats nothing; no memory is taken for it; the next request is served."""
    monkeypatch.setattr(local_server, "LARGEST_BODY", 1 << 20)
    good, here = json.dumps(WISHES).encode(), f"127.0.0.1:{site.port}"

    def wish(**wishes):
        return dict(body=WISHES | wishes)

    def text(old, new):
        assert old in good
        return dict(body=good.replace(old, new))

    picture, bomb = io.BytesIO(), io.BytesIO()
    Image.new("L", (3, 3)).save(picture, "png")
    Image.new("1", (1 << 14, 1 << 13)).save(bomb, "png")
    requests = [
        # another page, or another name for this machine
        (403, dict(method="GET", path="/", Host="evil.example")), (403, dict(method="GET", path="/", Host=None)),
        (403, dict(method="GET", path="/model", Host=f"evil.example:{site.port}")),
        (403, dict(method="GET", path="/", Host=[here, "evil.example"])),
        (403, dict(method="GET", path="/", Host="127.0.0.1:1")), (403, dict(body=good, Host="evil.example")),
        (403, dict(body=good, Host="evil.example", Origin="http://evil.example")),
        (403, dict(body=good, Origin="http://evil.example")), (403, dict(body=good, Origin="null")),
        (403, dict(body=good, Origin=None)), (403, dict(body=good, Origin=f"https://{here}")),
        (403, dict(body=good, Origin=f"http://localhost:{site.port}")),
        (403, dict(body=good, Sec_Fetch_Site="cross-site")), (403, dict(body=good, Sec_Fetch_Site="same-site")),
        (415, dict(body=good, Content_Type="text/plain")), (415, dict(body=good, Content_Type=None)),
        (415, dict(body=good, Content_Type="application/x-www-form-urlencoded")),
        # a body of no length, or of too much
        (411, dict(body=b"", Content_Length=None)), (411, dict(body=b"", Content_Length="-1")),
        (411, dict(body=b"", Content_Length="1e3")), (411, dict(body=b"", Content_Length="9" * 100)),
        (411, dict(body=b"", Content_Length=None, Transfer_Encoding="chunked")),
        (411, dict(body=good, Transfer_Encoding="chunked")), (411, dict(body=b"", Content_Length=["0", "2"])),
        (413, dict(body=b"", Content_Length=1 << 40)), (413, dict(body=b"", Content_Length=(1 << 20) + 1)),
        # paths and methods
        *((404, dict(method="GET", path=path)) for path in (
            "/../sample.py", "/..%2f..%2fetc/passwd", "//etc/passwd", "/serve.html", "/draw", "/?a", "/model/",
            f"http://{here}/", "*")),
        (404, dict(body=good, path="/")), (404, dict(body=good, path="/model")), (404, dict(body=good, path="/a")),
        *((501, dict(method=method, path="/draw")) for method in ("OPTIONS", "PUT", "DELETE", "HEAD", "TRACE")),
        (414, dict(method="GET", path="/" + "a" * 70000)), (431, dict(method="GET", path="/", X="a" * 70000)),
        (431, dict(method="GET", path="/", **{f"X{i}": 1 for i in range(200)})),
        # JSON that is none, or of another form
        *((400, dict(body=body)) for body in (
            b"", b"{", b"\xff\xfe", b"[" * 500000, b'{"a":' * 100000, b"[]", b"null", b"{}", b"1" * 5000, b"1e999")),
        (400, wish(more=1)), (400, text(b'"n": 8, ', b"")),
        # numbers
        *((400, text(b'"guidance": 2.0', b'"guidance": ' + value)) for value in (
            b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e5", b"1" + b"0" * 400, b'"1"', b"null", b"true", b"[1]")),
        *((400, text(b'"temperature": 1.0', b'"temperature": ' + value)) for value in (b"0", b"-1", b"1e-300", b"NaN")),
        *((400, text(b'"steps": 3', b'"steps": ' + value)) for value in (b"0", b"201", b"1e9", b"3.5", b"true", b"3.")),
        *((400, wish(n=n)) for n in (0, 17, -1, 10 ** 30, None)), *((400, wish(seed=seed)) for seed in (-1, 1 << 53)),
        *((400, wish(classes=classes)) for classes in ([2], [-1], [0.0], ["dog"], "dog", None, {}, [True], [[]])),
        *((400, wish(sampler=sampler)) for sampler in ("euler", None, ["ddim"], "a" * 1000)),
        (400, wish(trajectory=1)),
        # images that are none
        *((400, wish(image=image, cells=[0])) for image in (
            "", "%%%", "é", 7, [], base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(),
            base64.b64encode(b"%!PS-Adobe-3.0 EPSF").decode(), "/etc/passwd", "file:///etc/passwd",
            base64.b64encode(picture.getvalue()).decode(), base64.b64encode(bomb.getvalue()).decode())),
        *((400, wish(image=png_text(np.zeros((8, 8), np.uint8)), cells=cells))
          for cells in ([], [4], [-1], [0.5], "0", 0)),
        (400, dict(path="/crop", body=[])), (400, dict(path="/crop", body={"image": "AAAA"})),
        (400, dict(path="/crop", body={"image": None})), (400, dict(path="/crop", body={"path": "/etc/passwd"})),
    ]
    tracemalloc.start()
    try:
        with mock.patch.object(serve, "sample_images", side_effect=AssertionError("was drawn")):
            for status, request in requests:
                found, lines = ask(site, **request)
                assert found == status, (found, status, str(request)[:200])
                if request.get("method") != "HEAD":
                    [[error]] = [line.values() for line in lines]
                    assert list(lines[0]) == ["error"] and 3 < len(error) < 300 and "\n" not in error
                    assert not re.search(r"evil|passwd|Traceback|\.py|/tmp|aaaa", error), error
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    with socket.create_connection(("127.0.0.1", site.port), 5) as connection:  # no HTTP at all
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
        assert connection.recv(10)
    assert ask(site, body=WISHES)[0] == 200


def endless(pipeline, labels, *, callback, **_):
    """In place of sample_images; a test that fails has an end all the same."""
    began = time.monotonic()
    while time.monotonic() < began + 10:
        callback(1.0, None)
        select.select([], [], [], 0.001)


def test_one_picture_at_a_time(site, pipeline):
    """A second request gets 429; a client that goes away, or the end of the program, ends the drawing."""
    with mock.patch.object(serve, "sample_images", endless):
        for _ in range(2):
            first = start(site, body=WISHES)
            answer = first.getresponse()
            assert json.loads(answer.readline())["step"] == 1
            for path in ("/draw", "/crop"):
                status, [line] = ask(site, path=path, body=WISHES)
                assert status == 429 and line == {"error": "another picture is being drawn: wait until it is done"}
            assert ask(site, "GET", "/model")[0] == 200  # the page itself is there
            answer.close()
            first.close()
            free(site)
        with serving(pipeline) as other:
            connection = start(other, body=WISHES)
            answer = connection.getresponse()
            assert answer.readline()
        assert not other.worker.is_alive()  # it has come to its end while the client still waits
        answer.close()
        connection.close()
    assert ask(site, body=WISHES)[0] == 200


def test_slow_and_many_clients(pipeline, monkeypatch):
    """Who says nothing, a byte now and then, or less than was said, is left; more than a few wait outside."""
    monkeypatch.setattr(local_server, "PATIENCE", 0.2)
    head = b"POST /draw HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n"
    with serving(pipeline) as server:
        for sent, drip, says in ((b"", b"", b""), (b"GET / HT", b"T", b""), (head, b"X", b""),
                                 (head + b"\r\n{", b" ", b"HTTP/1.0 408 ")):
            with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
                began = time.monotonic()
                connection.sendall(sent)
                while not select.select([connection], [], [], 0.02)[0]:
                    connection.sendall(drip)
                    assert time.monotonic() < began + 5
                with contextlib.suppress(ConnectionResetError):
                    found = connection.recv(1000)
                    assert found.startswith(says) and (says or not found)
        with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
            connection.sendall(head + b"\r\n{")  # and leaves
        assert ask(server, body=WISHES)[0] == 200
    monkeypatch.setattr(local_server, "PATIENCE", 5.0)
    monkeypatch.setattr(local_server, "MOST_CONNECTIONS", 3)
    with serving(pipeline) as server, contextlib.ExitStack() as stack:
        threads = threading.active_count()
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 5))
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
                assert connection.recv(1) == b""  # closed at once
        assert threading.active_count() <= threads + 3


def test_errors_of_ours(site, capsys):
    """A bug is printed where the server runs; the client hears that there is one. Memory is said."""
    for error, printed in ((KeyError("bug"), True), (BrokenPipeError(), False), (TimeoutError(), False)):
        try:
            raise error
        except Exception:
            site.handle_error(None, None)
        assert ("Traceback" in capsys.readouterr().err) == printed
    site.handle_error, caught = lambda *_: caught.put(sys.exc_info()[0]), queue.Queue()
    for error, status, says in ((KeyError("secret"), 500, "the terminal"), (MemoryError("secret"), 503, "not enough")):
        def before(*_, error=error, **__):
            raise error

        def midway(*_, error=error, callback, **__):
            callback(1.0, None)
            raise error

        for fails, expected in ((before, status), (midway, 200)):
            with mock.patch.object(serve, "sample_images", fails):
                found, lines = ask(site, body=WISHES)
            assert found == expected and says in lines[-1]["error"] and "secret" not in lines[-1]["error"]
            free(site)
            if status == 500:
                assert caught.get(timeout=5) is KeyError
    assert ask(site, body=WISHES)[0] == 200 and caught.empty()


def test_the_command(run, tmp_path, capsys):
    """It says where the page is, ends in one line, and is refused beside what does not go with it."""
    with mock.patch.object(local_server.Server, "serve_forever", side_effect=KeyboardInterrupt):
        assert call("sample.py", run / "ckpt.pt", "--serve", 0, "--n", 3, "--steps", 9, "--class", "dog") == 130
    printed = capsys.readouterr()
    assert re.search(r"^open http://127\.0\.0\.1:\d+/ in a browser", printed.out, re.M)
    assert printed.err == "sample.py: stopped\n"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, says in ((["--serve", port], "give another port"), (["--serve", 65536], "a port from 0 to 65535"),
                            (["--serve", 0, "--compile"], "no --compile"), (["--serve", 0, "--n", 17], "from 1 to 16"),
                            (["--serve", 0, "--steps", 201], "from 1 to 200"),
                            (["--serve", 0, "--out", tmp_path / "a.npz"], "--serve writes no files"),
                            (["--serve", 0, "--mask", "a.png"], "belong together")):
            assert call("sample.py", run / "ckpt.pt", *words) == 2
            error = capsys.readouterr().err
            assert says in error and error.count("\n") == 1, error
    assert call("sample.py", run / "ckpt.pt", "--serve", 0, "--trajectory") == 2
    with mock.patch.object(sample_command, "rank_and_world", lambda: (0, 2)):
        assert call("sample.py", run / "ckpt.pt", "--serve", 0) == 2
    assert "--serve is for one process" in capsys.readouterr().err
