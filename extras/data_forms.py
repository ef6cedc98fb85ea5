"""Forms of data in files: a folder of images, a zip of them. What their names say of classes and splits.

Called by extras/datasets.py. Arrays and token files are in extras/data_arrays.py, LSUN's LMDB in extras/data_lmdb.py.
"""

import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from data import DataError, Source
from engine.read_back import (
    UserError,
    at_most,
    check_unpacked,
    expect,
    limit,
    parse_json,
    printable,
    read_bytes,
    reason_of,
)

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}

NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw",
            ".mov", ".mp4", ".avi", ".mkv"}  # pictures and films of other kinds: what is left out is said


def arrange(names, where):
    """Names like "train/cat/1.png", sorted -> class names, labels (n,), numbers of train and test (or None), a note."""
    def top(name):
        return name.split("/", 1)[0] if "/" in name else ""

    def classes_of(names):
        tops = {top(name) for name in names}
        return [] if "" in tops or len(tops) < 2 or all(re.fullmatch(r"\d{5}", t) for t in tops) else sorted(tops)

    while len({top(name) for name in names}) == 1 and top(names[0]):  # one folder around everything says nothing
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
        found = {top(names[i]) for i in test}
        unknown = sorted(found - set(class_names))
        if found == {""}:  # as ImageNet's val/ comes
            test, note = None, f"{split}/ has no class sub-folders and is left alone; held-out images are of train/"
        elif unknown:
            raise DataError(f"{where}/{split} has the class {unknown[0]!r}, {where}/{tops['train']} does not: both "
                            "must have the same sub-folders")
    numbers = {name: i for i, name in enumerate(class_names)}
    return [printable(c) for c in class_names], [numbers.get(top(name), 0) for name in names], train, test, note


