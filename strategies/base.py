"""The one Flower strategy: it runs any method's server half, and does everything that is not the method.

Sampling by client number from the seed, spreading clients over nodes, checking what comes back, processing it in
client order, byte counts and results: here and nowhere else.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, Metadata, MetricRecord
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedkd import protocol
from fedkd.checkpoints import Checkpoint, state_hash
from fedkd.config import Config
from fedkd.data import FederatedData
from fedkd.data.devices import Federation
from fedkd.errors import UserError
from fedkd.known import Known
from fedkd.method import Method, load
from fedkd.payload import PayloadError, Record, declared_bytes, pack, unpack, wire_bytes
from fedkd.results import Recorder, merge_rows
from fedkd.setup import Setup
from fedkd.sums import in_use, mean
from strategies import privacy, robust

_log = logging.getLogger("flwr")

Metrics = dict[str, tuple[float, float]]
"""Name to (sum, weight); the mean is sum / weight."""


class RoundError(RuntimeError):
    """A round that cannot be completed; the message names the clients and says why."""


class FederatedStrategy(Strategy):
    """A method as a Flower strategy.

    Args:
        setup: configuration, workspaces and sizes.
        half: the module with the method's server half.
        costs: relative cost of training each client ``[clients]``, for spreading them over nodes.
        known: what clients hold, with which their replies are compared.
        recorder: where results go; None keeps none.
        hosts: on devices, the node that hosts each client; None: every node can train every client.
    """

    run_name = ""
    """On devices, what they call the run."""

    def __init__(
        self,
        setup: Setup,
        half: ModuleType,
        costs: Sequence[float],
        known: Known,
        recorder: Recorder | None = None,
        hosts: Sequence[int] | None = None,
    ) -> None:
        self.setup, self.half, self.recorder, self.hosts = setup, half, recorder, hosts
        self.known = known
        self.method = load(setup.config.run.method).under(setup.config.hyper)
        self._config = json.dumps(setup.config.flat(), sort_keys=True)
        self.costs = list(costs)
        self.state: Record = half.init(setup)
        self._sum = self.method.Sum if in_use(setup.config, self.method) else None
        self._drops = drops(setup.config, self.method, self.state)
        run = setup.config.run
        robust.check(setup.config, self.method, self.state, run.min_clients if self._drops else run.cohort)
        privacy.check(setup, self.method, half)
        self._dropped: list[dict[str, Any]] = []  # of the round under way
        self._before = 0  # rounds that were done before `start`, which counts from 1
        self._versions: dict[int, int] = {}  # by client, the last round whose update counts
        self._asked: list[tuple[Metadata, list[int]]] = []  # orders under way, which get their names when they are sent
        self._cohort: list[int] = []
        self._scores: frozenset[str] = frozenset()  # what rows of scores say
        self._broadcast: Record = self.state  # of the round under way
        self._bytes_down: dict[int, int] = {}
        self._began = 0.0
        self._row: dict[str, Any] = {}

    def resume(self, checkpoint: Checkpoint) -> int:
        """Go on after a checkpoint; return how many rounds are left, for ``start``."""
        self._before, self.state, self._versions = checkpoint.round, checkpoint.state, dict(checkpoint.versions)
        return self.setup.config.run.rounds - self._before

    def summary(self) -> None:
        """Log nothing: the configuration is in the run's folder."""

    def cohort(self, round: int) -> list[int]:
        """Return the clients of a round, sampled without replacement, in ascending order."""
        run = self.setup.config.run
        if run.cohort == run.clients:
            return list(range(run.clients))
        drawn = self.setup.streams.numpy("cohort", round).choice(run.clients, run.cohort, replace=False)
        return sorted(map(int, drawn))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Order the round's cohort to train."""
        self._began = time.perf_counter()
        round = self._before + server_round
        if round == 1 and "parameters" in arrays and "parameters" in self.state.specs():
            self._start_from(arrays)
        self._cohort = self.cohort(round)
        broadcast = self._broadcast = self.half.broadcast(self.setup, self.state, round)
        broadcast.check(self.setup.sizes, "the server")
        personal = self._personal(round)
        self._bytes_down = {
            client: wire_bytes(broadcast) + (wire_bytes(personal[client]) if personal else 0) for client in self._cohort
        }
        return self._orders(MessageType.TRAIN, round, self._cohort, broadcast, grid, personal)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the updates, hand them to the server half in client order, and write the round down."""
        round = self._before + server_round
        config, rows = self.setup.config, list[protocol.Row]()
        updates: dict[int, Record] = {}  # by client; a sum by the first of its clients
        self._dropped = []

        def read(clients: list[int], reply: Message, said: list[protocol.Row]) -> None:
            updates.update(self._sum_of(clients, reply) if self._sum else self._updates_of(clients, reply))
            rows.extend(said)

        self._collect(MessageType.TRAIN, replies, read)
        long = {} if self._sum else robust.refused(config, self._broadcast, updates)
        for client, why in long.items():
            self._drop(MessageType.TRAIN, [client], PayloadError(why))
            del updates[client]
            rows = [row for row in rows if row["client"] != client]
        self._enough(len(rows), len(self._cohort))
        bytes_up = declared_bytes(self.method.Update, self.setup.sizes)
        for row in rows:
            row |= {"bytes_down": self._bytes_down[row["client"]], "bytes_up": bytes_up}
        arrived = time.perf_counter()
        answered = sorted(row["client"] for row in rows)
        self._versions |= dict.fromkeys(answered, round)
        if self._sum:
            given, selected = [mean(config, list(updates.values()), self.method.Update)], answered
        else:
            taken = robust.screened(config, self._broadcast, {client: updates[client] for client in answered})
            given, selected = list(taken.values()), list(taken)
        state, metrics = self.half.update(self.setup, self.state, given, round)
        self.state = privacy.noised(self.setup, state, round).check(self.setup.sizes, "the server")
        done = time.perf_counter()
        self._row = {"round": round, "clients": answered, "state": state_hash(self.state)}
        if len(selected) < len(answered):
            self._row["selected"] = selected
        self._row |= privacy.spent(config, round, self.cohort)
        for name, (total, weight) in metrics.items():
            self._row[f"{name}_sum"], self._row[f"{name}_weight"] = total, weight
        self._row |= {"seconds_train": arrived - self._began, "seconds_server": done - arrived}
        if self.recorder:
            self.recorder.write("clients", merge_rows(rows, {"round": round}))
        loss = sum(r["loss_sum"] for r in rows) / max(sum(r["loss_weight"] for r in rows), 1)
        return self._arrays(), MetricRecord({"loss": float(loss)})

    def _updates_of(self, clients: list[int], reply: Message) -> dict[int, Record]:
        """Return the updates that a node sent, by client."""
        owners = [f"client {client}" for client in clients]
        records = unpack(self.method.Update, protocol.arrays(reply, "updates"), self.setup.sizes, owners)
        for client, record in zip(clients, records, strict=True):
            if (said := int(getattr(record, "client", client))) != client:
                raise PayloadError(f"the update of client {client} is for client {said}")
            self.known.check(self.setup.check_variances(record, f"client {client}"), [client])
        return dict(zip(clients, records, strict=True))

    def _sum_of(self, clients: list[int], reply: Message) -> dict[int, Record]:
        """Return the sum that a node sent for all of its clients, under the first of them."""
        assert self._sum is not None
        owner = f"clients {listed(clients)}"
        [total] = unpack(self._sum, protocol.arrays(reply, "updates"), self.setup.sizes, [owner])
        if (said := int(total.tensors()["clients"])) != len(clients):
            raise PayloadError(f"the sum of {owner} is of {said}")
        self.known.check(self.setup.check_variances(total, owner), clients)
        return {clients[0]: total}

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Order all clients to be scored, every ``run.eval-every`` rounds and at the end."""
        run, round = self.setup.config.run, self._before + server_round
        if round % run.eval_every and round != run.rounds:
            return []
        sent = self.half.scoring if self.method.Scoring else self.half.broadcast
        broadcast = sent(self.setup, self.state, round)
        return self._orders(MessageType.EVALUATE, round, range(run.clients), broadcast, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Write the scores down; the round is done, and the run can go on after it if a checkpoint is due."""
        run, round = self.setup.config.run, self._before + server_round
        began, rows = self._began, list[protocol.Row]()
        self._collect(MessageType.EVALUATE, replies, lambda _, __, said: rows.extend(said))
        rows = self._alike(rows)
        if self._dropped:
            self._row["dropped"] = sorted(
                self._dropped, key=lambda each: (each["exchange"] != "train", each["clients"])
            )
        seconds = time.perf_counter() - began
        self._row |= {
            "seconds_evaluate": seconds - self._row["seconds_train"] - self._row["seconds_server"],
            "seconds": seconds,
        }
        if self.recorder:
            self.recorder.write("evaluations", merge_rows(rows, {"round": round}))
            self.recorder.write("rounds", [self._row])
            if round % run.checkpoint_every == 0 and round < run.rounds:
                self.recorder.checkpoint(round, self.state)
        scored = [row for row in rows if row["total"]]
        if not scored:
            return None
        correct = [row.get("personal_correct", row.get("global_correct", 0)) / row["total"] for row in scored]
        return MetricRecord({"accuracy": float(np.mean(correct))})

    def _alike(self, rows: list[protocol.Row]) -> list[protocol.Row]:
        """Return the rows that score the models that most did at first; honest clients score the same ones.

        Of two equally frequent kinds of rows it is that of the lowest client, whichever node answered first.
        """
        rows = sorted(rows, key=lambda row: int(row["client"]))
        if not self._scores and rows:
            [(self._scores, _)] = Counter(map(frozenset, rows)).most_common(1)
        for row in rows:
            if row.keys() != self._scores:
                said = f"client {row['client']} says {', '.join(row)}, and others {', '.join(sorted(self._scores))}"
                self._drop(MessageType.EVALUATE, [row["client"]], PayloadError(said))
        return [row for row in rows if row.keys() == self._scores]

    def _personal(self, round: int) -> dict[int, Record]:
        """Return what each client of the cohort gets for itself alone; empty for methods without."""
        if self.method.Personal is None:
            return {}
        if hasattr(self.half, "personals"):  # all at once, where that is cheaper than one by one
            records = self.half.personals(self.setup, self.state, round, self._cohort)
        else:
            records = [self.half.personal(self.setup, self.state, round, client) for client in self._cohort]
        checked = [record.check(self.setup.sizes, "the server") for record in records]
        return dict(zip(self._cohort, checked, strict=True))

    def _orders(
        self,
        kind: str,
        round: int,
        clients: Iterable[int],
        broadcast: Record,
        grid: Grid,
        personal: Mapping[int, Record] | None = None,
    ) -> list[Message]:
        """Write one order for each node that has clients to train or to score."""
        if self.hosts is None:
            group = self.setup.config.run.group if kind == MessageType.TRAIN else 1
            spread = self._spread(clients, self._nodes(grid), group)
        else:
            spread = self._hosted(clients, self.hosts)
        packed = pack([broadcast])
        orders = []
        self._asked = []
        for node, mine in ((node, sorted(mine)) for node, mine in spread.items() if mine):
            own = pack([personal[client] for client in mine]) if personal else None
            order = Message(
                protocol.order(self._config, round, mine, self.versions(mine), packed, own, self.run_name),
                dst_node_id=node,
                message_type=kind,
                # Flower lets whoever guesses a device's message answer it
                group_id=str(round) if self.hosts is None else f"{round}-{secrets.token_hex(16)}",
                ttl=None if self.hosts is None else self.setup.config.run.timeout,  # a late device skips what is over
            )
            orders.append(order)
            self._asked.append((order.metadata, mine))
        return orders

    def versions(self, clients: Iterable[int]) -> list[int]:
        """Return, for each client, the round that its state is to be from: the last whose update counts; 0: none."""
        return [self._versions.get(client, 0) for client in clients]

    def _spread(self, clients: Iterable[int], nodes: Sequence[int], size: int = 1) -> dict[int, list[int]]:
        """Spread groups of clients over the nodes, longest first.

        Every ``size`` clients in ascending order are a group, so that who is trained with whom does not depend on the
        nodes.  Only the last one may be smaller, and it is the last of its node too, so that the node finds the same.
        """
        load: dict[int, float] = dict.fromkeys(nodes, 0.0)
        spread: dict[int, list[int]] = {node: [] for node in nodes}
        ordered = sorted(clients)
        groups = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        costs = {group[0]: sum(self.costs[client] for client in group) for group in groups}
        for group in sorted(groups, key=lambda g: (-costs[g[0]], g)):
            node = min(nodes, key=lambda n: load[n])
            spread[node] += group
            load[node] += costs[group[0]]
        return spread

    @staticmethod
    def _hosted(clients: Iterable[int], hosts: Sequence[int]) -> dict[int, list[int]]:
        """Leave every client where it is."""
        spread: dict[int, list[int]] = {}
        for client in clients:
            spread.setdefault(hosts[client], []).append(client)
        return spread

    def _collect(
        self,
        exchange: str,
        replies: Iterable[Message],
        read: Callable[[list[int], Message, list[protocol.Row]], None],
    ) -> None:
        """Read the answer of every node that was asked, and leave out, or fail for, those that have none.

        Args:
            exchange: what was asked.
            replies: what arrived; what was not asked for, or is answered already, does not count.
            read: takes the clients, the reply and its rows of a node; a ``PayloadError`` counts as no answer.

        Raises:
            RoundError: a node failed or did not answer, or with ``run.on-failure = "drop"`` too many did.
            PayloadError: what a node answered is not what was asked for.
        """
        asked = {metadata.message_id: clients for metadata, clients in self._asked}
        answered, left, self._asked = 0, sum(map(len, asked.values())), []
        for reply in replies:
            clients = asked.pop(reply.metadata.reply_to_message_id, None)
            if clients is None:
                continue
            try:
                if reply.has_error():
                    said = _said(reply.error)
                    raise RoundError(f"clients {listed(clients)} failed: {said}")
                rows, failed = protocol.read_rows(reply, exchange), protocol.read_failed(reply)
                served = [client for client in clients if client not in failed]
                if [row["client"] for row in rows] != served or not failed.keys() <= set(clients):
                    raise PayloadError("it is for other clients")
                for row in rows:
                    self.known.check_row(row)
                if served:
                    read(served, reply, rows)
                answered += len(served)
            except PayloadError as error:
                self._drop(exchange, clients, PayloadError(f"the reply for clients {listed(clients)}: {error}"))
            except RoundError as error:
                self._drop(exchange, clients, error)
            else:
                for client, why in failed.items():
                    self._drop(exchange, [client], RoundError(f"client {client} failed: {why}"))
        if late := sorted(client for clients in asked.values() for client in clients):
            self._drop(exchange, late, RoundError(f"clients {listed(late)} did not answer in time"))
        self._enough(answered, left)

    def _enough(self, answered: int, asked: int) -> None:
        """Compare how many clients of an exchange count with ``run.min-clients``.

        Raises:
            RoundError: there are too few; it says why each of the others does not count.
        """
        if answered < (fewest := min(self.setup.config.run.min_clients, asked)):
            whys = "; ".join(each["why"] for each in self._dropped)
            raise RoundError(f"{answered} of {asked} clients answered, and run.min-clients = {fewest}: {whys}")

    def _drop(self, exchange: str, clients: list[int], error: Exception) -> None:
        """Go on without some clients, or raise the error where that is not wanted."""
        if not self._drops:
            raise error
        self._dropped.append({"exchange": exchange, "clients": clients, "why": str(error)})
        _log.warning("fedkd: going on without clients %s: %s", listed(clients), error)

    def _nodes(self, grid: Grid) -> list[int]:
        """Return the nodes, waiting for the first to appear."""
        deadline = time.monotonic() + 60
        while not (nodes := sorted(grid.get_node_ids())):
            if time.monotonic() > deadline:
                raise RoundError("no node appeared within 60 seconds")
            time.sleep(0.02)
        return nodes

    def _start_from(self, arrays: ArrayRecord) -> None:
        """Take the global model that the caller of ``start`` gave."""
        tensors = self.state.tensors() | {"parameters": torch.from_numpy(np.array(arrays["parameters"].numpy()))}
        self.state = type(self.state)(**tensors).check(self.setup.sizes, "initial_arrays")

    def _arrays(self) -> ArrayRecord | None:
        """Return the global model for Flower's ``Result``."""
        tensors = self.state.tensors()
        if "parameters" not in tensors:
            return None
        return ArrayRecord({"parameters": Array(tensors["parameters"].numpy())})


def build(
    config: Config,
    data: FederatedData | Federation,
    device: torch.device | str = "cpu",
    recorder: Recorder | None = None,
) -> FederatedStrategy:
    """Return the strategy of the configured method.

    Args:
        config: the run's configuration; ``config.run.method`` names the method.
        data: the federated data set; the server uses the number of clients, sizes and shapes, and of the images only
            those that were set aside, without labels (``data.public-fraction``); what is known of it, on devices.
        device: where the server half computes.
        recorder: where results go; None keeps none.
    """
    setup = Setup.build(config, data.shape, data.classes, torch.device(device), data.public(device))
    half = importlib.import_module(f"strategies.{config.run.method}")
    sizes = data.sizes()
    costs = np.minimum(sizes, config.train.batch_size) if config.train.local_steps else sizes
    hosts = data.nodes if isinstance(data, Federation) else None
    known = Known(data.class_counts("train"), data.class_counts("test"), config.train)
    return FederatedStrategy(setup, half, [float(c) for c in costs], known, recorder, hosts)


def drops(config: Config, method: Method, state: Record) -> bool:
    """Return whether a round goes on without clients that do not answer (``run.on-failure``).

    Args:
        method: the contract under these settings.
        state: the server's state.

    Raises:
        UserError: it is asked for, and the method, or privacy, needs an update from every client of the cohort.
    """
    wanted = config.run.on_failure
    needs_all = config.privacy.on or bool(robust.single(method, state))
    if needs_all and wanted == "drop":
        who = "privacy" if config.privacy.on else method.name
        raise UserError(f"run.on-failure = 'drop': {who} needs an update from every client of a round; take fail")
    return wanted == "drop" or (wanted == "auto" and config.data.partition == "devices" and not needs_all)


SILENT = {
    ErrorCode.MESSAGE_UNAVAILABLE: "no answer in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no answer in time",
    ErrorCode.NODE_UNAVAILABLE: "the node is gone, it gives no sign of life",
}
"""What Flower means by errors that it raises itself."""


def _said(error: Error) -> str:
    """Return what the client said: the line that names it, out of the traces that Ray and Flower wrap around it."""
    if error.code in SILENT:
        return SILENT[error.code]
    reason = error.reason or "no reason given"
    named = re.findall(r"ClientError(?:: |'>:<')(client .*?)(?:'>)?$", reason, re.MULTILINE)
    return str(named[-1]) if named else reason.partition("\n")[0]


def listed(clients: Sequence[int], most: int = 8) -> str:
    """Name clients, the first ones of many."""
    shown = ", ".join(map(str, clients[:most]))
    return shown if len(clients) <= most else f"{shown} and {len(clients) - most} more"
