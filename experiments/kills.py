"""Is a run that is killed again and again, at random moments, the run that nobody disturbed?

    python experiments/kills.py --kills 20                three minutes or so on a CPU

A small run of train.py, from pictures to samples, is made once undisturbed. Then the same command is started in another
directory, killed with SIGKILL after a random time, started again, killed again, ... and at last left alone. All files
must be equal: weights bit for bit, tables but for their speeds, pictures byte for byte; nothing may be left over.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
WORDS = ("--data toy --size 8 --f 4 --K 16 --code-dim 4 --tokenizer-width 16 --tokenizer-steps 400 --tokenizer-batch 8 "
         "--D 8 --width 32 --depth 2 --heads 2 --steps 1200 --batch 64 --warmup 1 --sample-steps 3 --log-every 5 "
         "--sample-every 100 --save-every 5 --device cpu").split()


def start(words, kill_after=None):
    """Runs train.py, and kills it so many seconds after its first word. Returns how long it lived from there."""
    with subprocess.Popen([sys.executable, TRAIN, *map(str, words)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        begun = time.monotonic()
        try:
            _, error = process.communicate(timeout=kill_after)
            assert process.returncode == 0, error
        except subprocess.TimeoutExpired:
            process.kill()
    return time.monotonic() - begun


def tensors(value, name=""):
    """{path: value} of everything in a checkpoint, tensors as bytes."""
    if isinstance(value, dict):
        return {path: v for key in value for path, v in tensors(value[key], f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return tensors(dict(enumerate(value)), name)
    return {name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value}


def contents(out):
    """{file: what must not differ}."""
    found = {}
    for path in out.iterdir():
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                found[path.name] = [{k: v for k, v in row.items() if k not in ("img/s", "seconds")}
                                    for row in csv.DictReader(file)]
        elif path.suffix == ".pt":
            found[path.name] = tensors(torch.load(path, map_location="cpu", weights_only=True))
        elif path.name not in ("index.html", "state.json"):  # how the run was started, and when
            found[path.name] = path.read_bytes()
    return found


def main():
    parser = argparse.ArgumentParser(description="Kill a run at random moments and compare it with an undisturbed one.")
    parser.add_argument("--kills", type=int, default=20, help="how often (default: 20)")
    parser.add_argument("--seconds", type=float, default=5, help="longest life of a run that is killed (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm, disturbed = Path(folder, "calm"), Path(folder, "disturbed")
        whole = start([*WORDS, "--out", calm])
        print(f"undisturbed: {whole:.1f} s from its first word to its end")
        for i in range(args.kills):
            lived = start([*WORDS, "--out", disturbed], moments.uniform(0, args.seconds))
            left = sorted(path.name for path in disturbed.iterdir()) if disturbed.exists() else []
            step = [f"{name} of {torch.load(disturbed / name, weights_only=True)['step']}"
                    for name in ("tokenizer.pt", "ckpt.pt") if name in left]
            print(f"kill {i + 1:2} after {lived:.2f} s: {', '.join(step) or 'no checkpoint'}"
                  + "".join(f", {name} unfinished" for name in left if ".part" in name), flush=True)
        start([*WORDS, "--out", disturbed])
        one, other = contents(calm), contents(disturbed)
        different = [name for name in sorted(one | other) if one.get(name) != other.get(name)]
    print(f"{len(one)} files, {'all equal' if not different else 'different: ' + ', '.join(different)}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
