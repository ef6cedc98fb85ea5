"""The page of a run: whole and escaped HTML, from one file and what lies beside it, at every moment of a run."""

import csv
import html.parser
import json
import os
import shlex
import shutil
import signal
import time
from unittest import mock

import numpy as np
import pytest

import train
from engine.process import lock
from extras import run_page
from extras.page_style import SCRIPT, STYLE
from extras.svg_curves import VOID, chart, log_ticks, number, short, tag, thin, ticks
from tests.common import TINY, call, contents, flags


class Page(html.parser.HTMLParser):
    """elements: (name, attributes, text in it and in those inside it); AssertionError if one is not closed in order."""

    def __init__(self, out):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.source = (out / "index.html").read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open and self.source.startswith("<!DOCTYPE html>\n<html")

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"{name} has an attribute twice"
        element = [name, dict(attributes), ""]
        self.elements.append(element)
        if name not in VOID:
            self.open.append(element)

    def handle_endtag(self, name):
        assert self.open.pop()[0] == name

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, name):
        return [(attributes, text) for element, attributes, text in self.elements if element == name]

    @property
    def state(self):
        """The word for it, after checking that the page loads itself again while the run lives, and only then."""
        (body, _), = self.all("body")
        refresh = [meta["content"] for meta, _ in self.all("meta") if meta.get("http-equiv") == "refresh"]
        assert refresh == (["30"] if body["data-state"] == "running" else [])
        return body["data-state"]


def check_page(out):
    """A Page that needs nothing but the files beside it, and runs and looks like nothing but what we wrote."""
    page = Page(out)
    for name, attributes, _ in page.elements:
        assert not any(key.startswith("on") or key in ("style", "srcset", "action") for key in attributes), name
        for key in ("href", "src"):
            if key in attributes:
                assert name in ("a", "img") and os.sep not in attributes[key] and (out / attributes[key]).is_file()
    for attributes, _ in page.all("div"):
        for file in attributes.get("data-files", "").split():
            assert (out / file).is_file()
    for word in ("http:", "https:", "//", "@import", "url("):
        assert word not in page.source.lower().replace("<!doctype html>", "")
    assert [text for _, text in page.all("script")] == [SCRIPT] and [text for _, text in page.all("style")] == [STYLE]
    assert {name for name, _, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "script", "body", "h1", "h2", "h3", "p", "b", "small", "span", "div",
        "pre", "a", "img", "input", "output", "progress", "figure", "figcaption", "svg", "line", "text", "polyline",
        "circle", "table", "tr", "th", "td"}
    return page


def test_page_of_a_run(folder, run):
    """It shows the last value of every column, all pictures, all settings, and the commands as they were given."""
    page, config = check_page(run), json.loads((run / "config.json").read_text())
    (_, text), = page.all("body")
    assert page.state == "complete" and "38 training images, 2 held out, 2 classes" in text and "cat, dog." in text
    assert "stage 3 of 3, embeddings and denoiser, step 8 of 8" in text
    shown = {words for _, words in page.all("b")}
    for name in ("tokenizer", "diffusion", "evaluation"):
        with (run / f"{name}.csv").open(newline="") as file:
            row = list(csv.DictReader(file))[-1]
        for column, value in row.items():
            if column not in ("step", "log2_K", "standard_error", "seconds"):  # of these no curve is drawn
                assert number(float(value)) in shown, column
    assert f"± {float(row['standard_error']):.2f}; log2 K = 3" in text
    boxes = {box["id"]: box["data-files"].split() for box, _ in page.all("div") if "data-files" in box}
    assert boxes == {kind: [f"{kind}_00000{step}.png" for step in (4, 8)] for kind in ("samples", "reconstructions")}
    assert [image["src"] for image, _ in page.all("img")] == [*(files[-1] for files in boxes.values()), "data.png"]
    assert [slider["max"] for slider, _ in page.all("input")] == ["1", "1"]
    settings = dict(zip((name for _, name in page.all("th")), (value for _, value in page.all("td")), strict=True))
    assert settings.keys() == config.keys() - {"classes"} and settings["lr"] == "0.01" and settings["flip"] == "false"
    longer, draw = (shlex.split(words) for _, words in page.all("pre"))
    given = ["train.py", "--data", str(folder), "--out", str(run), *flags(TINY)]
    assert longer == ["python", *given, "--steps", "16"]
    assert draw == ["python", "sample.py", str(run / "ckpt.pt"), "--class", "cat,dog", "--out", "more.png"]


