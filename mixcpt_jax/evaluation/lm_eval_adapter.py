"""A model class for EleutherAI's lm-evaluation-harness, computed in JAX.

    lm_eval.simple_evaluate(model=lm_eval_adapter.Model("runs/mine"), tasks=[...])

Importing this file also registers it with the harness as "mixcpt_jax".

Apart from rounding, its answers equal those of the harness's `hf` model on the exported
folder: it tokenizes texts, truncates contexts on the left and reads long texts in windows
in the same way.
"""

import collections
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import mixture
from mixcpt_jax.data.formats import Examples
from mixcpt_jax.evaluation import evaluator, generation, load_model

# Requests are packed into rows of this many tokens, doubled until the longest fits, so few
# programs are compiled.
_ROW_LENGTH = 512
_TOKENS_PER_CALL = 8
_READ_SETTINGS = {
    "until", "max_gen_toks", "max_length", "do_sample", "temperature", "top_k", "top_p",
}  # fmt: skip


@register_model("mixcpt_jax")
class Model(TemplateLM):
    """A model for the harness."""

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 8,
        max_length: int | None = None,
        dtype: str = "",
        **_: Any,  # arguments of all models of the harness, such as the device
    ):
        """
        Args:
          checkpoint: see `load_model.load`.
          batch_size: rows per batch, of packed requests or of prompts.
          max_length: maximum context, in tokens; None: the model's.
          dtype: see `load_model.load`.

        Raises:
          InputError: the model is incomplete, or `max_length` exceeds its context.
        """
        super().__init__()
        self._model = load_model.load(checkpoint, dtype)
        self._score = self._model.score()
        self._vocabulary = self._model.tokenizer
        self._has_warned = False
        longest = self._model.config.max_positions
        self.max_length = max_length or longest
        if self.max_length > longest:
            raise InputError(
                f"max_length={max_length}: must be <= {longest}, the model's context"
            )
        with jax.set_mesh(self._model.mesh):
            self._batch_size = generation.whole_batch(int(batch_size))
            self._stream = generation.Stream(
                self._model.params,
                self._model.config,
                self._vocabulary,
                self._model.dtype,
                batch_size=self._batch_size,
                tokens_per_call=_TOKENS_PER_CALL,
            )

    @property
    def eot_token_id(self) -> int:
        """The EOS token; the harness calls it the end-of-text token."""
        eos_id = self._vocabulary.eos_id
        return self._vocabulary.end_of_document_id if eos_id is None else eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token to put before a text without context."""
        bos_id = self._vocabulary.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def max_gen_toks(self) -> int:
        """The default number of new tokens of a task, as for `hf`."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        return self._model.place.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, or None."""
        return self._vocabulary.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation; without a generation prompt its last turn stays open."""
        try:
            text = self._vocabulary.apply_chat_template(
                chat_history, add_generation_prompt
            )
        except InputError:
            without = [turn for turn in chat_history if turn["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return self.apply_chat_template(without, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start = text.rindex(last.strip())
        is_kept = text.startswith(last.lstrip(), start)
        return text[: start + len(last.lstrip() if is_kept else last.strip())]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encodes text with its special tokens; adds BOS if the tokenizer does."""
        ids = self._vocabulary.encode_with_special(string)
        if add_special_tokens is None:
            prefix = self._vocabulary.model.id_to_token(self.prefix_token_id)
            add_special_tokens = not string.startswith(prefix)
        adds = add_special_tokens and self._vocabulary.add_bos
        return [self._vocabulary.bos_id] * adds + ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        if not requests:
            return []
        room = self.max_length + 1
        for number, (_, _, continuation) in enumerate(requests, 1):
            if len(continuation) > self.max_length:
                raise InputError(
                    f"request {number}: its continuation has {len(continuation)} tokens; "
                    f"must be <= {self.max_length}, the context; leave the request out"
                )
        self._warn_of_cuts(
            sum(len(context) + len(target) > room for _, context, target in requests)
        )
        examples = Examples.collect(
            _with_loss_mask(context, continuation, room)
            for _, context, continuation in requests
        )
        longest = int(examples.lengths.max()) - 1
        row_length = max(_ROW_LENGTH, 1 << (longest - 1).bit_length())
        places = [f"request {number + 1}" for number in range(len(requests))]
        rows = mixture.pack_text("requests", examples, row_length, places=places)
        with jax.set_mesh(self._model.mesh):
            nats, correct, count = evaluator.sums_per_example(
                self._score, rows, self._batch_size
            )
        return list(zip((-nats).tolist(), (correct == count).tolist(), strict=True))

    def _warn_of_cuts(self, count: int) -> None:
        """Warns once if contexts are truncated on the left."""
        if count and not self._has_warned:
            self._has_warned = True
            logging.warning(
                "%d contexts are truncated on the left to the model's %d tokens, as the "
                "harness's own models do; later requests are truncated without a warning",
                count,
                self.max_length,
            )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, each token with the longest context that fits."""
        windows = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]),
                    self.prefix_token_id,
                    self.max_length,
                    1,
                )
            ]
            for request in requests
        ]
        answers = iter(self._loglikelihood_tokens(list(itertools.chain(*windows))))
        return [
            sum(nats for nats, _ in itertools.islice(answers, len(part)))
            for part in windows
        ]

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """The continuations of texts, up to one of the stop strings of the task.

        Raises:
          InputError: a task needs a setting that is not supported.
        """
        by_settings = collections.defaultdict(list)
        for number, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True)
            by_settings[key].append((number, request))
        answers = [""] * len(requests)
        for group in by_settings.values():
            settings = normalize_gen_kwargs(group[0][1].args[1], self.max_gen_toks)
            contexts = [self.tok_encode(request.args[0]) for _, request in group]
            # Batches of prompts of similar length need little padding, and share prefixes.
            order = sorted(range(len(group)), key=lambda i: (-len(contexts[i]), i))
            for first in range(0, len(order), self._batch_size):
                part = order[first : first + self._batch_size]
                texts = self._generate([contexts[i] for i in part], settings)
                for i, text in zip(part, texts, strict=True):
                    answers[group[i][0]] = text
        return answers

    def _generate(
        self, contexts: list[list[int]], settings: dict[str, Any]
    ) -> list[str]:
        if unknown := set(settings) - _READ_SETTINGS:
            raise InputError(
                f"generation_kwargs: {', '.join(sorted(unknown))}: not supported; "
                f"supported are {', '.join(sorted(_READ_SETTINGS))}"
            )
        until = handle_stop_sequences(settings["until"], eos=None)
        max_new_tokens = settings["max_gen_toks"]
        room = self.max_length - max_new_tokens
        if room < 1:
            raise InputError(
                f"generation_kwargs: max_gen_toks={max_new_tokens}: must be < "
                f"{self.max_length}, the context, to leave room for a prompt"
            )
        sampling = generation.SamplingParams()
        if settings.get("do_sample"):
            sampling = generation.SamplingParams(
                settings.get("temperature", 1.0),
                settings.get("top_k") or None,
                settings.get("top_p", 1.0),
            )
        self._warn_of_cuts(sum(len(context) > room for context in contexts))
        prompts = [context[-room:] or [self.prefix_token_id] for context in contexts]
        stop_ids = self._vocabulary.stop_ids
        generated: list[list[int]] = [[] for _ in prompts]
        with jax.set_mesh(self._model.mesh):
            for news in self._stream(prompts, max_new_tokens, stop_ids, sampling):
                for ids, new in zip(generated, news, strict=True):
                    ids += new
                texts = [self._vocabulary.decode(ids) for ids in generated]
                is_open = [
                    bool(new) and not any(end in text for end in until)
                    for new, text in zip(news, texts, strict=True)
                ]
                if not any(is_open):
                    break
        return [postprocess_generated_text(text, until, None) for text in texts]


def _with_loss_mask(
    context: list[int], continuation: list[int], room: int
) -> tuple[list[int], list[bool]]:
    ids = (context + continuation)[-room:]
    num_loss_tokens = len(continuation)
    return ids, [False] * (len(ids) - num_loss_tokens) + [True] * num_loss_tokens
