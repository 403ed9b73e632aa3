# ruff: noqa: N802, N815 - jinja's visitor finds a method by the name of the node's class
"""The environment in which chat templates run: the names of transformers', and a meter at everything that costs.

A template is rewritten before it is compiled, so that nothing is computed around the meter: what it prints, its loops
and macros, comparisons, joined texts, slices and lists become calls of filters that have no name in the language.
Operators, calls, filters and tests are intercepted where jinja offers it. Constants are not folded: compiling a
template computes nothing of it.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (a template computes with values of any kind: isinstance tells a container's class, never what is in it)

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial, update_wrapper
from types import BuiltinMethodType, CodeType, MethodType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from pocketmoe.chat_template import costs
from pocketmoe.chat_template.meter import CURRENT, MAX_INTEGER_BITS, LimitExceeded

MAX_NODES = 20_000  # of a template's tree; the largest known have about 5,000
MAX_CODE = 400_000  # characters of Python that a template becomes: compiling takes 100 bytes for each, and 20 us
_NODES_PER_STEP = 16  # of a loop's body; what costs more is counted where it happens
_AT_ONCE = {"dictsort", "groupby", "join", "max", "min", "sort", "sum"}  # filters that pull all of an iterator
_NUMBER = re.compile(r"\d+")


class GenerationTag(Extension):
    """{% generation %} marks what an assistant said, for training; here it only has to be understood."""

    tags = {"generation"}  # noqa: RUF012 ; jinja's own protocol

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("render_body"), [], [], body).set_lineno(line)

    def render_body(self, caller: Macro) -> str:
        return caller()


class TemplateNamespace(Namespace):
    """Variables that outlive a loop. Names with an underscore are refused, as by transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may set a variable `self`
        names = dict(*args[1:], **kwargs)
        for name in names:
            _refuse_private(name)
        Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        """Its values may be shared by many, and are not known to the meter: each is counted when it is printed."""
        meter = CURRENT.get()
        meter.work(16)
        attributes = object.__getattribute__(self, "_Namespace__attrs")
        meter.allow(costs.written(meter, [*attributes.values()]))
        text = Namespace.__repr__(self)
        meter.produce(len(text))
        return text


class TemplateDict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name[:40]!r}")


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja's own, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_tojson.__name__ = "tojson"
_strftime_now.__name__ = "strftime_now"
_raise_exception.__name__ = "raise_exception"


class _Metering(NodeTransformer):
    """Rewrites a template's tree so that nothing large happens without the meter."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.MarkSafeIfAutoescape(nodes.Const(node.data))  # which is printed by `finalize`

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), "meter:concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "meter:weigh", nodes.Const(False))
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "meter:weigh", nodes.Const(operand.op in {"in", "notin"}))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        parts = (part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step))
        return _filtered(node.node, "meter:slice", *parts)

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node, nodes.Dict):
            for pair in node.items:
                pair.key = _filtered(pair.key, "meter:weigh", nodes.Const(False))
        return node if getattr(node, "ctx", "load") != "load" else _filtered(node, "meter:literal")

    visit_Tuple = visit_Dict = visit_List

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._count_body(node)
        if node.test is not None:
            size = sum(1 for _ in node.test.find_all(nodes.Node))
            step = _filtered(nodes.Const(1 + size // _NODES_PER_STEP), "meter:step")
            node.test = nodes.And(step, node.test)
        return node

    def _count_body(self, node: nodes.Node) -> nodes.Node:
        size = sum(1 for _ in node.find_all(nodes.Node))
        self.generic_visit(node)
        step = _filtered(nodes.Const(1 + size // _NODES_PER_STEP), "meter:step")
        node.body.insert(0, nodes.ExprStmt(step))  # pyright: ignore[reportAttributeAccessIssue]
        return node

    visit_Macro = visit_CallBlock = visit_Block = _count_body


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None)


@pass_context
def _concat(context: Context, values: Sequence[Any]) -> str:
    meter = CURRENT.get()
    meter.work(1)
    meter.allow(costs.written(meter, values))
    text = (markup_join if context.eval_ctx.autoescape else str_join)(values)
    return meter.keep(text)


@pass_context
def _weigh(context: Context, value: Any, looked_into: bool) -> Any:
    """Count an operand of a comparison, all of which may be compared; of a mapping right of `in` only a key is."""
    del context
    meter = CURRENT.get()
    if looked_into and isinstance(value, dict):
        meter.work(1)
    else:
        costs.linear(meter, (value,))
    return value


@pass_context
def _slice(context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
    del context
    meter = CURRENT.get()
    part = slice(start, stop, step)
    length = len(range(*part.indices(len(value)))) if isinstance(value, str | bytes | list | tuple) else 0
    meter.work(1 + length // 256)
    meter.allow(8 * length)
    return meter.keep(value[part])


@pass_context
def _literal(context: Context, value: Any) -> Any:
    del context
    meter = CURRENT.get()
    meter.work(1)
    meter.produce(64 + 16 * len(value))
    meter.size(value)
    return value


@pass_context
def _step(context: Context, steps: int) -> int:
    del context
    CURRENT.get().work(steps)
    return steps


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Count what is printed twice: as a piece, and as part of the text that the pieces are joined to."""
    meter = CURRENT.get()
    meter.work(1)
    if not isinstance(value, str):
        meter.allow(costs.written(meter, (value,)))
        value = str(value)
    size = meter.size(value).nbytes
    meter.produce(64 + 2 * size + (costs.WRITTEN * size if context.eval_ctx.autoescape else 0))
    return value


