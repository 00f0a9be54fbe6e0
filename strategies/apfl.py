"""APFL, server half: FedAvg's, so the global trajectory is FedAvg's (1/K each unless ``apfl.weighting`` says else)."""

from strategies.fedavg import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
