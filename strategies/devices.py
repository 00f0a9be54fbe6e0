"""Who hosts whom: the server asks every node once, before the first round, and refuses those that do not fit."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedkd import __version__, protocol
from fedkd.config import Config
from fedkd.data.devices import Description, Federation
from fedkd.payload import PayloadError
from strategies.base import SILENT, listed

WAIT_SECONDS, LOOK_SECONDS = 60.0, 0.5
"""How long to wait for nodes while clients are missing, and how often to look."""
AGAIN_SECONDS, PATIENCE = 60.0, 3
"""How often a silent node is asked again while clients are missing, and how many times longer its answer is waited for:
a question can be lost with what a node was doing for a run that has just been stopped."""
TELL_SECONDS = 20.0
"""How long a run that cannot start waits until the nodes to blame have heard of it; they look every few seconds."""

_log = logging.getLogger("flwr")


class RefusalError(RuntimeError):
    """The nodes that are there cannot do the run; the message names them and says why."""


@dataclass
class Devices:
    """The nodes of one Flower run, which are asked once, also for a series of runs on the same data.

    Args:
        grid: how to reach them.
        methods: the methods that will run.
        allowed: the clients that each node may host; None: any.
    """

    grid: Grid
    methods: Sequence[str]
    allowed: Mapping[int, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        self._known: dict[str, Federation] = {}

    def federation(self, config: Config) -> Federation:
        """Return who hosts whom, and how much of what.

        Raises:
            RefusalError: a client is missing or hosted twice, or the nodes with it do not fit.
        """
        key = json.dumps([config.data.model_dump(), config.run.clients])
        if key not in self._known:
            self._known[key] = self._ask(config)
        return self._known[key]

    def _ask(self, config: Config) -> Federation:
        """Ask nodes as they appear, until every client is hosted by one that answered and fits, or time is up.

        Nobody waits for the others: a node that is refused, or hangs, may be one that is not needed.
        """
        flat = json.dumps(config.flat(), sort_keys=True)
        question = protocol.Question(flat, __version__, tuple(self.methods))
        asked: set[int] = set()
        open_questions: dict[str, int] = {}
        found: dict[int, Description] = {}
        refused: dict[int, str] = {}
        began = asked_at = time.monotonic()
        while True:
            now, nodes = time.monotonic(), set(self.grid.get_node_ids())
            silent = asked - found.keys() - refused.keys()
            last_look = now >= began + WAIT_SECONDS * (PATIENCE if silent else 1)
            new = nodes - asked
            if now >= asked_at + AGAIN_SECONDS:
                new, asked_at = new | (nodes & silent), now
            asked |= new
            open_questions |= self._send(config, dict.fromkeys(sorted(new), question))
            for node, answer in self._answers(open_questions, config.run.clients).items():
                if not isinstance(answer, str):
                    found[node] = answer
                    refused.pop(node, None)  # it was silent for a while, and its first question is over
                elif node not in found:
                    refused[node] = answer
                    _log.error("fedkd: node %s is refused: %s", node, answer)
            unfit = judge(found, self.allowed)
            hosted = {c for node, answer in found.items() if node not in unfit for c in answer.fingerprints}
            complete = hosted.issuperset(range(config.run.clients))
            if complete or last_look:
                break
            time.sleep(LOOK_SECONDS)
        seconds = time.monotonic() - began
        late = f"no answer within {seconds:.0f} s (`fedkd deploy check` on it reads its data beforehand)"
        mute = dict.fromkeys(asked - found.keys() - refused.keys(), late)
        if complete and mute:
            _log.warning("fedkd: not waited for, since nobody needs them: node %s", listed(sorted(mute)))
        self._tell(config, unfit, wait=not complete)
        return federation(config, found, refused | unfit | mute)

    def _send(self, config: Config, questions: Mapping[int, protocol.Question]) -> dict[str, int]:
        """Send a question to each node, and return the nodes by the messages' numbers, without those that cannot go."""
        ttl = max(config.run.timeout, PATIENCE * WAIT_SECONDS)
        messages = [
            Message(
                question.content(),
                dst_node_id=node,
                message_type=MessageType.QUERY,
                ttl=ttl,
                group_id=secrets.token_hex(16),  # Flower lets whoever guesses a message answer it
            )
            for node, question in questions.items()
        ]
        names = self.grid.push_messages(messages) if messages else ()
        return {name: node for name, node in zip(names, questions, strict=False) if name}

    def _answers(self, open_questions: dict[str, int], clients: int) -> dict[int, Description | str]:
        """Return the answers that are there, and close their questions: descriptions, or why a node takes no part.

        Args:
            open_questions: nodes by the messages' numbers.
            clients: of the run.
        """
        answers: dict[int, Description | str] = {}
        for reply in self.grid.pull_messages(set(open_questions)) if open_questions else ():
            node = open_questions.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            if reply.has_error():
                if reply.error.code not in SILENT:
                    answers[node] = reply.error.reason or "it failed and gave no reason"
                continue
            try:
                described, why = protocol.read_answer(reply)
                answers[node] = why or Description.parse(described, clients)
            except PayloadError as error:
                answers[node] = f"its answer cannot be read: {error}"
        return answers

    def _tell(self, config: Config, unfit: Mapping[int, str], wait: bool) -> None:
        """Let nodes that do not fit say so in their own logs; a run that ends takes with it what was not fetched."""
        told = self._send(config, {node: protocol.Question(refused=why) for node, why in unfit.items()})
        for node, why in unfit.items():
            _log.error("fedkd: node %s is refused: %s", node, why)
        deadline = time.monotonic() + TELL_SECONDS
        while wait and told:
            self._answers(told, config.run.clients)
            if not told or time.monotonic() >= deadline:
                break
            time.sleep(LOOK_SECONDS)


