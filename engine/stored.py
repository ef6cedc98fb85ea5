"""What an earlier start of a run left: config.json and skipped.txt are read, checked, and compared with what is asked.

Called by engine/prepare.py and extras/run_facts.py.
"""

import math
from pathlib import Path

from engine.config import CHANGEABLE, OPTIONS, check_option, flag
from engine.read_back import UserError, expect, printable, read_bytes, read_json, read_names, shown

CACHE = "images.npy"  # decoded images, while the tokenizer trains: extras/image_cache.py


def read_config(out):
    """What an earlier start of this run was asked for; {} if there was none."""
    path = out / "config.json"
    if path.exists():
        return check_stored(path, read_json(path))
    early = ("skipped.txt", "data.png", "config.json", ".lock",  # .part: of a run that was killed
             *(CACHE.replace(".npy", ending) for ending in (".npy", ".part.npy", ".part.new.npy")))
    if out.exists() and any(p.name.removesuffix(".part") not in early for p in out.iterdir()):
        raise UserError(f"{out} exists, is not empty and is no run of train.py: give another --out")
    return {}


def read_skipped(path):
    """skipped.txt -> {title: why not}; None if there is none, that is, if the images were not checked yet."""
    if path.exists():
        lines = read_bytes(path, "VQLCMD_MAX_INDEX_BYTES").decode("utf-8", "backslashreplace").splitlines()
        for number, line in enumerate(lines, 1):
            if line.count("\t") != 1:
                raise UserError(f"{path}: line {number} must be a name, a tab and a reason, is "
                                f"{shown(line)}: take the file away, and give another --out")
        return dict(line.split("\t") for line in lines)


def write_skipped(path, skipped):
    """One line per image that cannot be used: where it lies, a tab, why not. Empty if all are sound."""
    path.write_text("".join(f"{printable(title)}\t{printable(reason)}\n" for title, reason in skipped.items()),
                    encoding="utf-8")


def check_stored(path, stored):
    """The dict of a config.json, if its entries are what train.py writes there; else ReadError."""
    for name, value in stored.items():
        if name in OPTIONS:
            check_option(path, name, value)
        elif name in ("seed", "train_images", "held_out_images"):
            expect(f"{path}: {name}", value, int, 0, 1 << 62)
        elif name == "minutes":
            expect(f"{path}: minutes", value, float, 0, 1e9)
        elif name in ("data", "lpips", "tokenizer", "init"):
            expect(f"{path}: {name}", value, str)
    if "sides" in stored and len(expect(f"{path}: sides", stored["sides"], list)) != 3:
        raise UserError(f"{path}: sides must be 3 numbers of pixels, are {len(stored['sides'])}")
    for side in stored.get("sides", ()):
        expect(f"{path}: sides", side, int, 1, 1 << 30)
    return stored | ({"classes": read_names(f"{path}: classes", stored["classes"])} if "classes" in stored else {})


def keep_promises(args, stored, out):
    """What a run was begun with and need not be said again: --init, and the steps that --minutes chose."""
    began, given = stored.get("init", "none"), args.init and str(Path(args.init).resolve())
    if began != "none" and given in (None, str(Path(began).resolve())):
        args.init = began
    elif given:
        args.init = given
    planned, names = stored.get("minutes"), ("tokenizer_steps", "steps")
    if planned:
        if args.minutes not in (None, planned):
            raise UserError(f"{out} was planned for --minutes {planned:g}: leave that as it is; a higher --steps trains"
                            " it longer")
        for name in names:
            setattr(args, name, stored.get(name) if getattr(args, name) is None else getattr(args, name))
    elif args.minutes is not None:
        if not 0 < args.minutes < math.inf:
            raise UserError(f"--minutes {args.minutes:g}: must be more than 0")
        if given := [flag(name) for name in names if getattr(args, name) is not None]:
            raise UserError(f"--minutes chooses {given[0]}: give one of the two")
        files = ["tokenizer.csv", "ckpt.pt", *["tokenizer.pt"] * (stored.get("tokenizer") == "own")]
        if any((out / name).exists() for name in files):
            raise UserError(f"--minutes is for a new run; {out} has its steps already: --steps trains it longer; else "
                            "give another --out")


def require_same_run(out, stored, asked):
    """An existing run is continued as it was begun, but for what is CHANGEABLE; such changes are printed."""
    no_classes = not (stored.get("classes", True) and asked.get("classes", True))
    for name, value in asked.items():
        if name in stored and stored[name] != value:
            if name not in CHANGEABLE:
                before, now = (shown(each) if isinstance(each, list) else each for each in (stored[name], value))
                old = "or the old setting to continue it"
                if name in ("train_images", "held_out_images", "classes"):
                    old = (f"with --init {out} to start from its weights; or the images"
                           f"{' or --no-classes' * no_classes} that it was begun with")
                raise UserError(f"{out} was made with {name} {before}, now {name} is {now}: give another --out, {old}")
            print(f"{name} was {stored[name]}, from here on it is {value}")
