"""Reads the files beside a tokenizer, and writes them into an export.

`tokenizer.json` or `tokenizer.model` holds the vocabulary. The files beside it name its
special tokens, add tokens, hold chat templates and list the tokens that end generation.
They are read as transformers reads them: `added_tokens_decoder` of
`tokenizer_config.json` defines all added tokens; only without it does
`special_tokens_map.json` override special tokens and `added_tokens.json` add tokens.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from mixcpt_jax.core import small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.small_files import MOST_BYTES_OF_VOCABULARY
from mixcpt_jax.models import headers
from mixcpt_jax.models.headers import Header

CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_MORE_TEMPLATES = "additional_chat_templates"
_GENERATION = "generation_config.json"
_MODEL = "config.json"
# The same vocabulary in other formats, for other programs.
_COPIED = ("tokenizer.model", "vocab.json", "merges.txt", _ADDED)
# Keys of tokenizer_config.json that name files or code that an export lacks, or with
# which transformers would change the tokenizer.
_DROPPED = {
    "add_prefix_space",
    "auto_map",
    "fast_tokenizer_files",
    "name_or_path",
    "processor_class",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
}

_NAMES = ("bos_token", "eos_token", "pad_token")
_OTHER_NAMES = ("unk_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_MOST_TOKENS = 2**31 - 1
# Some editors write this at the start of a file; conversations would then begin with it.
_BYTE_ORDER_MARK = "\ufeff"


class Added(NamedTuple):
    """A token that is split off a text before the rest is encoded."""

    content: str
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool

    @property
    def flags(self) -> dict[str, bool]:
        return {name: getattr(self, name) for name in _FLAGS}


@dataclasses.dataclass(frozen=True)
class Companions:
    """The contents of the files beside a tokenizer.

    Attributes:
      config: of `tokenizer_config.json`, with the special tokens of
        `special_tokens_map.json` if they override it.
      added: id -> token.
      templates: name -> chat template; the model's own is "default".
      ends: the tokens that end generation, from `generation_config.json` or else from
        `config.json`.
      special_map: `special_tokens_map.json`; None: there is none.
      files: name -> content of the files that an export copies.
      template_files: the template's files that an export writes.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    added: Mapping[int, Added] = dataclasses.field(default_factory=dict)
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = ()
    special_map: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    template_files: tuple[str, ...] = ()

    def special_tokens(self) -> dict[str, str | None]:
        """The "bos_token", "eos_token" and "pad_token" that the files name.

        None: the model has no such token.
        """
        return {
            name: _content(self.config[name]) for name in _NAMES if name in self.config
        }

    def other_tokens(self) -> dict[str, list[str]]:
        """Key -> the other special tokens that the files list under it.

        transformers would add those that are missing to the vocabulary.
        """
        lists = {name: _listed(self.config.get(name)) for name in _LISTS}
        values = lists | {name: [self.config.get(name)] for name in _OTHER_NAMES}
        return {
            name: [text for text in map(_content, tokens) if isinstance(text, str)]
            for name, tokens in values.items()
        }

    def save(self, folder: epath.Path, says: dict[str, Any], template: str | None):
        """Writes the files.

        Args:
          folder: of the export.
          says: the tokenizer's keys of `tokenizer_config.json`, with special tokens.
          template: the chat template.
        """
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        tokens = {k: v for k, v in says.items() if k in _NAMES}
        if self.special_map is not None:
            kept = {k: v for k, v in self.special_map.items() if k not in _NAMES}
            _write(folder / _MAP, kept | tokens)
        own = {} if template is None else {"default": template}
        templates = {**self.templates, **own}
        kept = {
            k: v
            for k, v in self.config.items()
            if k not in _DROPPED and k not in _NAMES and k != "chat_template"
        }
        if templates.keys() - {"default"}:
            kept["chat_template"] = [
                {"name": k, "template": v} for k, v in templates.items()
            ]
        elif own:
            kept["chat_template"] = template
            if _TEMPLATE in self.template_files:
                (folder / _TEMPLATE).write_text(template)
            if _OLD_TEMPLATE in self.template_files:
                _write(folder / _OLD_TEMPLATE, {"chat_template": template})
        _write(folder / CONFIG, kept | says)


def read(file: epath.Path) -> Companions:
    """Reads the files beside a `tokenizer.json` or `tokenizer.model`.

    Raises:
      InputError: one is malformed; names the file and the key.
    """
    folder = file.parent
    header = headers.read_if_there(folder / CONFIG)
    config = dict(header.values)
    has_map = (folder / _MAP).exists()
    special_map = headers.read(folder / _MAP) if has_map else None
    sources = dict.fromkeys(config, header)
    added = _added(header, "added_tokens_decoder")
    if added is None:
        if special_map is not None:
            config |= special_map.values
            sources |= dict.fromkeys(special_map.values, special_map)
        added = _legacy_added(folder, config)
    for name in _NAMES:
        token = config.get(name)
        if token is not None and not isinstance(_content(token), str):
            raise sources[name].wrong(name, "a token's text")
    for name in ("add_bos_token", "add_eos_token", "legacy"):
        header.flag(name, None)
    templates, template_files = _templates(folder, header)
    return Companions(
        config=config,
        added=added,
        templates=templates,
        ends=_ends(folder),
        special_map=None if special_map is None else special_map.values,
        files={
            name: small_files.read_bytes(
                folder / name, headers.AGAIN, MOST_BYTES_OF_VOCABULARY
            )
            for name in _COPIED
            if (folder / name).exists() and name != file.name
        },
        template_files=template_files,
    )