def test_names_are_escaped(run, tmp_path, capsys):
    """Classes, data, settings, files and errors that look like HTML, or like a shell's words, are text and no more."""
    out = tmp_path / "a <b>'\" $(touch x);"
    shutil.copytree(run, out)
    names = ["<script>alert(1)</script>", "\" onload='alert(2)'", "a, b", "-x", "</style><!-- &amp;", "\udcff"]
    config = json.loads((run / "config.json").read_text())
    config |= {"classes": names, "data": "<img src=x onerror=alert(3)>", "<b>": "<i>\"'", "lpips": "</table><h1>"}
    (out / "config.json").write_text(json.dumps(config))
    (out / "state.json").write_text(json.dumps({"state": "failed", "message": "<h1>it's & broken</h1>",
                                                "command": ["python", "train.py", "--data", "it's <here>; rm -r /"]}))
    (out / "samples_000009<x>.png").write_bytes(b"")
    rows = (out / "diffusion.csv").read_text()
    (out / "diffusion.csv").write_text(rows.replace("diff,", "<hr>,", 1) + "10,1,")  # and half a line
    assert call(run_page, out) == 0
    capsys.readouterr()
    page = check_page(out)
    (_, text), = page.all("body")
    assert ", ".join(names).replace("\udcff", "\\udcff") in text and config["data"] in text and page.state == "failed"
    assert ("<b>", "<i>\"'") in zip((name for _, name in page.all("th")), (v for _, v in page.all("td")), strict=True)
    assert "<hr>" in [line["data-name"] for line, _ in page.all("polyline")]
    error, again, draw = (words for _, words in page.all("pre"))
    assert error == "<h1>it's & broken</h1>" and shlex.split(again)[-3:] == ["it's <here>; rm -r /", "--steps", "16"]
    assert shlex.split(draw)[2:5] == [str(out / "ckpt.pt"), "--class", ",".join(names[:2])]
    assert "<" not in tag("p", "<", title="<\"").replace("<p ", "").replace("</p>", "")


@pytest.mark.parametrize("how", ["kill", "crash", "error"])
def test_page_while_a_run_lives(how, folder, undone, monkeypatch):
    """It says where the run is, at a status line too; and when it is stopped, or fails, that it was, and why."""
    seen, real = [], train.training_loss

    def watched(*args, **options):
        page = check_page(undone)
        (_, text), = page.all("body")
        seen.append((page.state, "step 4 of 8, about " in text, "samples_000004.png" in page.source))
        if len(seen) == 5:
            if how == "crash":
                raise ArithmeticError("first line\n<last line>")
            if how == "error":
                raise OSError(5, "it's broken")
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    words = ["--data", folder, "--out", undone, *flags(TINY)]
    monkeypatch.setattr(run_page, "SHARE", 1e9)  # a page at every line
    for picture in undone.glob("samples_*.png"):
        picture.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_loss", watched)
        if how == "crash":
            with pytest.raises(ArithmeticError):
                call("train.py", *words)
        else:
            assert call("train.py", *words) == {"kill": 143, "error": 1}[how]
    assert seen == 4 * [("running", False, False)] + [("running", True, True)]
    page = check_page(undone)
    (_, text), = page.all("body")
    assert page.state == {"kill": "stopped"}.get(how, "failed")
    says = {"kill": "The same command continues.", "crash": "ArithmeticError: <last line>",
            "error": "[Errno 5] it's broken"}[how]
    assert says in text and "first line" not in text
    assert "python train.py --data" in text and "Continue it" in text and "ckpt.pt" in text


def test_a_page_that_cannot_be_written(folder, run, undone, capsys):
    """Said once; the run goes on and computes what it would have computed. So with a page that we cannot make."""
    words = ["--data", folder, "--out", undone, *flags(TINY)]
    with mock.patch.object(run_page, "write_atomically", side_effect=OSError(28, "No space left on device")) as write:
        assert call("train.py", *words) == 0 and write.call_count > 2
    said = capsys.readouterr().out
    assert said.count("no page of this run, which goes on without: [Errno 28] No space") == 1
    assert contents(undone) == contents(run)
    with mock.patch.object(run_page, "page", side_effect=ZeroDivisionError):
        assert call("train.py", *words) == 0
    assert capsys.readouterr().out.count("goes on without: ZeroDivisionError") == 1
    assert not list(undone.glob("*.part"))


