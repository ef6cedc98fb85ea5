"""Forms of data in files: a folder, a zip, or LSUN's LMDB; and what names say of classes and splits."""

import functools
import json
import os
import re
import zipfile
from collections import Counter

import numpy as np

from data import Source
from engine.validate import UserError, check_file, check_unpacked, printable, read_json, reading
from extras.data_arrays import check_labels

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def ending_of(name):
    return os.path.splitext(name)[1].lower()


def arrange(names, where):
    """Names like "train/cat/1.png" -> class names, labels (n,), numbers of train, of test or None, a note."""
    paths = [name.split("/") for name in names]
    while min(map(len, paths)) > 1 and len({path[0] for path in paths}) == 1:  # a folder around all
        paths = [path[1:] for path in paths]
    tops = {path[0].lower(): path[0] for path in paths if len(path) > 1}
    held_out = next((tops[t] for t in ("test", "val", "valid", "validation") if t in tops), None)
    nested = all(len(path) > 2 for path in paths if path[0].lower() == "train")
    train, test, note = range(len(paths)), None, ""
    if "train" in tops and (held_out or nested):  # else images lie in it, and it is a class: trains
        train = [i for i, path in enumerate(paths) if path[0] == tops["train"]]
        if held_out:
            test = [i for i, path in enumerate(paths) if path[0] == held_out]
        paths = [path[1:] or path for path in paths]
    folders = [path[0] if len(path) > 1 else "" for path in paths]
    class_names = sorted({folders[i] for i in train})
    if "" in class_names or len(class_names) < 2 or all(re.fullmatch(r"\d{5}", c) for c in class_names):
        class_names = []
    if test and class_names:
        test_folders = {folders[i] for i in test}
        unknown = sorted(test_folders - set(class_names))
        if test_folders == {""}:  # as ImageNet's val/ comes
            test = None
            note = f"{held_out}/ has no class sub-folders and is left alone; held-out images are of train/"
        elif unknown:
            raise UserError(f"{where}: {held_out}/ has the class {unknown[0]!r}, {tops['train']}/ does not: "
                            "both must have the same sub-folders")
    numbers = {name: i for i, name in enumerate(class_names)}
    labels = [numbers.get(folder, 0) for folder in folders]
    return [printable(name) for name in class_names], labels, train, test, note


def add_words(class_names, path):
    """ImageNet's names with the words of a file up to four levels above: "n01440764 tench"."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return class_names
    folders = [path.resolve(), *path.resolve().parents][:5]
    for file in [folder / name for name in ("LOC_synset_mapping.txt", "words.txt") for folder in folders]:
        if file.is_file():
            lines = [line.split(maxsplit=1) for line in file.read_text("utf-8", "replace").splitlines()]
            words = {line[0]: printable(line[1].split(",")[0].strip()) for line in lines if len(line) == 2}
            return [f"{name} {words.get(name, '')}".strip() for name in class_names]
    return class_names


class Files(Source):
    """Image files by their names; `names` may hold others. index: StyleGAN's dataset.json, if it is there."""

    def __init__(self, path, names, index):
        others = Counter(ending_of(name) for name in names if ending_of(name) not in (*EXTENSIONS, ".json"))
        self.names = [name for name in names if ending_of(name) in EXTENSIONS]
        if not self.names:
            kinds = f"only files like {ending_of(names[0]) or names[0][-99:]}" if names else "no files"
            raise UserError(f"no images in {path}: it holds {kinds}; give {', '.join(sorted(EXTENSIONS))}")
        left_out = ", ".join(f"{n:,} {ending or 'of no ending'}" for ending, n in others.most_common(9))
        if left_out:
            left_out = f"left out: {left_out} (convert them to .jpg or .png, where they are images)"
        self.names.sort(key=lambda name: name.replace("/", "\0"))  # folder by folder
        class_names, labels, train, test, note = arrange(self.names, path)
        class_names = add_words(class_names, path)
        if index is not None:  # of StyleGAN's dataset_tool
            class_names, labels = [], np.zeros(len(self.names))
            with reading(where := f"{path}/dataset.json", "it needs a label for every image"):
                if index["labels"] is not None:
                    numbers = dict(index["labels"])
                    labels, class_names = check_labels(where, [numbers[n] for n in self.names], len(labels))
        self.note = "; ".join(filter(None, [note, left_out]))
        super().__init__(path, class_names, labels, train, test)


class Folder(Files):
    """Image files below a folder, at any depth; hidden ones and __MACOSX are left out, links are followed."""

    def __init__(self, path):
        names, seen = [], set()
        for directory, subfolders, files in os.walk(path, followlinks=True):
            real = os.path.realpath(directory)
            subfolders[:] = sorted(d for d in subfolders if not d.startswith((".", "__MACOSX")))
            if real in seen:  # a link back up would never end
                subfolders.clear()
                continue
            seen.add(real)
            base = os.path.relpath(directory, path).replace(os.sep, "/") + "/"
            names += [(base + name).removeprefix("./") for name in files if not name.startswith(".")]
            if not files and not subfolders and ending_of(directory) in EXTENSIONS:
                names.append(base[:-1])  # an empty directory x.png: somebody took it for an image
        index = path / "dataset.json"
        super().__init__(path, names, read_json(index) if index.exists() else None)

    def read(self, i):
        return os.path.join(self.path, self.names[i])


class Zip(Files):
    """Images in a zip, read without unpacking it; StyleGAN's dataset_tool puts labels beside them."""

    def __init__(self, path):
        with reading(path, "fetch or make it again"):
            self.archive = zipfile.ZipFile(check_file(path))
            names = [m.filename for m in self.archive.infolist() if not m.is_dir()]
            index = json.loads(self.unpack("dataset.json")) if "dataset.json" in names else None
        super().__init__(path, [name for name in names if "__MACOSX" not in name
                                and not os.path.basename(name).startswith(".")], index)

    def unpack(self, name):
        member = self.archive.getinfo(name)
        check_unpacked(f"{self.archive.filename}: {name}", member.file_size, member.compress_size)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError("it is neither stored nor deflated")  # others unpack a block whole, of any size
        with self.archive.open(member) as file:
            return file.read(member.file_size)

    def read(self, i):
        return self.unpack(self.names[i])


@functools.cache  # lmdb opens a file once in a process
def open_lmdb(path):
    """(environment, its keys) of a directory with data.mdb."""
    with reading(path, "pip install lmdb, or fetch it again"):
        import lmdb
        environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        n_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if n_bytes > (path / "data.mdb").stat().st_size:  # lmdb would crash where it ends
            raise ValueError("it is cut short")
        with environment.begin() as transaction:
            return environment, [key.decode() for key in transaction.cursor().iternext(values=False)]


class Lmdb(Source):
    """Image files in LSUN's LMDB; a NAME_val_lmdb beside a NAME_train_lmdb is held out."""

    def __init__(self, path):
        beside = path.with_name(path.name.replace("_train_", "_val_"))
        self.environment, self.names = open_lmdb(path.resolve())
        train, test = range(len(self.names)), None
        if beside != path and (beside / "data.mdb").is_file():
            self.test_environment, test_names = open_lmdb(beside.resolve())
            self.names = self.names + test_names
            test = range(len(train), len(self.names))
        super().__init__(path, [], np.zeros(len(self.names)), train, test)

    def read(self, i):
        environment = self.environment if i < self.total else self.test_environment
        with environment.begin() as transaction:
            return transaction.get(self.names[i].encode())
