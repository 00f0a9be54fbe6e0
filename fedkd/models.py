"""Models as ordered lists of named stages with a head, and the same models as flat vectors.

A method names stages ("inject here", "this part is personal", "drop from here up"); it never names layers, so any
model works.  :class:`FlatModel` lays all trainable parameters out in one vector, so that an average, a proximal term
or a matrix product over clients is a line of algebra, and nothing is copied to send or to load a model.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap

from fedkd.config import ModelSection
from fedkd.errors import UserError, nearest
from fedkd.rng import Streams

Shape = tuple[int, ...]


class StagedModel(nn.Module):
    """An image classifier made of named stages; the last stage, ``head``, gives the logits.

    Args:
        stages: name and module of each stage, first to last.
        input_shape: ``(channels, height, width)`` of an image.
        channels_last: how convolutions shall lie in memory, for :class:`FlatModel`; images then follow them.
        in_bfloat16: convolutions and linear layers compute in it; parameters, and what a call takes and gives, do not.
    """

    def __init__(
        self,
        stages: OrderedDict[str, nn.Module],
        input_shape: Shape,
        channels_last: bool = False,
        in_bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.input_shape = input_shape
        self.channels_last = channels_last
        self.in_bfloat16 = in_bfloat16

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the stages, first to last."""
        return tuple(self.stages)

    def forward(self, x: torch.Tensor, start: str | None = None, stop: str | None = None) -> torch.Tensor:
        """Run the stages from ``start`` (default: the first) up to but not including ``stop`` (default: to the end).

        Args:
            x: ``[batch, *input_shape]``, or what the stage ``start`` takes.

        Returns:
            logits ``[batch, classes]``, or what the stage ``stop`` takes.
        """
        running = start is None
        coarse = self.in_bfloat16 and not x.is_meta  # which has no numbers to round
        with torch.autocast(x.device.type, torch.bfloat16) if coarse else nullcontext():
            for name, stage in self.stages.items():
                if name == stop:
                    break
                running = running or name == start
                if running:
                    x = stage(x)
        return x.float() if self.in_bfloat16 else x

    def tail(self, start: str) -> StagedModel:
        """Return the stages from ``start`` on as a model of their own, which shares them and their mode."""
        names = self.stage_names[self.stage_names.index(start) :]
        stages = OrderedDict((name, self.stages[name]) for name in names)
        tail = StagedModel(stages, self.input_of(start), self.channels_last, self.in_bfloat16)
        return tail.train(self.training)

    def input_of(self, stage: str, setting: str = "stage") -> Shape:
        """Return the shape, without the batch, of what a stage takes.

        Args:
            stage: its name.
            setting: the key that named it, for the message.

        Raises:
            UserError: the model has no such stage.
        """
        if stage not in self.stages:
            raise UserError(
                f"{setting} = '{stage}': the model has no such stage{nearest(stage, self.stages)} "
                f"(stages: {', '.join(self.stages)})"
            )
        device = next(self.parameters()).device
        was_training = self.training
        self.eval()
        with torch.no_grad():
            shape = tuple(self(torch.zeros(1, *self.input_shape, device=device), stop=stage).shape[1:])
        self.train(was_training)
        return shape


