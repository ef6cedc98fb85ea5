"""`python sample.py CKPT --export FILE.pt`: a checkpoint to share, half as precise and without optimizer."""

import torch

from engine.checkpoint import CHECKPOINT_FORMAT, read_checkpoint
from engine.process import write_atomically
from engine.validate import UserError


def export(checkpoint, out):
    """Writes `checkpoint` anew to `out` (a Path) and says so in a line."""
    if out.suffix != ".pt":
        raise UserError(f"--export {out}: the name must end in .pt")
    if out.exists():
        raise UserError(f"--export {out} is there already: remove it, or give another name")
    kept, state = {"format": CHECKPOINT_FORMAT}, read_checkpoint(checkpoint, CHECKPOINT_FORMAT)
    for name in ("config", "tokenizer", "ema", "class_names", "class_counts", "sampling", "metrics", "step"):
        kept[name] = state[name]
    for part in ("tokenizer", "ema"):  # numbers too large for float16 stay in float32
        halves = {name: value.half() for name, value in state[part].items() if value.dtype == torch.float32}
        kept[part] = state[part] | {name: half for name, half in halves.items() if half.isfinite().all()}
    write_atomically(out, lambda partial: torch.save(kept, partial))
    return f"wrote {out}, {out.stat().st_size / 1e6:.2f} MB. Draw with it:  python sample.py {out}"
