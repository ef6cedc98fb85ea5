"""A program in parts, for a machine that is lent for an hour: each part in a process of its own, timed, its findings
beside what was predicted; results are kept, so that the same command goes on. Used by first_hour.py.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.distributed import choose_device
from engine.process import UserError, report_errors, user_error, write_atomically, write_json


def finding(what, found, predicted="", good=None):
    """A row of the report. good: is it as predicted? None where nothing was."""
    return {"what": what, "found": str(found), "predicted": predicted, "good": None if good is None else bool(good)}


def below(what, value, limit):
    return finding(what, f"{value:.3g}", f"at most {limit:g}", value <= limit)


def at_least(what, value, limit):
    return finding(what, f"{value:.3g}", f"at least {limit:g}", value >= limit)


def report(title, parts, results, tiny):
    """{part: its result} -> Markdown."""
    rows = [(part, row) for part, result in results.items() for row in result["findings"]]
    wrong = [f"* {part}: {row['what']}: **{row['found']}**, predicted {row['predicted']}" for part, row in rows
             if row["good"] is False]
    wrong += [f"* {part} ended early: {result['error']}" for part, result in results.items() if result["error"]]
    missing = [part for part in parts if part not in results]
    lines = [f"# {title}", ""]
    lines += ["**This is a CPU: everything is tiny, and no figure here says anything of a GPU.**", ""] if tiny else []
    lines += [f"## Not as predicted: {len(wrong) or 'nothing'}", "", *wrong, *[""] * bool(wrong),
              f"As predicted: {sum(row['good'] is True for _, row in rows)} of "
              f"{sum(row['good'] is not None for _, row in rows)}."
              + (f" Not run: {', '.join(missing)}." if missing else "")]
    for part, result in results.items():
        lines += ["", f"## {part}, {result['seconds']:.0f} s", ""]
        lines += ["| what | found | predicted | |", "|---|---|---|---|"]
        lines += [f"| {row['what']} | {row['found']} | {row['predicted']} | "
                  f"{ {True: 'yes', False: '**no**', None: ''}[row['good']]} |" for row in result["findings"]]
    return "\n".join(lines) + "\n"


def run_part(here, part):
    """In a process of its own, which writes its findings down as they come -> them, or why it ended early, too."""
    file, begun, error = here.out / f"{part}.json", time.monotonic(), None
    command = [sys.executable, sys.argv[0], "--out", here.out, "--device", here.device.type, "--part", part,
               "--processes", *here.processes]
    file.unlink(missing_ok=True)
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=here.limit)
            error = said.strip().splitlines()[-1] if process.returncode else None
        except subprocess.TimeoutExpired:
            error = f"it took more than --limit {here.limit} seconds"
        finally:  # also after Ctrl-C
            end(process)
    found = json.loads(file.read_text())["findings"] if file.exists() else []
    return {"machine": here.name, "seconds": time.monotonic() - begun, "error": error, "findings": found}


def end(process):
    """With all that it started, if it is not over; torchrun needs a moment to end its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(150):
            time.sleep(0.1)
            process.poll()
            os.killpg(process.pid, 0)  # is there anybody?
        os.killpg(process.pid, signal.SIGKILL)


def main(title, parts, description):
    """The command line of a program. parts: {name: function of `here` that yields findings}."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", nargs="+", choices=parts, metavar="PART", help=f"of {', '.join(parts)}")
    parser.add_argument("--skip", nargs="+", choices=parts, default=[], metavar="PART", help="all but these")
    parser.add_argument("--again", action="store_true", help="also what is complete")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], metavar="W", help="of that part (default: 2)")
    parser.add_argument("--limit", type=float, default=180, help="seconds for a part (default: 180)")
    parser.add_argument("--out", default="runs/first_hour", help="default: runs/first_hour")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--part", choices=parts, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with report_errors(Path(sys.argv[0]).name, "stopped; the same command goes on"):
        with user_error():
            device = choose_device(args.device)
        if device.type not in ("cuda", "cpu"):
            raise UserError(f"--device {device}: cuda or cpu")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        here = SimpleNamespace(device=device, name=name, tiny=device.type == "cpu", out=Path(args.out).resolve(),
                               processes=args.processes, limit=args.limit)
        here.out.mkdir(parents=True, exist_ok=True)
        if args.part:
            torch.set_num_threads(1) if here.tiny else None
            findings = []
            for found in parts[args.part](here):
                findings.append(found)
                print(f"  {found['what']}: {found['found']}" + (" NOT AS PREDICTED" if found["good"] is False else ""),
                      flush=True)
                write_json(here.out / f"{args.part}.json", {"findings": findings})
            return
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as after Ctrl-C: the part is ended, too
        known = here.out / "report.json"
        results = json.loads(known.read_text()) if known.exists() else {}
        results = {part: result for part, result in results.items() if result["machine"] == name}
        for part in parts:
            if part in args.skip or part not in (args.only or parts):
                continue
            if part in results and not results[part]["error"] and not args.again:
                print(f"{part}: complete")
                continue
            print(f"{part} ...", flush=True)
            results[part] = run_part(here, part)
            results = {name: results[name] for name in parts if name in results}
            write_json(known, results)
            text = report(f"{title} {name}", parts, results, here.tiny)
            write_atomically(here.out / "report.md", lambda partial, text=text: partial.write_text(text))
            print(f"{part}: {results[part]['error'] or 'done'}, {results[part]['seconds']:.0f} s", flush=True)
        print(f"wrote {here.out / 'report.md'}")
