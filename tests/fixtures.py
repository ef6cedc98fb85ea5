"""Fixtures that several modules of tests share; tests/__init__.py loads them, as a plugin."""

import contextlib
import hashlib
import http.server
import os
import shutil
import tarfile
import threading
import urllib.error
from unittest import mock

import numpy as np
import pytest
import torch

from extras import fid_command, fid_sources, inception, tokenizer_report
from extras.vqgan_losses import LPIPS
from tests.common import make_folder, train_tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "pets")


@pytest.fixture(scope="session")
def run(folder, tmp_path_factory):
    """A complete tiny run: its directory."""
    out = tmp_path_factory.mktemp("run") / "pets"
    assert train_tiny(folder, out) == 0
    return out


@pytest.fixture
def undone(run, tmp_path):
    """A run whose tokens are there and whose denoiser is not: its directory."""
    late = shutil.ignore_patterns("ckpt.pt", "diffusion.csv", "evaluation.csv", "metrics.json")
    return shutil.copytree(run, tmp_path / "pets", ignore=late)


@pytest.fixture
def small_lpips(monkeypatch, tmp_path):
    """LPIPS of three narrow stages; the file of its weights, as a VQGAN's checkpoint has them."""
    monkeypatch.setattr(LPIPS, "STAGES", ((2, 2), (3, 3), (4, 4, 4)))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "no cache"))
    torch.manual_seed(0)
    state = {"encoder.conv_in.weight": torch.zeros(1)}
    for name, value in LPIPS().state_dict().items():
        kind, number, *rest = name.split(".")
        if kind == "features":
            state[f"loss.perceptual_loss.net.slice1.{number}.{rest[0]}"] = value
        else:
            state[f"loss.perceptual_loss.lin{number}.model.1.weight"] = value.view(1, -1, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "lpips.ckpt")
    return tmp_path / "lpips.ckpt"


@pytest.fixture
def server():
    """A web server of what a test puts into its `files`, {name: bytes}."""
    class Handler(http.server.BaseHTTPRequestHandler):
        files = {}
        log_message = mock.Mock()

        def do_GET(self):
            content = self.files.get(self.path.lstrip("/"))
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        Handler.url = f"http://127.0.0.1:{web.server_port}/"
        yield Handler
        web.shutdown()


@contextlib.contextmanager
def taken_for_inception(path):
    """A file that is taken for Inception's published weights; and no network."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with (mock.patch.object(inception, "WEIGHTS_SHA256", digest),
          mock.patch.dict(os.environ, FID_WEIGHTS=str(path)),
          mock.patch.object(torch.hub, "_hub_dir", str(path.parent / "hub" / "hub")),
          mock.patch("torch.hub.urlopen", side_effect=urllib.error.URLError("no network"))):
        yield path


@pytest.fixture
def weights(tmp_path):
    """Random weights in the published layout."""
    rng, state = np.random.default_rng(0), {}
    for name, like in inception.InceptionV3().state_dict().items():
        if name.endswith("conv.weight"):
            value = rng.standard_normal(like.shape) * (2 / like[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            value = rng.uniform(0.5, 1.5, like.shape)
        elif name.endswith("num_batches_tracked"):
            continue
        else:
            value = 0.2 * rng.standard_normal(like.shape)
        state[name] = torch.from_numpy(value).float()
    torch.save(state, tmp_path / "inception.pth")
    with taken_for_inception(tmp_path / "inception.pth") as path:
        yield path


class Pixels(torch.nn.Module):
    """In place of the network, and a thousand times faster: "features" are a few pixels of what it reads."""

    widths = {"2048": 128, "spatial": 120}

    def __init__(self, resize="tf"):
        super().__init__()
        self.resize, self.fc = resize, torch.nn.Linear(1, 1)

    prepare = inception.InceptionV3.prepare

    def forward(self, images):
        f = self.prepare(images).flatten(1)[:, ::1061]  # (B, 253)
        return {"2048": f[:, :128], "spatial": f[:, -120:], "logits_unbiased": f[:, 60:160]}


@pytest.fixture
def fast(tmp_path_factory):
    """Programs take Pixels for Inception, and a small file for its weights."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    path.write_bytes(b"weights")
    with contextlib.ExitStack() as patches:
        for module in (fid_command, fid_sources, tokenizer_report):
            patches.enter_context(mock.patch.object(
                module, "load_inception", lambda path, device, resize="tf": Pixels(resize)))
        yield patches.enter_context(taken_for_inception(path))


@pytest.fixture(scope="session")
def hostile_files(tmp_path_factory):
    """{name: file} of a program of TorchScript, and of a tar with links to the file beside them."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "precious").write_text("years of work")
    files = {name: folder / f"{name}.ckpt" for name in ("write", "tar")}
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), files["write"])
    with tarfile.open(files["tar"], "w") as archive:
        for member in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(member)
            info.type = tarfile.SYMTYPE
            info.linkname = str(folder / "precious")
            archive.addfile(info)
    return files
