"""The ``inline`` engine: the same ServerApp and ClientApp in one process, over a loopback grid, without Ray."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Sequence

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedkd.config import Config


class LoopbackGrid(Grid):
    """A grid whose nodes are calls of a ClientApp in this process.

    Args:
        client_app: the app that answers.
        contexts: one context per node, by node id.
    """

    def __init__(self, client_app: ClientApp, contexts: dict[int, Context]) -> None:
        self._app, self._contexts = client_app, contexts
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer every message at once; an exception becomes an error reply, as on a real node."""
        sent = []
        for message in messages:
            name = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = name
            try:
                reply = self._app(message, self._contexts[message.metadata.dst_node_id])
            except Exception as error:
                logging.getLogger("flwr").debug("client failed", exc_info=True)
                reply = Message(
                    Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=f"{type(error).__name__}: {error}"),
                    reply_to=message,
                )
            self._replies[name] = reply
            sent.append(name)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def run(config: Config, nodes: int = 1) -> None:
    """Run an experiment in this process; ``config.run.dir`` receives the results.

    Args:
        config: what to run.
        nodes: number of loopback nodes; the results do not depend on it.
    """
    from clients.app import app as client_app
    from strategies.app import app as server_app

    run_apps(server_app, client_app, config, nodes)


def run_apps(
    server_app: ServerApp,
    client_app: ClientApp,
    config: Config,
    nodes: int = 1,
    devices: Sequence[UserConfig] = (),
) -> None:
    """Run any ServerApp against any ClientApp over a loopback grid.

    Args:
        nodes: number of nodes, each of which can train every client.
        devices: in their place, the node configuration of each device.
    """
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    flat = dict(config.flat())
    run_id = 1
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 1

    def context(node: int, node_config: UserConfig) -> Context:
        return Context(run_id=run_id, node_id=node, node_config=node_config, state=RecordDict(), run_config=flat)

    simulated: list[UserConfig] = [{"partition-id": k, "num-partitions": nodes} for k in range(nodes)]
    try:
        contexts = {node: context(node, own) for node, own in enumerate(devices or simulated, start=2)}
        server_app(LoopbackGrid(client_app, contexts), context(1, {}))
    finally:
        logger.setLevel(level)
