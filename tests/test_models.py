"""Models as stages and as vectors: sizes, views, optimiser, and what a stage may be asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import nn

import strategies
from clients.training import SGD
from fedkd import models
from fedkd.config import ModelSection
from fedkd.data import federate
from fedkd.errors import UserError
from fedkd.latent import build_generator
from fedkd.models import FlatModel, LatentGenerator, Shape, StagedModel, gradients
from fedkd.rng import Streams

MNIST: Shape = (1, 28, 28)
CIFAR: Shape = (3, 32, 32)
SIZES = {
    ("fedgen_cnn", MNIST, 10): 26_434,
    ("fedgen_cnn", MNIST, 26): 26_962,
    ("fedavg_cnn", MNIST, 10): 582_026,
    ("lenet5", MNIST, 10): 61_706,
    ("linear", MNIST, 10): 784 * 10 + 10,
    ("pfl_cnn", CIFAR, 10): 1_626_442,
    ("mlp", MNIST, 10): 784 * 64 + 64 + 64 * 10 + 10,
    ("resnet18", CIFAR, 10): 11_173_962,
}
"""Parameters: FedGen's from its released code, the others by hand."""


def made(name: str, shape: Shape = MNIST, classes: int = 10, seed: int = 1, **keys: Any) -> StagedModel:
    """Build a model."""
    return models.build(ModelSection(name=name, **keys), shape, classes, Streams(seed))


def count(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "shape", "classes"), SIZES)
def test_models_have_their_published_size(name: str, shape: Shape, classes: int) -> None:
    """A wrong padding or a missing bias shows in the number of parameters."""
    assert count(made(name, shape, classes)) == SIZES[name, shape, classes]


def test_the_generator_has_its_published_size() -> None:
    """The released generator for MNIST."""
    assert count(LatentGenerator(32, 10, 256, (32,))) == 19_744


def test_auto_takes_what_fits_the_images() -> None:
    """Digits of 8 pixels are too small for convolutions of stride two to make sense."""
    assert made("auto", (1, 8, 8)).stage_names == ("hidden", "head")
    assert made("auto", MNIST).stage_names == ("conv1", "conv2", "latent", "head")


@pytest.mark.parametrize("name", [name for name in models._MODELS if name != "resnet18"])
def test_stages_compose(name: str) -> None:
    """Running up to a stage and on from it is running through."""
    model = made(name).eval()
    x = torch.randn(3, *MNIST)
    whole = model(x)
    assert whole.shape == (3, 10)
    for stage in model.stage_names:
        halfway = model(x, stop=stage)
        assert tuple(halfway.shape[1:]) == model.input_of(stage)
        assert torch.equal(model(halfway, start=stage), whole)
    assert torch.equal(model(x, stop=model.stage_names[0]), x)


def test_a_range_of_stages_runs_alone() -> None:
    """``start`` and ``stop`` together give the stages in between."""
    model = made("fedgen_cnn").eval()
    x = torch.randn(2, *model.input_of("conv2"))
    assert torch.equal(model(x, start="conv2", stop="latent"), model.stages["conv2"](x))


@pytest.mark.parametrize("training", [True, False])
def test_a_tail_is_the_stages_themselves(training: bool) -> None:
    """What it computes, its tensors, their names and the mode, which asking it for a shape changes nowhere."""
    model = made("fedgen_cnn").train(training)
    tail = model.tail("conv2")
    assert tail.stage_names == ("conv2", "latent", "head")
    whole = dict(model.named_parameters())
    assert all(whole[name] is tensor for name, tensor in tail.named_parameters())
    assert tail.input_of("head") == model.input_of("head")
    assert {module.training for module in (*model.modules(), *tail.modules())} == {training}
    model.eval()
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(tail(model(x, stop="conv2")), model(x))


def test_a_workspace_sets_the_mode_of_every_layer(flat: FlatModel) -> None:
    for mode in (False, True, True, False):
        flat.train() if mode else flat.eval()
        assert {module.training for module in flat.module.modules()} == {mode}


def test_stages_take_the_shapes_that_they_say() -> None:
    """A generator is built from these shapes."""
    model = made("fedgen_cnn")
    shapes = {name: model.input_of(name) for name in model.stage_names}
    assert shapes == {"conv1": (1, 28, 28), "conv2": (6, 14, 14), "latent": (16, 7, 7), "head": (32,)}


def test_asking_for_a_shape_changes_nothing() -> None:
    """Neither the mode nor the running statistics of a model in training."""
    model = made("fedgen_cnn").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.input_of("head")
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_unknown_stage_and_model_are_named() -> None:
    """The nearest right name comes with the message."""
    with pytest.raises(UserError, match=r"'haed'.*did you mean 'head'"):
        made("mlp").input_of("haed")
    with pytest.raises(UserError, match=r"model\.name = 'lenet'.*did you mean 'lenet5'"):
        made("lenet")


