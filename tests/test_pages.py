"""The page of a run and the page of --serve: what they are told, and who else is told nothing."""

import base64
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import threading
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import losses
from data import load_image
from engine.build import load_checkpoint
from engine.process import lock
from extras import run_page, serve
from sample import sample_images
from tests.common import HERE, TINY, call, contents, encode, flags, noise, train_tiny

HOSTILE = ["</script><img src=x onerror=alert(1)>", "\u2028\udcff\u202e", "' \"; rm -r /", "a, b", "-x"]


def run_data(out):
    """What run.js says, after checking that it is one assignment, in ASCII, without tags."""
    assert (out / "index.html").read_bytes() == (HERE / "extras" / "run.html").read_bytes()
    text = (out / "run.js").read_text("ascii")
    assert "<" not in text and text.count("\n") == 1
    return json.loads(text.removeprefix("RUN = ").removesuffix(";\n"))


@pytest.mark.parametrize("name", ["run.html", "serve.html"])
def test_static_pages(name):
    """Nothing comes from elsewhere; no text can become HTML."""
    page = (HERE / "extras" / name).read_text("utf-8")
    page = re.sub(r"http://www\.w3\.org/(2000/svg|1999/xhtml)", "", page)  # names, not addresses
    assert not re.search(r"https?:|\"//|(inner|outer)HTML|insertAdjacent|document\.write|eval\(", page)


def test_page_of_a_run(folder, run):
    """The curves are those of the CSV files; the commands those that were given."""
    data, config = run_data(run), json.loads((run / "config.json").read_text())
    assert (data["state"], data["step"]) == ("complete", 8)
    assert data["classes"] == ["cat", "dog"] and "psnr" in data["metrics"]["tokenizer"]
    assert data["settings"].keys() == config.keys() - {"classes"}
    for name in ("tokenizer", "diffusion", "evaluation"):
        rows = np.genfromtxt(run / f"{name}.csv", delimiter=",", names=True, deletechars="")
        assert {*data["columns"][name]} == {*rows.dtype.names} - {"step"}
        for column, points in data["columns"][name].items():
            np.testing.assert_allclose(points, np.stack([rows["step"], rows[column]], 1), rtol=1e-4)
    (_, longer), (_, draw) = data["commands"]
    given = ["python", "train.py", "--data", str(folder), "--out", str(run), *flags(TINY)]
    assert shlex.split(longer) == [*given, "--steps", "16"] and str(run / "ckpt.pt") in draw


def test_states(run, tmp_path, capsys):
    """Of any run, from its files: how far it is, how it ended, whether it lives; hostile names are text."""
    out = shutil.copytree(run, tmp_path / "it's <b>")
    config = json.loads((run / "config.json").read_text()) | {HOSTILE[0]: HOSTILE[0]}
    config |= {"steps": 9, "classes": HOSTILE, "data": HOSTILE[0]}
    (out / "config.json").write_text(json.dumps(config))
    start = {"state": "running", "message": HOSTILE[0], "command": HOSTILE}
    (out / "state.json").write_text(json.dumps(start))
    with lock(out):
        assert call(run_page, out) == 0 and run_data(out)["state"] == "running"
    (out / "tokens.npy").unlink()
    (out / "tokenizer.csv").write_text("step,reconstruction,img/s\n4,0.5,7\n5,nan,7\n6,0.4")  # half a line
    for step in ("999999", "1000000"):
        (out / f"samples_{step}.png").touch()
    assert call(run_page, out) == 0
    data = run_data(out)
    assert data["columns"]["tokenizer"] == {"reconstruction": [[4, 0.5]], "img/s": [[4, 7], [5, 7]]}
    assert [name for name in data["files"] if "samples" in name][-2:] == [
        "samples_999999.png", "samples_1000000.png"]
    assert (data["state"], data["stage"], data["step"]) == ("gone", "tokenizer", 5)
    assert data["message"] == data["settings"]["data"] == data["settings"][HOSTILE[0]] == HOSTILE[0]
    assert data["classes"][1] == r"\u2028\udcff\u202e" and shlex.split(data["commands"][0][1]) == HOSTILE
    (out / "config.json").write_text("step,a\nx,y")
    assert call(run_page, out) == 2 and "config.json cannot be read" in capsys.readouterr().err