class FlatModel:
    """A module whose trainable parameters and BatchNorm statistics are views of two vectors.

    Writing to :attr:`parameters` changes the module and back.  Vectors that leave the workspace have to be cloned.

    Args:
        module: any module; it is moved to ``device`` and its tensors are re-laid.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        self.module = module.to(device)
        self.device = torch.device(device)
        self.channels_last = isinstance(module, StagedModel) and module.channels_last
        tensors = list(self.module.parameters())
        self.shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
        last = [p.detach().movedim(1, -1) if self.channels_last and p.ndim == 4 else p.detach() for p in tensors]
        self.parameters = torch.cat([p.reshape(-1) for p in last])
        self.gradient = torch.zeros_like(self.parameters)
        self.tensors: list[torch.Tensor] = [*tensors]
        named = [(n, m) for n, m in self.module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.norms = [m for _, m in named]
        self.statistics_shapes = {f"{n}.{s}": m.num_features for n, m in named for s in ("running_mean", "running_var")}
        owned = [(m, name) for m in self.norms for name in ("running_mean", "running_var")]
        parts = [getattr(m, name).detach().reshape(-1) for m, name in owned]
        self.statistics = torch.cat(parts) if parts else torch.zeros(0, device=self.device)
        for view, parameter in zip(self.unflatten(self.parameters).values(), tensors, strict=True):
            parameter.data = view
        for (norm, name), view in zip(owned, self.unflatten_statistics(self.statistics).values(), strict=True):
            setattr(norm, name, view)

    def unflatten(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of a parameter vector ``[..., P]`` by parameter name, each ``[..., *shape]``."""
        views, offset = {}, 0
        for name, shape in self.shapes.items():
            size = torch.Size(shape).numel()
            part, ahead = vector[..., offset : offset + size], vector.shape[:-1]
            if self.channels_last and len(shape) == 4:
                outputs, inputs, height, width = shape
                views[name] = part.reshape(*ahead, outputs, height, width, inputs).movedim(-1, -3)
            else:
                views[name] = part.reshape(*ahead, *shape)
            offset += size
        return views

    @torch.no_grad()
    def flatten(self, parts: Iterable[torch.Tensor | None], out: torch.Tensor) -> torch.Tensor:
        """Write one tensor per parameter (None: zeros) into a vector ``[P]``, and return it: unflatten's reverse."""
        for view, part in zip(self.unflatten(out).values(), parts, strict=True):
            view.zero_() if part is None else view.copy_(part)
        return out

    def unflatten_statistics(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of a statistics vector ``[..., S]`` by buffer name, each ``[..., features]``."""
        sizes = list(self.statistics_shapes.values())
        return dict(zip(self.statistics_shapes, torch.split(vector, sizes, dim=-1), strict=True)) if sizes else {}

    def slice_of(self, stages: Callable[[str], bool]) -> torch.Tensor:
        """Return a boolean mask ``[P]`` of the parameters whose stage satisfies the predicate (staged models)."""
        mask = torch.zeros(self.parameters.shape[-1], dtype=torch.bool)
        for name, view in self.unflatten(mask).items():
            view.fill_(stages(name.split(".")[1]))
        return mask

    @torch.no_grad()
    def load(self, parameters: torch.Tensor, statistics: torch.Tensor | None = None) -> None:
        """Copy a parameter vector ``[P]`` (and BatchNorm statistics ``[S]``) into the module."""
        self.parameters.copy_(parameters)
        if statistics is not None:
            self.statistics.copy_(statistics)

    def train(self, mode: bool = True) -> None:
        """Set training or evaluation mode, which is a walk through all layers, unless the module has it already."""
        if self.module.training != mode:
            self.module.train(mode)

    def eval(self) -> None:
        """Set evaluation mode."""
        self.train(False)

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the gradient vector ``[P]`` of a scalar loss (the next call overwrites it)."""
        return gradients(loss, self)[0]

    @torch.no_grad()
    def descend(self, loss: torch.Tensor, parameters: torch.Tensor, lr: float) -> None:
        """Step along a scalar loss's gradient in the module: ``parameters -= lr * gradient``, on a vector ``[P]``.

        Tensor by tensor, as autograd gives the gradient, without making one vector of it first: in a model of a million
        parameters that costs a twentieth of the step.
        """
        parts = torch.autograd.grad(loss, self.tensors, allow_unused=True)
        views = self.tensors if parameters is self.parameters else self.unflatten(parameters).values()
        reached = [(view, part) for view, part in zip(views, parts, strict=True) if part is not None]
        if reached:
            torch._foreach_add_(*map(list, zip(*reached, strict=True)), alpha=-lr)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = self.module(*args, **kwargs)
        return out


class StackedModel(FlatModel):
    """A workspace of G models at once: every vector has a row for each, and a call runs them all.

    One call of a small model takes its time for being called, not for its arithmetic, so G of them in one are quicker.
    A gradient is that of the sum of losses of which each depends on one row, so it has each loss's own in its row.

    Args:
        model: the workspace of one of them; its module is run, and what it holds is left alone.
        rows: G.
    """

    def __init__(self, model: FlatModel, rows: int) -> None:
        self.module, self.device, self.channels_last = model.module, model.device, model.channels_last
        self.shapes, self.norms, self.statistics_shapes = model.shapes, model.norms, model.statistics_shapes
        self.parameters = model.parameters.new_zeros(rows, model.parameters.numel())
        self.gradient = torch.zeros_like(self.parameters)
        self.statistics = model.statistics.new_zeros(rows, model.statistics.numel())
        self.tensors = [view.requires_grad_() for view in self.unflatten(self.parameters).values()]

    def __call__(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return what each model makes of its own batch, ``[G, batch, ...]`` to ``[G, batch, ...]``."""

        def one(tensors: list[torch.Tensor], statistics: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            named = dict(zip(self.shapes, tensors, strict=True)) | statistics
            out: torch.Tensor = functional_call(self.module, named, (x,), kwargs)
            return out

        views = self.unflatten_statistics(self.statistics)
        statistics = {name: view.contiguous() for name, view in views.items()}  # vmap renews no others
        out: torch.Tensor = vmap(one)(self.tensors, statistics, x)
        for name, view in views.items():
            view.copy_(statistics[name])
        return out


def gradients(loss: torch.Tensor, *models: FlatModel) -> tuple[torch.Tensor, ...]:
    """Return each model's gradient vector ``[P]`` of one scalar loss, zero in what the loss does not reach.

    A model's vector is its workspace's: its next call overwrites it.
    """
    parts = iter(torch.autograd.grad(loss, [t for model in models for t in model.tensors], allow_unused=True))
    return tuple(model.flatten(islice(parts, len(model.tensors)), model.gradient) for model in models)


def build(config: ModelSection, input_shape: Shape, classes: int, streams: Streams) -> StagedModel:
    """Build the configured model, initialised from the run's seed.

    Args:
        config: the ``model`` section.
        input_shape: ``(channels, height, width)``.
        classes: number of logits.
        streams: the run's random streams; ``model`` seeds the initial parameters, unless ``model.seed`` does.

    Raises:
        UserError: an unknown model, or images that it cannot take.
        RuntimeError: it needs more memory than there is (:func:`too_much`).
    """
    name = config.name
    if name == "auto":
        name = "fedgen_cnn" if min(input_shape[1:]) >= 16 else "mlp"
    if name not in _MODELS:
        raise UserError(f"model.name = '{name}' is unknown{nearest(name, _MODELS)} (known: {', '.join(_MODELS)})")
    with torch.random.fork_rng(devices=[]):
        own = streams if config.seed < 0 else Streams(config.seed)
        torch.manual_seed(own.seed if config.init == "torch-seed" else own.number("model"))
        try:
            stages = OrderedDict(_MODELS[name](config, input_shape, classes))
            last, bfloat16 = config.memory_format == "channels-last", config.precision == "bfloat16"
            model = StagedModel(stages, input_shape, last, bfloat16)
            model.input_of("head")
        except (RuntimeError, ZeroDivisionError, ValueError) as error:
            if too_much(error):
                raise
            advice = "try model.name=mlp" if name != "mlp" else str(error).partition("\n")[0]
            raise UserError(
                f"model.name = '{name}' cannot take images of {'x'.join(map(str, input_shape))}; {advice}"
            ) from error
    return model


def too_much(error: Exception) -> bool:
    """Say whether an error of PyTorch is that of more memory than there is, or than can be counted."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in ("memory", "overflow"))


Stages = Iterator[tuple[str, nn.Module]]


def _norm(config: ModelSection, channels: int, default: str = "batch") -> nn.Module:
    """BatchNorm or GroupNorm (at most 32 groups, at least two channels each), by ``model.norm``."""
    if (default if config.norm == "auto" else config.norm) == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(32, channels // 2), channels)


def _flat_size(stages: list[tuple[str, nn.Module]], input_shape: Shape) -> int:
    with torch.no_grad():
        return int(nn.Sequential(*(m for _, m in stages)).eval()(torch.zeros(1, *input_shape)).numel())


def _fedgen_cnn(config: ModelSection, shape: Shape, classes: int) -> Stages:
    """The classifier of FedGen's released code: 26,434 parameters on MNIST (distinct from the CNN its paper names)."""
    convolutions: list[tuple[str, nn.Module]] = []
    channels = shape[0]
    for number, width in enumerate((6, 16), start=1):
        block = nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1), _norm(config, width), nn.ReLU())
        convolutions.append((f"conv{number}", block))
        channels = width
    yield from convolutions
    yield "latent", nn.Sequential(nn.Flatten(), nn.Linear(_flat_size(convolutions, shape), 32))
    yield "head", nn.Linear(32, classes)


def _fedavg_cnn(config: ModelSection, shape: Shape, classes: int) -> Stages:
    """The CNN of the FedAvg paper as PFLlib and PGFed run it: two 5x5 convolutions without padding, 512 hidden."""
    convolutions: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Sequential(nn.Conv2d(shape[0], 32, 5), nn.ReLU(), nn.MaxPool2d(2))),
        ("conv2", nn.Sequential(nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2))),
    ]
    yield from convolutions
    yield "hidden", nn.Sequential(nn.Flatten(), nn.Linear(_flat_size(convolutions, shape), 512), nn.ReLU())
    yield "head", nn.Linear(512, classes)


