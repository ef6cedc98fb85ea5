"""Our tokenizer beside the widely read recipe of zalandoresearch/pytorch-vq-vae, on the same images, in one run.

    git clone https://github.com/zalandoresearch/pytorch-vq-vae
    python experiments/tokenizer_peer.py pytorch-vq-vae/vq-vae.ipynb --data cifar10 --minutes 20

Three contestants, all with 8 x 8 tokens of 512 codes and a squared error:

    theirs             the notebook's own classes and settings: EMA codebook 512 x 64, Adam 1e-3, batch 256
    ours, same time    train.py's preset 32-cpu for as many minutes; its learning rate follows the clock
    ours, same steps   the same network at their batch size, for as many steps as theirs took

The first two take turns of ten seconds, so that whatever else the machine does meets both. Time in reading and
augmenting images counts, time in measuring does not. The same command again continues a run that was stopped.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.config import DEFAULTS, PRESETS, TOKENIZER_OPTIONS  # noqa: E402
from engine.distributed import bf16_works, choose_device  # noqa: E402
from engine.randomness import STAGES, batch_indices, generator_for, seed_for  # noqa: E402
from engine.process import write_atomically  # noqa: E402
from extras.datasets import find  # noqa: E402
from extras.grids import save_grid  # noqa: E402
from extras.tokenizer_metrics import usage_and_perplexity  # noqa: E402
from train import learning_rate  # noqa: E402
from vqvae import VQVAE, to_uint8, tokenizer_step  # noqa: E402

TURN = 10  # seconds


def classes_of(notebook):
    """The classes that the notebook defines, as the notebook defines them."""
    cells = ["".join(cell["source"]) for cell in json.loads(Path(notebook).read_text())["cells"]
             if cell["cell_type"] == "code"]
    names = {"torch": torch, "nn": nn, "F": F}
    exec("\n".join(cell for cell in cells if cell.startswith("class ")), names)
    return names


class Theirs:
    """Model, loss and settings of the notebook. As it draws batches: 256 different images, afresh at every step."""

    def __init__(self, notebook, images, seed, device):
        torch.manual_seed(seed)
        self.images, self.seed, self.device, self.step = images, seed, device, 0
        self.model = classes_of(notebook)["Model"](128, 2, 32, 512, 64, 0.25, 0.99).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        some = images.batch(np.linspace(0, len(images) - 1, min(len(images), 10000)).astype(int))
        self.variance = float((some.double() / 255).var(correction=0))

    def train(self, progress):
        rows = np.random.default_rng((self.seed, self.step)).choice(len(self.images), 256, replace=False)
        x = self.images.batch(rows).to(self.device).float() / 255 - 0.5
        self.optimizer.zero_grad()
        vq_loss, x_hat, _ = self.model.train()(x)
        (F.mse_loss(x_hat, x) / self.variance + vq_loss).backward()
        self.optimizer.step()
        self.step += 1

    def reconstruct(self, images):
        """uint8 images (B, 3, 32, 32) -> their reconstructions, tokens (B, 64)."""
        parts = self.model.eval()
        z = parts._pre_vq_conv(parts._encoder(images.to(self.device).float() / 255 - 0.5))
        _, z_q, _, one_hot = parts._vq_vae(z)
        return to_uint8(2 * parts._decoder(z_q)).cpu(), one_hot.argmax(1).view(len(images), -1).cpu()


class Ours:
    """train.py's tokenizer. steps None: its schedule follows progress, the share of its time that has passed."""

    def __init__(self, images, seed, device, steps=None, **options):
        self.config = DEFAULTS | PRESETS["32-cpu"] | options
        self.images, self.seed, self.device, self.steps, self.step = images, seed, device, steps, 0
        torch.manual_seed(seed_for(seed, STAGES["weights"], 0))
        arguments = {name: self.config[option] for name, option in TOKENIZER_OPTIONS.items()}
        self.model = VQVAE(**arguments, bf16=bf16_works(device)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    def train(self, progress):
        estimate = round(self.step / progress) if progress > 0.002 else self.config["tokenizer_steps"]
        self.config["tokenizer_steps"] = steps = self.steps or max(self.step + 1, estimate)
        rows = batch_indices(len(self.images), self.config["tokenizer_batch"], self.seed, "tokenizer", self.step)
        generator = generator_for(self.seed, "tokenizer", self.step)
        lr = learning_rate(self.step, steps, self.config["warmup"], self.config["tokenizer_lr"])
        outputs, _ = tokenizer_step(self.config, {"tokenizer": self.model, "optimizer": self.optimizer},
                                    self.images.batch(rows).to(self.device), generator, self.step / steps, lr, gan_lr=0)
        if self.step % 50 == 49 and self.step < 0.75 * steps:
            self.model.quantizer.restart_dead_codes(outputs["z_e"], generator)
        self.step += 1

    def reconstruct(self, images):
        tokens = self.model.eval().encode(images.to(self.device))
        return self.model.decode(tokens).cpu(), tokens.cpu()


@torch.no_grad()
def measure(contestant, images):
    """Held-out {"mse" of pixels in [0, 1], "psnr", "usage", "perplexity"}, rounded to 8 bits as for train.py's own."""
    squared, counts = 0.0, torch.zeros(512, dtype=torch.int64)
    for rows in torch.arange(len(images)).split(500):
        x = images.batch(rows.tolist())
        x_hat, tokens = contestant.reconstruct(x)
        squared += float((x_hat.int() - x.int()).square().sum(dtype=torch.int64))
        counts += torch.bincount(tokens.flatten(), minlength=512)
    mse = squared / (len(images) * 3 * 32 * 32) / 255 ** 2
    usage, perplexity = usage_and_perplexity(counts)
    return {"mse": mse, "psnr": -10 * math.log10(mse), "usage": usage, "perplexity": perplexity}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", help="vq-vae.ipynb of a clone of zalandoresearch/pytorch-vq-vae")
    parser.add_argument("--data", default="cifar10", help="as for train.py; images of 32 pixels")
    parser.add_argument("--root", metavar="DIR", help="as for train.py")
    parser.add_argument("--minutes", type=float, default=20, help="for each of the first two (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="runs/tokenizer_peer", help="directory for the state, results.json, a picture")
    args = parser.parse_args()
    device, out, budget = choose_device(args.device), Path(args.out), 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    images, held_out = find(args.data, args.root).load(32)
    race = {"theirs": Theirs(args.notebook, images, args.seed, device),
            "ours, same time": Ours(images, args.seed, device),
            "ours, same steps": Ours(images, args.seed, device, tokenizer_batch=256)}
    spent = dict.fromkeys(race, 0.0)
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device, weights_only=True)
        spent = state.pop("spent")
        for name, (step, model, optimizer) in state.items():
            race[name].model.load_state_dict(model)
            race[name].optimizer.load_state_dict(optimizer)
            race[name].step = step

    def save():
        write_atomically(out / "state.pt", lambda partial: torch.save({"spent": spent} | {
            name: (c.step, c.model.state_dict(), c.optimizer.state_dict()) for name, c in race.items()}, partial))

    def turn(name, seconds=math.inf, steps=math.inf):
        """TURN seconds of training, or fewer if it reaches its end."""
        contestant, before, start = race[name], spent[name], time.perf_counter()
        while spent[name] < min(seconds, before + TURN) and contestant.step < steps:
            contestant.train(spent[name] / budget)
            spent[name] = before + time.perf_counter() - start

    with tqdm(total=round(2 * budget), initial=round(sum(spent.values())), unit="s", disable=None) as bar:
        while min(spent["theirs"], spent["ours, same time"]) < budget:
            before = sum(spent.values())
            turn("theirs", seconds=budget)
            turn("ours, same time", seconds=budget)
            bar.update(round(sum(spent.values()) - before))
            save()
    last, steps = race["ours, same steps"], race["theirs"].step
    last.steps = steps
    with tqdm(total=steps, initial=last.step, unit="step", disable=None) as bar:
        while last.step < steps:
            before = last.step
            turn("ours, same steps", steps=steps)
            bar.update(last.step - before)
            save()
    shown = held_out.batch(range(16))
    rows, results = [shown], {}
    for name, contestant in race.items():
        results[name] = {"steps": contestant.step, "seconds": round(spent[name], 1)} | measure(contestant, held_out)
        with torch.no_grad():
            rows.append(contestant.reconstruct(shown)[0])
        print(f"{name:16s}  " + "  ".join(f"{key} {value:.6g}" for key, value in results[name].items()))
    save_grid(torch.cat(rows), out / "reconstructions.png", 16)
    (out / "results.json").write_text(json.dumps(
        {"command": " ".join(sys.argv), "seed": args.seed, "device": str(device), "torch": torch.__version__,
         "threads": torch.get_num_threads(), "held_out": len(held_out), **results}, indent=2) + "\n")
    print(f"rows of {out / 'reconstructions.png'}: held-out images, " + ", ".join(race))


if __name__ == "__main__":
    main()