@pytest.mark.parametrize("name", ["fedavg_cnn", "lenet5"])
def test_images_that_a_model_cannot_take_are_named(name: str) -> None:
    """A size error deep inside PyTorch tells a user nothing."""
    with pytest.raises(UserError, match=rf"'{name}' cannot take images of 1x8x8; try model\.name=mlp"):
        made(name, (1, 8, 8))


# Normalisation and seeds.


def norms(model: nn.Module, kind: type[nn.Module]) -> int:
    """Return how many layers of a kind a model has."""
    return sum(isinstance(m, kind) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "norm", "batch", "group"),
    [
        ("fedgen_cnn", "auto", 2, 0),
        ("fedgen_cnn", "batch", 2, 0),
        ("fedgen_cnn", "group", 0, 2),
        ("resnet18", "auto", 0, 20),
        ("resnet18", "batch", 20, 0),
        ("mlp", "batch", 0, 0),
    ],
)
def test_the_norm_is_the_models_own_or_the_one_asked_for(name: str, norm: str, batch: int, group: int) -> None:
    """Changing the normalisation changes no other layer."""
    model = made(name, CIFAR, norm=norm)
    assert (norms(model, nn.BatchNorm2d), norms(model, nn.GroupNorm)) == (batch, group)
    assert count(model) == count(made(name, CIFAR))


def test_group_norm_has_groups_worth_the_name() -> None:
    """A group of one channel over one pixel would always be zero."""
    for module in made("fedgen_cnn", norm="group").modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_channels // module.num_groups >= 2


def test_group_norm_has_no_statistics() -> None:
    """So nothing is left to be personal or averaged."""
    assert FlatModel(made("fedgen_cnn", norm="group")).statistics.numel() == 0
    assert FlatModel(made("fedgen_cnn")).statistics.numel() == 2 * (6 + 16)


