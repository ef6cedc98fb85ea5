"""`python fid.py`: its command line, from two words to a table of scores."""

import argparse
from pathlib import Path

from engine.distributed import choose_device, init_distributed
from engine.run import main_process_first, report_errors, user_error, write_json
from extras.fid_sources import Samples, open_side
from extras.inception import PREPROCESS, find_inception, load_inception
from fid import FIDError, Statistics, compute_scores, measure, print_scores
from sample import load_checkpoint


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
    if not checkpoints and (args.n or args.steps or args.guidance is not None):
        raise FIDError("--n, --steps and --guidance are for a checkpoint at FAKE")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        raise FIDError(f"--save-stats {args.save_stats}: the name must end in .npz")
    for file in (args.save_stats, args.json):  # before any long work
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    pipeline = load_checkpoint(args.fake, device) if checkpoints else None
    size = args.size or (pipeline.tokenizer.size if pipeline else None)
    sides = [open_side(word, args.root, size, bool(pipeline)) for word in words if word not in checkpoints]
    if pipeline:
        settings = {key: getattr(args, key) for key in ("steps", "guidance") if getattr(args, key) is not None}
        source = Samples(pipeline, args.n or 50_000, getattr(sides[0][1], "labels", None), args.seed, **settings)
        sides.append((None, source, f"{source.n:,} samples of step {pipeline.step:,}, seed {args.seed}, " + ", ".join(
            f"{key} {value}" for key, value in source.settings.items())))
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
        path = main_process_first(lambda: find_inception(args.weights))  # downloads, if need be
        network = load_inception(path or find_inception(args.weights), device, args.resize)
    measured = []
    for word, (statistics, source, _) in zip(words, sides, strict=True):
        result = measure(source, network, args.batch, name=word) if source else statistics
        if source and statistics:  # ADM's reference file: statistics of the whole set, and some of its images
            result = Statistics(statistics.n, statistics.mean, statistics.cov, args.resize, result.features,
                                result.logits)
        measured.append(result)
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
            facts = {"real": args.real, "fake": args.fake, "n_real": n_real, "n_fake": n_fake, "resize": args.resize}
            write_json(Path(args.json), scores | facts)


def main():
    parser = argparse.ArgumentParser(description="FID, sFID, KID, Inception Score, precision and recall.")
    parser.add_argument("real", metavar="REAL", help="a folder, zip, ... of images, whatever train.py takes as --data "
                        "(of a named set, its training images); or an .npz with arr_0 (images), or mu and sigma")
    parser.add_argument("fake", metavar="FAKE", nargs="?", help="the same, or a checkpoint of train.py to sample from")
    parser.add_argument("--n", type=int, help="samples to draw from a checkpoint (default: 50000)")
    parser.add_argument("--steps", type=int, help="calls of its network per image (default: in the checkpoint)")
    parser.add_argument("--guidance", type=float, help="omega (default: in the checkpoint)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--size", type=int, help="centre-crop and resize files to so many pixels, as for training "
                        "(default: the checkpoint's, if there is one; else files are taken as they are)")
    parser.add_argument("--root", metavar="DIR", help="where a named set lies, as for train.py")
    parser.add_argument("--resize", choices=list(PREPROCESS), default="tf", help="how images become 299 pixels: as "
                        "TensorFlow, ADM and torch-fidelity do, as pytorch-fid, or as clean-fid (default: tf)")
    parser.add_argument("--weights", help="file of the Inception weights (default: $FID_WEIGHTS, or the cache, or "
                        "a download)")
    parser.add_argument("--save-stats", metavar="FILE", help="write the statistics of REAL as an .npz")
    parser.add_argument("--json", metavar="FILE", help="write the scores")
    parser.add_argument("--batch", type=int, help="images at a time (default: 16 on a CPU, else 128)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args()
    with report_errors("fid.py", memory_advice="lower --batch, and the score stays the same"):
        rank, _ = init_distributed()
        for name in ("n", "steps", "size", "batch"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise FIDError(f"--{name} must be at least 1")
        if args.seed < 0:
            raise FIDError("--seed must not be negative")
        run(args, rank)
