"""Talks to a model.

    python -m mixcpt_jax chat --checkpoint=RUN [--prompt="..." | --prompts=FILE]
        [--raw] [--temperature=0.7 --top_p=0.9 ...]

opens a chat, or answers the given prompts. RUN is the workdir of a run, a phase's folder, a
Hugging Face folder, a model of the Hub (ORG/NAME) or a GGUF file. If the output is not a
terminal, only answers are printed.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mixcpt_jax.cli import command
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal

if TYPE_CHECKING:
    from mixcpt_jax.evaluation import generation, load_model


def main() -> None:
    arguments = _parse()
    for prompt in arguments.prompt:
        _check_utf8(prompt, "--prompt")
    if arguments.prompts:
        arguments.prompt += _read_prompts(arguments.prompts, arguments.raw)
    # Imported here so that --help does not wait for jax.
    import jax

    from mixcpt_jax.evaluation import generation, load_model

    sampling = generation.SamplingParams(
        arguments.temperature, arguments.top_k, arguments.top_p
    )
    trained = load_model.load(arguments.checkpoint, arguments.dtype)
    is_watched = sys.stdout.isatty()
    if is_watched:
        terminal.say(f"{trained.place} ({trained.dtype})")
    with jax.set_mesh(trained.mesh):
        if len(arguments.prompt) > 1 or arguments.prompts:
            _answer_all(arguments, trained, sampling)
            return
        speaker = _speaker(arguments, trained, sampling)
        if arguments.prompt:
            print_pieces(speaker.say(arguments.prompt[0]))
        else:
            converse(speaker, is_watched)


def _parse() -> argparse.Namespace:
    parser = command.parser("chat", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN", help="where the model is")
    add(
        "--prompt",
        action="append",
        default=[],
        help="a prompt to answer; may be repeated",
    )
    add(
        "--prompts",
        default="",
        metavar="FILE",
        help='JSON lines of {"prompt"} or {"messages"}. Like several --prompt they are '
        "answered together, and the answers are JSON lines",
    )
    add("--raw", action="store_true", help="complete the text, without a chat template")
    add(
        "--max_new_tokens",
        type=command.number(int, least=1, most=2**31 - 1),
        default=512,
    )
    add(
        "--temperature",
        type=command.number(float, least=0, most=100),
        default=0.0,
        help="what logits are divided by; 0 takes the most likely token",
    )
    add(
        "--top_k",
        type=command.number(int, least=1, most=2**24),
        default=None,
        help="sample from this many most likely tokens only",
    )
    add(
        "--top_p",
        type=command.number(float, above=0, most=1),
        default=1.0,
        help="sample from the most likely tokens that have this share of probability",
    )
    add("--seed", type=command.seed, default=0, help="of sampling")
    add("--dtype", default="", help="float32 (default on CPUs) or bfloat16 (elsewhere)")
    return parser.parse_args()


def _check_utf8(text: str, where: str) -> None:
    # Python decodes bytes that are not UTF-8 as halves of surrogate pairs.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: not UTF-8 (character {error.start + 1} of {text!a:.60}); encode "
            "it as UTF-8"
        ) from None


def _read_prompts(path: str, is_raw: bool) -> list[Any]:
    """Texts, or conversations."""
    from mixcpt_jax.data import formats, sources, tally

    found = tally.Tally()
    conversations = [formats.read_prompt(r, found) for r in sources.read(path, "jsonl")]
    found.warn(path)
    if not is_raw:
        return conversations
    for messages in conversations:
        if len(messages) > 1:
            raise InputError(
                f"{path}: --raw completes texts; use prompt instead of messages"
            )
    return [messages[0]["content"] for messages in conversations]


def _answer_all(
    arguments: argparse.Namespace,
    trained: "load_model.LoadedModel",
    sampling: "generation.SamplingParams",
) -> None:
    from mixcpt_jax.evaluation import generation

    sampler = generation.Sampler(trained.config, trained.tokenizer, trained.dtype)
    if arguments.raw:
        work, prompts = sampler.complete, arguments.prompt
    else:
        work = sampler.chat
        prompts = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            for prompt in arguments.prompt
        ]
    answers = work(
        trained.params, prompts, arguments.max_new_tokens, sampling, arguments.seed
    )
    for prompt, answer in zip(arguments.prompt, answers, strict=True):
        key = "prompt" if isinstance(prompt, str) else "messages"
        terminal.show_json({key: prompt, "answer": answer})


def _speaker(
    arguments: argparse.Namespace,
    trained: "load_model.LoadedModel",
    sampling: "generation.SamplingParams",
) -> "generation.Chat | generation.Completion":
    from mixcpt_jax.evaluation import generation

    stream = generation.Stream(
        trained.params, trained.config, trained.tokenizer, trained.dtype
    )
    speaker = generation.Completion if arguments.raw else generation.Chat
    return speaker(
        stream, trained.tokenizer, arguments.max_new_tokens, sampling, arguments.seed
    )


_HELP = "/reset forgets, /quit or Ctrl-D ends, Ctrl-C stops an answer."


def converse(
    speaker: "generation.Chat | generation.Completion", is_watched: bool = False
) -> None:
    """Reads standard input line by line and answers, to its end.

    Args:
      speaker: generates the answers.
      is_watched: whether a person reads the output, so a prompt and help are shown.
    """
    if is_watched:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited from now on)
        terminal.say(_HELP)
    # Bytes that are not UTF-8 become surrogates. Python refuses this after the first read.
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            text = input("> " if is_watched else "").strip()
        except EOFError:
            terminal.show(end="\n" if is_watched else "")
            return
        except KeyboardInterrupt:
            terminal.show()  # drop what was typed
            continue
        if text == "/quit":
            return
        if text == "/reset":
            speaker.reset()
        elif is_watched and text.startswith("/"):
            terminal.say(_HELP)
        elif text:
            try:
                _check_utf8(text, "standard input")
                print_pieces(speaker.say(text))
            except InputError as error:
                terminal.say(f"{error}; /reset starts a new chat", "ERROR")


def print_pieces(pieces: Iterator[str]) -> None:
    """Prints a text while it is generated; Ctrl-C stops only the text.

    A second Ctrl-C acts as usual.
    """
    has_come = []

    def note(*_):
        has_come.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        for piece in pieces:
            terminal.show_generated(piece)
            if has_come:
                pieces.close()
                break
        terminal.show()
    finally:
        signal.signal(signal.SIGINT, before)


def start() -> None:
    """Runs the command from the command line."""
    command.run(main)