def test_page_of_an_old_run(run, tmp_path, capsys):
    """Made from the files alone; a run that vanished is told from one that lives by its lock."""
    out, config = tmp_path / "old", json.loads((run / "config.json").read_text())
    shutil.copytree(run, out)
    make_old(out)
    (out / "state.json").unlink()
    assert call(run_page, out) == 0 and capsys.readouterr().out == f"{out / 'index.html'}\n"
    page = check_page(out)
    titles = [text for _, text in page.all("h3")]
    assert page.state == "complete" and "effective rank of the embeddings" in titles and "max_drop_rate" in page.source
    assert shlex.split(page.all("pre")[0][1])[:4] == ["python", "train.py", "--data", config["data"]]
    (out / "config.json").write_text(json.dumps(config | {"steps": 9}))
    for state in ("ended", "running"):
        (out / "state.json").write_text(json.dumps({"state": state}))
        with lock(out):
            assert call(run_page, out) == 0 and check_page(out).state == "running"
        assert call(run_page, out) == 0 and check_page(out).state == {"running": "gone"}.get(state, state)
    for name in ("diffusion.csv", "evaluation.csv", "metrics.json", "data.png", "tokens.npy"):
        (out / name).unlink()
    assert call(run_page, out) == 0 and "stage 2 of 3" in check_page(out).source
    (out / "tokenizer.csv").write_text("step,reconstruction\n")
    assert call(run_page, out) == 0 and "step 0 of 8" in check_page(out).source
    assert call(run_page, tmp_path) == 2 and "is no run of train.py" in capsys.readouterr().err
    assert not (tmp_path / "index.html").exists()


def test_long_curves(run, tmp_path):
    """4,000 rows: a page of moderate size, quickly; the ends of a curve and its spikes stay."""
    shutil.copytree(run, tmp_path / "a")
    rng = np.random.default_rng(0)
    for name in ("tokenizer", "diffusion"):
        header = (run / f"{name}.csv").read_text().splitlines()[0]
        rows = [[str(100 * i + 100), *(f"{value:.5f}" for value in values)]
                for i, values in enumerate(rng.uniform(1, 2, (4000, header.count(","))))]
        rows[1234][1], rows[2345][1], rows[3000][1], rows[3500][1] = "7.77777", "0.11111", "nan", ""
        (tmp_path / "a" / f"{name}.csv").write_text("\n".join([header, *map(",".join, rows)]) + "\n")
    times = []
    for _ in range(3):
        began = time.process_time()
        run_page.write_page(tmp_path / "a")
        times.append(time.process_time() - began)
    assert min(times) < 0.2  # 0.03 on two cores of a laptop
    page = check_page(tmp_path / "a")
    assert len(page.source) < 400_000
    line = [line for line, _ in page.all("polyline") if line["data-name"] == "rec"][1]  # the first is held out
    points = dict(pair.split(":") for pair in line["data-values"].split())
    assert 250 < len(points) <= 302 and len(line["points"].split()) == len(points)
    assert points["123500"] == "7.7778" and points["234600"] == "0.11111" and {"100", "400000"} < points.keys()
    curve = np.stack([np.arange(301.0), rng.normal(size=301)], 1)
    assert len(thin(curve)) <= 302 and thin(curve)[[0, -1], 0].tolist() == [0, 300] and thin(curve[:300]) is not curve


def test_axes():
    """Round numbers within the range, few of them, also of curves that are a point, constant, or negative."""
    assert ticks(0, 2500) == [0, 500, 1000, 1500, 2000, 2500]
    assert ticks(4.38, 4.63) == pytest.approx([4.4, 4.45, 4.5, 4.55, 4.6]) and ticks(-3, 1) == [-3, -2, -1, 0, 1]
    assert log_ticks(0.0045, 0.15) == pytest.approx([0.01, 0.1]) and len(log_ticks(2e-9, 5e-3)) <= 4
    assert [short(value) for value in (0, 0.05, 2500, 400_000, 2e6)] == ["0", "0.05", "2.5k", "400k", "2M"]
    assert [number(v) for v in (0.25860, 1528, 8.384e-5, 255.0, "l2", True)] == ["0.2586", "1,528", "8.4e-05", "255",
                                                                               "l2", "True"]
    for values in ([3.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 5.0], [1e-9, 1.0], [1e5, 1e9]):
        figure = chart("a", {"b": np.stack([np.arange(len(values)), values], 1)})
        assert "nan" not in figure and "inf" not in figure and number(values[-1]) in figure
    assert chart("a", {"b": None, "c": np.zeros((0, 2))}) == ""
