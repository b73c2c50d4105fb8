"""What a PromQL expression selects, and by which functions, found on its syntax tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser

_OPERATORS = {"Equal": "=", "NotEqual": "!=", "Re": "=~", "NotRe": "!~"}


@dataclass(frozen=True)
class Selector:
    """One vector selector: its metric, matchers as (label, operator, value), and what stands around it."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]
    #: Range in seconds, or None for an instant vector.
    range: float | None
    #: The functions and aggregations around it, the nearest first.
    around: tuple[str, ...]


def parse(expression: str) -> Any:
    return promql_parser.parse(expression)


def selectors(expression: str) -> list[Selector]:
    return list(_selectors(parse(expression), ()))


def _selectors(node: Any, around: tuple[str, ...]) -> Iterator[Selector]:
    kind = type(node).__name__
    if kind == "VectorSelector":
        yield _selector(node, None, around)
    elif kind == "MatrixSelector":
        yield _selector(node.vector_selector, node.range.total_seconds(), around)
    elif kind == "Call":
        for argument in node.args:
            yield from _selectors(argument, (node.func.name, *around))
    elif kind == "AggregateExpr":
        yield from _selectors(node.expr, (str(node.op), *around))
        if node.param is not None:
            yield from _selectors(node.param, around)
    elif kind == "BinaryExpr":
        yield from _selectors(node.lhs, around)
        yield from _selectors(node.rhs, around)
    elif kind in ("ParenExpr", "UnaryExpr", "SubqueryExpr"):
        yield from _selectors(node.expr, around)
    elif kind not in ("NumberLiteral", "StringLiteral"):
        raise AssertionError(f"unknown node {kind}")


def _selector(node: Any, range_: float | None, around: tuple[str, ...]) -> Selector:
    matchers = [(m.name, _OPERATORS[str(m.op).rpartition(".")[2]], m.value) for m in node.matchers.matchers]
    for alternatives in node.matchers.or_matchers:
        matchers += [(m.name, _OPERATORS[str(m.op).rpartition(".")[2]], m.value) for m in alternatives]
    name = node.name or next((value for label, _, value in matchers if label == "__name__"), "")
    return Selector(name, tuple(matchers), range_, around)


def available(expression: str, labels_of: Callable[[str], set[str]]) -> set[str]:
    """Labels of an expression's result; raises where it groups or joins by a label that is not there.

    ``labels_of`` says which labels the series of a metric may carry.
    """
    return _available(parse(expression), labels_of)


def _available(node: Any, labels_of: Callable[[str], set[str]]) -> set[str]:
    kind = type(node).__name__
    if kind in ("VectorSelector", "MatrixSelector"):
        selector = next(_selectors(node, ()))
        carried = labels_of(selector.metric)
        _need({label for label, _, _ in selector.matchers} - {"__name__"}, carried, selector.metric)
        return carried
    if kind == "AggregateExpr":
        below = _available(node.expr, labels_of)
        if node.modifier is None:
            return set() if str(node.op) != "topk" else below
        _need(set(node.modifier.labels), below, f"{node.op} by")
        return below if str(node.op) == "topk" else set(node.modifier.labels)
    if kind == "BinaryExpr":
        left, right = _available(node.lhs, labels_of), _available(node.rhs, labels_of)
        if node.modifier is None:
            return left or right
        if node.modifier.matching is not None:
            _need(set(node.modifier.matching.labels), left, "on, left")
            _need(set(node.modifier.matching.labels), right, "on, right")
        _need(set(node.modifier.group_labels or ()), right, "group_left")
        many_right = str(node.modifier.card).endswith("OneToMany")
        return (right if many_right else left) | set(node.modifier.group_labels or ())
    if kind == "Call":
        below = set().union(*(_available(each, labels_of) for each in node.args))
        if node.func.name == "histogram_quantile":
            _need({"le"}, below, node.func.name)
            return below - {"le"}
        texts = [each.val for each in node.args if type(each).__name__ == "StringLiteral"]
        if node.func.name == "label_replace":
            _need({texts[2]}, below, node.func.name)
            return below | {texts[0]}
        if node.func.name == "label_join":
            _need(set(texts[2:]), below, node.func.name)
            return below | {texts[0]}
        return below
    if kind in ("ParenExpr", "UnaryExpr", "SubqueryExpr"):
        return _available(node.expr, labels_of)
    return set()


def _need(wanted: set[str], carried: set[str], where: str) -> None:
    if not wanted <= carried:
        raise LookupError(f"{where}: no label {', '.join(sorted(wanted - carried))}")
