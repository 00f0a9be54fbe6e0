"""Per-FedAvg, server half: FedAvg's average, uniform unless ``per_fedavg.weighting`` says else."""

from strategies.fedavg import State, broadcast, init, update

__all__ = ["State", "broadcast", "init", "update"]
