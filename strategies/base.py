"""The one Flower strategy: it runs any method's server half, and does everything that is not the method.

Sampling by client number from the seed, spreading clients over nodes, checking what comes back, processing it in
client order, byte counts and results: here and nowhere else.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedkd import protocol
from fedkd.config import Config
from fedkd.data import FederatedData
from fedkd.method import load
from fedkd.payload import PayloadError, Record, pack, unpack, wire_bytes
from fedkd.results import Recorder, merge_rows, state_hash
from fedkd.setup import Setup

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
        recorder: where results go; None keeps none.
    """

    def __init__(
        self, setup: Setup, half: ModuleType, costs: Sequence[float], recorder: Recorder | None = None
    ) -> None:
        self.setup, self.half, self.recorder = setup, half, recorder
        self.method = load(setup.config.run.method).under(setup.config.hyper)
        self._config = json.dumps(setup.config.flat(), sort_keys=True)
        self.costs = list(costs)
        self.state: Record = half.init(setup)
        self._asked: dict[int, list[int]] = {}  # node -> clients of the exchange under way
        self._cohort: list[int] = []
        self._bytes_down: dict[int, int] = {}
        self._began = 0.0
        self._row: dict[str, Any] = {}

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
        if server_round == 1 and "parameters" in arrays and "parameters" in self.state.specs():
            self._start_from(arrays)
        self._cohort = self.cohort(server_round)
        broadcast = self.half.broadcast(self.setup, self.state, server_round).check(self.setup.sizes, "the server")
        personal = self._personal(server_round)
        self._bytes_down = {
            client: wire_bytes(broadcast) + (wire_bytes(personal[client]) if personal else 0) for client in self._cohort
        }
        return self._orders(MessageType.TRAIN, server_round, self._cohort, broadcast, grid, personal)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the updates, hand them to the server half in client order, and write the round down."""
        updates: dict[int, Record] = {}
        rows: list[protocol.Row] = []
        for clients, reply in self._answers(replies):
            owners = [f"client {client}" for client in clients]
            records = unpack(self.method.Update, protocol.arrays(reply, "updates"), self.setup.sizes, owners)
            updates |= dict(zip(clients, records, strict=True))
            rows += protocol.read_rows(reply)
        for row in rows:
            row |= {"bytes_down": self._bytes_down[row["client"]], "bytes_up": wire_bytes(updates[row["client"]])}
        arrived = time.perf_counter()
        self.state, metrics = self.half.update(
            self.setup, self.state, [updates[client] for client in self._cohort], server_round
        )
        self.state.check(self.setup.sizes, "the server")
        done = time.perf_counter()
        self._row = {"round": server_round, "clients": self._cohort, "state": state_hash(self.state)}
        for name, (total, weight) in metrics.items():
            self._row[f"{name}_sum"], self._row[f"{name}_weight"] = total, weight
        self._row |= {"seconds_train": arrived - self._began, "seconds_server": done - arrived}
        if self.recorder:
            self.recorder.write("clients", merge_rows(rows, {"round": server_round}))
        loss = sum(r["loss_sum"] for r in rows) / max(sum(r["loss_weight"] for r in rows), 1)
        return self._arrays(), MetricRecord({"loss": float(loss)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Order all clients to be scored, every ``run.eval-every`` rounds and at the end."""
        run = self.setup.config.run
        if server_round % run.eval_every and server_round != run.rounds:
            return []
        sent = self.half.scoring if self.method.Scoring else self.half.broadcast
        broadcast = sent(self.setup, self.state, server_round)
        return self._orders(MessageType.EVALUATE, server_round, range(run.clients), broadcast, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Write the scores down."""
        began, rows = self._began, []
        for _, reply in self._answers(replies):
            rows += protocol.read_rows(reply)
        seconds = time.perf_counter() - began
        self._row |= {
            "seconds_evaluate": seconds - self._row["seconds_train"] - self._row["seconds_server"],
            "seconds": seconds,
        }
        if self.recorder:
            self.recorder.write("evaluations", merge_rows(rows, {"round": server_round}))
            self.recorder.write("rounds", [self._row])
        scored = [row for row in rows if row["total"]]
        if not scored:
            return None
        correct = [row.get("personal_correct", row.get("global_correct", 0)) / row["total"] for row in scored]
        return MetricRecord({"accuracy": float(np.mean(correct))})

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
        """Spread clients over the nodes, longest first, and write one order per node."""
        nodes = self._nodes(grid)
        load: dict[int, float] = dict.fromkeys(nodes, 0.0)
        self._asked = {node: [] for node in nodes}
        for client in sorted(clients, key=lambda c: (-self.costs[c], c)):
            node = min(nodes, key=lambda n: load[n])
            self._asked[node].append(client)
            load[node] += self.costs[client]
        self._asked = {node: sorted(mine) for node, mine in self._asked.items() if mine}
        packed = pack([broadcast])
        return [
            Message(
                protocol.order(
                    self._config, round, mine, packed, pack([personal[c] for c in mine]) if personal else None
                ),
                dst_node_id=node,
                message_type=kind,
                group_id=str(round),
            )
            for node, mine in self._asked.items()
        ]

    def _answers(self, replies: Iterable[Message]) -> list[tuple[list[int], Message]]:
        """Return (clients, reply) for every node that was asked.

        Raises:
            RoundError: a node failed or did not answer.
        """
        asked, self._asked = self._asked, {}
        answers = []
        for reply in replies:
            clients = asked.pop(reply.metadata.src_node_id)
            if reply.has_error():
                raise RoundError(f"clients {_listed(clients)} failed: {_said(reply.error.reason or 'no reason given')}")
            if [row["client"] for row in protocol.read_rows(reply)] != clients:
                raise PayloadError(f"the reply for clients {_listed(clients)} is for other clients")
            answers.append((clients, reply))
        if asked:
            late = sorted(client for clients in asked.values() for client in clients)
            raise RoundError(f"clients {_listed(late)} did not answer in time")
        return answers

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
    config: Config, data: FederatedData, device: torch.device | str = "cpu", recorder: Recorder | None = None
) -> FederatedStrategy:
    """Return the strategy of the configured method.

    Args:
        config: the run's configuration; ``config.run.method`` names the method.
        data: the federated data set; the server uses the number of clients, sizes and shapes, and of the images only
            those that were set aside, without labels (``data.public-fraction``).
        device: where the server half computes.
        recorder: where results go; None keeps none.
    """
    setup = Setup.build(config, data.images.shape, data.classes, torch.device(device), data.public(device))
    half = importlib.import_module(f"strategies.{config.run.method}")
    sizes = data.sizes()
    costs = np.minimum(sizes, config.train.batch_size) if config.train.local_steps else sizes
    return FederatedStrategy(setup, half, [float(c) for c in costs], recorder)


def _said(reason: str) -> str:
    """Return what the client said: the line that names it, out of the traces that Ray and Flower wrap around it."""
    named = re.findall(r"ClientError: (client \d+: .*)", reason)
    return str(named[-1]) if named else reason


def _listed(clients: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, clients[:most]))
    return shown if len(clients) <= most else f"{shown} and {len(clients) - most} more"
