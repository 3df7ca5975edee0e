"""What a run loses where machines fail: killed, out of disk, bits of its checkpoints flipped.

    python -m benchmarks.soak --minutes=10 --output=benchmarks/soak_cpu.json

A small run of two stages is begun again and again until it is finished, and what hurts it is drawn
at random: SIGKILL at any moment, SIGKILL while a checkpoint is written, a limit on the size of
files that stands for a full disk; between two processes, a flipped bit in the newest checkpoint.
Then another run begins. Lost would be: parameters, losses or figures that differ in one bit from
those of a run that nothing happened to; a run that goes on from an older checkpoint than the newest
whole one; a flipped bit that nobody noticed; an end that is no kill and no error in a last line.

`flips_noticed` counts checkpoints that were set aside; a second bit of one, flipped before any
process had looked, is noticed with the first.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from dmc_jax.checkpoints.metadata import load_metadata
from dmc_jax.checkpoints.models import open_model
from dmc_jax.checkpoints.run_directory import PARTIAL_MARK, complete_steps, latest
from dmc_jax.commands import in_a_line
from dmc_jax.config import STAGES, DataConfig, ModelConfig, RunConfig, StageConfig
from dmc_jax.data.prepare import prepare
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.times import MARK
from dmc_jax.training.loop import train

HURTS = ("kill", "kill_in_a_save", "full_disk", "flip")
TIMES = ("tokens_per_second", "goodput", MARK)


def small_run(folder: Path) -> RunConfig:
    """Prepare a text of sums, and the run of a tiny model on it."""
    texts, draw = folder / "texts", random.Random(0)
    texts.mkdir(parents=True)
    for name in range(60):
        pairs = ((draw.randrange(50), draw.randrange(50)) for _ in range(40))
        lines = "\n".join(f"{a} plus {b} is {a + b}." for a, b in pairs)
        (texts / f"{name}.txt").write_text(lines)
    quiet = {"workers": 1, "report": lambda _: None}
    prepare(folder / "data", source=texts, vocab_size=280, **quiet)
    stage = StageConfig(steps=12, learning_rate=3e-3)
    return RunConfig(
        name="run",
        output=str(folder / "hurt"),
        model=ModelConfig(280, 32, 2, 4, 2, 8, 32, 100.0, 1e-5, 32, tied_embeddings=False),
        data=DataConfig(path=str(folder / "data"), length=32, batch=8),
        stages="pretrain,retrofit",
        pretrain=stage,
        retrofit=stage,
        compute_dtype="float32",
        log_every=1,
        save_every=2,
        eval_windows=8,
    )


def process(run: RunConfig, log: Path, largest: int | None) -> None:
    """Train in a process of its own, whose files cannot grow beyond `largest` bytes."""
    with log.open("wb") as said:
        os.dup2(said.fileno(), 2)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    in_a_line(lambda: train(run, quiet=True), at_once=True)


@dataclasses.dataclass
class Soak:
    """A run that is hurt, one that is not, and what came of it."""

    run: RunConfig
    folder: Path
    draw: random.Random
    hurts: tuple[str, ...] = HURTS
    counts: Counter = dataclasses.field(default_factory=Counter)
    lost: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["dmc_jax.training.loop"])
        self.directory = Path(self.run.output) / self.run.name
        whole = dataclasses.replace(self.run, output=str(self.folder / "whole"))
        self.train(whole)  # which leaves its compiled programs behind
        shutil.rmtree(whole.output)
        self.train(whole)
        self.whole = Path(whole.output) / whole.name
        if self.lost:
            raise RuntimeError(f"a run that nothing happened to: {self.lost}")

    def train(self, run: RunConfig, hurt: str = "") -> None:
        """Have a process train, and hurt it."""
        log = self.folder / "log"
        largest = int(10 ** self.draw.uniform(3, 5.5)) if hurt == "full_disk" else None
        child = self.processes.Process(target=process, args=(run, log, largest))
        begun = time.monotonic()
        child.start()
        if hurt.startswith("kill"):
            child.join(self.draw.uniform(0, self.seconds))
        while hurt == "kill_in_a_save" and child.is_alive():
            if any(self.directory.glob(f"*/*{PARTIAL_MARK}*")):
                child.join(self.draw.uniform(0, 0.05))
                break
            child.join(0.001)
        if hurt.startswith("kill"):
            child.kill()
        child.join()
        said = log.read_text(errors="replace") if log.exists() else ""
        known = {"full_disk": (0, 1), "kill": (0, -9), "kill_in_a_save": (0, -9)}.get(hurt, (0,))
        told = child.exitcode != 1 or said.strip().rpartition("\n")[2].startswith("error: ")
        if child.exitcode not in known or not told:
            self.lost.append(f"{hurt or 'unhurt'}: exit code {child.exitcode}: {said[-500:]}")
        if child.exitcode == 0:  # moments to kill are drawn from what a whole process takes here
            self.seconds = time.monotonic() - begun
        # Of threads below Orbax, which write to a full disk and are not told of the end.
        self.counts["tracebacks_before_the_error"] += "Traceback" in said
        self.counts[hurt or "unhurt"] += child.exitcode != 0 or not hurt
        self.counts["processes"] += 1

    def flip(self) -> int | None:
        """Flip a bit of the newest checkpoint; returns the inode of its folder, which stays."""
        newest = latest(self.directory)
        if newest is None:
            return None
        files = [f for f in sorted(newest.path.rglob("*")) if f.is_file() and f.stat().st_size]
        file = self.draw.choice([f for f in files if f.name != "_CHECKPOINT_METADATA"])
        content = bytearray(file.read_bytes())
        content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        self.counts["flip"] += 1
        return newest.path.stat().st_ino

    def one_run(self) -> None:
        """Hurt a run until it is finished, then compare."""
        shutil.rmtree(self.run.output, ignore_errors=True)
        flipped: set[int] = set()
        while not self.finished():
            hurt = self.draw.choice(self.hurts)
            if hurt == "flip":
                flipped |= {self.flip()} - {None}
                hurt = "kill"
            before = self.newest(flipped)
            self.train(self.run, hurt)
            if self.newest(flipped) < before:
                self.lost.append(f"{hurt}: back from {before} to {self.newest(flipped)}")
        aside = {folder.stat().st_ino for folder in self.directory.glob("*/*.damaged*")}
        self.counts["flips_noticed"] += len(flipped & aside)
        if flipped - aside:
            self.lost.append(f"{len(flipped - aside)} flips were not noticed")
        self.lost += differences(self.directory, self.whole)
        self.counts["runs"] += 1

    def finished(self) -> bool:
        """Whether the end of the last stage was measured, and is whole."""
        end = latest(self.directory)
        last = self.run.stage_names[-1]
        done = end and (end.stage, end.step) == (last, self.run.stage(last).steps)
        return bool(done) and load_metadata(end).validation is not None

    def newest(self, flipped: set[int]) -> tuple[int, int]:
        """The furthest checkpoint that no bit of was flipped, by stage and step."""
        return max(
            (number, step)
            for number, stage in enumerate(("", *STAGES))
            for step in (complete_steps(self.directory / stage) if stage else [0])
            if not stage or (self.directory / stage / str(step)).stat().st_ino not in flipped
        )


def differences(directory: Path, whole: Path) -> list[str]:
    """Say what of a run is not, bit for bit, what it is in another."""
    found = []
    for stage in (stage for stage in STAGES if (whole / stage).is_dir()):
        ours, theirs = (open_model(place / stage) for place in (directory, whole))
        equal = jax.tree.map(np.array_equal, ours.params, theirs.params)
        if not all(jax.tree.leaves(equal)):
            found.append(f"{stage}: other parameters")
        if ours.metadata.validation != theirs.metadata.validation:
            found.append(f"{stage}: other figures")
    ours, theirs = (
        [
            {name: x for name, x in json.loads(line).items() if not name.startswith(TIMES)}
            for line in (place / "metrics.jsonl").read_text().splitlines()
        ]
        for place in (directory, whole)
    )
    return found + ["other losses"] * (ours != theirs)


def soak(folder: Path, seed: int, more: Callable[[Soak], bool], hurts=HURTS) -> Soak:
    """Hurt runs one after another as long as `more` says.

    Args:
        folder: to work in.
        seed: of what is drawn.
        more: asked after every run.
        hurts: some of `HURTS`.
    """
    state = Soak(small_run(folder), folder, random.Random(seed), hurts)
    while True:
        state.one_run()
        if not more(state):
            return state


def main() -> int:
    """Soak for a while; exit code 1 where something was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    begun = time.monotonic()

    def more(state: Soak) -> bool:
        print(dict(state.counts), state.lost, flush=True)
        return time.monotonic() - begun < 60 * options.minutes

    with tempfile.TemporaryDirectory() as folder:
        programs = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
        os.environ |= programs | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        state = soak(Path(folder), options.seed, more)
    result = {
        **machine(" ".join(["python -m benchmarks.soak", *sys.argv[1:]])),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "seconds_of_a_whole_process": round(state.seconds, 1),
        "steps_of_a_run": sum(state.run.stage(name).steps for name in state.run.stage_names),
        "counts": dict(sorted(state.counts.items())),
        "lost": state.lost,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return 1 if state.lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
