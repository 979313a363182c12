"""Rows of a table, each our executor beside torch on one job, in a world that stands: what has been measured is kept
and printed at once, and a restart goes on with the next row."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch_side import Side, Timed

from autotune.runners.job import Job
from autotune.runners.ledger import ENDED, Ledger, Row
from autotune.runners.standing import Standing, attempt_here, folder_here
from autotune.runners.worker import leave
from autotune.spec.errors import WrongNumbers

SAME_LOSS = 1e-2  # relative, after some updates: the two round to bf16 in other places
HEADS = ("ours", "theirs", "theirs ms", "ours ms", "theirs / ours", "theirs MiB", "ours MiB", "their loss", "our loss")


@dataclass(frozen=True)
class Pair:
    """A job of ours and what torch's way to do it is called; rows that call it alike have it run once."""

    job: Job
    theirs: str
    make: Callable[[], Side]
    lacks: str = ""  # why torch cannot


def parser(about: str | None, flag: str, names: Sequence[str], usual: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The arguments that such scripts have in common; `flag` takes names of rows, without it the `usual` ones (all)."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        flag, dest="names", default=",".join(usual or names), help=f"these rows alone, of {', '.join(names)}"
    )
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="a model that a test on a CPU runs in seconds")
    made.add_argument("--steps", type=int, default=5)
    made.add_argument("--warmup", type=int, default=2)
    made.add_argument("--patience", type=float, default=60, help="most seconds of either side of a row")
    return made


def chosen(parser: argparse.ArgumentParser, flag: str, text: str, names: Sequence[str]) -> list[str]:
    """The names in `text`; ends with 2 where one is unknown."""
    found = text.split(",")
    if unknown := set(found) - set(names):
        parser.error(f"{flag}: found {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    return found


def line(row: Row) -> str:
    """The row in Markdown. Where only one side came to an end, it stands with the other's reason."""
    a, b = (Timed(**row[side]) if side in row else None for side in ("ours", "theirs"))
    if "failed" in row or a is None or b is None:
        known = f" (ours {a.median * 1e3:.1f} ms, {a.peak / 2**20:.0f} MiB)" if a else ""
        return f"| {row['plan']} | {row.get('beside', '')} | failed: {row.get('failed', ENDED)[:160]}{known} |"
    times = f"{b.median * 1e3:.1f} | {a.median * 1e3:.1f} | {b.median / a.median:.3f}"
    return (
        f"| {row['plan']} | {row['beside']} | {times} | {b.peak / 2**20:.0f} | {a.peak / 2**20:.0f} | "
        f"{b.loss:.4f} | {a.loss:.4f} |"
    )


def apart(rows: Sequence[Row]) -> list[str]:
    """What is to be said of rows whose losses differ. A loss that is no number differs from every other."""
    both = [row for row in rows if "failed" not in row]
    return [
        f"{row['plan']}: the losses differ: {row['theirs']['loss']:.4f} and {row['ours']['loss']:.4f}"
        for row in both
        if not abs(row["theirs"]["loss"] / row["ours"]["loss"] - 1) <= SAME_LOSS
    ]


def fill(row: Row, pair: Pair, world: Standing, ledger: Ledger, patience: float) -> None:
    """Runs both, ours first, unless an earlier row has; what is known is kept in between."""
    name, job = row["plan"], pair.job.to_json()
    row |= {"beside": pair.theirs, "job": job}
    if pair.lacks:
        row["failed"] = pair.lacks
        return
    earlier = [other for other in ledger.rows if other is not row]
    ours = next((r["ours"] for r in earlier if r.get("job") == job and "ours" in r), None)
    if ours is None:
        ran = world.run(pair.job, name, patience)
        ours = asdict(Timed(list(ran.step_s), max(ran.peak_bytes), ran.losses[-1]))
    row["ours"] = ours
    ledger.save()
    theirs = next((r["theirs"] for r in earlier if r.get("beside") == pair.theirs and "theirs" in r), None)
    if theirs is None:
        with world.watched(world.folder / name, patience):
            side = pair.make()
            theirs = asdict(side.run())
            del side
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    row["theirs"] = theirs
    del row["failed"]


def walk(names: Sequence[str], pair: Callable[[str, Standing], Pair], asked: argparse.Namespace) -> NoReturn:
    """Every row in turn, then ends with 0, or with 6 where losses differ. A row that fails ends this process; torchrun
    starts the world again and the next row follows. It would after 6 too: an attempt that finds all rows known ends
    before it joins."""
    again, file = attempt_here() > 0, folder_here() / "peer.json"
    if again:
        rows = Ledger.resume(file).rows
        if {row["plan"] for row in rows} >= set(names) and not any(r.get("failed") == ENDED for r in rows):
            leave(WrongNumbers.exit_code if apart(rows) else 0)
    world = Standing.join(asked.device)
    ledger = world.share(lambda: Ledger.resume(file) if again else Ledger(file))
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if world.rank == 0 else (lambda text: None)
    if world.rank:
        ledger = Ledger(None, ledger.rows)
    if last := ledger.unfinished():
        last["failed"] = world.share(lambda: world.why(last["plan"]) or "its processes ended without a word")
        ledger.save()
        say(line(last))
    if not ledger.rows:
        say(f"| {' | '.join(HEADS)} |")
        say("|---" * len(HEADS) + "|")
    for name in names:
        if ledger.row(name) is None:
            row = ledger.begin(name)
            fill(row, pair(name, world), world, ledger, asked.patience)
            ledger.save()
            say(line(row))
    for told in (found := apart(ledger.rows)):
        say(told)
    if found:
        dist.barrier()  # whoever is late must not be ended before it has said the same
        leave(WrongNumbers.exit_code)
    world.leave()
