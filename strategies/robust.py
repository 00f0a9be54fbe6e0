"""Hostile clients: which methods the rules of ``[aggregation]`` are for, and what a round does to the updates.

Clipping and Krum act on the round's updates before the server half sees them, so they hold for everything that it does
with them; median and trimmed mean take the place of its average (:func:`strategies.averaging.average`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum

from fedkd.clipping import MODEL, change, clipped, length
from fedkd.config import AggregationSection, Config
from fedkd.errors import UserError
from fedkd.method import Method
from fedkd.payload import Record
from strategies.averaging import MEAN


def check(config: Config, method: Method, state: Record, fewest: int) -> None:
    """Check that the settings of ``[aggregation]`` can be had.

    Args:
        method: the contract under these settings.
        state: the server's state.
        fewest: number of clients that a round may be left with.

    Raises:
        UserError: the method's server does not average models alone, or the rule needs more clients.
    """
    asked, rule = config.aggregation, config.aggregation.rule
    if not (key := key_of(asked)):
        return
    if why := beyond_models(method, state):
        raise UserError(f"{key} is for methods whose server averages models, and {method.name} {why}; leave it out")
    needed, what = 1, ""
    if rule == "median":
        needed = 3
    elif rule in ("krum", "multi-krum"):
        needed, what = 2 * asked.byzantine + 3, f" with aggregation.byzantine = {asked.byzantine}"
    elif rule == "trimmed-mean" and not int(asked.trim * fewest):
        raise UserError(
            f"aggregation.trim = {asked.trim} cuts off nobody of the {fewest} clients of a round; raise it, or take "
            "more clients"
        )
    if fewest < needed:
        whose = "run.clients-per-round" if fewest == config.run.cohort else "run.min-clients"
        raise UserError(f"{key}{what} needs {needed} clients in every round, and {whose} leaves {fewest}; raise it")


def key_of(asked: AggregationSection) -> str:
    """Return the setting that is for servers that average models alone, with its value; nothing without one."""
    if asked.rule != MEAN.rule:
        return f"aggregation.rule = '{asked.rule}'"
    norms = {"clip-norm": asked.clip_norm, "refuse-norm": asked.refuse_norm}
    return next((f"aggregation.{name} = {norm}" for name, norm in norms.items() if norm), "")


def beyond_models(method: Method, state: Record) -> str:
    """Return why averaging models is not all that a method's server does with real numbers of its clients, or nothing.

    The types tell: a model has to travel in both directions, the model has to be all that a client sends but counts,
    and the server must not keep a part for each client of the round.  The counts, and servers that also distil from
    the clients' models, are left to docs/robustness.md.
    """
    sent, received = method.Update.specs(), method.Broadcast.specs()
    if any(name not in sent or sent[name] != received.get(name) for name in MODEL):
        return "averages none"
    if more := [name for name, spec in sent.items() if spec.dtype.is_floating_point and name not in MODEL]:
        return f"also takes its clients' {', '.join(map(repr, more))}"
    if kept := single(method, state):
        return f"keeps its clients' {', '.join(map(repr, kept))} one by one"
    return ""


def single(method: Method, state: Record) -> list[str]:
    """Return the fields in which the server keeps, or sends on, a part for each client of the round."""
    kinds = [type(state), method.Broadcast, method.Update, method.Personal, method.Scoring]
    return [name for kind in kinds if kind for name, spec in kind.specs().items() if "cohort" in spec.shape]


FAR = 1000.0
"""How many times as long as is usual in its round a vector of an update may be, where no setting bounds it: what
clients whose training converges send is within a few times."""


def refused(config: Config, broadcast: Record, updates: Mapping[int, Record]) -> dict[int, str]:
    """Return why updates are refused for their length, by client.

    With ``aggregation.refuse-norm`` that bounds the change of the model.  With no setting of ``[aggregation]`` or
    ``[privacy]`` each vector of an update may be :data:`FAR` times as long as is usual in the round.  The other
    settings have their own way with long updates, and get them all.

    Args:
        broadcast: what the clients started from.
        updates: of the clients that answered.
    """
    asked = config.aggregation
    if most := asked.refuse_norm:
        norms = {client: length(update, broadcast) for client, update in updates.items()}
        said = "the update of client {} changes the model by {:.6g}, and aggregation.refuse-norm = {:g}"
        return {client: said.format(client, norm, most) for client, norm in norms.items() if norm > most}
    if asked != AggregationSection() or config.privacy.on:
        return {}
    return _outsized(broadcast, updates)


def _outsized(broadcast: Record, updates: Mapping[int, Record]) -> dict[int, str]:
    """Return why updates are refused for vectors that are too long beside the others', by client.

    Usual is the median's length, or that of the round's model if it is longer: gradients and the like are short beside
    it, and most clients' may all but vanish.  The round's model is the median's or the one that was sent; where none
    travels, the longest median of any kind is in its place.  Fewer than half of the clients cannot move a median; of
    fewer than three there is none.
    """
    specs = next(iter(updates.values())).specs() if updates else {}
    lengths = {
        name: {client: _length(update, name) for client, update in updates.items()}
        for name, spec in specs.items()
        if spec.dtype.is_floating_point
    }
    medians = {name: statistics.median_low(of.values()) if len(of) > 2 else 0.0 for name, of in lengths.items()}
    model = max(medians.get("parameters", 0.0), _length(broadcast, "parameters"))
    measure = model or max(medians.values(), default=0.0)
    why: dict[int, str] = {}
    for name, of in lengths.items():
        usual = max(medians[name], measure)
        for client, found in of.items():
            if usual and found > FAR * usual:
                said = f"the update of client {client} has {name} of length {found:.3g}, where {usual:.3g} is usual"
                why.setdefault(client, f"{said}: it diverged, or is hostile")
    return why


def _length(record: Record, name: str) -> float:
    """Return the length of a field, zero if there is none of this name."""
    return float(torch.linalg.vector_norm(getattr(record, name, torch.zeros(0))))


def screened(config: Config, broadcast: Record, updates: dict[int, Record]) -> dict[int, Record]:
    """Return the updates that the server half gets, by client: clipped, and those that Krum selects.

    Args:
        broadcast: what the clients started from.
        updates: of the clients that answered, in ascending order.
    """
    aggregation = config.aggregation
    if most := aggregation.clip_norm or config.privacy.clip_norm:
        updates = {client: clipped(update, broadcast, most) for client, update in updates.items()}
    if aggregation.rule not in ("krum", "multi-krum"):
        return updates
    number = 1 if aggregation.rule == "krum" else len(updates) - aggregation.byzantine
    kept = krum(broadcast, updates.values(), aggregation.byzantine, number)
    return {client: update for k, (client, update) in enumerate(updates.items()) if k in kept}


def krum(start: Record, updates: Iterable[Record], byzantine: int, number: int) -> set[int]:
    """Return the positions of the updates nearest to their ``n - f - 2`` nearest ones (Blanchard et al. 2017).

    Flower's selection, on the changes in double precision: it takes distances from ``|a|^2 + |b|^2 - 2 a b``, in which
    the digits of models that are nearly alike, or the range of huge ones, would be lost.

    Args:
        start: what the clients started from.
        byzantine: f.
        number: how many; 1 is Krum, more is Multi-Krum.
    """
    contents = [
        RecordDict({"arrays": ArrayRecord({"change": Array(np.ascontiguousarray(change(update, start).numpy()))})})
        for update in updates
    ]
    selected = {id(one) for one in select_multikrum(contents, byzantine, number)}
    return {k for k, one in enumerate(contents) if id(one) in selected}
