"""Prepares the tokens of sources, in shards, and keeps shards that are already valid."""

import collections
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import ml_collections
from etils import epath

from mixcpt_jax.core.errors import InputError, in_place, naming
from mixcpt_jax.data import corpus as corpus_lib
from mixcpt_jax.data import formats, sources, token_cache
from mixcpt_jax.data.tally import Tally
from mixcpt_jax.runtime import terminal

# Characters of text in a shard; one shard per process is in memory.
_SHARD_SIZE = 2**25


def prepare(
    config: ml_collections.ConfigDict,
    tokenizer: Any,
    num_workers: int = 0,
    shard_size: int = _SHARD_SIZE,
) -> None:
    """Prepares the sources of a phase that have a weight.

    Args:
      config: a validated config of one phase, paths resolved.
      tokenizer: the model's.
      num_workers: number of worker processes; 0: only this process.
      shard_size: approximate number of characters in a shard.

    Raises:
      InputError: see `sources.read` and `formats.encode`; or nothing can be written.
    """
    measured = corpus_lib.measure(config)
    with _pool(num_workers) as in_order:
        for name, source in config.sources.items():
            if source.weight:
                with naming(f"sources.{name}"):
                    _prepare_source(
                        config, name, measured, tokenizer, in_order, shard_size
                    )


def _prepare_source(
    config: ml_collections.ConfigDict,
    name: str,
    measured: corpus_lib.Measured,
    tokenizer: Any,
    in_order: corpus_lib.InOrder,
    shard_size: int,
) -> None:
    source = config.sources[name]
    folder = token_cache.folder_of(config.data.prepared, name)
    hashes = sources.hashes(source.path, source.reader, source.split)
    key = corpus_lib.identity(config, source, tokenizer, hashes, measured.holdout)
    with contextlib.suppress(InputError):  # a damaged manifest counts as missing
        manifest = token_cache.read_manifest(folder)
        if (
            manifest
            and not token_cache.difference(manifest, key)
            and token_cache.is_undamaged(folder, manifest)
        ):
            terminal.show(f"{name}: is already prepared")
            return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / token_cache.MANIFEST).unlink(missing_ok=True)
    corpus = corpus_lib.Corpus(config, source, measured)
    settings = source.format, source.fields.to_dict(), source.preference_side
    settings = *settings, source.on_bad_record
    # The holdout only determines which records there are, and a shard's hash covers them.
    same = {name: value for name, value in key.items() if name != "holdout"}
    make = functools.partial(_make_shard, folder, same, settings, tokenizer)
    groups = _groups(corpus.train_split(in_order), shard_size)
    shards, num_kept, tally = [], 0, Tally()
    for _, (entry, is_new) in in_order(make, enumerate(groups)):
        shards.append(entry)
        tally.add(entry["found"])
        num_kept += not is_new
        if is_new:
            terminal.show(
                f"{name}: {entry['file']}, {entry['tokens']} tokens of "
                f"{entry['examples']} examples",
            )
    tally.left_out.update(corpus.left_out)
    tally.examples.update(corpus.examples)
    tally.pass_over(sources.not_read(source.path, source.reader, source.split))
    examples = token_cache.finish_examples(folder, key, shards, tally.counts())
    terminal.show(
        f"{name}: {examples.num_tokens} tokens of {len(examples)} examples in "
        f"{len(shards)} shards, {num_kept} of them kept",
    )
    for line in tally.lines():
        terminal.show(f"{name}: {in_place(line, f'sources.{name}')}")


def _make_shard(
    folder: epath.Path, key: dict, settings: tuple, tokenizer: Any, numbered: tuple
) -> tuple[token_cache.Entry, bool]:
    """The entry of a shard, and whether it was written now."""
    number, records = numbered
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16)
    for record in records:
        digest.update(json.dumps(record.fields, default=str).encode())
    facts = {"input": digest.hexdigest()}
    entry = token_cache.finished_shard(folder, number, facts)
    if entry is not None:
        return entry, False
    format_name, fields, side, on_bad_record = settings
    tally = Tally()
    examples = formats.encode(
        records, format_name, tokenizer, fields, side, tally, on_bad_record
    )
    facts["found"] = tally.counts()
    return token_cache.write_examples(folder, number, examples, facts), True


def _groups(
    records: Iterable[sources.Record], most: int
) -> Iterator[list[sources.Record]]:
    """Groups of consecutive records; the size of each is just above `most`."""
    group, size = [], 0
    for record in records:
        group.append(record)
        size += _size(record)
        if size >= most:
            yield group
            group, size = [], 0
    if group:
        yield group


def _size(record: sources.Record) -> int:
    return sum(len(v) if isinstance(v, str) else 64 for v in record.fields.values())


@contextlib.contextmanager
def _pool(num_workers: int) -> Iterator[corpus_lib.InOrder]:
    """A map over processes that keeps order and holds few results in memory."""
    if not num_workers:
        yield corpus_lib.one_by_one
        return
    # There is one process per core, so threads within a process would only compete.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_workers, context, terminal.begin_worker, (terminal.is_json(),)
    ) as executor:

        def in_order(function, items: Iterable) -> Iterator[tuple[Any, Any]]:
            ahead = collections.deque()
            for item in items:
                ahead.append((item, executor.submit(function, item)))
                if len(ahead) > num_workers:
                    first, future = ahead.popleft()
                    yield first, future.result()
            for first, future in ahead:
                yield first, future.result()

        try:
            yield in_order
        except BrokenProcessPool as error:
            raise InputError(
                "a process that tokenizes was killed, perhaps for lack of memory; run the "
                "same command again with fewer --workers"
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)
