"""The run directory: what an earlier start left in it, and what the first start puts there."""

from pathlib import Path

from engine import process
from engine.config import CHANGEABLE, flag
from engine.validate import UserError, printable, read_json
from extras.data_arrays import TokenFile
from extras.image_cache import CACHE
from extras.pictures import contact_sheet
from extras.run_page import page_of_a_run


def read_config(out):
    """config.json of an earlier start; {} if there was none."""
    if (out / "config.json").exists():
        return read_json(out / "config.json")
    early = ("skipped.txt", "data.png", ".lock", CACHE, "images.part", "config.json")  # of one killed early
    if out.exists() and any(not path.name.startswith(early) for path in out.iterdir()):
        raise UserError(f"{out} exists, is not empty and is no run of train.py: give another --out")
    return {}


def repeat_choices(args, before, out):
    """What need not be given again: --init, and the steps that --minutes chose. before: of read_config."""
    if args.init:
        args.init = str(Path(args.init).resolve())
    elif before.get("init", "none") != "none":
        args.init = before["init"]
    planned, names = before.get("minutes"), ("tokenizer_steps", "steps")
    if planned:
        if args.minutes not in (None, planned):
            raise UserError(f"{out} was planned for --minutes {planned:g}: a higher --steps trains it longer")
        for name in names:
            if getattr(args, name) is None:
                setattr(args, name, before[name])
    elif args.minutes is not None:
        given = [flag(name) for name in names if getattr(args, name) is not None]
        if given:
            raise UserError(f"--minutes chooses {given[0]}: give one of the two")
        if not args.minutes > 0:
            raise UserError(f"--minutes {args.minutes:g}: must be more than 0")
        if (out / "tokenizer.csv").exists() or (out / "ckpt.pt").exists():
            raise UserError(f"--minutes is for a new run; {out} has its steps: --steps trains it longer")


def require_same_run(out, before, run_config):
    """An existing run is continued as it was begun, but for what is CHANGEABLE; such changes are printed."""
    for name, value in run_config.items():
        old, new = before.get(name, value), value
        if old == new:
            continue
        if name not in CHANGEABLE:
            hint = "or the old setting to continue it"
            if name in ("train_images", "held_out_images", "classes"):
                hint = f"with --init {out} to start from its weights; or the images that it was begun with"
            old, new = (printable(each)[:100] for each in (old, new))
            raise UserError(f"{out} was made with {name} {old}, now {name} is {new}: give another --out, "
                            f"{hint}")
        print(f"{name} was {old}, from here on it is {new}")


def read_skipped(out):
    """skipped.txt -> {title: why not}; None if there is none: the images were not looked at yet."""
    if (out / "skipped.txt").is_file():
        lines = (out / "skipped.txt").read_text(encoding="utf-8").splitlines()
        return dict(line.partition("\t")[::2] for line in lines)


def make(out, source, load_images, run_config, is_first, allow_bad, stack):
    """Locks the directory, decodes every image at the first start, writes config.json and the page."""
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(process.lock(out))
    if is_first and not isinstance(source, TokenFile):
        train, _ = load_images()
        write_skipped(source, out, allow_bad)
        contact_sheet(train, out / "data.png")
    process.write_json(out / "config.json", run_config)
    stack.enter_context(page_of_a_run(out))


def write_skipped(source, out, allow_bad):
    skipped, total = source.skipped, sum(source.counts())
    lines = "".join(f"{printable(title)}\t{printable(reason)}\n" for title, reason in skipped.items())
    process.write_atomically(out / "skipped.txt", lambda partial: partial.write_text(lines, encoding="utf-8"))
    if skipped:
        print(f"{len(skipped):,} of {total:,} images ({len(skipped) / total:.2%}) cannot be used, left "
              f"out: {out / 'skipped.txt'}")
    if len(skipped) > 0.01 * total and not allow_bad:
        title, reason = next(iter(skipped.items()))
        raise UserError(f"{len(skipped):,} of {total:,} images cannot be used, more than 1 %, e.g. {title} "
                        f"({reason}); all are in {out / 'skipped.txt'}: repair them or take them out, or add "
                        "--allow-bad")
