"""FedRep, server half: FedAvg on the representation (Collins et al. 2021)."""

from strategies.partial import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
