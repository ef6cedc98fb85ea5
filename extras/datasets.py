"""From the word after --data to a source of images: toy, a published set by its name, or a path of any form.

Facts about published sets: what they are, their licence, where to get them. `python data.py` ends here.
"""

import argparse
import difflib
import os
import sys
from pathlib import Path

from engine.process import report_errors
from engine.validate import UserError, check_file
from extras.data_arrays import read_idx, read_npy, read_npz
from extras.data_cifar import read_cifar
from extras.data_forms import Folder, Zip
from extras.data_lmdb import Lmdb
from extras.downloads import fetch
from extras.grids import contact_sheet
from extras.image_cache import save_for_runs
from extras.toy import TOY_SIZE, Toy

ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")


def lsun(folder, what, count):
    """Facts about one of LSUN's sets."""
    return dict(
        what=f"LSUN {what}", count=count,
        licence="none stated; its authors offer it for research, the pictures are their photographers'",
        where="https://www.yf.io/p/lsun",
        command=f"curl -LO http://dl.yf.io/lsun/scenes/{folder}.zip && unzip {folder}.zip",
        layout=f"{folder}/data.mdb, or the images in a folder or a zip",
        also=(folder, f"lsun/{folder}"))


IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-..., .gz or not"
DATASETS = {
    "ffhq": dict(
        what="Flickr-Faces-HQ, 70,000 aligned portraits of 1024 x 1024 pixels", count=70000,
        licence="CC BY-NC-SA 4.0 (NVIDIA); each photograph has its own, see the set's ffhq-dataset-v2.json",
        where="https://github.com/NVlabs/ffhq-dataset",
        command="git clone https://github.com/NVlabs/ffhq-dataset && cd ffhq-dataset && "
                "python download_ffhq.py --images",
        layout="00000/00000.png to 69000/69999.png, or a zip of them, at 1024 pixels or smaller",
        also=("images1024x1024", "ffhq-dataset/images1024x1024")),
    "lsun-churches": lsun("church_outdoor_train_lmdb", "church_outdoor, 126,227 photographs of churches", 126227),
    "lsun-bedrooms": lsun("bedroom_train_lmdb", "bedroom, 3,033,042 photographs of bedrooms, 43 GB", 3033042),
    "imagenet": dict(
        what="ImageNet (ILSVRC 2012), 1,281,167 photographs of 1,000 classes", count=1281167,
        licence="non-commercial research and education only, granted to those who register",
        where="https://image-net.org/download-images",
        command="mkdir train && cd train && tar xf ../ILSVRC2012_img_train.tar && "
                "for f in *.tar; do mkdir ${f%.tar} && tar xf $f -C ${f%.tar} && rm $f; done",
        layout="train/n01440764/n01440764_10026.JPEG and so on, 1,000 folders; val/ with the same beside it",
        also=("ILSVRC2012", "ILSVRC/Data/CLS-LOC")),
    "cifar10": dict(
        what="CIFAR-10, 50,000 + 10,000 photographs of 32 x 32 pixels in 10 classes", count=50000,
        licence="none stated; its author asks for a citation (Krizhevsky 2009)",
        where="https://www.cs.toronto.edu/~kriz/cifar.html",
        layout="cifar-10-python.tar.gz or cifar-10-binary.tar.gz, as they come or unpacked",
        also=(*ARCHIVES, "cifar-10-batches-py", "cifar-10-batches-bin"),
        urls=["https://www.cs.toronto.edu/~kriz/"],
        files={"cifar-10-python.tar.gz":
               "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"}),  # SHA-256 as in Keras
    "fashion-mnist": dict(
        what="Fashion-MNIST, 60,000 + 10,000 grey pictures of clothes, 28 x 28 pixels", count=60000,
        licence="MIT (Zalando)",
        where="https://github.com/zalandoresearch/fashion-mnist",
        layout=IDX, also=("FashionMNIST/raw",),
        classes=["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                 "boot"],
        urls=["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
        files={  # SHA-256 as in TensorFlow Datasets
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"}),
    "mnist": dict(
        what="MNIST, 60,000 + 10,000 grey handwritten digits, 28 x 28 pixels", count=60000,
        licence="CC BY-SA 3.0 (LeCun, Cortes)",
        where="http://yann.lecun.com/exdb/mnist",
        layout=IDX, also=("MNIST/raw",),
        urls=["https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"],
        files={  # SHA-256 as in TensorFlow Datasets
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"}),
}
EXAMPLES = """examples:
  python data.py toy                               the built-in set: what is there, and a page of it, data.png
  python data.py photos/ --size 64 --out page.png  your own folder
  python data.py ffhq --root /datasets             a published set, or how to get it"""


def find(name, root=None):
    """The source behind --data: toy, a name in DATASETS, or a path.

    root: where named sets lie, a folder of them or the set itself.
    """
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
    raise UserError(f"--data {name}: no such folder or file, and no name of a data set; there are toy, "
                    f"{', '.join(DATASETS)}.{near}")


def find_named(name, root):
    """A set of DATASETS: looked for below --root, or $VQLCMD_DATA, data/ and here; else downloaded."""
    facts, source, problem = DATASETS[name], None, None
    bases = [root] if root is not None else [os.environ.get("VQLCMD_DATA"), "data", "."]
    bases = [Path(base).expanduser() for base in bases if base is not None]
    paths = [base / word for base in bases for word in names_of(name)]
    others = [word for other in DATASETS.keys() - {name} for word in names_of(other)]
    if root is not None and not any((bases[0] / word).exists() for word in others):
        paths.append(bases[0])  # the set itself, and not a folder in which others lie
    for path in filter(Path.exists, paths):
        try:
            source = detect_format(path)
            break
        except UserError as error:  # an empty folder, or a download that is not complete
            problem = problem or error
    if source is None and "files" in facts and root is None:
        source = detect_format(download(name))
    if source is None and problem:
        raise problem
    if source is None:
        for key in ("what", "licence", "where", "command", "layout"):
            print(f"  {key:8} {facts.get(key, 'the same command without --root downloads it')}", file=sys.stderr)
        raise UserError(f"--data {name}: not found in {', '.join(map(str, paths))}: get it as above, and then "
                        f"--root FOLDER, or VQLCMD_DATA=FOLDER, or data/{name}")
    source.name = source.dataset = name
    count = facts["count"]
    verdict = "as published" if source.total == count else f"but {count:,} are published: is it complete?"
    source.note = f"{name}: {source.total:,} images, {verdict}" + f"\n  {source.note}" * bool(source.note)
    source.class_names = facts.get("classes", source.class_names)
    return source


def names_of(name):
    """Names that files or a folder of this set may have."""
    return name, f"{name}.zip", *DATASETS[name]["also"]


def download(name):
    """Fetches what is not there of a set into $VQLCMD_DATA/NAME or data/NAME. -> the folder."""
    folder = Path(os.environ.get("VQLCMD_DATA", "data")).expanduser() / name
    for file, sha256 in DATASETS[name]["files"].items():
        if not (folder / file).exists():
            urls = [url + file for url in DATASETS[name]["urls"]]
            fetch(urls, folder / file, sha256, "name their folder with --root")
    return folder


def detect_format(path):
    """Path -> source, by what lies there."""
    if not path.is_dir():
        check_file(path)
        readers = {".npy": read_npy, ".npz": read_npz, ".zip": Zip} | dict.fromkeys(ARCHIVES, read_cifar)
        for ending, read in readers.items():
            if path.name.endswith(ending):
                return read(path)
        raise UserError(f"--data {path} is of no form that is known: give a folder of images, a .zip of "
                        "them, .npy, .npz, or the folder of an LMDB or of MNIST's or CIFAR-10's files")
    if (path / "data.mdb").is_file():
        test = path.with_name(path.name.replace("_train_", "_val_"))
        return Lmdb(path, test if test != path and (test / "data.mdb").is_file() else None)
    for inside in sorted(path.glob("*_train_lmdb")):
        return detect_format(inside)
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        if (folder / "test_batch").is_file() or (folder / "test_batch.bin").is_file():
            return read_cifar(folder)
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        if any(folder.glob("train-images?idx3-ubyte*")):
            return read_idx(folder)
    inside = list(path.iterdir())
    if len(inside) == 1 and inside[0].name.endswith((".zip", ".npz", ".npy", *ARCHIVES)):
        return detect_format(inside[0])
    return Folder(path)


def main():
    parser = argparse.ArgumentParser(description="Show what --data would train on.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help=f"toy, {', '.join(DATASETS)}, or a path: folder, zip, LMDB, arrays")
    parser.add_argument("--root", help="where the named set lies (default: $VQLCMD_DATA, then data/)")
    parser.add_argument("--size", type=int, help="pixels a side (default: the toy's own, or 64)")
    parser.add_argument("--out", default="data.png", help="the page of images to write")
    parser.add_argument("--save", type=Path, metavar="FILE.npy", help="decode all images once, at "
                        "--size, into this file, for train.py --data FILE.npy; given again, it continues")
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
