"""Ditto, server half: FedAvg's, so the global trajectory is FedAvg's."""

from strategies.fedavg import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
