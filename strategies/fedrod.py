"""FedRoD, server half: FedAvg on the generic model (Chen, Chao 2022); personalized heads are the clients' own."""

from strategies.fedavg import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
