"""`python fid.py`: its command line, from two words to a table of scores."""

import argparse
from pathlib import Path

from engine.distributed import choose_device, init_distributed, precision, rank_and_world
from engine.process import in_turns, report_errors, user_error, write_json
from extras.fid_sources import Decoded, Samples, cached_statistics, open_side
from extras.inception import PREPROCESS, find_inception, load_inception
from extras.sampling_options import OPTIONAL, add_sampling_flags, check_flags, labels_to_draw, open_checkpoint
from fid import MAX_KEPT, REAL_KEPT, FIDError, Statistics, compute_scores, measure, print_scores

FLAGS = {"classes": "class", "interval": "guidance-interval"}  # where a flag is not called as its value
EXAMPLES = """examples:
  python fid.py toy runs/toy/ckpt.pt --n 10000                 the training images against samples drawn on the way
  python fid.py toy runs/toy/ckpt.pt --n 5000 --steps 16 --guidance 0.5 --temperature 0.9
  python fid.py photos/ samples.npz                            two sets of images, as they are
  python fid.py photos/ --size 64 --save-stats photos.npz      once; then photos.npz in place of photos/
  torchrun --nproc-per-node 8 -- fid.py ffhq runs/ffhq/ckpt.pt --root /datasets"""


def run(args, rank):
    """The whole command, on each process."""
    with user_error():
        device = choose_device(args.device)
    words = [word for word in (args.real, args.fake) if word]
    checkpoints = [word for word in words if word.endswith(".pt")]
    if len(words) == 1 and not args.save_stats:
        raise FIDError("give REAL and FAKE, or one of them and --save-stats FILE")
    if len(checkpoints) > 1 or args.real in checkpoints:
        raise FIDError("a checkpoint can only stand at FAKE: first the real images, then the generated ones")
    if not checkpoints and (given := [name for name in ("n", "classes", "class_counts", *OPTIONAL)
                                      if getattr(args, name) is not None] + ["compile"] * args.compile):
        raise FIDError(f"--{FLAGS.get(given[0], given[0]).replace('_', '-')} is for a checkpoint at FAKE")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        raise FIDError(f"--save-stats {args.save_stats}: the name must end in .npz")
    for file in (args.save_stats, args.json):  # before any long work
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    pipeline = None
    if checkpoints:
        pipeline, settings, chosen, batch = open_checkpoint(args.fake, args, device)
    size = args.size or (pipeline.tokenizer.size if pipeline else None)
    sides = [open_side(word, args.root, size, bool(pipeline)) for word in words if word not in checkpoints]
    if pipeline:
        labels, classes = labels_to_draw(args.n or 50_000, args, pipeline, chosen, getattr(sides[0][1], "labels", None))
        source = Samples(pipeline, labels, args.seed, batch, **settings)
        sides.append((None, source, f"{source.n:,} samples of step {pipeline.step:,}, seed {args.seed}, {classes}, "
                      + ", ".join(f"{key} {value}" for key, value in settings.items()) + f", {precision(device)}"))
    for word, (statistics, source, what) in zip(words, sides, strict=True):
        if rank == 0:
            print(f"{word}: {what}")
        if source and source.n < 2:
            raise FIDError(f"{word}: {source.n} image; a covariance needs at least two, and a score thousands")
        if statistics and statistics.resize not in (None, args.resize):
            raise FIDError(f"{word} was made with --resize {statistics.resize}, not {args.resize}: both sides must be "
                           "made alike")
        if rank == 0 and statistics and statistics.resize is None:
            print(f"{word} does not say how images were resized for it; taken as --resize {args.resize}")
    network = None
    if any(source for _, source, _ in sides):
        network = load_inception(in_turns(lambda: find_inception(args.weights)), device, args.resize)  # may download
    measured = [measure_side(word, side, network, args, is_real=i == 0)
                for i, (word, side) in enumerate(zip(words, sides, strict=True))]
    if rank != 0:
        return
    if args.save_stats:
        measured[0].save(args.save_stats)
        print(f"wrote {args.save_stats}")
    if len(measured) == 2:
        scores = compute_scores(*measured, device="cpu" if device.type == "mps" else device)
        n_real, n_fake = (m.n for m in measured)
        print_scores(scores, n_real, n_fake)
        if args.json:
            facts = {"real": args.real, "fake": args.fake, "n_real": n_real, "n_fake": n_fake, "resize": args.resize,
                     **{f"features_{side}": 0 if m.features is None else len(m.features)
                        for side, m in zip(("real", "fake"), measured, strict=True)}}
            write_json(Path(args.json), scores | facts)


def measure_side(word, side, network, args, is_real):
    """The Statistics of a side: read, measured, or found in the cache if it is a training set at REAL."""
    statistics, source, _ = side
    if source is None:
        return statistics
    keep = args.features if is_real else MAX_KEPT
    if is_real and isinstance(source, Decoded) and rank_and_world()[1] == 1:  # of several, each has a part of the set
        result, path = cached_statistics(source.dataset, network, args.batch, keep)
        if rank_and_world()[0] == 0:
            print(f"{word}: statistics in {path}")
    else:
        result = measure(source, network, args.batch, keep, name=word)
    if statistics:  # ADM's reference file: statistics of the whole set, and some of its images
        result = Statistics(statistics.n, statistics.mean, statistics.cov, args.resize, result.features, result.logits)
    return result


def main():
    parser = argparse.ArgumentParser(description="FID, sFID, KID, Inception Score, precision and recall.",
                                     epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", metavar="REAL", help="a folder, zip, ... of images, whatever train.py takes as --data "
                        "(of a named set, its training images); or an .npz with arr_0 (images), or mu and sigma")
    parser.add_argument("fake", metavar="FAKE", nargs="?", help="the same, or a checkpoint of train.py to sample from")
    parser.add_argument("--size", type=int, help="centre-crop and resize files to so many pixels, as for training "
                        "(default: the checkpoint's, if there is one; else files are taken as they are)")
    parser.add_argument("--root", metavar="DIR", help="where a named set lies, as for train.py")
    parser.add_argument("--resize", choices=list(PREPROCESS), default="tf", help="how images become 299 pixels: as "
                        "TensorFlow, ADM and torch-fidelity do, as pytorch-fid, or as clean-fid (default: tf)")
    parser.add_argument("--weights", help="file of the Inception weights (default: $FID_WEIGHTS, or the cache, or "
                        "a download)")
    parser.add_argument("--save-stats", metavar="FILE", help="write the statistics of REAL as an .npz")
    parser.add_argument("--json", metavar="FILE", help="write the scores")
    parser.add_argument("--features", type=int, default=REAL_KEPT, metavar="M", help="features of REAL that are kept "
                        "for KID, precision and recall, and saved by --save-stats, 8 kB an image (float32); 0: none "
                        f"(default: {REAL_KEPT}; of FAKE {MAX_KEPT} are used)")
    add_sampling_flags(parser.add_argument_group("samples of a checkpoint at FAKE, as for sample.py"),
                       n="how many to draw (default: 50000)", batch="images at a time, drawn (default: 256, or fewer "
                       "if memory is short) and measured (default: 16 on a CPU, else 128); the score stays the same")
    args = parser.parse_args()
    with report_errors("fid.py", memory_advice="lower --batch, and the score stays the same"):
        rank, _ = init_distributed()
        check_flags(args)
        if args.features < 0 or args.size is not None and args.size < 1:
            raise FIDError("--size must be at least 1, and --features not negative")
        run(args, rank)
