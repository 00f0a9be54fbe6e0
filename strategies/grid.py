"""A grid that looks for replies more often than Flower's tenth of a second."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

LONGEST_WAIT = 0.02
DEVICES_WAIT = 0.5
"""The longest wait for devices, which take seconds and are asked over the network."""


class PromptGrid(Grid):
    """Any grid, with replies looked for after a twentieth of the longest wait, then ever less often.

    Args:
        grid: the grid that does the work.
        longest: the longest wait, in seconds.
    """

    def __init__(self, grid: Grid, longest: float = LONGEST_WAIT) -> None:
        self._grid, self._longest = grid, longest

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the replies that arrive within ``timeout`` seconds."""
        waiting = {name for name in self._grid.push_messages(messages) if name}  # none for what cannot be sent
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        wait = self._longest / 20
        while waiting:
            arrived = list(self._grid.pull_messages(waiting))
            replies += arrived
            waiting -= {message.metadata.reply_to_message_id for message in arrived}
            if not waiting or (deadline is not None and time.monotonic() >= deadline):
                break
            time.sleep(wait)
            wait = min(wait * 1.5, self._longest)
        return replies
