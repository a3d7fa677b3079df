"""Terms written as in Python, for the command line and YAML files; read from their syntax, never evaluated.

objectives:
  - SoftTargets(temperature=4.0, weight=0.9)
  - LogitStandardization(SoftTargets(temperature=2.0, weight=LinearSchedule(0, 9, until=20 / 240)))
  - "Hint(layers={0.5: 0.5, 1.0: 1.0})"
  - DKD
"""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from . import objectives
from .errors import TransferError
from .objective import Objective
from .weight_schedules import CosineSchedule, LinearSchedule, SigmoidSchedule

Maker = Callable[..., Any]
TERMS: Mapping[str, Maker] = {name: getattr(objectives, name) for name in objectives.__all__}
SCHEDULES: Mapping[str, Maker] = {kind.__name__: kind for kind in (CosineSchedule, LinearSchedule, SigmoidSchedule)}
MAKERS = {**TERMS, **SCHEDULES}
_ARITHMETIC: Mapping[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def terms_from_text(texts: Sequence[str]) -> list[Objective]:
    """Makes the terms that are written, one a text.

    A term is the name of one of `hf_transfer.objectives`, alone (with its defaults) or called. Arguments are literals
    (numbers, `+ - * /` of them, strings, True, False, None, lists, tuples, dicts), schedules such as
    `LinearSchedule(0, 1, until=0.1)`, and for a term that wraps another, that one.

    Args:
        texts: Such as `["SoftTargets(temperature=4.0, weight=0.9)", "DKD"]`.

    Returns:
        The terms, in the order given.

    Raises:
        TransferError: A text is not such a term, its name or an argument's is unknown, or a value is refused; the
            message holds the text, what is valid, and the nearest valid names.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):  # a str is a sequence too
        raise TransferError(
            f"Terms are a list of texts such as ['SoftTargets(temperature=4.0)', 'DKD'], got {texts!r}."
        )
    return [_Reader(text).term() for text in texts]


class _Reader:
    """Reads one text; every complaint starts with it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def term(self) -> Objective:
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self.refusal(f"it cannot be read ({error}). Write it as SoftTargets(temperature=4.0)") from error
        if not isinstance(tree, (ast.Call, ast.Name)):
            raise self.refusal("it is not one term, such as SoftTargets(temperature=4.0) or DKD")
        made = self.made(tree)
        if not isinstance(made, Objective):
            raise self.refusal(f"a schedule is not a term. Terms are {', '.join(TERMS)}")
        return made

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                number = self.number(operand)
                return -number if isinstance(sign, ast.USub) else number
            case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
                return self.arithmetic(node)
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {self.key(key): self.value(value) for key, value in zip(keys, values, strict=True)}
            case ast.Call() | ast.Name():
                return self.made(node)
        raise self.refusal(
            f"{ast.unparse(node)!r} is not a literal (a number, string, True, False, None, list, tuple or dict), a "
            "term or a schedule"
        )

    def key(self, node: ast.expr | None) -> str | float | None:
        value = None if node is None else self.value(node)
        if value is not None and not isinstance(value, (str, int, float)):
            raise self.refusal(f"{value!r} is not a name or a number, as the keys of a dict are here")
        return value

    def arithmetic(self, node: ast.BinOp) -> float:
        try:
            return _ARITHMETIC[type(node.op)](self.number(node.left), self.number(node.right))
        except ArithmeticError as error:
            raise self.refusal(f"{ast.unparse(node)!r} has no value: {error}") from error

    def number(self, node: ast.expr) -> float:
        value = self.value(node)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refusal(f"{ast.unparse(node)!r} is not a number")
        return value

    def made(self, node: ast.Call | ast.Name) -> Any:
        """The term or the schedule of a name, or of a call of one."""
        function = node.func if isinstance(node, ast.Call) else node
        name = ast.unparse(function)
        if name not in MAKERS:
            raise self.refusal(
                f"{name!r} is neither a term nor a schedule{_nearest(name, MAKERS)}. Terms are {', '.join(TERMS)}; "
                f"schedules {', '.join(SCHEDULES)}; texts such as 'last' need quotes"
            )
        maker = MAKERS[name]
        given = node if isinstance(node, ast.Call) else ast.Call(function, [], [])
        signature = inspect.signature(maker)
        arguments = self.arguments(name, given, signature)
        try:
            return maker(*arguments.args, **arguments.kwargs)
        except TransferError as error:
            raise self.refusal(str(error)) from error
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # of a value of the wrong type or size
            raise self.refusal(f"{error}. It is {_shown(name, signature)}") from error

    def arguments(self, name: str, call: ast.Call, signature: inspect.Signature) -> inspect.BoundArguments:
        """What the call passes, by parameter; each must be one, and may be a term or a schedule where it takes one."""
        takes = _shown(name, signature)
        keywords: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise self.refusal("arguments are written out, as in SoftTargets(temperature=4.0), not with **")
            if keyword.arg not in signature.parameters:
                near = _nearest(keyword.arg, signature.parameters)
                raise self.refusal(f"{name} has no argument {keyword.arg!r}{near}. It is {takes}")
            if keyword.arg in keywords:
                raise self.refusal(f"{name} is given {keyword.arg!r} twice")
            keywords[keyword.arg] = self.value(keyword.value)
        try:
            bound = signature.bind(*map(self.value, call.args), **keywords)
        except TypeError as error:
            raise self.refusal(f"{name}: {error}. It is {takes}") from error
        for parameter, value in bound.arguments.items():
            kind = _kind(value)
            if kind is not None and kind not in str(signature.parameters[parameter].annotation):
                raise self.refusal(f"{parameter!r} of {name} takes no {kind.lower()}. It is {takes}")
        return bound

    def refusal(self, why: str) -> TransferError:
        return TransferError(f"The term {self.text!r}: {why.removesuffix('.')}.")


def _shown(name: str, signature: inspect.Signature) -> str:
    """SoftTargets(temperature: float | Schedule = 4.0, ...)"""
    parameters = [str(parameter).replace("'", "") for parameter in signature.parameters.values()]
    return f"{name}({', '.join(parameters)})"


def _kind(value: Any) -> str | None:
    """How an annotation calls a value that was called: `LogitTerm`, `float | Schedule`; None for literals."""
    if isinstance(value, Objective):
        return "Term"
    return "Schedule" if type(value) in SCHEDULES.values() else None


def _nearest(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3)
    return f" (did you mean {' or '.join(by_lower[found] for found in near)}?)" if near else ""
