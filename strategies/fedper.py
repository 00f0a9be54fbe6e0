"""FedPer, server half: FedAvg on the base layers (Arivazhagan et al. 2019)."""

from strategies.partial import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
