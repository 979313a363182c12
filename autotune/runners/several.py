"""Several jobs one after another in one world of workers: `python -m autotune.runners.several FOLDER`, started by
torchrun. Starting workers takes longer than most of what a profile of acceptances runs.

The folder has `jobs.jsonl`, a job a line; each leaves its ranks' reports in a folder of its number.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from autotune.runners.job import Job
from autotune.runners.launch import JOBS
from autotune.runners.standing import Standing

PATIENCE_S = 1800.0  # for one of the jobs


def read_jobs(folder: Path) -> list[Job]:
    return [Job.from_json(line) for line in (folder / JOBS).read_text().splitlines()]


def main(arguments: list[str]) -> NoReturn:
    folder = Path(arguments[0])
    jobs = read_jobs(folder)
    world = replace(Standing.join(jobs[0].device), folder=folder)
    for number, job in enumerate(jobs):
        world.run(job, str(number), PATIENCE_S)
    world.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
