"""The commands of Slurm, as far as gpt/compare/execution/slurm.py uses them, on this machine.

`install` puts them into a folder for the PATH. A job's elements run two at a time, in sessions of
their own; none if there is a file `held` in the state folder. The files `refusal` and `answer`
contain what sbatch prints instead; with a file `one`, it refuses a job while another is in the
queue. `scancel --signal=USR2 ELEMENT` plays the time limit.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = "FAKE_SLURM"  # environment variable: the state folder
NAMES = ("sbatch", "squeue", "srun", "scontrol", "scancel", "sacct")


def install(folder: Path) -> Path:
    """Write the commands into a folder; returns the state folder."""
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)
    state = folder / "state"
    state.mkdir()
    return state


def sbatch(state: Path, script: str) -> None:
    refusal = state / "refusal"
    if refusal.exists():
        sys.exit(refusal.read_text())
    if (state / "one").exists() and any((state / "queue").glob("*")):
        sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    job = 100 + len(list(state.glob("*.sh")))
    text = Path(script).read_text()
    (state / f"{job}.sh").write_text(text)
    array = re.search(r"--array=0-(\d+)", text)
    elements = [f"{job}_{i}" for i in range(int(array[1]) + 1)] if array else [str(job)]
    (state / "queue").mkdir(exist_ok=True)
    for element in elements:
        (state / "queue" / element).touch()
    answer = state / "answer"
    print(answer.read_text() if answer.exists() else f"Submitted batch job {job}")
    if (state / "held").exists():
        return
    words = [sys.executable, __file__, "control", str(job), *elements]
    nothing = subprocess.DEVNULL
    subprocess.Popen(words, start_new_session=True, stdin=nothing, stdout=nothing, stderr=nothing)


def control(state: Path, job: str, *elements: str) -> None:
    """Run the elements of a job, and those that are requeued again."""
    waiting, running = list(elements), dict[str, subprocess.Popen[bytes]]()
    while waiting or running:
        while waiting and len(running) < 2:
            element = waiting.pop(0)
            environment = {**os.environ, "SLURM_JOB_ID": element, "SLURM_NTASKS": "1"}
            if "_" in element:
                _, environment["SLURM_ARRAY_TASK_ID"] = element.split("_")
                environment["SLURM_ARRAY_JOB_ID"] = job
            words = ["bash", str(state / f"{job}.sh")]
            running[element] = subprocess.Popen(words, env=environment, start_new_session=True)
        for element, process in list(running.items()):
            if process.poll() is not None:
                del running[element]
                requeued = state / f"{element}.requeue"
                if requeued.exists():
                    requeued.rename(state / f"{element}.requeued")
                    waiting.append(element)
                else:
                    (state / "queue" / element).unlink()
        time.sleep(0.1)


def srun(state: Path, *words: str) -> None:
    job = os.environ["SLURM_JOB_ID"]
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    rest = list(words)
    while rest[0].startswith("--"):
        flag = rest.pop(0)
        if flag in ("--output", "--error"):
            path = rest.pop(0).replace("%A", job.split("_")[0]).replace("%a", task)
            file = os.open(path.replace("%j", job).replace("%t", "0"), os.O_CREAT | os.O_WRONLY)
            os.dup2(file, 1 if flag == "--output" else 2)
    (state / f"{job}.pid").write_text(str(os.getpid()))
    os.execvp(rest[0], rest)


def squeue(state: Path, *words: str) -> None:
    assert {"--me", "--array", "--noheader", "--format=%i"} == set(words)
    print("\n".join(path.name for path in (state / "queue").glob("*")))


def scontrol(state: Path, action: str, element: str) -> None:
    assert action == "requeue"
    (state / f"{element}.requeue").touch()


def scancel(state: Path, *words: str) -> None:
    name = "SIGUSR2" if "--signal=USR2" in words else "SIGTERM"
    os.kill(int((state / f"{words[-1]}.pid").read_text()), signal.Signals[name])


def sacct(state: Path, *words: str) -> None:
    print("FAILED|node7")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ[STATE]), *sys.argv[2:])
