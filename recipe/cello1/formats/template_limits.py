"""Bounds on chat templates, which are programs of whoever made a model: on their time, and on what they make.

``transformers/utils/chat_template_utils.py``, ``_cached_compile_jinja_template`` (transformers 5.10.4)::

    jinja_env = ImmutableSandboxedEnvironment(...)

That sandbox bounds the length of a range, and nothing else. The one below is put in its place, for all that renders
with transformers in the process, in any thread. Every step of a loop, call, filter and operation pays in advance for
what it takes in and may make, so that none of them runs long by itself. vLLM's processes are bounded likewise, under
the variable ``LIMIT_TEMPLATES``: its servers render each prompt, and compile templates in a sandbox of their own
(``vllm/renderers/hf.py``, ``_resolve_chat_template_kwargs``, vLLM 0.27.1), which reckons what is constant in them. That
one has jinja2's by its name, which is replaced where vLLM runs, and nowhere else: others have it, too.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sequence, Set
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from jinja2 import Template, nodes, sandbox
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg, pass_context
from jinja2.visitor import NodeTransformer

LIMIT_TEMPLATES = "CELLO1_LIMIT_TEMPLATES"  # environment variable
MOST_ADDED = 1 << 20  # characters, beside what the messages have
_TIME_LIMIT_S = 20  # of a thread's own time, for one prompt
_WORK = 16  # times what may be made in the end: characters that are moved on the way
_EACH = 8  # what a step, or a value, counts beside its characters
_LONGEST = 1 << 18  # characters of a template
# What multiplies its parts, what takes a number for a length, and what takes long by itself.
_MULTIPLY = {"expandtabs", "format", "format_map", "indent", "join", "strftime_now", "tojson", "translate"}
_LENGTHEN = {"batch", "center", "ljust", "rjust", "round", "slice", "to_bytes", "truncate", "zfill"}
_REFUSED = {"decode", "encode", "pprint", "striptags", "urlize", "wordwrap"}


class _Now(threading.local):
    """What is left to the template that a thread renders; nothing is bounded outside of one."""

    left: int | None = None
    most = 0
    until = 0.0


_now = _Now()


class TemplateLimitError(RuntimeError):
    """A template that takes too much."""


def limit_templates(*, in_jinja: bool = False) -> None:
    """Let transformers render templates within bounds, from now on; or all that has jinja2's sandbox by its name."""
    from transformers.utils import chat_template_utils

    if in_jinja:
        sandbox.ImmutableSandboxedEnvironment = BoundedSandbox
    if chat_template_utils.ImmutableSandboxedEnvironment is not BoundedSandbox:
        chat_template_utils.ImmutableSandboxedEnvironment = BoundedSandbox
        chat_template_utils._compile_jinja_template.cache_clear()


def limit_in_vllm() -> None:
    """Do so in a process of vLLM, which calls this as a plugin in all of them, where the variable asks for it."""
    if os.environ.get(LIMIT_TEMPLATES):
        limit_templates(in_jinja=True)


@contextmanager
def _bounded(given: object) -> Iterator[None]:
    before = _now.left, _now.most, _now.until
    _now.left = 1 << 62
    _now.left = _now.most = _WORK * (MOST_ADDED + _WORK * _size(given))
    _now.until = time.thread_time() + _TIME_LIMIT_S
    try:
        yield
    finally:
        _now.left, _now.most, _now.until = before


def _pay(cost: int) -> None:
    if _now.left is None:
        return
    _now.left -= cost + _EACH
    if _now.left < 0:
        raise TemplateLimitError(f"it makes or moves more than {_now.most:,} characters")
    if time.thread_time() > _now.until:
        raise TemplateLimitError(f"it is not done after {_TIME_LIMIT_S} s")


def _size(value: object) -> int:
    """Count the characters that a value has when it is written out; of a number, what it takes to reckon with it."""
    total, todo, left = 0, [value], _now.left or 0
    while todo and total <= left:
        part = todo.pop()
        total += _EACH
        if isinstance(part, str | bytes | range):
            total += len(part)
        elif isinstance(part, int):
            total += (part.bit_length() >> 6) ** 2
        elif isinstance(part, Mapping) and not isinstance(part, Context):
            todo += [*part.keys(), *part.values()]
        elif isinstance(part, Sequence | Set | MappingView):
            todo += part  # type: ignore[arg-type]  # a MappingView can be iterated, whatever its stub says
    return total


