"""Runs that are disturbed at random have to end like one that is not.

    python tests/chaos.py --rounds 500 --seed 0

A round is a tiny run that meets one to three faults, drawn by the round's seed, and is
started again after each until it ends. Each start has to end in one of these ways:

- the run is at its end;
- it was killed, or stopped by SIGTERM, when that was the fault;
- it says in one line what is wrong, rightly, and the newest whole checkpoint is there
  still. Then the remedy that it names is applied.

At the end the rows of metrics.jsonl but for speeds, and the parameters read from the last
checkpoint, equal those of an undisturbed run bit for bit. A round that goes otherwise is
told with its seed; `--rounds 1 --seed SEED` does it again, but for where the signals hit.

Some rounds are in a bucket on this machine: there starts are killed or stopped, or meet
refused and late answers and cut connections.

A new kind of fault is a function of a `Round`, named in `FAULTS`.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import bucket
import ml_collections
import processes
import tokenizers
from etils import epath

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import paths

CHECKPOINTS = "checkpoints"
NUM_STEPS = 6
_NOBODY = 65534
_LONGEST = 1200.0  # seconds after which a start counts as hung
_BUCKET_ROUNDS = 0.08  # share of the rounds that are in a bucket
_BUCKET_FAULTS = 0.06  # share of the requests that meet one, where they do


class Failure(Exception):
    """A start, or a round, ended in a way that is not allowed."""


def make_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """A run of a few steps of a model of a few thousand parameters; writes its files."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    bpe.train_from_iterator([], 257, special_tokens=[end], show_progress=False)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    shape = {
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    rng = random.Random(0)
    texts = [" ".join(rng.choices(("ein", "zwei", "drei"), k=9)) for _ in range(30)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines)

    config = config_lib.default()
    config.model.path = str(folder)
    config.model.weights = "random"
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.objective.ntp_weight, config.objective.lssd_weight = 1.0, 0.0
    config.sources.texts = config_lib.source(
        path=str(folder / "texts.jsonl"), holdout=2
    )
    config.data.row_length = 16
    config.data.batch_size = config.eval.batch_size = 2
    config.optimizer.learning_rate = 3e-3
    config.optimizer.spike_factor = 5.0
    config.train.max_skipped = 2
    config.train.num_steps = NUM_STEPS
    config.train.eval_every = 3
    config.train.timeout = _LONGEST
    config.metrics.tensorboard = config.metrics.progress = False
    return config


def start(
    config: str,
    workdir: str,
    cache: str,
    limit: int,
    environment: dict[str, str],
    user: int,
    temporary: str,
    output,
) -> None:
    """What the command line does, in a process of its own; prints the parameters' hash.

    Args:
      config: as JSON.
      workdir: the run's.
      cache: folder of compiled programs.
      limit: bytes that a file can hold; 0: any number.
      environment: by which buckets are found.
      user: whose process it becomes; 0: it stays the one that it is.
      temporary: the folder for temporary files; "": the usual one.
      output: a pipe, for standard output and error.
    """
    os.dup2(output.fileno(), sys.__stdout__.fileno())
    os.dup2(output.fileno(), sys.__stderr__.fileno())
    os.environ |= {"JAX_PLATFORMS": "cpu"} | environment
    import jax

    from mixcpt_jax.cli import command

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if limit:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    tempfile.tempdir = temporary or None
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    command.run(_train, ml_collections.ConfigDict(json.loads(config)), workdir)


