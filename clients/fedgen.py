"""FedGen, client half: local SGD with generated features beside the real data (Zhu et al. 2021, Eq. 5)."""

from __future__ import annotations

import torch

from clients import partial
from clients.training import Job, Mean, Models, Outcome
from fedkd.data import Shard
from fedkd.latent import draw_labels, draw_noise
from fedkd.losses import cross_entropy, kl
from fedkd.methods.fedgen import Broadcast, Hyper, Update
from fedkd.partial import State


def update(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Outcome:
    """Train on real and generated data and count the labels drawn.

    paper (Eq. 5): ``CE(f(x), y) + w CE(h(G(y~)), y~)``, y~ from the label counts.

    authors: ``CE(f(x), y) + b_t KL(h(G(y)) || f(x)) + (B_G / B) a_t CE(h(G(y~)), y~)``, y~ uniform over the classes
    that clients have drawn so far, ``a_t = max(1e-4, alpha * decay^t)`` and b_t likewise, both zero in the first
    round (t counts from 0) and after ``early-stop`` local steps.  h(G(y)) is the prediction for generated features of
    the batch's own labels, without gradient.  A weight alpha or beta of zero stays zero.
    """
    hyper: Hyper = job.hyper
    generator = job.extras["generator"]
    generator.load(broadcast.generator, broadcast.generator_statistics)
    generator.eval()
    rng, device = job.torch_rng("generated"), job.model.device
    generated_weight, latent_weight = _weights(hyper, job.round)
    if hyper.variant == "authors":
        generated_weight *= hyper.batch / job.train.batch_size

    @torch.no_grad()
    def generate(labels: torch.Tensor) -> torch.Tensor:
        return generator(draw_noise(hyper.variant, (len(labels), hyper.noise), rng).to(device), labels)

    sgd = partial.start(job, broadcast, state)
    loss, generated_loss, latent_loss = Mean(), Mean(), Mean()
    drawn = torch.zeros_like(broadcast.label_probabilities, dtype=torch.int64)
    for step, (x, y) in enumerate(job.batches(shard)):
        if hyper.variant == "authors" and hyper.early_stop and step == hyper.early_stop:
            generated_weight = latent_weight = 0.0
        drawn += torch.bincount(y, minlength=len(drawn)).cpu()
        logits = job.model(x)
        total = loss.add(cross_entropy(logits, y))
        if latent_weight:
            target = job.model(generate(y), start=hyper.layer)
            total = total + latent_weight * latent_loss.add(kl(target, logits, hyper.temperature))
        if generated_weight:
            labels = draw_labels(broadcast.label_probabilities, hyper.batch, rng).to(device)
            predicted = job.model(generate(labels), start=hyper.layer)
            total = total + generated_weight * generated_loss.add(cross_entropy(predicted, labels))
        sgd.step(total)
    base = partial.finish(job, shard, loss)
    metrics = dict(base.metrics)
    if generated_loss.weight:
        metrics["generated_loss"] = generated_loss.metric()
    if latent_loss.weight:
        metrics["latent_loss"] = latent_loss.metric()
    return Outcome(Update(**base.update.tensors(), label_counts=drawn), base.state, metrics)


def models(job: Job, broadcast: Broadcast, state: State | None, shard: Shard) -> Models:
    """The global model, and where the predictor alone is shared, the client's own features under it."""
    hyper: Hyper = job.hyper
    both = partial.models(job, broadcast, state, shard)
    return both if hyper.share == "predictor" else both._replace(personal=None)


def _weights(hyper: Hyper, round: int) -> tuple[float, float]:
    """Return the weights of the generated cross-entropy and of the latent KL in a round (from 1)."""
    if hyper.variant == "paper":
        return hyper.eq5_weight, 0.0
    if round == 1:
        return 0.0, 0.0
    decayed = hyper.decay ** (round - 1)
    return tuple(max(1e-4, w * decayed) if w else 0.0 for w in (hyper.alpha, hyper.beta))  # type: ignore[return-value]