def add_words(class_names, path):
    """ImageNet's folders with the first word of each from the data's own file: "n01440764 tench".

    LOC_synset_mapping.txt or words.txt, beside the folders or up to four levels above; other names stay as they are.
    """
    if not class_names or not all(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return class_names
    folders = [path.resolve(), *path.resolve().parents][:5]
    for file in [folder / name for name in ("LOC_synset_mapping.txt", "words.txt") for folder in folders]:
        if file.is_file():
            text = read_bytes(file, "VQLCMD_MAX_INDEX_BYTES").decode("utf-8", "replace")
            lines = [line.split(maxsplit=1) for line in text.splitlines()]
            words = {line[0]: printable(line[1].split(",")[0].strip()) for line in lines if len(line) == 2}
            return [f"{name} {words[name]}" if words.get(name) else name for name in class_names]
    return class_names


def stylegan_labels(text, names, where):
    """dataset.json of StyleGAN's dataset_tool -> class names and labels (n,); no classes where its labels are null."""
    try:
        numbers, entry = parse_json(f"{where}/dataset.json", text).get("labels", 0), f"{where}/dataset.json: a label"
        if numbers is None:
            return [], [0] * len(names)
        pairs = [expect(entry, pair, list) for pair in expect(f"{where}/dataset.json: labels", numbers, list)]
        numbers = {name: expect(entry, label, int, 0, 1 << 62) for name, label in pairs}
        labels = [numbers[name] for name in names]
    except (ValueError, TypeError, KeyError) as error:  # a pair of three, a name that is a list, a name that is missing
        raise DataError(f"{where}/dataset.json has no whole-number label for every image ({reason_of(error)}): make it "
                        "again with dataset_tool, or take it away") from error
    classes = max(numbers.values()) + 1
    at_most(entry, classes, "VQLCMD_MAX_CLASSES")
    return [str(c) for c in range(classes)], labels


def no_images(where, others):
    endings = sorted({os.path.splitext(name)[1].lower() or os.path.basename(name) for name in others})
    held = f"only files like {printable(', '.join(endings[:4]))}" if endings else "no files"
    hint = left_out(Counter(os.path.splitext(name)[1].lower() for name in others))
    return DataError(f"no images in {where}: it holds {held}; expected files that end in "
                     f"{', '.join(sorted(EXTENSIONS))}{'; ' * bool(hint)}{hint}")


def left_out(endings):
    """Counter of endings -> which pictures and films of other kinds are left out, and what to do; or nothing."""
    found = ", ".join(f"{n:,} {ending}" for ending, n in sorted(endings.items()) if ending in NOT_READ)
    return found and (f"left out: {found} (convert them to .jpg or .png to train on them, e.g. with ImageMagick: "
                      "magick mogrify -format jpg FILES)")


class Folder(Source):
    """Image files below a folder, at any depth; hidden ones and __MACOSX are left out, links are followed."""

    def __init__(self, path):
        self.names, others, seen, endings, top = [], [], set(), Counter(), str(path).count(os.sep)
        for directory, subfolders, files in os.walk(path, followlinks=True):
            if directory.count(os.sep) - top > limit("VQLCMD_MAX_DEPTH"):
                raise DataError(f"{path}: {printable(os.path.relpath(directory, path)[:80])}... lies deeper than "
                                f"{limit('VQLCMD_MAX_DEPTH')} folders; if that is meant, set VQLCMD_MAX_DEPTH")
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in seen:  # a link back up would never end
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(d for d in subfolders if not d.startswith((".", "__MACOSX")))
            base = os.path.relpath(directory, path).replace(os.sep, "/") + "/"
            base = "" if base == "./" else base
            found = [base + f for f in files if not f.startswith(".")]
            images = [name for name in found if os.path.splitext(name)[1].lower() in EXTENSIONS]
            self.names += images
            others += found if not images else []
            endings.update(os.path.splitext(name)[1].lower() for name in set(found) - set(images))
            if not files and not subfolders and os.path.splitext(directory)[1].lower() in EXTENSIONS:
                self.names.append(base[:-1])  # an empty directory x.png: somebody took it for an image
        if not self.names:
            raise no_images(path, others)
        self.names.sort(key=lambda name: name.replace("/", "\0"))  # folder by folder
        class_names, labels, train, test, self.note = arrange(self.names, path)
        class_names, hint = add_words(class_names, path), left_out(endings)
        self.note += "; " * bool(self.note and hint) + hint
        if os.path.exists(os.path.join(path, "dataset.json")):
            text = read_bytes(Path(path, "dataset.json"), "VQLCMD_MAX_INDEX_BYTES")
            class_names, labels = stylegan_labels(text, self.names, path)
        super().__init__(path, class_names, labels, train, test)

    def read(self, i):
        return os.path.join(self.path, self.names[i])


class Zip(Source):
    """Images in a zip, read without unpacking; StyleGAN's dataset_tool puts labels beside them."""

    def __init__(self, path):
        labelled = None
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if not m.is_dir() and "__MACOSX" not in m.filename
                           and not os.path.basename(m.filename).startswith(".")]
                images = [m for m in members if os.path.splitext(m.filename)[1].lower() in EXTENSIONS]
                if "dataset.json" in archive.namelist():
                    index = archive.getinfo("dataset.json")
                    check_unpacked(f"{path}: dataset.json", index.file_size, index.compress_size)
                    labelled = archive.read("dataset.json")
        except UserError:
            raise
        except Exception as error:  # damaged zips raise half a dozen types
            raise DataError(f"{path} cannot be read as a zip ({reason_of(error)}): fetch or make it again") from error
        if not images:
            raise no_images(path, [m.filename for m in members])
        largest = max(max(m.file_size, m.compress_size, m.header_offset) for m in images)
        if largest >= 1 << 62:
            raise DataError(f"{path} claims an entry of {largest:,} bytes: fetch or make it again")
        if any(m.flag_bits & 1 for m in images):
            raise DataError(f"{path} is encrypted: unpack it and give the folder")
        images.sort(key=lambda m: m.filename.replace("/", "\0"))
        self.names = [m.filename for m in images]
        # Five numbers an image, not zipfile's objects: a million of those would be a gigabyte.
        self.places = np.array([(m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC)
                                for m in images], np.int64)
        class_names, labels, train, test, self.note = arrange(self.names, path)
        class_names = add_words(class_names, path)
        hint = left_out(Counter(os.path.splitext(m.filename)[1].lower() for m in members))
        self.note += "; " * bool(self.note and hint) + hint
        if labelled is not None:
            class_names, labels = stylegan_labels(labelled, self.names, path)
        super().__init__(path, class_names, labels, train, test)

    def read(self, i):
        offset, packed, size, method, checksum = self.places[i].tolist()
        at_most("the entry", packed, "VQLCMD_MAX_IMAGE_BYTES")
        if size > 4 * packed:  # images hardly shrink; a thread each could unpack one
            at_most("the entry", size, "VQLCMD_MAX_PACKED_IMAGE_BYTES")
        with open(self.path, "rb") as file:  # its own handle: threads read side by side
            file.seek(offset)
            lengths = struct.unpack("<HH", file.read(30)[26:])  # of the name and of the extra field
            file.seek(sum(lengths), os.SEEK_CUR)
            content = file.read(packed)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-15).decompress(content, size + 1)
        elif method != zipfile.ZIP_STORED:
            raise DataError(f"packed by method {method}, neither stored nor deflated")
        if zlib.crc32(content) != checksum:
            raise DataError("its checksum in the zip differs")
        return content
