"""FedDF, client half: FedAvg's; the distillation is the server's."""

from clients.fedavg import models, update

__all__ = ["models", "update"]
