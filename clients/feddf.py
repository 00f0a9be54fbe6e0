"""FedDF, client half: FedAvg's; the distillation is the server's."""

from clients.fedavg import adapt, models, update

__all__ = ["adapt", "models", "update"]
