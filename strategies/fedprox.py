"""FedProx, server half: FedAvg's; the proximal term is the clients'."""

from strategies.fedavg import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