def place_of(file: epath.Path, companions: Companions, key: str) -> str:
    """The file that names a special token."""
    in_map = companions.special_map is not None and key in companions.special_map
    is_map = in_map and "added_tokens_decoder" not in companions.config
    return str(file.parent / (_MAP if is_map else CONFIG))


def _content(token: Any) -> Any:
    # An added token may be spelled out with its flags.
    return token.get("content") if isinstance(token, dict) else token


def _added(header: Header, key: str) -> dict[int, Added] | None:
    entries = header.mapping(key, None)
    if entries is None:
        return None
    added = {}
    for token_id, entry in entries.items():
        place = Header(header.file, entries, f"{key}.")
        is_id = token_id.isascii() and token_id.isdecimal() and len(token_id) < 11
        token = Header(header.file, entry) if isinstance(entry, dict) else None
        if not is_id or token is None:
            # The key is in the object, not in the file.
            raise dataclasses.replace(place, values={f"{key}.{token_id}": entry}).wrong(
                token_id, "an added token under its id"
            )
        flags = {name: token.flag(name, False) for name in _FLAGS}
        added[int(token_id)] = Added(token.text("content"), **flags)
    return added


def _legacy_added(folder: epath.Path, config: Mapping[str, Any]) -> dict[int, Added]:
    header = headers.read_if_there(folder / _ADDED)
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens")
    named = [*(config.get(name) for name in (*_NAMES, "unk_token")), *_listed(more)]
    special = {text for text in map(_content, named) if isinstance(text, str)}
    added = {}
    for content in header.values:
        token_id = header.integer(content, least=0, most=_MOST_TOKENS)
        is_special = content in special
        added[token_id] = Added(
            content, is_special, False, False, False, not is_special
        )
    if len(added) < len(header.values):
        raise InputError(f"{header.file}: two tokens have one id; download it again")
    return added


def _listed(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _templates(
    folder: epath.Path, header: Header
) -> tuple[dict[str, str], tuple[str, ...]]:
    """All chat templates by name, and the files that hold the default one."""
    found = [name for name in (_TEMPLATE, _OLD_TEMPLATE) if (folder / name).exists()]
    templates = {}
    if (more := folder / _MORE_TEMPLATES).is_dir():
        files = sorted(more.glob("*.jinja"))
        templates = {file.name.removesuffix(".jinja"): file for file in files}
        templates = {name: read_template(file) for name, file in templates.items()}
    if _TEMPLATE in found:
        templates["default"] = read_template(folder / _TEMPLATE)
    if templates:
        return templates, tuple(found)
    templates = _named(header)
    if not templates and _OLD_TEMPLATE in found:
        templates = _named(headers.read(folder / _OLD_TEMPLATE))
    return templates, tuple(found)


def _named(header: Header) -> dict[str, str]:
    """The templates of a key `chat_template`: one, or several by name."""
    value = header.get("chat_template")
    match value:
        case None:
            return {}
        case str():
            templates = {"default": value}
        case dict():
            templates = value
        case list() if all(isinstance(t, dict) for t in value):
            templates = {t.get("name"): t.get("template") for t in value}
        case _:
            templates = {None: None}
    if not all(isinstance(text, str) for text in (*templates, *templates.values())):
        raise header.wrong("chat_template", "a template or a list of named ones")
    return {k: v.removeprefix(_BYTE_ORDER_MARK) for k, v in templates.items()}


def read_template(file: epath.Path) -> str:
    """A template file's text; Jinja itself converts all line ends to line feeds."""
    text = small_files.read_text(file, "save the template as UTF-8")
    return text.removeprefix(_BYTE_ORDER_MARK)


def ends_file(folder: epath.Path) -> epath.Path:
    """The file that lists the tokens that end generation, else the model's config."""
    file = folder / _GENERATION
    return file if file.exists() else folder / _MODEL


def _ends(folder: epath.Path) -> tuple[int, ...]:
    header = headers.read_if_there(ends_file(folder))
    if not isinstance(header.get("eos_token_id"), list):
        end = header.integer("eos_token_id", None, 0, _MOST_TOKENS)
        return () if end is None else (end,)

    def is_id(value):
        return headers.is_integer(value) and 0 <= value <= _MOST_TOKENS

    return tuple(header.many("eos_token_id", is_id, "a list of tokens' ids"))


def _write(file: epath.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2))
