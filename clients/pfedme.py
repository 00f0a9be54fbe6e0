"""pFedMe, client half: steps of the Moreau envelope's gradient (T. Dinh et al. 2020, the paper's algorithm)."""

from __future__ import annotations

from clients import fedavg
from clients.training import SGD, Job, Mean, Models, Outcome, Predictor
from fedkd.data import Shard
from fedkd.losses import cross_entropy
from fedkd.methods.fedavg import Broadcast, Update
from fedkd.methods.fedavg_ft import State
from fedkd.methods.pfedme import Hyper


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """For each batch, K inner steps on theta and one outer step on w; send w, keep the personal model.

    ::

        theta <- theta - inner-lr (grad f(theta) + lambda (theta - w))      K times on one batch
        w     <- w - lr lambda (w - theta)

    w and theta start from the global model; theta goes on from the last local round's (the paper leaves its start
    open, the released code does this).  Momentum and weight decay act on w.
    """
    hyper: Hyper = job.hyper
    lr, loss = fedavg.start(job, broadcast, state).lr, Mean()
    theta, w = job.model.parameters, job.model.parameters.clone()
    outer = SGD(job, lr, w)
    decay = hyper.inner_weight_decay if hyper.variant == "authors" else 0.0
    for x, y in job.batches(shard):
        for step in range(hyper.inner_steps):
            values = cross_entropy(job.model(x), y)
            direction = job.model.backward(values.mean() if step else loss.add(values))
            direction += hyper.lam * (theta - w)
            if decay:
                direction += decay * theta
            theta.add_(direction, alpha=-hyper.inner_lr)
        outer.apply(hyper.lam * (w - theta))
    base = fedavg.finish(job, shard, loss)
    return Outcome(
        update=Update(**base.update.tensors() | {"parameters": w}),
        state=State(**base.state.tensors(), parameters=w.clone() if hyper.variant == "authors" else theta.clone()),
        metrics=base.metrics,
    )


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The global model, and the personal one of the last participation; before the first one, the global model."""

    def personal() -> Predictor:
        if state is None:
            job.load(broadcast.parameters, broadcast.statistics, None)
        else:
            job.model.load(state.parameters, state.statistics)
        return job.predictor()

    return Models(shared=fedavg.models(job, broadcast, state, shard).shared, personal=personal)
