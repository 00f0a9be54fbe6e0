"""Images, who holds them, and each client's share of them as tensors."""

from fedkd.data.federated import FederatedData, Shard, federate
from fedkd.data.images import Images, load_images

__all__ = ["FederatedData", "Images", "Shard", "federate", "load_images"]