def _cost(name: str, first: object, others: Sequence[object]) -> int:
    if name in _REFUSED:
        raise TemplateLimitError(f"it uses {name}, which may take any time")
    size, rest = _size(first), sum(map(_size, others))
    if name == "replace" and len(others) > 1 and isinstance(first, str):
        old, new = map(str, others[:2])
        return size + rest + (first.count(old) if old else size) * len(new)
    widths = (width for part in others for width in (part if isinstance(part, tuple) else (part,)))
    numbers = [width for width in widths if isinstance(width, int) and width > 0]
    if name in ("format", "format_map", "strftime_now"):
        form = first if isinstance(first, str) else str(others[0]) if others else ""
        if "*" not in form and not re.search(r":[^{}]*\{", form):
            numbers = []  # that is what is written, not how wide
        numbers += [int(digits[:19]) for digits in re.findall(r"\d+", form)]
    if name in _MULTIPLY:
        return size + rest + size * (rest + sum(numbers))
    return size + rest + (sum(numbers) if name in _LENGTHEN else 0)


def _paid(name: str, function: Callable[..., Any], first: object, /, *others: Any, **named: Any) -> Any:
    """Call a function once it is paid for; values that are made one by one are made first."""
    if _now.left is None:
        return function(first, *others, **named)
    first, *rest = (list(_steps(part, 1)) if isinstance(part, Iterator) else part for part in (first, *others))
    _pay(_cost(name, first, [*rest, *named.values()]))
    found = function(first, *rest, **named)
    _pay(_size(found))
    return found


def _steps(items: Iterable[Any], weight: int) -> Iterator[Any]:
    for item in items:
        _pay(max(weight, 0))  # a template may name this filter, too
        yield item


def _counted(value: Any) -> Any:
    _pay(_size(value))
    return value


@pass_context
def _late(_: Context, value: Any) -> Any:
    """Return a value, which jinja cannot know when it compiles: a filter of a constant is not reckoned there."""
    return value


_OWN: dict[str, Callable[..., Any]] = {"_counted": _counted, "_late": _late, "_steps": _steps}


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    n_own = 0 if _PassArg.from_obj(function) is None else 1  # arguments of jinja's own

    @wraps(function)
    def paid(*values: Any, **named: Any) -> Any:
        return _paid(name, partial(function, *values[:n_own]), *values[n_own:], **named)

    return paid


class _Paid(dict[str, Callable[..., Any]]):
    """Filters or tests, of which each is paid for once it is taken, however it was added."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return _OWN.get(name) or _filter(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a filter or a test, as jinja asks for it."""
        return self[name] if name in self else default


class _Namespace(Namespace):
    """Namespaces may hold each other: none is written out."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Counting(NodeTransformer):
    """Let the parts of a template that jinja compiles to plain Python pay, too."""

    def _wrap(self, node: nodes.Expr, name: str = "_counted", *values: int) -> nodes.Expr:
        return nodes.Filter(node, name, [nodes.Const(value) for value in values], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (jinja's names)
        weight = sum(1 for _ in node.find_all(nodes.Node))
        self.generic_visit(node)
        node.iter = self._wrap(node.iter, "_steps", weight)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.node is not None:
            node.node = self._wrap(node.node, "_late")
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._wrap(self.generic_visit(node))

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._wrap(self.generic_visit(node)) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._wrap(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [self._wrap(part) for part in node.nodes]
        return node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = self._wrap(node.expr)
        return node


class _Template(Template):
    stopped: TemplateLimitError | None = None

    def render(self, *args: Any, **kwargs: Any) -> str:
        if self.stopped is not None:  # or each of many prompts would take as long
            raise self.stopped
        try:
            with _bounded((args, kwargs)):
                return super().render(*args, **kwargs)
        except TemplateLimitError as error:
            self.stopped = error
            raise

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        with _bounded((args, kwargs)):
            yield from super().generate(*args, **kwargs)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox for strangers' templates, with bounds on the time a template takes and on what it makes."""

    template_class = _Template
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own: Callable[..., Any] | None = vars(self)["finalize"]
        self.finalize = _counted if own is None else _filter("", own)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # makes any amount of text
        for table in ("filters", "tests"):
            setattr(self, table, _Paid(getattr(self, table)))
        self.filters |= _OWN

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Template:
        """Compile a template, once."""
        with _bounded(source):
            return super().from_string(source, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _LONGEST:
            raise TemplateLimitError(f"it has {len(source):,} characters, and {_LONGEST:,} may be")
        return _Counting().visit(super()._parse(source, name, filename)).set_environment(self)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Put the parts of a text together."""
        return "".join([_counted(part) for part in parts])

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls."""
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)

        def call(_: object, /, *values: Any, **named: Any) -> Any:
            return super(BoundedSandbox, self).call(context, function, *values, **named)

        return _paid(getattr(function, "__name__", ""), call, owner, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Do what a template reckons."""
        pair = (left, right)
        numbers = [number for number in pair if isinstance(number, int)]
        if _now.left is None:
            return super().call_binop(context, operator, left, right)
        cost = _cost("format" if operator == "%" and isinstance(left, str) else "", left, [right])
        if operator == "**" and len(numbers) == 2 and right > 0:
            cost += (left.bit_length() * right >> 6) ** 2
        elif operator == "*" and len(numbers) == 1:
            cost *= max(1, numbers[0])
        _pay(cost)
        return _counted(super().call_binop(context, operator, left, right))