def _metered(cost: costs.Cost, at_once: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter or test, with its cost counted first. That it wants the context keeps it from being folded."""
    wants = getattr(function, "jinja_pass_arg", None)

    def metered(context: Context, *args: Any, **kwargs: Any) -> Any:
        meter = CURRENT.get()
        if at_once and args and isinstance(args[0], Iterator):
            args = ([*args[0]], *args[1:])
        meter.allow(cost(meter, (*args, *kwargs.values())))
        first = () if wants is None else (_passed(wants.name, context),)
        result = function(*first, *args, **kwargs)
        return result if any(result is arg for arg in args) else meter.keep(result)

    return pass_context(update_wrapper(metered, function, assigned=("__name__", "__doc__"), updated=()))


def _passed(name: str, context: Context) -> Any:
    return {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[name]


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with the meter of `CURRENT` at everything that costs.

    Raises LimitExceeded, and whatever a template's mistakes raise in Python.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            optimized=False,
            finalize=_finalize,
        )
        self.filters["tojson"] = _tojson
        self.filters = {
            name: _metered(costs.FILTERS.get(name, costs.unknown), name in _AT_ONCE, function)
            for name, function in self.filters.items()
        }
        self.filters |= {
            "meter:concat": _concat,
            "meter:literal": _literal,
            "meter:slice": _slice,
            "meter:step": _step,
            "meter:weigh": _weigh,
        }
        self.tests = {
            name: _metered(costs.TESTS.get(name, costs.unknown), at_once=False, function=function)
            for name, function in self.tests.items()
        }
        del self.globals["lipsum"]  # random text of any length; no chat needs it
        self.globals |= {
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        if sum(1 for _ in tree.find_all(nodes.Node)) > MAX_NODES:
            raise LimitExceeded(f"it has more than {MAX_NODES:,} parts")
        tree = _Metering().visit(tree)
        return tree.set_lineno(1).set_environment(self)

    def _compile(self, source: str, filename: str) -> CodeType:
        if len(source) > MAX_CODE:
            raise LimitExceeded(f"it becomes more than {MAX_CODE:,} characters of code")
        return super()._compile(source, filename)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            costs.linear(CURRENT.get(), argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        del context
        meter = CURRENT.get()
        meter.work(1)
        if isinstance(left, int) and isinstance(right, int):
            if operator == "**" and abs(left) > 1:
                meter.allow(0 if left.bit_length() * right <= 2 * MAX_INTEGER_BITS else 1 << 62)
        elif operator == "*":
            sequence, times = (left, right) if isinstance(right, int) else (right, left)
            bound = meter.size(sequence).nbytes * max(0, times) if isinstance(times, int) else 0
            meter.work(bound // 1024)
            meter.allow(bound)
        elif operator == "%":
            meter.allow(costs.formatted(meter, (left, right)))
        else:
            meter.allow(costs.linear(meter, (left, right)))
        return meter.keep(self.binop_table[operator](left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = CURRENT.get()
        meter.work(1)
        cost, subject = _cost_of_call(obj)
        if cost is not None:
            if subject and getattr(obj, "__name__", "") == "join":
                args = tuple([*arg] if isinstance(arg, Iterator) else arg for arg in args)
            values = [value for name, value in kwargs.items() if name not in {"_loop_vars", "_block_vars"}]
            meter.allow(cost(meter, (*subject, *args, *values)))
        return meter.keep(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        return update_wrapper(partial(_format, self, value.__self__, value.__name__ == "format_map"), value)


def _cost_of_call(called: Any) -> tuple[costs.Cost | None, tuple[Any, ...]]:
    """What a call costs, and the object whose method it is. None: what it does is itself made of metered operations."""
    if isinstance(called, Macro | BlockReference | LoopContext):
        return None, ()
    name = getattr(called, "__name__", type(called).__name__)
    if isinstance(called, BuiltinMethodType | MethodType):
        if isinstance(called.__self__, GenerationTag | BlockReference | LoopContext) and name != "changed":
            return None, ()
        return costs.METHODS.get(name, costs.unknown), (called.__self__,)
    if isinstance(called, partial):
        return costs.METHODS["format"], ()
    known = {"TemplateNamespace": "namespace", "TemplateDict": "dict", "safe_range": "range"}
    known |= {"Cycler": "cycler", "Joiner": "joiner"}
    return costs.FUNCTIONS.get(known.get(name, name), costs.unknown), ()


def _format(environment: MeteredEnvironment, text: str, by_map: bool, /, *args: Any, **kwargs: Any) -> str:
    """`str.format` and `str.format_map`: each field is counted as it is made."""
    if by_map:
        if kwargs or len(args) != 1:
            raise TypeError("format_map() takes exactly one argument")
        args, kwargs = (), args[0]
    meter = CURRENT.get()
    meter.work(1 + len(text) // 16)
    kind = _EscapedFields if isinstance(text, Markup) else _Fields
    options: dict[str, Any] = {"escape": text.escape} if isinstance(text, Markup) else {}
    return type(text)(kind(environment, **options).vformat(text, args, kwargs))


class _Fields(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        meter = CURRENT.get()
        wide = sum(int(digits) if len(digits) < 16 else 1 << 60 for digits in _NUMBER.findall(format_spec))
        meter.allow(costs.written(meter, (value,)) + 4 * wide)
        return meter.keep(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is None:
            return value
        meter = CURRENT.get()
        meter.allow(costs.written(meter, (value,)))
        return meter.keep(super().convert_field(value, conversion))


class _EscapedFields(_Fields, SandboxedEscapeFormatter):
    """The same for a text that is safe in HTML."""
