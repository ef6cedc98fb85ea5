"""Forms of data in files: a folder of images, a zip of them, and what names say of classes and splits.

Called by extras/datasets.py.
"""

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

# Pictures and films of other kinds: what is left out is said.
NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef",
            ".arw", ".mov", ".mp4", ".avi", ".mkv"}
MAX_MEMBER = 32 << 20  # bytes of an image in a zip beyond 4 times its packed size: images hardly shrink


def ending_of(name):
    return os.path.splitext(name)[1].lower()


def arrange(names, where):
    """Names like "train/cat/1.png", sorted -> class names, labels (n,), train, test (or None), a note.

    train, test: numbers of the images of each split.
    """
    def top(name):
        return name.split("/", 1)[0] if "/" in name else ""

    def classes_of(names):
        tops = {top(name) for name in names}
        numbered = all(re.fullmatch(r"\d{5}", t) for t in tops)
        return [] if "" in tops or len(tops) < 2 or numbered else sorted(tops)

    while len({top(name) for name in names}) == 1 and top(names[0]):  # one folder around all says nothing
        names = [name.split("/", 1)[1] for name in names]
    tops = {t.lower(): t for t in {top(name) for name in names}}
    split = next((tops[t] for t in ("test", "val", "valid", "validation") if t in tops), None)
    train, test, note = range(len(names)), None, ""
    nested = all(name.count("/") > 1 for name in names if top(name).lower() == "train")
    if "train" in tops and (split is not None or nested):  # else images lie in it, and it is a class: trains
        train = [i for i, name in enumerate(names) if top(name) == tops["train"]]
        if split is not None:
            test = [i for i, name in enumerate(names) if top(name) == split]
        names = [name.split("/", 1)[-1] for name in names]
    class_names = classes_of([names[i] for i in train])
    if test is not None and class_names:
        test_tops = {top(names[i]) for i in test}
        unknown = sorted(test_tops - set(class_names))
        if test_tops == {""}:  # as ImageNet's val/ comes
            test = None
            note = f"{split}/ has no class sub-folders and is left alone; held-out images are of train/"
        elif unknown:
            raise UserError(f"{where}: {split}/ has the class {unknown[0]!r}, {tops['train']}/ does not: "
                            "both must have the same sub-folders")
    numbers = {name: i for i, name in enumerate(class_names)}
    labels = [numbers.get(top(name), 0) for name in names]
    return [printable(name) for name in class_names], labels, train, test, note


def add_words(class_names, path):
    """ImageNet's folders with the first word of each from the data's own file: "n01440764 tench".

    LOC_synset_mapping.txt or words.txt, beside the folders or up to four levels above; other names stay.
    """
    if not class_names or not all(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return class_names
    folders = [path.resolve(), *path.resolve().parents][:5]
    for file in [folder / name for name in ("LOC_synset_mapping.txt", "words.txt") for folder in folders]:
        if file.is_file():
            lines = [line.split(maxsplit=1) for line in file.read_text("utf-8", "replace").splitlines()]
            words = {line[0]: printable(line[1].split(",")[0].strip()) for line in lines if len(line) == 2}
            return [f"{name} {words[name]}" if words.get(name) else name for name in class_names]
    return class_names


def stylegan_labels(index, names, where):
    """dataset.json of StyleGAN's dataset_tool -> labels (n,), class names; none where its labels are null."""
    with reading(f"{where}/dataset.json", "it needs a whole-number label for every image"):
        if index["labels"] is None:
            return np.zeros(len(names)), []
        numbers = dict(index["labels"])
        return check_labels(f"{where}/dataset.json", [numbers[name] for name in names], len(names))


class Files(Source):
    """Image files by their names; `names` may hold others. index: StyleGAN's dataset.json, if it is there."""

    def __init__(self, path, names, index):
        endings = Counter(map(ending_of, names))
        left_out = ", ".join(f"{endings[e]:,} {e}" for e in sorted(NOT_READ & endings.keys()))
        if left_out:
            left_out = (f"left out: {left_out} (convert them to .jpg or .png to train on them, e.g. with "
                        "ImageMagick: magick mogrify -format jpg FILES)")
        self.names = [name for name in names if ending_of(name) in EXTENSIONS]
        if not self.names:
            kinds = sorted({ending_of(name) or os.path.basename(name) for name in names})
            content = f"only files like {printable(', '.join(kinds[:4]))}" if kinds else "no files"
            raise UserError(f"no images in {path}: it holds {content}; expected files that end in "
                            f"{', '.join(sorted(EXTENSIONS))}{'; ' if left_out else ''}{left_out}")
        self.names.sort(key=lambda name: name.replace("/", "\0"))  # folder by folder
        class_names, labels, train, test, note = arrange(self.names, path)
        class_names = add_words(class_names, path)
        if index is not None:
            labels, class_names = stylegan_labels(index, self.names, path)
        self.note = "; ".join(filter(None, [note, left_out]))
        super().__init__(path, class_names, labels, train, test)


class Folder(Files):
    """Image files below a folder, at any depth; hidden ones and __MACOSX are left out, links are followed."""

    def __init__(self, path):
        names, seen = [], set()
        for directory, subfolders, files in os.walk(path, followlinks=True):
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:  # a link back up would never end
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(d for d in subfolders if not d.startswith((".", "__MACOSX")))
            base = os.path.relpath(directory, path).replace(os.sep, "/")
            prefix = "" if base == "." else base + "/"
            names += [prefix + name for name in files if not name.startswith(".")]
            if not files and not subfolders and ending_of(base) in EXTENSIONS:
                names.append(base)  # an empty directory x.png: somebody took it for an image
        index = path / "dataset.json"
        super().__init__(path, names, read_json(index) if index.exists() else None)

    def read(self, i):
        return os.path.join(self.path, self.names[i])


class Zip(Files):
    """Images in a zip, read without unpacking it; StyleGAN's dataset_tool puts labels beside them."""

    def __init__(self, path):
        index = None
        with reading(path, "fetch or make it again"):
            self.archive = zipfile.ZipFile(check_file(path))
            names = [m.filename for m in self.archive.infolist() if not m.is_dir()]
            if "dataset.json" in names:
                member = self.archive.getinfo("dataset.json")
                check_unpacked(f"{path}: dataset.json", member.file_size, member.compress_size)
                index = json.loads(self.unpack(member))
        super().__init__(path, [name for name in names if "__MACOSX" not in name
                                and not os.path.basename(name).startswith(".")], index)

    def unpack(self, member):
        """The content of a member; no more is unpacked than the size that it announces."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError("it is neither stored nor deflated")
        with self.archive.open(member) as file:
            return file.read(member.file_size)

    def read(self, i):
        member = self.archive.getinfo(self.names[i])
        if member.file_size > max(MAX_MEMBER, 4 * member.compress_size):
            raise UserError(f"it would unpack from {member.compress_size:,} to {member.file_size:,} bytes")
        return self.unpack(member)
