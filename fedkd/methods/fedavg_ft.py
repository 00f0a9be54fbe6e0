"""Control: FedAvg whose clients are scored after the same local steps.

The global trajectory is FedAvg's, bit for bit.  What differs is which model is scored: a client's own copy after its
local steps, before aggregation.  Personalized methods have to beat this row, not FedAvg's global model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fedkd.method import Method
from fedkd.methods import fedavg
from fedkd.payload import ParameterVector


class Hyper(fedavg.Hyper):
    """Settings of the control."""

    score: Literal["last-participation", "now"] = Field(
        "last-participation",
        description="score each client's model as its last participation left it (no extra work), or after "
        "fine-tuning the current global model by the same local steps (costs a local training per evaluation)",
    )


@dataclass(frozen=True)
class State(fedavg.State):
    """FedAvg's state and the client's own model after its last local steps."""

    parameters: ParameterVector


METHOD = Method(
    name="fedavg_ft",
    summary="control: FedAvg, clients scored after the same local steps",
    hyper=Hyper,
    Broadcast=fedavg.Broadcast,
    Update=fedavg.Update,
    Sum=fedavg.Sum,
    State=State,
    groups=True,
)
