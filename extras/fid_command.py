"""`python fid.py`: its command line, from two words to a table of scores."""

import argparse
import dataclasses
from pathlib import Path

import fid
from engine.distributed import choose_device, init_distributed
from engine.process import main_process_first, report_errors, write_json
from engine.validate import UserError
from extras.fid_sources import from_pipeline, open_side
from extras.inception import PREPROCESS, find_inception, load_inception
from extras.sampling_options import OPTIONAL, add_sampling_flags, check_flags, labels_to_draw, open_checkpoint
from fid import MAX_KEPT, REAL_KEPT, compute_scores, measure, print_scores


def check_arguments(args, draws):
    """UserError for what is wrong whatever the files. draws: FAKE is a checkpoint."""
    check_flags(args, size=1, features=0)
    if not args.fake and not args.save_stats:
        raise UserError("give REAL and FAKE, or REAL and --save-stats FILE")
    if args.real.endswith(".pt"):
        raise UserError("a checkpoint can only stand at FAKE: first the real images, then the generated ones")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        raise UserError(f"--save-stats {args.save_stats}: the name must end in .npz")
    for name in ("n", "classes", "class_counts", "compile", *OPTIONAL):
        if getattr(args, name) is not None and not draws:
            flag = {"classes": "class", "interval": "guidance-interval"}.get(name, name.replace("_", "-"))
            raise UserError(f"--{flag} is for a checkpoint at FAKE")


def run(args):
    """The whole command, on each process."""
    rank, _ = init_distributed()
    draws = bool(args.fake) and args.fake.endswith(".pt")
    check_arguments(args, draws)
    device, size, drawn = choose_device(args.device), args.size, []
    if draws:
        pipeline, settings, chosen, batch = open_checkpoint(args.fake, args, device)
        labels, facts = labels_to_draw(args.n or 50_000, args, pipeline, chosen, settings)
        size = size or pipeline.tokenizer.size
        drawn = [(args.fake, None, from_pipeline(pipeline, labels, args.seed, batch, **settings), facts)]
    files = [word for word in (args.real, args.fake) if word and not word.endswith(".pt")]
    sides = [(word, *open_side(word, args.root, size, as_trained=draws)) for word in files] + drawn
    for word, statistics, _, what in sides:
        if statistics and statistics.resize is None:
            what += f" that do not say how images were resized; taken as --resize {args.resize}"
        elif statistics and statistics.resize != args.resize:
            raise UserError(f"{word} was made with --resize {statistics.resize}, not {args.resize}")
        if rank == 0:
            print(f"{word}: {what}")

    network, measured = None, []
    if any(source for _, _, source, _ in sides):
        main_process_first(lambda: find_inception(args.weights))  # it may download
        network = load_inception(find_inception(args.weights), device, args.resize)
    for (word, statistics, source, _), keep in zip(sides, (args.features, MAX_KEPT), strict=False):
        found = measure(source, network, args.batch, keep, name=word) if source else statistics
        if source and rank == 0 and found.n < source.n:
            print(f"{word}: {source.n - found.n:,} images cannot be used and are left out")
        if source and statistics:  # ADM's reference file: statistics of the whole set, and some of its images
            found = dataclasses.replace(found, n=statistics.n, mean=statistics.mean, cov=statistics.cov)
        measured.append(found)
    if rank == 0 and args.save_stats:
        measured[0].save(args.save_stats)
        print(f"wrote {args.save_stats}")
    if rank == 0 and args.fake:
        real, fake = measured
        scores = compute_scores(real, fake, device)
        print_scores(scores, real.n, fake.n)
        if args.json:
            sides = {"real": args.real, "n_real": real.n, "fake": args.fake, "n_fake": fake.n}
            write_json(Path(args.json), scores | sides | {"resize": args.resize})


def main():
    parser = argparse.ArgumentParser("fid.py", description=fid.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("real", metavar="REAL", help="as --data of train.py, or an .npz of arr_0 (images) or mu and sigma")
    add("fake", metavar="FAKE", nargs="?", help="the same, or a checkpoint of train.py to sample from")
    add("--size", type=int, help="crop and resize as for training (default: as the checkpoint, or not)")
    add("--root", metavar="DIR", help="where a named set lies, as for train.py")
    add("--resize", choices=list(PREPROCESS), default="tf", help="to 299 pixels (default: tf, as ADM does)")
    add("--weights", help="of Inception (default: $FID_WEIGHTS, the cache, or a download)")
    add("--save-stats", metavar="FILE", help="write the statistics of REAL as an .npz")
    add("--json", metavar="FILE", help="write the scores")
    add("--features", type=int, default=REAL_KEPT, metavar="M", help="real images kept for KID and recall")
    group = parser.add_argument_group("samples of a checkpoint at FAKE")
    add_sampling_flags(group, n="how many (default: 50000)", batch="images at a time; scores stay the same")
    args = parser.parse_args()
    with report_errors("fid.py", memory_advice="lower --batch, and the score stays the same"):
        run(args)