def _lenet5(config: ModelSection, shape: Shape, classes: int) -> Stages:
    """LeNet-5 with ReLU and max pooling; images of 28 pixels are padded as in the original."""
    convolutions: list[tuple[str, nn.Module]] = [
        (
            "conv1",
            nn.Sequential(nn.Conv2d(shape[0], 6, 5, padding=2 if shape[1] < 32 else 0), nn.ReLU(), nn.MaxPool2d(2)),
        ),
        ("conv2", nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2))),
    ]
    yield from convolutions
    yield "hidden1", nn.Sequential(nn.Flatten(), nn.Linear(_flat_size(convolutions, shape), 120), nn.ReLU())
    yield "hidden2", nn.Sequential(nn.Linear(120, 84), nn.ReLU())
    yield "head", nn.Linear(84, classes)


def _pfl_cnn(config: ModelSection, shape: Shape, classes: int) -> Stages:
    """The CNN of pfl-research's CIFAR-10 benchmark (Apple): 1,626,442 parameters there.

    Source: apple/pfl-research @ 06651ed, ``benchmarks/model/pytorch/cnn.py``, without its dropout and with PyTorch's
    initial weights in place of Glorot's.
    """
    convolutions: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Sequential(nn.Conv2d(shape[0], 32, 3), nn.ReLU())),
        ("conv2", nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2))),
    ]
    yield from convolutions
    yield "hidden", nn.Sequential(nn.Flatten(), nn.Linear(_flat_size(convolutions, shape), 128), nn.ReLU())
    yield "head", nn.Linear(128, classes)


