"""FedBABU, server half: FedAvg on the body (Oh et al. 2022)."""

from strategies.partial import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