def test_the_initial_model_is_the_seeds() -> None:
    """All clients of a run start from one model, and another seed gives another."""
    first, again, other = (FlatModel(made("fedgen_cnn", seed=seed)).parameters for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    """Code around the model must not draw other numbers because a model was built."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = made("mlp")
    build_generator(8, 16, "head", model, 10, Streams(1), torch.device("cpu"))
    assert torch.equal(torch.rand(1), expected)


# Flat models.


@pytest.fixture
def flat() -> FlatModel:
    """A small model with BatchNorm as vectors."""
    return FlatModel(made("fedgen_cnn", (1, 8, 8)))


def test_the_vector_and_the_module_share_memory(flat: FlatModel) -> None:
    """Nothing is copied to send or to load a model."""
    flat.parameters.fill_(0.25)
    assert all(bool((p == 0.25).all()) for p in flat.module.parameters())
    with torch.no_grad():
        next(flat.module.parameters()).fill_(0.5)
    assert float(flat.parameters[0]) == 0.5


def test_statistics_are_views_in_training_too(flat: FlatModel) -> None:
    """BatchNorm updates its buffers in place, so the vector follows."""
    before = flat.statistics.clone()
    flat.module.train()
    flat(torch.randn(8, 1, 8, 8))
    assert not torch.equal(flat.statistics, before)
    expected = [getattr(m, name) for m in flat.norms for name in ("running_mean", "running_var")]
    assert torch.equal(flat.statistics, torch.cat(expected))


def test_laying_out_keeps_the_model() -> None:
    """The vector model computes what the module computed."""
    x = torch.randn(4, *MNIST)
    plain = made("fedgen_cnn").eval()
    expected = plain(x)
    flat = FlatModel(plain)
    assert torch.equal(flat(x), expected)
    assert torch.equal(flat.parameters, torch.cat([p.detach().reshape(-1) for p in plain.parameters()]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedgen_cnn", "fedavg_cnn", "pfl_cnn"])
def test_channels_last_is_the_same_model_in_another_order(name: str) -> None:
    """Predictions and gradients are the same up to rounding, weights lie otherwise, and views have their shapes."""
    plain = FlatModel(made(name, CIFAR))
    last = FlatModel(made(name, CIFAR, **{"memory-format": "channels-last"}))
    assert last.shapes == plain.shapes
    assert not torch.equal(last.parameters, plain.parameters)
    assert torch.equal(last.parameters.sort().values, plain.parameters.sort().values)
    x, y = torch.randn(8, *CIFAR), torch.arange(8)
    gradients = [m.unflatten(m.backward(nn.functional.cross_entropy(m(x), y))) for m in (plain, last)]
    views = [m.unflatten(m.parameters) for m in (plain, last)]
    stacked = last.unflatten(last.parameters.expand(2, -1))
    for key, shape in plain.shapes.items():
        assert torch.equal(views[0][key], views[1][key])
        assert torch.equal(stacked[key][1], views[1][key])
        assert torch.allclose(gradients[0][key], gradients[1][key], rtol=1e-4, atol=1e-5)
        convolution = len(shape) == 4 and shape[1] > 1
        assert views[1][key].is_contiguous() != convolution
        assert not convolution or views[1][key].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["fedgen_cnn", "fedavg_cnn", "lenet5", "linear", "mlp", "pfl_cnn", "resnet18"])
def test_bfloat16_is_the_same_model_with_fewer_digits(name: str) -> None:
    """Weights are the same, and what comes in and out is float32; products are rounded to eight bits."""
    plain, coarse = (FlatModel(made(name, CIFAR, precision=precision)) for precision in ("float32", "bfloat16"))
    assert torch.equal(coarse.parameters, plain.parameters)
    x, y = torch.randn(8, *CIFAR, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    logits = [model(x) for model in (plain, coarse)]
    losses = [nn.functional.cross_entropy(out, y) for out in logits]
    gradients = [model.backward(loss) for model, loss in zip((plain, coarse), losses, strict=True)]
    for (exact, rounded), most in ((logits, 0.05), (gradients, 0.25)):
        assert rounded.dtype == torch.float32
        assert 1e-4 < float((rounded - exact).detach().norm() / exact.detach().norm()) < most
    middle = coarse(x, stop="head")
    assert middle.dtype == torch.float32
    assert torch.equal(coarse(middle, start="head"), logits[1])


def test_load_sets_parameters_and_statistics(flat: FlatModel) -> None:
    """Without statistics those of the workspace stay."""
    flat.load(torch.full_like(flat.parameters, 2.0), torch.full_like(flat.statistics, 3.0))
    flat.load(torch.full_like(flat.parameters, 4.0))
    assert bool((flat.parameters == 4).all())
    assert torch.equal(flat.statistics, torch.full_like(flat.statistics, 3.0))


def test_unflatten_gives_views_by_name(flat: FlatModel) -> None:
    """Also for a stack of vectors, one per client."""
    assert {n: tuple(p.shape) for n, p in flat.module.named_parameters()} == flat.shapes
    views = flat.unflatten(flat.parameters)
    assert all(torch.equal(views[name], p) for name, p in flat.module.named_parameters())
    stacked = torch.stack([flat.parameters, flat.parameters + 1])
    for name, view in flat.unflatten(stacked).items():
        assert torch.equal(view[1], views[name] + 1)
    vector = torch.zeros_like(flat.parameters)
    flat.unflatten(vector)["stages.head.bias"].fill_(1)
    assert int(vector.sum()) == 10


def loss_of(flat: FlatModel, seed: int = 0) -> torch.Tensor:
    """Return a loss of the model on fixed data."""
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 1, 8, 8, generator=rng), torch.randint(0, 10, (16,), generator=rng)
    return nn.functional.cross_entropy(flat(x), y)


def test_backward_gives_the_gradient(flat: FlatModel) -> None:
    """As ``torch.autograd.grad`` does, and twice in a row without adding up."""
    expected = torch.autograd.grad(loss_of(flat), list(flat.module.parameters()))
    vector = torch.cat([g.reshape(-1) for g in expected])
    for _ in range(2):
        assert torch.equal(flat.backward(loss_of(flat)), vector)


def test_what_a_loss_does_not_reach_has_gradient_zero(flat: FlatModel) -> None:
    """Also where the call before left something, and in a step, which leaves it where it is."""
    other = FlatModel(nn.Linear(2, 1))
    flat.backward(loss_of(flat)), other.backward(other(torch.ones(1, 2)).sum())
    behind = flat.slice_of(lambda stage: stage == "head")
    features = flat(torch.randn(4, 1, 8, 8), stop="head").square().sum()
    inside, outside = gradients(features, flat, other)
    assert not inside[behind].any()
    assert inside[~behind].any()
    assert not outside.any()
    before = flat.parameters.clone()
    flat.descend(flat(torch.randn(4, 1, 8, 8), stop="head").square().sum(), flat.parameters, 0.1)
    assert torch.equal(flat.parameters[behind], before[behind])
    assert not torch.equal(flat.parameters, before)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels-last"])
def test_a_vector_and_its_parts_are_the_same_numbers(memory_format: Any) -> None:
    """Whichever way the weights of convolutions lie."""
    model = FlatModel(made("fedgen_cnn", (1, 8, 8), memory_format=memory_format))
    vector = torch.arange(model.parameters.numel(), dtype=torch.float32)
    parts = [part.contiguous() for part in model.unflatten(vector).values()]
    assert torch.equal(model.flatten(parts, torch.empty_like(vector)), vector)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)])
def test_sgd_is_pytorchs(worker: Callable[..., Any], momentum: float, weight_decay: float) -> None:
    """Sums on vectors are those of PyTorch's optimiser on tensors."""
    keys = {"model.name": "fedgen_cnn", "train.momentum": momentum, "train.weight-decay": weight_decay}
    node = worker("fedavg", **keys)
    ours, theirs = node.setup.model, FlatModel(made("fedgen_cnn", (1, 8, 8), norm="batch"))
    theirs.load(ours.parameters, ours.statistics)
    sgd = SGD(node.job(1, 0), lr=0.1)
    torch_sgd = torch.optim.SGD(theirs.module.parameters(), 0.1, momentum, weight_decay=weight_decay)
    for step in range(4):
        sgd.step(loss_of(ours, step))
        torch_sgd.zero_grad()
        loss_of(theirs, step).backward()
        torch_sgd.step()
    assert torch.allclose(ours.parameters, theirs.parameters, rtol=0, atol=1e-7)


def test_an_extra_gradient_is_part_of_the_step(worker: Callable[..., Any]) -> None:
    """A proximal term enters momentum and weight decay like the loss's own gradient."""
    node = worker("fedavg", **{"train.momentum": 0.9})
    model, job = node.setup.model, node.job(1, 0)
    start, pull = model.parameters.clone(), torch.linspace(-1, 1, model.parameters.numel())
    ends = []
    for split in (False, True):
        model.load(start)
        sgd = SGD(job, lr=0.1)
        for step in range(2):
            loss = loss_of(model, step)
            if split:
                sgd.step(loss, extra=pull)
            else:
                sgd.step(loss + sum((p * v).sum() for p, v in zip(_views(model), _views(model, pull), strict=True)))
        ends.append(model.parameters.clone())
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=1e-6)