def test_page_while_a_run_lives(folder, undone, monkeypatch):
    """It says where the run is, at a status line too; at the end that it was stopped, or why it failed."""
    seen, real = [], losses.training_loss

    def watched(*args, **options):
        data = run_data(undone)
        seen.append((data["state"], data["step"]))
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(seen) == 6:
            raise ArithmeticError("it's broken")
        return real(*args, **options)

    monkeypatch.setattr(run_page, "SHARE", 1e9)  # a page at every line
    monkeypatch.setattr(losses, "training_loss", watched)
    assert train_tiny(folder, undone) == 143 and run_data(undone)["state"] == "stopped"
    with pytest.raises(ArithmeticError):
        train_tiny(folder, undone)
    assert seen == [("running", step) for step in (0, 0, 2, 2, 4, 4)]
    data = run_data(undone)
    assert (data["state"], data["message"]) == ("failed", "ArithmeticError: it's broken")


def test_a_page_that_cannot_be_written(folder, run, undone, capsys):
    """Said once; the run goes on and computes what it would have computed."""
    with mock.patch.object(run_page, "write_atomically", side_effect=OSError(28, "No space left")):
        assert train_tiny(folder, undone) == 0
    assert capsys.readouterr().out.count("no page of this run, which goes on without: [Errno 28]") == 1
    assert contents(undone) == contents(run)


REQUEST = dict(n=8, seed=3, steps=3, guidance=2.0, temperature=1.0, classes=[1], sampler="ancestral",
               trajectory=False, image=None, cells=[])


@pytest.fixture
def site(run):
    """A running server of sample.py --serve."""
    pipeline = load_checkpoint(run / "ckpt.pt", torch.device("cpu"))
    args = SimpleNamespace(serve=0, n=None, seed=0, steps=None)
    with serve.make_server(args, pipeline, [0, 1], pipeline.sampling) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def start(server, path="/draw", body=REQUEST, method="POST", **headers):
    """The answer, not yet read, to a request as our page sends it, but for these headers (None: without)."""
    host = f"127.0.0.1:{server.server_port}"
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json",
            "Content-Length": len(body)}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    for name, value in (sent | {name.replace("_", "-"): value for name, value in headers.items()}).items():
        if value is not None:
            connection.putheader(name, str(value))
    connection.endheaders(body)
    return connection.getresponse()


def ask(*args, **options):
    """(status, the lines of the answer as JSON)."""
    with start(*args, **options) as answer:
        return answer.status, [json.loads(line) for line in answer.read().splitlines()]


def pixels(texts):
    """PNG files in base64 -> (n, 3, H, W)."""
    return np.stack([load_image(base64.b64decode(text)) for text in texts])


def test_what_is_drawn(site, run, tmp_path):
    """The very images of the command line; the trajectory on the way; known tokens are kept."""
    pipeline = load_checkpoint(run / "ckpt.pt", torch.device("cpu"))
    words = ["--class", "dog", "--n", 8, "--seed", 3, "--guidance", 1e3, "--sampler", "ddim", "--steps", 4]
    assert call("sample.py", run / "ckpt.pt", *words, "--out", tmp_path / "dogs") == 0
    status, lines = ask(site, body=REQUEST | dict(guidance=1000, sampler="ddim", steps=4))
    expected = np.stack([load_image(tmp_path / "dogs" / f"{i:06d}.png") for i in range(8)])
    assert status == 200 and [line.get("step") for line in lines] == [1, 2, 3, 4, None]
    assert np.array_equal(pixels(lines[-1]["images"]), expected) and "images" not in lines[-2]

    labels, seen = torch.tensor([0, 0, 0, 1, 1]), []
    images = sample_images(pipeline, labels, seed=3, **pipeline.sampling | {"guidance": 2.0},
                           callback=lambda t, p: seen.append(pipeline.tokenizer.decode(p.argmax(-1))))
    _, lines = ask(site, body=REQUEST | dict(n=5, classes=[0, 1], trajectory=True))
    for line, images_then in zip(lines, [*seen, images], strict=True):
        assert line["labels"] == labels.tolist() and np.array_equal(pixels(line["images"]), images_then)

    upload = base64.b64encode(encode(noise(1, 10, 14)[0])).decode()
    _, [line] = ask(site, "/crop", {"image": upload})
    known = pipeline.tokenizer.encode(torch.from_numpy(pixels([line["image"]])))
    known[:, [0, 3]] = -1
    images = sample_images(pipeline, torch.full((3,), 2), seed=3, inpaint=known,
                           **pipeline.sampling | {"guidance": 0.0})
    _, lines = ask(site, body=REQUEST | dict(n=3, classes=[], image=upload, cells=[3, 0]))
    assert np.array_equal(pixels(lines[-1]["images"]), images)


