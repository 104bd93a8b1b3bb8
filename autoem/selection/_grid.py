"""The structures of a sweep: a model with some of its keyword arguments set.

In: a model, or several by label, and a grid of keyword arguments. Out: `Structure`s in the order of the grid.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from autoem._errors import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """One entry of a sweep: what it is called, the keyword arguments that it sets, and the model that has them set."""

    label: str
    setting: dict[str, Any]
    model: Callable


def structures(model: Callable | Mapping[str, Callable], grid: Mapping[str, Iterable[Any]] | None) -> list[Structure]:
    """Every combination of the grid's values, for every model.

    Raises:
        DataError: nothing to try, the same structure twice, or a keyword argument that a model does not take.
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    for name, one in models.items():
        if not callable(one):
            raise TypeError(f"select(model={{{name!r}: {one!r}}}): each model must be a NumPyro model, a function")
    if grid is not None and not isinstance(grid, Mapping):
        raise TypeError(f'select(grid={grid!r}): grid must be a dict, such as {{"k": range(1, 7)}}')
    values = {n: listed(n, v) for n, v in (grid or {}).items()}
    out = []
    for (name, one), chosen in itertools.product(models.items(), itertools.product(*values.values())):
        setting = dict(zip(values, chosen, strict=True))
        refuse_unknown(one, setting)
        told = ", ".join([name] * bool(name) + [f"{n}={short(v)}" for n, v in setting.items()])
        out.append(Structure(told, {"model": name, **setting} if name else setting, with_setting(one, setting, told)))
    labels = [s.label for s in out]
    if not out or labels == [""]:
        mend = 'grid={"k": range(1, 7)}, or a dict of models by label'
        raise DataError("grid", problem="there are no structures to try", mend=mend, kind="argument")
    if twice := [n for n in labels if labels.count(n) > 1]:
        mend = "give each value once"
        raise DataError("grid", problem=f"the structure {twice[0]} stands in it twice", mend=mend, kind="argument")
    return out


def listed(name: str, values: Any) -> list[Any]:
    """The values of one keyword argument."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        mend = f'grid={{"{name}": [{values!r}]}}'
        raise DataError(name, problem=f"its values {values!r} are no list", mend=mend, kind="argument")
    return [v.item() if getattr(v, "shape", None) == () and hasattr(v, "item") else v for v in values]


def short(value: Any) -> str:
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def refuse_unknown(model: Callable, setting: Mapping[str, Any]) -> None:
    """Raise where the model takes no keyword argument of a name in the grid."""
    try:
        parameters = inspect.signature(model).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in setting:
        if name not in parameters:
            problem = f"grid= names it, but the model takes {list(parameters)}"
            raise DataError(name, problem=problem, mend="name one of the model's own arguments", kind="argument")


def with_setting(model: Callable, setting: Mapping[str, Any], label: str) -> Callable:
    """The model with keyword arguments set, under its own name and with its own source for messages."""
    chosen: Any = functools.partial(model, **setting)
    chosen.__signature__ = inspect.signature(chosen)
    chosen.__wrapped__ = model
    chosen.__name__ = getattr(model, "__name__", type(model).__name__)
    chosen.label = label
    return chosen