def judge(found: Mapping[int, Description], allowed: Mapping[int, Sequence[int]] | None = None) -> dict[int, str]:
    """Return which nodes have other images or classes than most of them, or host a client that another one does.

    Where no kind of data is that of the most, it is that of the lowest client among them.  A node with a client that
    it may not host has no say in that.

    Args:
        found: what nodes say of themselves.
        allowed: the clients that each may host; None: any.
    """
    unfit: dict[int, str] = {}
    if allowed is not None:
        for node, mine in found.items():
            if node not in allowed:
                unfit[node] = "its key is not in hosts.toml on the server, or was let in after the run began"
            elif foreign := mine.fingerprints.keys() - set(allowed[node]):
                unfit[node] = f"hosts.toml on the server does not give its key client {listed(sorted(foreign))}"
    order = sorted(found.keys() - unfit.keys(), key=lambda node: min(found[node].fingerprints))
    if not order:
        return unfit
    kinds = Counter((found[node].shape, found[node].classes) for node in order)
    usual = max(kinds, key=lambda kind: kinds[kind])  # the first of equals
    first, owner = next(found[n] for n in order if (found[n].shape, found[n].classes) == usual), dict[int, int]()
    for node in order:
        mine = found[node]
        if mine.shape != first.shape:
            shapes = " and ".join("x".join(map(str, shape)) for shape in (mine.shape, first.shape))
            unfit[node] = f"its images differ from those of client {min(first.fingerprints)}: {shapes}"
        elif mine.classes != first.classes:
            unfit[node] = f"its classes differ from those of client {min(first.fingerprints)}: {_named(mine, first)}"
        for client in mine.fingerprints if node not in unfit else ():  # it takes nobody's place
            if (other := owner.setdefault(client, node)) != node:
                for one, two in ((node, other), (other, node)):
                    unfit.setdefault(one, f"client {client} is hosted twice: by node {two} too")
    return unfit


def federation(config: Config, found: Mapping[int, Description], refused: Mapping[int, str]) -> Federation:
    """Put the descriptions of the nodes that are not refused together.

    Raises:
        RefusalError: a client is missing; the message says which nodes were refused.
    """
    nodes = {client: node for node in found if node not in refused for client in found[node].fingerprints}
    if missing := sorted(set(range(config.run.clients)) - set(nodes)):
        why = "; ".join(
            f"node {node}{_clients_of(found.get(node))} is refused: {reason}" for node, reason in refused.items()
        )
        raise RefusalError(f"no node hosts client {listed(missing)}" + (f"; {why}" if why else _advice(found)))
    clients = range(config.run.clients)
    known = [found[nodes[client]] for client in clients]
    return Federation(
        config=config,
        nodes=tuple(nodes[client] for client in clients),
        names=known[0].classes,
        shape=known[0].shape,
        train=np.array([one.train[client] for client, one in enumerate(known)], dtype=np.int64),
        test=np.array([one.test[client] for client, one in enumerate(known)], dtype=np.int64),
        fingerprints=tuple(one.fingerprints[client] for client, one in enumerate(known)),
    )


def _advice(found: Mapping[int, Description]) -> str:
    if not found:
        return "; no node appeared: start the SuperNodes"
    return f"; {len(found)} nodes are there: start the others, or lower run.clients"


def _clients_of(description: Description | None) -> str:
    return f" (client {listed(sorted(description.fingerprints))})" if description else ""


def _named(mine: Description, first: Description) -> str:
    """Say how two lists of classes differ."""
    if len(mine.classes) != len(first.classes):
        return f"{len(mine.classes)} and {len(first.classes)}"
    return next(f"'{a}' and '{b}'" for a, b in zip(mine.classes, first.classes, strict=True) if a != b)
