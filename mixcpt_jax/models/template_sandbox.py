"""Renders chat templates, which are untrusted programs, with limits on time and memory.

Jinja's sandbox keeps a template away from Python's internals, but `'a' * 10**9`, nested
loops and a macro that doubles a string can use unlimited time and memory. Here each
operation first charges its cost to a budget: every iteration, call and operator, and every
character created. Operations that can multiply a size (`*`, `**`, padding, `replace`,
`join`) compute the size of their result before creating it.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes, sandbox, visitor

# Limits of one rendering; creating `_CHARACTERS_PER_OPERATION` characters counts as one
# operation.
MAX_OPERATIONS = 2**20
_CHARACTERS_PER_OPERATION = 1024
MAX_SECONDS = 20.0
# Maximum size of one string or list, and of the text of a template.
MAX_CHARACTERS = 2**26
MAX_TEMPLATE_CHARACTERS = 2**20
# Maximum of a number that pads, indents or rounds, and of the bits of an integer.
_MAX_WIDTH, _MAX_BITS = 10_000, 4096
# Transformers' `{% generation %}` blocks mark text and render as their content.
_MARKS = re.compile(r"({%[-+]?\s*)(end)?generation\b")
_WIDE = re.compile(r"%[^%a-zA-Z]*(?:\d{5}|\*)")
_WIDE_FIELD = re.compile(r"\d{5}|:[^}]*{")


class OverBudget(jinja2.TemplateError):
    """A rendering that needs more time or memory than a template may use."""


class Template:
    """A chat template, in the environment that transformers provides.

    Args:
      source: Jinja's text.

    Raises:
      jinja2.TemplateError: the text is malformed or too long.
    """

    def __init__(self, source: str):
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise OverBudget(
                f"it has {len(source)} characters, at most {MAX_TEMPLATE_CHARACTERS} are "
                "supported"
            )
        self._environment = _Environment()
        self._environment.budget.renew()  # compilation folds constants
        source = _MARKS.sub(lambda m: m[1] + ("endif" if m[2] else "if true"), source)
        self._template = self._environment.from_string(source)
        self._refusal: str | None = None

    def render(self, **variables: Any) -> str:
        """Renders it.

        Raises:
          OverBudget: it needs too much time or memory; every later call raises this too.
          Exception: a template can raise whatever Python can.
        """
        if self._refusal:
            raise OverBudget(self._refusal)
        self._environment.budget.renew()
        try:
            return self._template.render(**variables)
        except OverBudget as error:
            self._refusal = str(error)
            raise


class _Budget(threading.local):
    """The remaining budget of the rendering in this thread."""

    def renew(self) -> None:
        self._left = MAX_OPERATIONS
        self._deadline = time.monotonic() + MAX_SECONDS

    def charge(self, operations: int = 1, characters: int = 0) -> None:
        """Charges for some operations, and for a string or list before it is created."""
        self.require_size(characters)
        self._left -= operations + characters // _CHARACTERS_PER_OPERATION
        if self._left < 0:
            raise OverBudget(f"it needs more than {MAX_OPERATIONS} operations")
        if time.monotonic() > self._deadline:
            raise OverBudget(f"it needs more than {MAX_SECONDS:.0f} s")

    @staticmethod
    def require_size(characters: int) -> None:
        """Refuses a string or list that is too long."""
        if characters > MAX_CHARACTERS:
            raise OverBudget(
                f"it makes a text or list of {characters:.3g} items, at most "
                f"{MAX_CHARACTERS} are supported"
            )

    def charge_value(self, value: Any) -> Any:
        """Charges for a value, counting each part as often as it occurs; returns it."""
        self.charge(1, len(value) if isinstance(value, str | bytes) else 0)
        if isinstance(value, Mapping):
            for part in value.values():
                self.charge_value(part)
        elif isinstance(value, list | tuple | set | frozenset):
            for part in value:
                self.charge_value(part)
        return value

    def charge_widths(self, values: Iterable[Any]) -> None:
        """Refuses unreasonably large padding widths."""
        for value in values:
            if isinstance(value, int) and abs(value) > _MAX_WIDTH:
                raise OverBudget(
                    f"it pads to {value}, at most {_MAX_WIDTH} is supported"
                )


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox that transformers uses, but everything that can grow is charged for."""

    intercepted_binops = frozenset(sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self):
        self.budget = _Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            finalize=self.budget.charge_value,
        )
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        self.filters = {
            name: self._paying(name, function)
            for name, function in (self.filters | {"tojson": _to_json}).items()
        } | {
            "_counted": self._counted,
            "_charged": self.budget.charge_value,
            "_joined": self._joined,
        }

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        source = _Charging().visit(source)
        source.set_environment(self)
        return super()._generate(source, *args, **options)

    def concat(self, parts: Iterable[str]) -> str:
        return self._joined(self._counted(parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.charge(1, _size_of_result(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
        values = [*args, *kwargs.values()]
        self.budget.charge_value(values)
        name = getattr(function, "__name__", "")
        subject = getattr(function, "__self__", None)
        if "strftime" in name:
            self.budget.charge(1, 32 * sum(map(_length, values)))
        elif isinstance(subject, str | bytes | int):
            self._charge_method(name, subject, values)
        return self.budget.charge_value(
            super().call(context, function, *args, **kwargs)
        )

    def _charge_method(self, name: str, subject: Any, values: Sequence[Any]) -> None:
        """Charges for the result of a method of a string, bytes or integer."""
        size = _length(subject)
        match name, values:
            case "ljust" | "rjust" | "center" | "zfill" | "to_bytes", _:
                self.budget.charge_widths(values)
            case "expandtabs", _:
                self.budget.charge_widths(values)
                size *= max([8, *(v for v in values if isinstance(v, int))])
            case "replace", [old, new, *_]:
                size = _size_of_replaced(subject, old, new)
            case "join", [parts, *_]:
                size *= _length(parts)
            case "translate", [Mapping() as table]:
                size *= max(map(_length, table.values()), default=1)
        self.budget.charge(1, size)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is not None:
            _require_narrow(_WIDE_FIELD, value.__self__)
        return function

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop; each counts as an operation."""
        for item in items:
            self.budget.charge()
            yield item

    def _joined(self, parts: Iterable[Any]) -> str:
        texts, size = [], 0
        for part in parts:
            texts.append(text := str(self.budget.charge_value(part)))
            size += len(text)
            self.budget.require_size(size)
        return "".join(texts)

    def _paying(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a filter so that it charges for its arguments and its result."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def paying(*args: Any, **kwargs: Any) -> Any:
            args = [list(a) if isinstance(a, Iterator) else a for a in args]
            subject, *values = *args[first:], *kwargs.values()
            self.budget.charge_value([subject, *values])
            self._charge_filter(name, subject, values)
            result = function(*args, **kwargs)
            if not isinstance(result, Iterator):
                self.budget.charge_value(result)
            return result

        return paying

    def _charge_filter(self, name: str, subject: Any, values: Sequence[Any]) -> None:
        if name in _PADDING:
            self.budget.charge_widths(values)
        if name in _SLOW and len(text := str(subject)) > _MAX_SLOW:
            raise OverBudget(
                f"its filter {name} has {len(text)} characters, at most {_MAX_SLOW} are "
                "supported"
            )
        size = 0
        match name, values:
            case "format", _:
                _require_narrow(_WIDE, str(subject))
            case "replace", [old, new, *_]:
                size = _size_of_replaced(str(subject), str(old), str(new))
            case "indent" | "tojson", _:
                ints = (abs(value) for value in values if isinstance(value, int))
                size = _length(subject) * max([*map(_length, values), *ints], default=1)
            case "join", [separator, *_]:
                size = _length(subject) * _length(separator)
            case "sum", _ if not isinstance(subject, str):
                size = len(subject) * sum(map(_length, subject))
        self.budget.charge(1, size)


# Filters whose numbers are widths, and filters whose time grows faster than their text.
_PADDING = frozenset({"batch", "center", "indent", "round", "slice", "tojson"})
_SLOW = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr"})
_MAX_SLOW = 2**16


class _Charging(visitor.NodeTransformer):
    """Makes loops, lists, slices and concatenations charge, by wrapping them in filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.Tuple(node.nodes, "load", lineno=node.lineno)
        return _filtered(parts, "_joined")

    def _charged(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_charged")

    visit_List = visit_Dict = _charged

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx == "store" else _filtered(node, "_charged")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        if not isinstance(node.arg, nodes.Slice):
            return self.generic_visit(node)
        node.node = self.visit(node.node)
        return _filtered(node, "_charged")


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


def _size_of_result(operator: str, left: Any, right: Any) -> int:
    """How many characters or items an operator creates; bounds integers."""
    texts = str | bytes | list | tuple
    match operator:
        case "+" if isinstance(left, texts) and isinstance(right, texts):
            return len(left) + len(right)
        case "*" if isinstance(left, texts) and isinstance(right, int):
            return len(left) * max(right, 0)
        case "*" if isinstance(right, texts) and isinstance(left, int):
            return len(right) * max(left, 0)
        case "%" if isinstance(left, str | bytes):
            _require_narrow(_WIDE, left)
            return len(left)
        case "*" if isinstance(left, int) and isinstance(right, int):
            _require_bits(left.bit_length() + right.bit_length())
        case "**" if isinstance(left, int) and isinstance(right, int):
            _require_bits(left.bit_length() * max(right, 1))
    return 0


def _size_of_replaced(subject: Any, old: Any, new: Any) -> int:
    return len(subject) + subject.count(old) * len(new)


def _require_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise OverBudget(
            f"it makes an integer of {bits:.3g} bits, the most is {_MAX_BITS}"
        )


def _require_narrow(wide: re.Pattern, form: str | bytes) -> None:
    text = form.decode("latin-1") if isinstance(form, bytes) else form
    if wide.search(text):
        raise OverBudget(
            f"it pads by the format {text[:80]!r}; widths have at most four digits"
        )


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
