"""From the word after --data to a source of images: toy, a published set by its name, or a path of any known form.

Facts about published sets: what they are, their licence, where to get them, how they are laid out. Nothing of them is
in this repository. Called by engine/prepare.py and fid.py; `python data.py` ends here.
"""

import argparse
import difflib
import os
from pathlib import Path

from data import DataError
from engine.read_back import UserError, regular_file
from engine.process import report_errors
from extras.data_arrays import read_arrays, read_cifar, read_idx
from extras.data_forms import Folder, Zip
from extras.data_lmdb import Lmdb
from extras.downloads import fetch
from extras.grids import contact_sheet
from extras.image_cache import save_for_runs
from extras.toy import TOY_SIZE, Toy

LSUN = dict(
    licence="none stated; its authors offer it for research, the pictures are their photographers'",
    where="https://www.yf.io/p/lsun")
DATASETS = {
    "ffhq": dict(
        what="Flickr-Faces-HQ, 70,000 aligned portraits of 1024 x 1024 pixels", count=70000,
        licence="CC BY-NC-SA 4.0 (NVIDIA); each photograph under its own licence, see the set's ffhq-dataset-v2.json",
        where="https://github.com/NVlabs/ffhq-dataset",
        command="git clone https://github.com/NVlabs/ffhq-dataset && cd ffhq-dataset && "
                "python download_ffhq.py --images",
        layout="00000/00000.png to 69000/69999.png, or a zip of them, at 1024 pixels or smaller",
        also=("images1024x1024", "ffhq-dataset/images1024x1024", "ffhq.zip")),
    "lsun-churches": LSUN | dict(
        what="LSUN church_outdoor, 126,227 photographs of churches", count=126227,
        command="curl -LO http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip && "
                "unzip church_outdoor_train_lmdb.zip",
        layout="church_outdoor_train_lmdb/data.mdb, or the images in a folder or a zip",
        also=("church_outdoor_train_lmdb", "lsun/church_outdoor_train_lmdb", "lsun-churches.zip")),
    "lsun-bedrooms": LSUN | dict(
        what="LSUN bedroom, 3,033,042 photographs of bedrooms, 43 GB", count=3033042,
        command="curl -LO http://dl.yf.io/lsun/scenes/bedroom_train_lmdb.zip && unzip bedroom_train_lmdb.zip",
        layout="bedroom_train_lmdb/data.mdb, or the images in a folder or a zip",
        also=("bedroom_train_lmdb", "lsun/bedroom_train_lmdb", "lsun-bedrooms.zip")),
    "imagenet": dict(
        what="ImageNet (ILSVRC 2012), 1,281,167 photographs of 1,000 classes", count=1281167,
        licence="non-commercial research and education only, granted to those who register",
        where="https://image-net.org/download-images",
        command="mkdir train && cd train && tar xf ../ILSVRC2012_img_train.tar && "
                "for f in *.tar; do mkdir ${f%.tar} && tar xf $f -C ${f%.tar} && rm $f; done",
        layout="train/n01440764/n01440764_10026.JPEG and so on, 1,000 folders; val/ with the same may lie beside",
        also=("ILSVRC2012", "ILSVRC/Data/CLS-LOC", "imagenet.zip")),
    "cifar10": dict(
        what="CIFAR-10, 50,000 + 10,000 photographs of 32 x 32 pixels in 10 classes", count=50000,
        licence="none stated; its author asks for a citation (Krizhevsky 2009)",
        where="https://www.cs.toronto.edu/~kriz/cifar.html",
        layout="cifar-10-python.tar.gz or cifar-10-binary.tar.gz, as they come or unpacked",
        also=("cifar-10-python.tar.gz", "cifar-10-batches-py", "cifar-10-binary.tar.gz", "cifar-10-batches-bin"),
        urls=["https://www.cs.toronto.edu/~kriz/"],
        files={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}),  # MD5 as on the page named above
    "fashion-mnist": dict(
        what="Fashion-MNIST, 60,000 + 10,000 grey pictures of clothes, 28 x 28 pixels, 10 classes", count=60000,
        licence="MIT (Zalando)",
        where="https://github.com/zalandoresearch/fashion-mnist",
        layout="train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-..., .gz or not",
        also=("FashionMNIST/raw",),
        classes=["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"],
        urls=["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"],
        files={"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",  # MD5 as in its README
               "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
               "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
               "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}),
    "mnist": dict(
        what="MNIST, 60,000 + 10,000 grey handwritten digits, 28 x 28 pixels", count=60000,
        licence="CC BY-SA 3.0 (LeCun, Cortes)",
        where="http://yann.lecun.com/exdb/mnist",
        layout="train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-..., .gz or not",
        also=("MNIST/raw",),
        urls=["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
        files={"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",  # MD5 as in torchvision's mnist.py
               "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
               "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
               "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}),
}

EXAMPLES = """examples:
  python data.py toy                               the built-in set: what is there, and a page of it, data.png
  python data.py photos/ --size 64 --out page.png  your own folder
  python data.py ffhq --root /datasets             a published set, or how to get it"""


def download(name):
    """Fetches the files of a set into $VQLCMD_DATA/NAME or data/NAME, those that are not there. -> the folder."""
    folder = Path(os.environ.get("VQLCMD_DATA", "data")).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, md5 in DATASETS[name]["files"].items():
        if not (folder / file).exists():
            fetch([url + file for url in DATASETS[name]["urls"]], folder / file, md5, "name their folder with --root")
    return folder


def find(name, root=None):
    """The source behind --data: an object with name, class_names, counts(), sizes(), describe() and load(size).

    name: toy, a name in DATASETS, or a path. root: where named sets lie; either a folder of them or the set itself.
    DataError if there is nothing by this name, or nothing in it.
    """
    if name == "toy":
        return Toy()
    if name in DATASETS:
        return find_named(name, root)
    path = Path(name).expanduser()
    path = path if root is None or path.exists() else Path(root).expanduser() / path
    if path.exists():
        return detect_format(path)
    parent = path.parent if path.parent.is_dir() else Path(".")
    near = difflib.get_close_matches(path.name, ["toy", *DATASETS, *(p.name for p in parent.iterdir())], 1)
    near = "" if not near else f" Did you mean {near[0] if near[0] in (*DATASETS, 'toy') else parent / near[0]}?"
    raise DataError(f"--data {name}: no such folder or file, and no name of a data set; there are toy, "
                    f"{', '.join(DATASETS)}.{near}")


def find_named(name, root):
    """A set of DATASETS: looked for below --root, $VQLCMD_DATA and data/, and here; else downloaded, or a message."""
    facts, places = DATASETS[name], []
    for base in [root] if root is not None else [os.environ.get("VQLCMD_DATA"), "data", "."]:
        if base is not None:
            places += [Path(base).expanduser() / word for word in (name, *facts["also"])]
    others = [word for other, facts in DATASETS.items() if other != name for word in (other, *facts["also"])]
    if root is not None and not any((Path(root).expanduser() / word).exists() for word in others):
        places.append(Path(root).expanduser())  # the set itself, and not a folder in which others lie
    problem, source = None, None
    for path in places:
        if path.exists():
            try:
                source = detect_format(path)
                break
            except UserError as error:  # an empty folder, or a download that is not complete
                problem = problem or error
    if source is None and "files" in facts and root is None:
        source = detect_format(download(name))
    if source is None and problem is not None:
        raise problem
    if source is None:
        command = facts.get("command") or "the same command without --root downloads it"
        error = DataError(f"--data {name}: not found")
        error.lines = [
            f"--data {name}: not found in {', '.join(map(str, dict.fromkeys(places)))}",
            f"  what       {facts['what']}", f"  licence    {facts['licence']}",
            f"  published  {facts['where']}", f"  get it     {command}",
            f"  layout     {facts['layout']}", f"  then       --root FOLDER, or VQLCMD_DATA=FOLDER, or data/{name}"]
        error.args = ("\n".join(error.lines),)
        raise error
    source.name, source.dataset, source.published = name, name, facts["count"]
    source.class_names = facts.get("classes", source.class_names)
    return source


def detect_format(path, outer=()):
    """Path -> source, by what lies there. outer: the folders around it that were looked into."""
    archives = ["cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"]
    if path.is_file():
        if path.name in archives:
            return read_cifar(path)
        if path.suffix in (".npy", ".npz"):
            return read_arrays(path)
        if path.suffix == ".zip":
            return Zip(path)
        raise DataError(f"--data {path} is a file of no form that is known: give a folder of images, a .zip of them, "
                        ".npy, .npz, or the folder of an LMDB or of MNIST's or CIFAR-10's files")
    if not path.is_dir():
        regular_file(path)  # says what it is
    if path.resolve() in outer:  # a link back
        raise DataError(f"--data {outer[0]} holds a link that leads in a circle: give the folder of the images")
    outer = *outer, path.resolve()
    if (path / "data.mdb").is_file():
        test = path.with_name(path.name.replace("_train_", "_val_"))
        return Lmdb(path, test if test != path and (test / "data.mdb").is_file() else None)
    for inside in sorted(path.glob("*_train_lmdb")):
        return detect_format(inside, outer)
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        if (folder / "test_batch").is_file() or (folder / "test_batch.bin").is_file():
            return read_cifar(folder)
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        if any(folder.glob("train-images?idx3-ubyte*")):
            return read_idx(folder)
    inside = [p for p in path.iterdir() if p.suffix in (".zip", ".npz", ".npy") or p.name in archives]
    if len(inside) == 1 and len(list(path.iterdir())) == 1:
        return detect_format(inside[0], outer)
    return Folder(path)


def main():
    parser = argparse.ArgumentParser(description="Show what --data would train on.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help=f"toy, {', '.join(DATASETS)}, or a path: folder, zip, LMDB, arrays")
    parser.add_argument("--root", help="where the named set lies (default: $VQLCMD_DATA, then data/)")
    parser.add_argument("--size", type=int, help="pixels a side (default: the toy's own, or 64)")
    parser.add_argument("--out", default="data.png", help="the page of images to write")
    parser.add_argument("--save", type=Path, metavar="FILE.npy", help="decode all images once, at --size, into this "
                        "file, for train.py --data FILE.npy; the same command again continues")
    args = parser.parse_args()
    with report_errors("data.py", memory_advice="choose a smaller --size"):
        source = find(args.data, args.root)
        print(source.describe())
        size = args.size or (TOY_SIZE if source.name == "toy" else 64)
        images, _ = save_for_runs(source, args.size, args.save).load(size, {}) if args.save else source.load(size)
        contact_sheet(images, args.out)
        for title, reason in source.skipped.items():
            print(f"cannot be used: {title}: {reason}")
        print(f"wrote {args.out}")
