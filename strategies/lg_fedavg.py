"""LG-FedAvg, server half: FedAvg on the global head (Liang et al. 2020)."""

from strategies.partial import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
