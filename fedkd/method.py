"""A method is a value: a contract here, a client half in ``clients`` and a server half in ``strategies``.

The three files have one name, and that name is the registered name: ``fedkd/methods/fedgen.py``,
``clients/fedgen.py``, ``strategies/fedgen.py``.  Nothing else has to be edited to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from fedkd.config import Config, HyperParameters, Scalar
from fedkd.errors import UserError, nearest
from fedkd.models import FlatModel
from fedkd.payload import Record


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    authors: str
    title: str
    venue: str
    arxiv: str = ""

    def __str__(self) -> str:
        return f"{self.authors}: {self.title}. {self.venue}" + (f", arXiv {self.arxiv}" if self.arxiv else "")


@dataclass(frozen=True)
class Method:
    """The contract of a method.

    Args:
        name: registered name, equal to the file name.
        summary: one line for ``fedkd methods``.
        hyper: the method's own settings.
        Broadcast: what the server sends to every sampled client.
        Update: what a client returns.
        State: what a client keeps between its participations.
        Personal: what the server sends to one client only, beside the broadcast; None: nothing.
        Scoring: what the server sends to all clients when they are scored; None: the broadcast.
        Sum: what a node may send for all of its clients at once (``run.exchange``), if averaging updates is all that
            the server does with them; None: it needs them one by one.
        groups: clients can be trained several at once (``run.group``): the client half does nothing with a batch but
            step along the mean of losses per row.
        paper: the source; None for a control.
        variants: readings of the paper that ``<name>.variant`` selects.
        extras: ``(hyper, model, classes, streams, device)`` to workspaces beside the model that both halves hold, by
            name; records may use the dimensions ``<name>`` and ``<name>_statistics``.
        sizes: ``(hyper, model)``, the second a :class:`fedkd.models.FlatModel`, to further dimensions of the records;
            ``shared_statistics`` may be among them, when not all BatchNorm statistics are for averaging.
        records: ``(hyper)`` to the record types, by field name above, of a method whose settings choose them.
        defaults: the method's own value of keys in :data:`fedkd.config.LEFT_TO_METHODS`, used when the user gives none.
    """

    name: str
    summary: str
    hyper: type[HyperParameters]
    Broadcast: type[Record]
    Update: type[Record]
    State: type[Record]
    Personal: type[Record] | None = None
    Scoring: type[Record] | None = None
    Sum: type[Record] | None = None
    groups: bool = False
    paper: Paper | None = None
    variants: tuple[str, ...] = ()
    extras: Callable[..., dict[str, FlatModel]] | None = None
    sizes: Callable[..., dict[str, int]] | None = None
    records: Callable[..., dict[str, Any]] | None = None
    defaults: Mapping[str, Scalar] = field(default_factory=dict)

    def under(self, hyper: HyperParameters) -> Method:
        """Return the contract under these settings: with the records that they choose."""
        return replace(self, **self.records(hyper)) if self.records else self


@cache
def names() -> tuple[str, ...]:
    """Return the registered names, found by file name."""
    import fedkd.methods

    return tuple(sorted(m.name for m in pkgutil.iter_modules(fedkd.methods.__path__) if not m.name.startswith("_")))


@cache
def load(name: str) -> Method:
    """Return the contract of a method.

    Raises:
        UserError: no such method.
    """
    if name not in names():
        raise UserError(f"unknown method '{name}'{nearest(name, names())} (known: {', '.join(names())})")
    method: Method = importlib.import_module(f"fedkd.methods.{name}").METHOD
    if method.name != name:
        raise TypeError(f"fedkd/methods/{name}.py registers '{method.name}': file name and method name must agree")
    return method


def check_group(config: Config) -> None:
    """Check that clients can be trained several at once, where that is asked for.

    Raises:
        UserError: not those of this method, or not those of devices, which have one group for each device.
    """
    group, method = config.run.group, load(config.run.method).under(config.hyper)
    if group > 1 and not method.groups:
        able = ", ".join(name for name in names() if load(name).groups)
        raise UserError(f"run.group = {group}: {method.name} trains its clients one by one; take 1, or one of {able}")
    if group > 1 and config.data.partition == "devices":
        raise UserError(f"run.group = {group}: devices train their clients one by one; take 1")
