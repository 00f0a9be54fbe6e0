"""The server side: Flower strategies, and the server half of each method.

A server half is a module with a state record and three pure functions::

    init(setup) -> State
    broadcast(setup, state, round) -> Broadcast
    update(setup, state, updates, round) -> (State, metrics)

and, when the contract has a ``Personal`` record, ``personal(setup, state, round, client) -> Personal`` (also for a
newcomer, whose number is none of the run's and who has no history), or a ``Scoring`` record,
``scoring(setup, state, round) -> Scoring``.

``build("fedgen", config, ...)`` gives a genuine ``flwr.serverapp.strategy.Strategy``.
"""

from strategies.base import FederatedStrategy, build

__all__ = ["FederatedStrategy", "build"]
