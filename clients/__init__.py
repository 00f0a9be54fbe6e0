"""The client side: the Flower ClientApp and the client half of each method.

A client half is a module with two pure functions::

    update(job, broadcast, state, shard) -> Outcome      # local training
    models(job, broadcast, state, shard) -> Models       # what the client predicts with

``job`` (see :class:`clients.training.Job`) brings the settings, the model's workspace and the named randomness.
"""