def _views(model: FlatModel, vector: torch.Tensor | None = None) -> list[torch.Tensor]:
    return list(model.module.parameters()) if vector is None else list(model.unflatten(vector).values())


# The generator's place in the model.


def test_a_generator_makes_what_its_stage_takes() -> None:
    """Any stage can be fed, an image-shaped one too."""
    model = made("fedgen_cnn")
    for stage in model.stage_names:
        generator = build_generator(8, 16, stage, model, 10, Streams(1), torch.device("cpu"))
        features = generator(torch.rand(3, 8), torch.tensor([0, 1, 9]))
        assert tuple(features.shape[1:]) == model.input_of(stage)
        assert model(features, start=stage).shape == (3, 10)


@pytest.mark.parametrize("layer", ["conv1", "conv2"])
def test_batch_norm_behind_the_generator_is_refused(layer: str) -> None:
    """The server has no statistics to run such a stage with when those are personal."""
    config = tiny("fedgen", **{"model.name": "fedgen_cnn", "fedgen.layer": layer})
    with pytest.raises(UserError, match=rf"fedgen\.layer = '{layer}'.*BatchNorm.*model\.norm=group"):
        strategies.build(config, federate(config))


@pytest.mark.parametrize(
    "keys",
    [
        {"fedgen.layer": "latent"},
        {"fedgen.layer": "conv1", "model.norm": "group"},
        {"fedgen.layer": "conv1", "model.norm-statistics": "averaged"},
    ],
    ids=str,
)
def test_what_the_refusal_recommends_is_accepted(keys: dict[str, str]) -> None:
    """Each of the three ways out is one."""
    config = tiny("fedgen", **{"model.name": "fedgen_cnn", **keys})
    assert strategies.build(config, federate(config)).state.specs()


def test_torch_seed_gives_the_weights_of_a_plain_script() -> None:
    """Published runs can start from their own initial weights; the caller's random state is left alone."""
    before = torch.get_rng_state()
    built = made("fedgen_cnn", seed=3, init="torch-seed")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    plain = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 16, 3, 2, 1), nn.BatchNorm2d(16)),
        *(nn.Linear(784, 32), nn.Linear(32, 10)),
    )
    torch.set_rng_state(before)
    for mine, theirs in zip(built.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(next(iter(made("fedgen_cnn", seed=3).parameters())), next(iter(plain.parameters())))


@pytest.mark.parametrize("init", ["stream", "torch-seed"])
def test_the_weights_may_have_a_seed_of_their_own(init: str) -> None:
    """So that what weights and what cohorts do to a result can be told apart; the run's own seed is the default."""

    def weights(run: int, own: int) -> torch.Tensor:
        model = models.build(ModelSection(name="mlp", init=init, seed=own), MNIST, 10, Streams(run))
        return torch.cat([p.reshape(-1) for p in model.parameters()])

    assert torch.equal(weights(1, 7), weights(2, 7))
    assert torch.equal(weights(1, 7), weights(7, -1))
    assert not torch.equal(weights(1, 7), weights(1, -1))
