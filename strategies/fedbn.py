"""FedBN, server half: FedAvg on everything but BatchNorm (Li et al. 2021)."""

from strategies.partial import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
