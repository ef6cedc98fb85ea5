"""From the word after --data to a source of images: toy, a published set (datasets.json), or a path."""

import argparse
import difflib
import os
import sys
from pathlib import Path

from engine.process import report_errors
from engine.validate import UserError, check_file, read_json
from extras.data_arrays import read_cifar, read_idx, read_npy, read_npz
from extras.data_forms import Folder, Lmdb, Zip
from extras.downloads import fetch
from extras.image_cache import save_for_runs
from extras.pictures import contact_sheet
from extras.toy import TOY_SIZE, Toy

DATASETS = read_json(Path(__file__).with_suffix(".json"))  # SHA-256 of Keras (CIFAR-10) and TensorFlow
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")


def find(name, root=None):
    """The source behind --data: toy, a name in DATASETS, or a path, below root if that is given."""
    if name == "toy":
        return Toy()
    if name in DATASETS:
        return find_named(name, root)
    path = Path(name).expanduser()
    if root is not None and not path.exists():
        path = Path(root).expanduser() / path
    if path.exists():
        return detect_format(path)
    parent = path.parent if path.parent.is_dir() else Path(".")
    paths = {word: word for word in ("toy", *DATASETS)} | {p.name: p for p in parent.iterdir()}
    near = "".join(f" Did you mean {paths[word]}?" for word in difflib.get_close_matches(path.name, paths, 1))
    raise UserError(f"--data {name}: no such folder or file, nor one of toy, {', '.join(DATASETS)}.{near}")


def find_named(name, root):
    """A set of DATASETS: looked for below --root, or $VQLCMD_DATA, data/ and here; else downloaded."""
    facts, source = DATASETS[name], None
    home = Path(os.environ.get("VQLCMD_DATA", "data")).expanduser()
    bases = dict.fromkeys([home, Path("data"), Path(".")]) if root is None else [Path(root).expanduser()]
    paths = [base / word for base in bases for word in facts["names"]]
    others = [word for other in DATASETS.keys() - {name} for word in DATASETS[other]["names"]]
    if root is not None and not any(Path(root, word).expanduser().exists() for word in others):
        paths += bases  # the set itself, and not a folder in which others lie
    problem = f"not found in {', '.join(map(str, paths))}"
    for path in filter(Path.exists, paths):
        try:
            source = detect_format(path)
            break
        except UserError as error:  # an empty folder, or a download that is not complete
            problem = error
    if source is None and "files" in facts and root is None:
        for file, sha256 in facts["files"].items():
            if not (home / name / file).exists():
                urls = [url + file for url in facts["urls"]]
                fetch(urls, home / name / file, sha256, "name their folder with --root")
        source = detect_format(home / name)
    if source is None:
        for word in ("what", "licence", "where", "command", "layout"):
            print(f"  {word:8} {facts[word]}", file=sys.stderr)
        raise UserError(f"--data {name}: {problem}. Get it as above, and give its folder as --root")
    source.name = source.dataset = name
    source.class_names = facts.get("classes", source.class_names)
    count = facts["count"]
    verdict = "as published" if source.total == count else f"but {count:,} are published: is it complete?"
    source.note = f"{name}: {source.total:,} images, {verdict}\n  {source.note}".rstrip()
    return source


def detect_format(path):
    """Path -> source, by what lies there."""
    if not path.is_dir():
        check_file(path)
        readers = {".npy": read_npy, ".npz": read_npz, ".zip": Zip} | dict.fromkeys(ARCHIVES, read_cifar)
        for ending, read in readers.items():
            if path.name.endswith(ending):
                return read(path)
        raise UserError(f"--data {path} is of no form that is known: give a folder, .zip, .npy or .npz")
    if (path / "data.mdb").is_file():
        return Lmdb(path)
    for inside in sorted(path.glob("*_train_lmdb")):
        return detect_format(inside)
    for inside in (".", "raw", "MNIST/raw", "cifar-10-batches-py", "cifar-10-batches-bin"):
        folder = path / inside
        if (folder / "test_batch").is_file() or (folder / "test_batch.bin").is_file():
            return read_cifar(folder)
        if any(folder.glob("train-images?idx3-ubyte*")):
            return read_idx(folder)
    inside = list(path.iterdir())
    if len(inside) == 1 and inside[0].name.endswith((".zip", ".npz", ".npy", *ARCHIVES)):
        return detect_format(inside[0])
    return Folder(path)


def main():
    parser = argparse.ArgumentParser("data.py", description="Show what --data would train on.")
    parser.add_argument("data", help=f"toy, {', '.join(DATASETS)}, or a path: folder, zip, LMDB, arrays")
    parser.add_argument("--root", help="where the named set lies (default: $VQLCMD_DATA, then data/)")
    parser.add_argument("--size", type=int, help="pixels a side (default: the toy's own, or 64)")
    parser.add_argument("--out", default="data.png", help="the page of images to write")
    parser.add_argument("--save", type=Path, metavar="FILE.npy", help="decode all once, for train.py")
    args = parser.parse_args()
    with report_errors("data.py", memory_advice="choose a smaller --size"):
        source = find(args.data, args.root)
        print(source.describe())
        size = args.size or (TOY_SIZE if source.name == "toy" else 64)
        saved = save_for_runs(source, args.size, args.save) if args.save else None
        images, _ = saved.load(size, {}) if saved else source.load(size)
        contact_sheet(images, args.out)
        for title, reason in source.skipped.items():
            print(f"cannot be used: {title}: {reason}")
        print(f"wrote {args.out}")