def _train(config: ml_collections.ConfigDict, workdir: str) -> None:
    import jax

    from mixcpt_jax import main
    from mixcpt_jax.models import pretrained, transformer
    from mixcpt_jax.training import checkpoint

    main.run(config, workdir)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        transformer.abstract_params(pretrained.read_model_config(config.model.path)),
    )
    params = jax.device_get(checkpoint.load_params(workdir, wanted))
    content = b"".join(leaf.tobytes() for leaf in jax.tree.leaves(params))
    print("parameters", hashlib.sha256(content).hexdigest(), flush=True)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a start ended.

    Attributes:
      status: the exit status.
      output: standard output and error.
      seconds: how long it took.
    """

    status: int
    output: str
    seconds: float

    @property
    def parameters(self) -> str:
        """The hash of the trained parameters, or nothing if the run is not at its end."""
        words = self.output.split()
        return words[-1] if self.status == 0 and "parameters" in words else ""


class Stage:
    """What all rounds share: the config, compiled programs, and the undisturbed run.

    Attributes:
      folder: for all that it writes.
      way: what goes wrong on the way to the bucket.
    """

    def __init__(self, folder: pathlib.Path, way: bucket.Faults, port: int):
        self.folder, self.way = epath.Path(folder), way
        self._environment = bucket.environment(port)
        self._context = processes.context()
        for open_to_all in (folder, folder / "cache"):
            open_to_all.mkdir(exist_ok=True)
            open_to_all.chmod(0o777)
        (folder / "model").mkdir()
        self.config = make_config(folder / "model")
        whole = self.folder / "whole"
        # The first compiles, and the second is as long as all others.
        self.start(whole)
        (whole / CHECKPOINTS).rmtree()
        (whole / "results.json").unlink()
        ended = self.start(whole)
        if not ended.parameters:
            raise Failure(f"undisturbed, it ends with {ended}")
        self.seconds = ended.seconds
        self.parameters, self.rows = ended.parameters, rows_of(whole)
        files = (folder / "whole" / CHECKPOINTS / str(NUM_STEPS)).rglob("*")
        self.largest_file = max(file.stat().st_size for file in files)

    def start(
        self,
        workdir: epath.Path,
        save_every: int = 1,
        signal_after: tuple[int, float] | None = None,
        limit: int = 0,
        user: int = 0,
        temporary: str = "",
    ) -> Ended:
        """Starts the run, or lets it go on, and waits for its end.

        Args:
          workdir: the run's.
          save_every: steps between checkpoints.
          signal_after: a signal to send, and the seconds before it.
          limit, user, temporary: see the function `start`. A worker process builds the
            batches if there is a temporary folder, which is for its tokens.

        Raises:
          Failure: it hangs.
        """
        config = self.config.copy_and_resolve_references()
        config.train.save_every = save_every
        config.data.num_workers = int(bool(temporary))
        reader, writer = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=start,
            args=(
                config.to_json(),
                str(workdir),
                str(self.folder / "cache"),
                limit,
                self._environment,
                user,
                temporary,
                writer,
            ),
        )
        began = time.monotonic()
        process.start()
        writer.close()
        number, moment = signal_after or (0, _LONGEST)
        output = b""
        while True:
            left = began + moment - time.monotonic()
            if left <= 0 and number:
                os.kill(process.pid, number)
                number, moment = 0, _LONGEST
                continue
            if left <= 0:
                process.kill()
                process.join()
                raise Failure(f"hangs; it has said: {output.decode()}")
            if select.select([reader], [], [], left)[0]:
                part = os.read(reader.fileno(), 1 << 16)
                if not part:
                    break
                output += part
        process.join()
        reader.close()
        seconds = time.monotonic() - began
        return Ended(process.exitcode, output.decode(errors="replace"), seconds)


def rows_of(workdir: epath.Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without what is no result."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in rows]


class Round:
    """One run, its faults and what became of it.

    Attributes:
      stage: what it shares with others.
      workdir: the run's.
      rng: draws everything.
      events: what happened, to be told.
      faults, outcomes: the kinds of both.
    """

    def __init__(self, stage: Stage, seed: int):
        self.stage = stage
        self.rng = random.Random(seed)
        self._is_in_bucket = self.rng.random() < _BUCKET_ROUNDS
        root = "gs://bucket" if self._is_in_bucket else str(stage.folder)
        self.workdir = paths.absolute(root) / f"round-{seed}"
        self.events: list[str] = []
        self.faults: list[str] = []
        self.outcomes: list[str] = []
        self._damaged: set[int | str] = set()
        self._is_done = ""

    def run(self) -> None:
        """All of it.

        Raises:
          Failure: anything ended in a way that is not allowed.
        """
        faults = FAULTS_IN_A_BUCKET if self._is_in_bucket else FAULTS
        for _ in range(self.rng.randint(1, 3)):
            kind = self.rng.choice(list(faults))
            self.faults.append(kind)
            self.events.append(f"fault: {kind}")
            faults[kind](self)
        tries = 0
        while not self._is_done:
            tries += 1
            if tries > 5:
                raise Failure("does not come to its end")
            self.start()
        if rows_of(self.workdir) != self.stage.rows:
            raise Failure("metrics.jsonl is another")
        if self._is_done != self.stage.parameters:
            raise Failure("the parameters are others")
        self.workdir.rmtree()

    def start(
        self,
        signal_number: int = 0,
        limit: int = 0,
        bucket_faults: float = 0.0,
        temporary: str = "",
    ) -> None:
        """Starts the run once; a signal comes at a moment drawn from how long it takes."""
        after = None
        if signal_number:
            after = signal_number, self.rng.uniform(0, self.stage.seconds)
        good = self._whole_checkpoints()
        self.stage.way.share = bucket_faults
        save_every = self.rng.choice((1, 1, 2))
        ended = self.stage.start(
            self.workdir, save_every, after, limit, temporary=temporary
        )
        self.stage.way.share = 0.0
        self._is_done = ended.parameters
        outcome = self.outcome(ended, signal_number, limit, temporary)
        self.outcomes.append(outcome)
        self.events.append(
            f"start{f', signal {after[0]} after {after[1]:.3f} s' if after else ''}"
            f"{f', files of {limit} bytes' if limit else ''}: {outcome}"
        )
        left = self._whole_checkpoints()
        if good and max(left.values(), default=-1) < max(good.values()):
            raise Failure(f"had whole checkpoints {good}, has {left}")
        self.take_remedy(outcome)

    def take_remedy(self, outcome: str) -> None:
        """Deletes what the message of a damage says to delete."""
        if outcome == "no checkpoint is whole":
            if left := self._whole_checkpoints():
                raise Failure(f"there are whole checkpoints: {left}")
            (self.workdir / CHECKPOINTS).rmtree()
        if outcome == "its end is damaged":
            self.workdir.rmtree()

    def outcome(
        self, ended: Ended, signal_number: int = 0, limit: int = 0, temporary: str = ""
    ) -> str:
        """How a start ended.

        Raises:
          Failure: in a way that is not allowed.
        """
        lines = [line for line in ended.output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        if "Traceback" in ended.output:
            raise Failure(f"says at length: {ended.output[-3000:]}")
        if ended.parameters:
            return "at its end"
        last = lines[-1] if lines else ""
        match ended.status, signal_number:
            case 0, signal.SIGTERM | signal.SIGHUP if last.startswith("stopped by SIG"):
                where = "in the loop" if " from step " in last else "elsewhere"
                return f"stopped by {signal.Signals(signal_number).name} {where}"
            case -9, signal.SIGKILL:
                return "killed"
            case (-15, signal.SIGTERM) | (-1, signal.SIGHUP):
                # It was not yet, or no longer, ours to take.
                return "terminated"
        if ended.status == 1 and last.startswith("error: ") and len(errors) == 1:
            if self._damaged and "no checkpoint is whole" in last:
                return "no checkpoint is whole"
            if self._damaged and "delete that phase's folder" in last:
                return "its end is damaged"
            if limit and "File too large" in last:
                return "no room"
            if temporary and f"{temporary}/mixcpt-tokens" in last:
                return "no temporary space"
        raise Failure(f"ends with status {ended.status}: {ended.output[-3000:]}")

    def _whole_checkpoints(self) -> dict[int | str, int]:
        """Identity -> step of those that no fault has touched."""
        folder = self.workdir / CHECKPOINTS
        if not folder.exists():
            return {}
        return {
            self._identity(path): int(path.name)
            for path in folder.iterdir()
            if path.name.isdigit()
            and self._identity(path) not in self._damaged
            and (not self._is_in_bucket or (path / "commit_success.txt").exists())
        }

    def _identity(self, folder: epath.Path) -> int | str:
        """On a disk the inode, which stays when a folder is renamed."""
        return str(folder) if self._is_in_bucket else os.stat(folder).st_ino

    def damage(self, change: Callable[[pathlib.Path], None]) -> None:
        """Lets the run come some way, then changes a file of a checkpoint of its."""
        self.start(self.rng.choice((signal.SIGKILL, signal.SIGTERM)))
        whole = self._whole_checkpoints()
        if not whole:
            return
        # Mostly the newest, which is the one that is read.
        steps = sorted(whole.values())
        step = steps[-1] if self.rng.random() < 0.7 else self.rng.choice(steps)
        folder = self.workdir / CHECKPOINTS / str(step)
        files = pathlib.Path(folder).rglob("*")
        file = self.rng.choice(sorted(file for file in files if file.is_file()))
        self._damaged.add(self._identity(folder))
        self.events.append(f"damaged: {file.relative_to(self.workdir)}")
        change(file)


def truncate(this: Round) -> None:
    this.damage(
        lambda file: os.truncate(file, this.rng.randrange(1 + file.stat().st_size))
    )


def flip(this: Round) -> None:
    def change(file):
        content = bytearray(file.read_bytes())
        if content:
            content[this.rng.randrange(len(content))] ^= 1 << this.rng.randrange(8)
            file.write_bytes(content)

    this.damage(change)


def full_disk(this: Round) -> None:
    """No file may be larger than a size between the smallest and the largest."""
    this.start(limit=int(this.stage.largest_file ** this.rng.uniform(0.6, 1)))


def lost_permission(this: Round) -> None:
    """The folder of a run that has come some way may no longer be written to."""
    this.start(this.rng.choice((signal.SIGKILL, signal.SIGTERM)))
    folder = this.workdir
    if not folder.exists():
        return
    mode = stat.S_IMODE(os.stat(folder).st_mode)
    os.chmod(folder, 0o555)
    # Whoever is root may write all the same.
    ended = this.stage.start(folder, user=0 if os.getuid() else _NOBODY)
    os.chmod(folder, mode)
    *_, last = ended.output.splitlines()
    if "Traceback" in ended.output or "Permission denied; change its perm" not in last:
        raise Failure(f"without permission, it ends with {ended}")
    this.outcomes.append("no permission")


@contextlib.contextmanager
def small_folder(folder: epath.Path, num_bytes: int) -> Iterator[None]:
    """A folder with little space; without the right to mount one, it does not exist."""
    folder.mkdir()
    options = f"size={num_bytes}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        is_mounted = not subprocess.run(mount, stderr=subprocess.DEVNULL).returncode
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        folder.rmdir()
    try:
        yield
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
            folder.rmdir()


def full_temporary_folder(this: Round) -> None:
    """The folder for temporary files is full, or nearly, or not there."""
    folder = this.stage.folder / "temporary"
    with small_folder(folder, this.rng.choice((4096, 16_384, 1 << 20))):
        this.start(temporary=str(folder))


def second_process(this: Round) -> None:
    """Two processes on the workdir: each ends, or says in one line that the other has it.

    They may take turns. One of them ends, or names what an earlier fault has damaged.
    """
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(this.stage.start, this.workdir)
        time.sleep(this.rng.uniform(0, this.stage.seconds))
        second = pool.submit(this.stage.start, this.workdir)
    both = first.result(), second.result()
    outcomes = set()
    for ended in both:
        *_, last = ended.output.splitlines()
        refused = ended.status == 1 and "has owned this folder since" in last
        outcomes.add("refused" if refused else this.outcome(ended))
    if outcomes == {"refused"}:
        raise Failure(f"of two processes, none ends: {both}")
    this.outcomes.extend(sorted(outcomes))
    if "at its end" not in outcomes:
        for outcome in outcomes:
            this.take_remedy(outcome)


_SIGNALS: dict[str, Callable[[Round], None]] = {
    "kill": lambda this: this.start(signal.SIGKILL),
    "SIGTERM": lambda this: this.start(signal.SIGTERM),
    "SIGHUP": lambda this: this.start(signal.SIGHUP),
    "second process": second_process,
}
FAULTS_IN_A_BUCKET = _SIGNALS | {
    "bucket fails": lambda this: this.start(bucket_faults=_BUCKET_FAULTS)
}
FAULTS = _SIGNALS | {
    "truncate": truncate,
    "flip": flip,
    "delete": lambda this: this.damage(pathlib.Path.unlink),
    "full disk": full_disk,
    "lost permission": lost_permission,
    "full temporary folder": full_temporary_folder,
}


def run(rounds: int, seed: int) -> bool:
    """Runs the rounds of seeds from `seed` on and prints counts; False if one fails."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    way = bucket.Faults(share=0.0, seed=seed)
    with (
        bucket.serve() as port,
        bucket.faulty(port, way) as faulty_port,
        bucket.reached_by(faulty_port),
    ):
        failed = _run(Stage(folder, way, faulty_port), rounds, seed)
    print(f"requests: {dict(way.counts)}", flush=True)
    if not failed:
        shutil.rmtree(folder)
    return not failed


def _run(stage: Stage, rounds: int, seed: int) -> list[int]:
    """The seeds of the rounds that fail."""
    faults, outcomes = collections.Counter(), collections.Counter()
    failed = []
    print(f"an undisturbed run takes {stage.seconds:.2f} s", flush=True)
    began = time.monotonic()
    for number in range(seed, seed + rounds):
        this = Round(stage, number)
        try:
            this.run()
        except Failure as failure:
            failed.append(number)
            told = "\n  ".join([*this.events, str(failure)])
            print(f"seed {number} fails:\n  {told}", flush=True)
        faults.update(this.faults)
        outcomes.update(this.outcomes)
        done = number + 1 - seed
        if done == rounds or done % 25 == 0:
            seconds = time.monotonic() - began
            print(f"{done} rounds in {seconds:.0f} s; {len(failed)} failed: {failed}")
            for what, counts in (("faults", faults), ("outcomes", outcomes)):
                told = (f"{kind} {count}" for kind, count in counts.most_common())
                print(f"{what}: {', '.join(told)}", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(not run(arguments.rounds, arguments.seed))


if __name__ == "__main__":
    main()