WRONG = dict(
    n=[0, 17, None, 1.0, True], seed=[-1], steps=[201, "3"], sampler=["euler", []], trajectory=[1],
    guidance=[float("nan"), 1e5, None], temperature=[0], classes=[[2], [0.0], "dog"], cells=[[4], "0"],
    image=["", 7, "/etc/passwd", base64.b64encode(b"<svg/>").decode()])
REFUSALS = [
    *[(403, dict(method="GET", path=path, Host=host)) for path in ("/", "/model")
      for host in ("evil.example", "127.0.0.1:1", None)],
    *[(403, {name: value}) for name in ("Host", "Origin") for value in ("http://evil.example", "null", None)],
    *[(415, dict(Content_Type=value)) for value in ("text/plain", None)],
    *[(413, dict(Content_Length=value)) for value in (None, "-1", "9" * 5000, (8 << 20) + 1)],
    *[(404, dict(method="GET", path=path)) for path in ("/draw", "/serve.html", "/../sample.py")],
    (404, dict(path="/model")), (501, dict(method="OPTIONS")),
    *[(400, dict(body=body)) for body in (b"", b"\xff", b"[" * 500000, b"[]", b"{}")],
    *[(400, dict(body=REQUEST | {name: value})) for name, values in WRONG.items() for value in values],
    (400, dict(path="/crop", body={"image": "AAAA"}))]


def test_refusals(site):
    """A status and one line; nothing is drawn."""
    with mock.patch.object(serve, "sample_images", side_effect=AssertionError("was drawn")):
        for status, request in REFUSALS:
            found, [line] = ask(site, **request)
            assert found == status and list(line) == ["error"] and "\n" not in line["error"], request


def test_the_page_of_serve(site):
    """Names come as JSON, which the page takes for text; no other page may show it in a frame or read it."""
    with start(site, "/", method="GET", Host=f"localhost:{site.server_port}") as answer:
        assert answer.status == 200 and answer.read() == (HERE / "extras" / "serve.html").read_bytes()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    _, [model] = ask(site, "/model", method="GET")
    assert model["names"] == ["cat", "dog"] and model["initial"]["steps"] == 3 and model["grid"] == [2, 2]
    assert site.server_address[0] == "127.0.0.1"


def test_one_picture_at_a_time(site):
    """A second request is told so; a client that goes away ends the drawing."""
    def endless(*_, callback, **__):
        for _ in range(2000):  # a test that fails has an end all the same
            callback(1.0, None)
            time.sleep(0.001)

    with mock.patch.object(serve, "sample_images", endless):
        first = start(site)
        assert json.loads(first.readline())["step"] == 1
        for path in ("/draw", "/crop"):
            assert ask(site, path)[0] == 429
        first.close()
        assert site.drawing.acquire(timeout=1)
        site.drawing.release()


def test_errors_of_ours(site, capfd):
    """The client hears that there is one; a bug is printed where the server runs."""
    with mock.patch.object(serve, "sample_images", side_effect=KeyError("secret")):
        found, [line] = ask(site)
    assert found == 500 and "the terminal" in line["error"] and "secret" not in line["error"]
    assert "KeyError" in capfd.readouterr().err


def test_the_command(run, capsys):
    """It says where the page is, ends in one line, and is refused beside what does not go with it."""
    with mock.patch.object(serve.Server, "serve_forever", side_effect=KeyboardInterrupt):
        assert call("sample.py", run / "ckpt.pt", "--serve", 0, "--n", 3, "--class", "dog") == 130
    assert re.search(r"^open http://127\.0\.0\.1:\d+/ in a browser", capsys.readouterr().out, re.M)
    assert call("sample.py", run / "ckpt.pt", "--serve", 0, "--n", 17) == 2
    assert "16" in capsys.readouterr().err