def _mlp(config: ModelSection, shape: Shape, classes: int) -> Stages:
    """One hidden layer of ``model.hidden`` units."""
    size = torch.Size(shape).numel()
    yield "hidden", nn.Sequential(nn.Flatten(), nn.Linear(size, config.hidden), nn.ReLU())
    yield "head", nn.Linear(config.hidden, classes)


def _linear(config: ModelSection, shape: Shape, classes: int) -> Stages:
    """Multinomial logistic regression on the pixels: a head and nothing before it."""
    del config
    yield "head", nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), classes))


class _Residual(nn.Module):
    """The basic block of ResNet: two 3x3 convolutions and a shortcut."""

    def __init__(self, config: ModelSection, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            _norm(config, outputs, "group"),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            _norm(config, outputs, "group"),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(config, outputs, "group")
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def _resnet18(config: ModelSection, shape: Shape, classes: int) -> Stages:
    """ResNet-18 with the CIFAR stem (3x3, stride 1, no pooling); GroupNorm unless ``model.norm`` says batch."""
    yield "stem", nn.Sequential(nn.Conv2d(shape[0], 64, 3, 1, 1, bias=False), _norm(config, 64, "group"), nn.ReLU())
    inputs = 64
    for number, (outputs, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), start=1):
        yield (
            f"block{number}",
            nn.Sequential(_Residual(config, inputs, outputs, stride), _Residual(config, outputs, outputs, 1)),
        )
        inputs = outputs
    yield "pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    yield "head", nn.Linear(512, classes)


_MODELS: dict[str, Callable[[ModelSection, Shape, int], Stages]] = {
    "fedgen_cnn": _fedgen_cnn,
    "fedavg_cnn": _fedavg_cnn,
    "lenet5": _lenet5,
    "linear": _linear,
    "mlp": _mlp,
    "pfl_cnn": _pfl_cnn,
    "resnet18": _resnet18,
}


class LatentGenerator(nn.Module):
    """FedGen's generator of latent features: [noise, one-hot label] -> hidden (BatchNorm, ReLU) -> features.

    Source: zhuangdizhu/FedGen @ dd5807c, which gives 19,744 parameters for 32 noise, 10 classes, 256 hidden, 32 out.

    Args:
        noise: width of the noise.
        classes: number of classes.
        hidden: hidden width.
        output_shape: shape of the features, without the batch.
    """

    def __init__(self, noise: int, classes: int, hidden: int, output_shape: Shape) -> None:
        super().__init__()
        self.classes = classes
        self.output_shape = output_shape
        self.body = nn.Sequential(
            nn.Linear(noise + classes, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, torch.Size(output_shape).numel()),
        )

    def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return features ``[batch, *output_shape]`` for noise ``[batch, noise]`` and labels ``[batch]``."""
        one_hot = nn.functional.one_hot(labels, self.classes).to(noise.dtype)
        out: torch.Tensor = self.body(torch.cat((noise, one_hot), dim=1))
        return out.reshape(len(labels), *self.output_shape)
