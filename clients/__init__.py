"""The client side: the Flower ClientApp and the client half of each method.

A client half is a module with two pure functions::

    update(job, broadcast, state, shard) -> Outcome      # local training
    models(job, broadcast, state, shard) -> Models       # what the client predicts with

and, where a client that joins after training does something else in its local epochs, or can be scored between them,
a third::

    adapt(job, broadcast, shard) -> Iterator[Predictor]  # what a newcomer predicts with after each of ``local-epochs``

``job`` (see :class:`clients.training.Job`) brings the settings, the model's workspace and the named randomness.
"""
