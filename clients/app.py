"""The Flower ClientApp: a node that hosts many clients, the same for every method.

A ``train`` message brings the broadcast once and the numbers of the clients this node shall train; the reply holds
their stacked updates and one row of metrics per client.  An ``evaluate`` message is answered by one row per client.
A node that is a device is asked by a ``query`` message first: which clients it hosts, and what their data looks like.
"""

from __future__ import annotations

import gc
import importlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.group import Groups, Work
from clients.training import Job, Models, Predictor
from fedkd import __version__, protocol
from fedkd.clipping import clipped
from fedkd.config import Config
from fedkd.data import Shard, federate
from fedkd.data.devices import Description, NodeKeys, Place, hosted, own_keys
from fedkd.device import pick_device, single_thread
from fedkd.errors import UserError
from fedkd.losses import cross_entropy
from fedkd.method import load
from fedkd.payload import PayloadError, Record, Stack, unpack
from fedkd.results import run_folder
from fedkd.setup import Setup
from fedkd.state import ClientStore
from fedkd.sums import Total, in_use

app = ClientApp()

EVALUATION_BATCH = 1024

_log = logging.getLogger("flwr")  # what a SuperNode shows


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which clients this node hosts and what data they have, or why it does not take part."""
    try:
        question = protocol.Question.read(message)
        content = protocol.answer("" if question.refused else _describe(question, context).json())
        refused = question.refused
    except Exception as error:  # whatever it is, both sides have to hear of it
        refused = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        content = protocol.answer(refused=refused)
    if refused:
        _log.error("fedkd: this node does not take part: %s", refused)
    return Message(content, reply_to=message)


def _describe(question: protocol.Question, context: Context) -> Description:
    if question.version != __version__:
        raise UserError(f"this node has fedkd {__version__}, and the server has {question.version}; install the same")
    for method in question.methods:
        load(method)
        importlib.import_module(f"clients.{method}")
    config = Config.read(question.config)
    place = Place.of(config, own_keys(context.node_config))
    if place is None:
        raise UserError("this node is simulated and has no data of its own")
    return Description.of(hosted(config, place), place.clients)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients that the message names and return their updates."""
    order = protocol.read_order(message)
    worker = _worker_of(order, context)
    broadcast = worker.broadcast(message)
    personal = worker.personal(message, order.clients)
    pooled = Total(worker.config, worker.sum) if worker.sum else None
    updates = Stack(1 if pooled else len(order.clients))

    def begun(client: int, version: int) -> Work:
        job = worker.job(order.round, client, personal.get(client), version)
        return Work(job, worker.state(client, version), worker.shard(client, "train"))

    versions = dict(zip(order.clients, order.versions, strict=True))
    groups = Groups(versions, worker.config.run.group, begun, worker.half.update, broadcast)

    def trained(client: int, version: int) -> protocol.Row:
        (update, new_state, metrics), seconds = groups.outcome(client)
        began = time.perf_counter()
        update.check(worker.setup.sizes, "the client")
        update = clipped(update, broadcast, worker.config.privacy.clip_norm) if worker.config.privacy.on else update
        new_state.check(worker.setup.of(client).sizes, "the client")
        worker.store.save(new_state, client, order.round, version)
        row: protocol.Row = {"client": client, "examples": len(worker.shard(client, "train"))}
        for name, (total, weight) in metrics.items():
            row[f"{name}_sum"], row[f"{name}_weight"] = total, weight
        if pooled:
            pooled.add(update, client)
        else:
            updates.add(update)
        return row | {"seconds": seconds + time.perf_counter() - began}

    rows, failed = _each(order, trained)
    if pooled and rows:
        updates.add(pooled.record())
    return Message(protocol.reply(rows, failed, updates.arrays() if rows else None), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the clients that the message names on their own test data."""
    order = protocol.read_order(message)
    worker = _worker_of(order, context)
    broadcast = worker.broadcast(message, worker.method.Scoring)

    def scored(client: int, version: int) -> protocol.Row:
        state = worker.state(client, version)
        train, test = worker.shard(client, "train"), worker.shard(client, "test")
        job = worker.job(order.round, client, last_round=version)
        models: Models = worker.half.models(job, broadcast, state, train)
        row: protocol.Row = {"client": client, "total": len(test)}
        for kind, model in (("global", models.shared), ("personal", models.personal)):
            if model is not None:
                row[f"{kind}_correct"], row[f"{kind}_loss_sum"] = _score(model, test)
        return row

    return Message(protocol.reply(*_each(order, scored)), reply_to=message)


class ClientError(RuntimeError):
    """An order cannot be followed; the message names its clients."""


_ADVICE = {
    "Expected more than 1 value per channel": "; BatchNorm cannot be trained on a single image here: take "
    "model.norm=group or, where the client has more of them, train.last-batch=drop or another train.batch-size"
}
"""What a user can do about errors of PyTorch, by how they begin."""


def _each(
    order: protocol.Order, serve: Callable[[int, int], protocol.Row]
) -> tuple[list[protocol.Row], dict[int, str]]:
    """Serve the clients of an order one after another; one that fails keeps nobody else from being served.

    Args:
        serve: takes a client and the version of its state.

    Returns:
        The rows of those that were served, and why the others were not.
    """
    rows, failed = list[protocol.Row](), dict[int, str]()
    for client, version in zip(order.clients, order.versions, strict=True):
        try:
            rows.append(serve(client, version))
        except Exception as error:  # whatever it is, the server has to hear whose it is
            failed[client], foreseen = _said(error)
            level, trace = (logging.INFO, None) if foreseen else (logging.ERROR, error)
            _log.log(level, "fedkd: client %d failed: %s", client, failed[client], exc_info=trace)
    return rows, failed


def _said(error: Exception) -> tuple[str, bool]:
    """Return what a user is told of an error, and whether that says it all."""
    if isinstance(error, PayloadError | UserError):
        return str(error), True
    advice = "".join(text for begin, text in _ADVICE.items() if str(error).startswith(begin))
    return f"{type(error).__name__}: {error}{advice}", bool(advice)


def _score(model: Callable[[], Predictor], test: Shard) -> tuple[int, float]:
    """Return the number of correct predictions and the summed cross-entropy."""
    predict = model()
    correct, loss = 0, 0.0
    for start in range(0, len(test), EVALUATION_BATCH):
        x, y = test.batch(slice(start, start + EVALUATION_BATCH))
        logits = predict(x)
        correct += int((logits.argmax(dim=1) == y).sum())
        loss += float(cross_entropy(logits, y).sum())
    return correct, loss


class Worker:
    """What a process keeps between messages: data, workspaces and the client half; nothing that a result depends on."""

    def __init__(self, config: Config, run_id: int, place: Place | None = None, run: str = "") -> None:
        self.config, self.place = config, place
        self.method = load(config.run.method).under(config.hyper)
        self.sum = self.method.Sum if in_use(config, self.method) else None
        self.half = importlib.import_module(f"clients.{self.method.name}")
        self.device = pick_device(config.run.device)
        self.data = hosted(config, place) if place else federate(config)
        self.setup = Setup.build(config, self.data.shape, self.data.classes, self.device)
        folder = place.folder(run) if place else run_folder(config, run_id) / "state"
        self.store = ClientStore(folder, config.run.checkpoint_every)
        self.initial = self.setup.model.parameters.clone()
        self.initials = {name: other.model.parameters.clone() for name, other in self.setup.others.items()}
        self._shards: dict[tuple[int, str], Shard] = {}

    def shard(self, client: int, split: str) -> Shard:
        """Return a client's ``train`` or ``test`` images on this worker's device; made once."""
        if (client, split) not in self._shards:
            self._shards[client, split] = self.data.shard(client, split, self.device)
        return self._shards[client, split]

    def broadcast(self, message: Message, kind: type[Record] | None = None) -> Record:
        """Return the message's broadcast, checked; it is a ``Broadcast`` unless the contract has another kind."""
        kind = kind or self.method.Broadcast
        [sent] = unpack(kind, protocol.arrays(message, "broadcast"), self.setup.sizes, [owner := "the server"])
        return self.setup.check_variances(sent, owner)

    def personal(self, message: Message, clients: Sequence[int]) -> dict[int, Record]:
        """Return what the message brings for each client alone, checked; empty for methods without."""
        if self.method.Personal is None:
            return {}
        owners = [f"the server for client {client}" for client in clients]
        records = unpack(self.method.Personal, protocol.arrays(message, "personal"), self.setup.sizes, owners)
        return dict(zip(clients, records, strict=True))

    def state(self, client: int, version: int) -> Record | None:
        """Return what the client kept after a round; None for round 0."""
        return self.store.load(self.method.State, client, version, self.setup.of(client).sizes)

    def job(self, round: int, client: int, personal: Record | None = None, last_round: int = 0) -> Job:
        """Return a client's job in a round (:class:`Job`), with the workspace of the client's own model."""
        setup = self.setup.of(client)
        return Job(
            config=self.config,
            model=setup.model,
            streams=setup.streams,
            round=round,
            client=client,
            initial_parameters=self.initials.get(setup.config.model.name, self.initial),
            extras=setup.extras,
            personal=personal,
            last_round=last_round,
        )


def _worker_of(order: protocol.Order, context: Context) -> Worker:
    """Return this process's worker for an order, after checking that the order is for this node.

    Raises:
        ClientError: it is not.
    """
    try:
        worker = _worker(order.config, context.run_id, own_keys(context.node_config), order.run)
        here = worker.place.clients if worker.place else range(worker.config.run.clients)
        if strange := sorted(set(order.clients) - set(here)):
            raise UserError(f"client {strange[0]} is not hosted here")
        return worker
    except UserError as error:
        raise ClientError(f"client {', '.join(map(str, order.clients))}: {error}") from error


@lru_cache(maxsize=1)
def _worker(config: str, run_id: int, node: NodeKeys | None, run: str) -> Worker:
    """Return this process's worker for a configuration (JSON of flat keys); one is kept at a time.

    Args:
        config: the configuration.
        run_id: Flower's number of the run.
        node: what the node's configuration says, of a node that is a device.
        run: the name under which a device keeps its clients' states.
    """
    single_thread()
    gc.collect()
    gc.freeze()  # what is loaded by now stays, so the collector need not walk it again in every round
    read = Config.read(config)
    return Worker(read, run_id, Place.of(read, node), run)
