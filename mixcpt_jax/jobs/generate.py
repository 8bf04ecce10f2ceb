"""The job "generate": writes a source for later phases to read.

There are three kinds, see `config.generate`. "replay" samples the model that the phase
starts from, at temperature 1: plain distillation (`kd_weight`) on its own samples preserves
its knowledge without its training data (arXiv 2605.26097). "comprehension" appends
questions and answers to each document of a source, by rules. With "questions" the model
writes them.

The phase's folder `generated/` holds JSON lines, in parts of whole batches. A batch depends
only on the seed and its number, so an interrupted phase resumes with the next batch and
writes the same records.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import comprehension, corpus, filters, formats, sources
from mixcpt_jax.evaluation import generation
from mixcpt_jax.runtime import hosts, metrics
from mixcpt_jax.training import phase as phase_lib

FOLDER = "generated"
_BATCHES_PER_PART = 8
_SHORTEST_ROOM = 64
_COUNTS = ("records", "tokens", "left_out/blank", "left_out/duplicate")
_ASK = (
    "\n\nWrite a question about this text that the text answers, and its answer. Begin "
    "the question with “Question:” and the answer with “Answer:”."
)
_PAIR = re.compile(r"Question:\s*(\S.*?)\s*\n\s*Answer:\s*(\S.*?)\s*", re.DOTALL)


class Request(NamedTuple):
    """The parts of one record.

    Attributes:
      ids: the prompt's tokens; empty if the model writes nothing.
      record: the fields that the model does not write.
    """

    ids: list[int]
    record: dict[str, Any]


@phase_lib.job
def run(phase: phase_lib.Phase) -> dict[str, Any]:
    """Writes records until they have `generate.num_tokens` tokens.

    Returns:
      The content of `results.json`: `generated`, the numbers of records and tokens and of
      dropped records, by reason; and their folder.

    Raises:
      InputError: config, prompts, weights or workdir are wrong.
    """
    settings = phase.config.generate
    phase.announce(f"writes {settings.num_tokens:,} tokens by {settings.kind}")
    requests, files = _requests(phase)
    phase.claim(files)
    with jax.set_mesh(phase.mesh):
        written = _write(phase, requests)
    return phase.finish({"generated": written, "folder": str(phase.folder / FOLDER)})


def _requests(
    phase: phase_lib.Phase,
) -> tuple[Iterable[Request], dict[str, dict[str, str]]]:
    """The requests, in order, and the hashes of the files that they come from."""
    config, settings = phase.config, phase.config.generate
    if settings.prompts:
        prompts = _prompts_of_file(settings.prompts)
        files = {"generate.prompts": sources.hashes(settings.prompts, "jsonl")}
        return _from_prompts(phase, prompts), files
    if not settings.source:
        return itertools.repeat(_from_start(phase)), {}
    entry = config.sources[settings.source]
    files = {
        settings.source: sources.hashes(entry.path, entry.reader, entry.split),
    }
    records = corpus.Corpus(config, entry, corpus.measure(config)).train_split()
    if settings.kind == "replay":
        prompts = [
            _as_text(
                formats.prompt_and_response(
                    record, entry.format, entry.fields.to_dict()
                )[0]
            )
            for record in records
        ]
        return _from_prompts(phase, prompts), files
    if settings.kind == "comprehension":
        return _by_rules(records, entry), files
    return _questions(phase, records, entry), files


def _from_start(phase: phase_lib.Phase) -> Request:
    """A request for a whole text, after the token that precedes texts in pre-training.

    It is not always BOS, which begins a turn in some chat models.
    """
    tokenizer = phase.tokenizer
    first = tokenizer.bos_id if tokenizer.add_bos else tokenizer.end_of_document_id
    return Request([first], {})


def _prompts_of_file(path: str) -> list[str]:
    records = sources.read(path, "jsonl")
    return [_as_text(formats.read_prompt(record)) for record in records]


def _as_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """A prompt as it precedes a response in the plain formats."""
    return formats.SEPARATOR.join([*(m["content"] for m in messages), ""])


def _from_prompts(phase: phase_lib.Phase, prompts: list[str]) -> Iterable[Request]:
    """The prompts, repeated without end; all are encoded first, so none fails later.

    All prompts of a file must fit the context; prompts of a source that do not fit are
    dropped.
    """
    settings = phase.config.generate
    place, room = settings.prompts or f"sources.{settings.source}", _room(phase)
    requests = []
    encoded = generation.encode_prompts(phase.tokenizer, prompts)
    for number, (text, ids) in enumerate(zip(prompts, encoded, strict=True), 1):
        if len(ids) <= room:
            record = {"prompt": text.removesuffix(formats.SEPARATOR)}
            requests.append(Request(ids, record))
        elif settings.prompts:
            raise InputError(
                f"{place}: prompt {number} has {len(ids)} tokens, which with "
                f"generate.max_new_tokens={settings.max_new_tokens} do not fit the "
                f"model's context of {phase.model_config.max_positions}; shorten one of "
                "them"
            )
    if len(requests) < len(prompts):
        phase.say(
            f"{len(prompts) - len(requests)} prompts of {place} do not fit the model's "
            "context and are left out"
        )
    if not requests:
        raise InputError(f"generate: {place} has no prompt that fits; give another")
    return itertools.cycle(requests)


def _room(phase: phase_lib.Phase) -> int:
    """The most tokens that a prompt may have."""
    room = phase.model_config.max_positions - phase.config.generate.max_new_tokens
    if room < _SHORTEST_ROOM:
        raise InputError(
            f"generate.max_new_tokens={phase.config.generate.max_new_tokens}: leaves "
            f"prompts {room} tokens of the model's context of "
            f"{phase.model_config.max_positions}; lower it"
        )
    return room


def _by_rules(records: Iterable[sources.Record], entry) -> Iterator[Request]:
    for number, record in enumerate(records):
        text = formats.plain_text(record, entry.format, entry.fields.to_dict())
        title = record.fields.get("title")
        asked = comprehension.tasks(
            text, title if isinstance(title, str) else "", str(number)
        )
        if asked:
            yield Request([], {"text": comprehension.write(text, asked)})


def _questions(
    phase: phase_lib.Phase, records: Iterable[sources.Record], entry
) -> Iterator[Request]:
    """A request for a question about each document, cut to fit the context."""
    tokenizer, room = phase.tokenizer, _room(phase)
    for record in records:
        text = formats.plain_text(record, entry.format, entry.fields.to_dict()).strip()
        ids = _asked(phase, text)
        if len(ids) > room:
            kept = tokenizer.encode(text)[: room - len(ids)]
            text = tokenizer.decode(kept).rstrip("\N{REPLACEMENT CHARACTER}")
            ids = _asked(phase, text)
        if text and len(ids) <= room:
            yield Request(ids, {"text": text})


def _asked(phase: phase_lib.Phase, text: str) -> list[int]:
    tokenizer = phase.tokenizer
    if not tokenizer.has_turns:
        text = f"{text}{_ASK}\n\nQuestion:"
        return generation.encode_prompts(tokenizer, [text])[0]
    messages = [{"role": "user", "content": text + _ASK}]
    return tokenizer.encode_chat(messages, add_generation_prompt=True)[0]


def _record(kind: str, request: Request, said: str) -> dict[str, Any] | None:
    """The record made from an answer; None if the answer is blank or malformed."""
    if not request.ids:
        return request.record
    if kind == "questions":
        said = said if "Question:" in said else f"Question: {said}"
        found = _PAIR.fullmatch(said[said.index("Question:") :])
        if not found:
            return None
        task = comprehension.Task(*found.groups())
        return {"text": comprehension.write(request.record["text"], [task])}
    if not said.strip():
        return None
    if "prompt" in request.record:
        return {"prompt": request.record["prompt"], "response": said.strip()}
    return {"text": said.strip()}


def _write(phase: phase_lib.Phase, requests: Iterable[Request]) -> dict[str, int]:
    """Writes the missing parts, until there are enough tokens.

    Returns:
      The numbers of records, tokens and dropped answers.
    """
    config, settings = phase.config, phase.config.generate
    output = _Output(phase)
    batches = itertools.islice(
        _batched(requests, config.eval.batch_size), output.num_batches, None
    )
    say = _speaker(phase)
    with (
        metrics.Writer(
            phase.folder, config.metrics, output.num_parts - 1, {}, hosts.is_first()
        ) as writer,
        metrics.bar(phase.name, settings.num_tokens, phase.shows_progress) as show,
    ):
        for part in itertools.count(output.num_parts):
            taken = list(itertools.islice(batches, _BATCHES_PER_PART))
            if not taken or output.tokens >= settings.num_tokens:
                break
            before = output.records
            for batch in taken:
                first = output.num_batches * config.eval.batch_size
                output.add(batch, say(batch, first), first)
                show(min(output.tokens, settings.num_tokens))
                if output.tokens >= settings.num_tokens:
                    break
            # Write the row first, so that every part has its counts.
            writer.write(part, output.counts)
            writer.save()
            output.write(part)
            if output.records == before:
                phase.say(
                    "nothing new comes any more; fewer tokens than were asked for"
                )
                break
    return {key: int(value) for key, value in output.counts.items()}


class _Output:
    """The parts of `generated/`: the existing ones, and the one being filled.

    Attributes:
      num_parts, num_batches: parts that exist, and batches added so far.
      records, tokens: in all parts.
    """

    def __init__(self, phase: phase_lib.Phase):
        self._phase, self._folder = phase, phase.folder / FOLDER
        self._model = phase_lib.model_hash(phase.start_key)
        self._lines: list[str] = []
        self._seen: set[bytes] = set()
        self.num_parts = int(
            hosts.of_first(
                next(n for n in itertools.count() if not self._file(n).exists())
            )
        )
        self.num_batches = self.num_parts * _BATCHES_PER_PART
        rows = metrics.read(phase.folder)[: self.num_parts]
        last = rows[-1] if self.num_parts else {}
        self.records, self.tokens, self._blank, self._duplicates = (
            int(last.get(key, 0)) for key in _COUNTS
        )
        for part in range(self.num_parts):
            for row in small_files.read_lines(self._file(part), small_files.OBJECT):
                self._seen.add(_digest(row))

    @property
    def counts(self) -> dict[str, float]:
        values = self.records, self.tokens, self._blank, self._duplicates
        return dict(zip(_COUNTS, map(float, values), strict=True))

    def add(self, batch: Sequence[Request], said: Sequence[str], first: int) -> None:
        """Adds the records of a batch that are new.

        Args:
          batch: the requests.
          said: the model's answer to each, or ''.
          first: the number of the batch's first record.
        """
        config = self._phase.config
        self.num_batches += 1
        for number, (request, text) in enumerate(zip(batch, said, strict=True), first):
            record = _record(config.generate.kind, request, text)
            if record is None:
                self._blank += 1
                continue
            if (digest := _digest(record)) in self._seen:
                self._duplicates += 1
                continue
            self._seen.add(digest)
            self.records += 1
            self.tokens += sum(
                len(self._phase.tokenizer.encode(value)) for value in record.values()
            )
            origin = {
                "kind": config.generate.kind,
                "number": number,
                "seed": config.seed,
                "model": self._model,
            }
            line = json.dumps(record | {"generated": origin}, ensure_ascii=False)
            self._lines.append(line + "\n")

    def write(self, part: int) -> None:
        """Writes the filled part."""
        if hosts.is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            paths.replace(self._file(part), "".join(self._lines))
        self._lines = []

    def _file(self, part: int) -> epath.Path:
        return self._folder / f"{part:05}.jsonl"


def _digest(record: Mapping[str, Any]) -> bytes:
    texts = (v for k, v in record.items() if k != "generated")
    return filters.digest("\n".join(texts))


def _speaker(phase: phase_lib.Phase) -> Callable[[Sequence[Request], int], list[str]]:
    """`(batch, number of its first record) -> the model's answer to each request`."""
    settings, tokenizer = phase.config.generate, phase.tokenizer
    if settings.kind == "comprehension":
        return lambda batch, first: [""] * len(batch)
    params = phase.starting_params(phase.config.model.compute_dtype)
    sampler = generation.Sampler(
        phase.model_config,
        tokenizer,
        phase.config.model.compute_dtype,
        batch_size=phase.config.eval.batch_size,
    )
    asks = settings.kind == "questions" and tokenizer.has_turns
    stop_ids = tokenizer.stop_ids if asks else tokenizer.document_ends
    sampling = generation.SamplingParams(settings.temperature, top_p=settings.top_p)

    def say(batch: Sequence[Request], first: int) -> list[str]:
        prompts = [request.ids for request in batch]
        said = sampler.generate(
            params,
            prompts,
            settings.max_new_tokens,
            stop_ids,
            sampling,
            phase.config.seed,
            first,
        )
        return generation.decode_continuations(tokenizer, prompts, said)

    return say


def _batched(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    requests = iter(requests)
    while batch := list(itertools.islice(requests, size)):
        yield batch
