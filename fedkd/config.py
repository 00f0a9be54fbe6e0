"""The configuration of a run: typed sections of flat ``section.key`` scalars.

The same keys stand in ``pyproject.toml`` (``[tool.flwr.app.config]``, what ``flwr run`` offers), on the command line
(``--set section.key=value``) and in ``config.toml`` of every run.  Every key has a default here and nowhere else; a
test compares ``pyproject.toml`` with it.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedkd.errors import UserError, nearest

Scalar = str | int | float | bool


class Section(BaseModel):
    """A group of settings.  Field names are written with hyphens outside Python."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        allow_inf_nan=False,
    )


class HyperParameters(Section):
    """Base of a method's own settings; its section has the method's name."""

    def doubts(self, train: TrainSection, model: ModelSection, statistics: int) -> list[str]:
        """Return a line for each setting that is allowed, and beside those of the run likely a mistake.

        Args:
            train: the settings of local training.
            model: those of the model.
            statistics: how many running statistics of BatchNorm the model has.
        """
        del train, model, statistics
        return []


def overshoots(key: str, weight: float, train: TrainSection, what: str) -> list[str]:
    """Return a line where steps of a quadratic term ``weight / 2 ||theta - centre||^2`` move away from its centre.

    With momentum m, ``e = theta - centre`` follows ``v <- m v + weight e, e <- e - lr v``, which shrinks when the roots
    of ``z^2 - (1 + m - lr weight) z + m`` are inside the unit circle: ``lr weight < 2 (1 + m)``.  A convex loss beside
    the term adds its curvature to the weight, so then there is no room beyond this bound either.

    Args:
        key: the setting that is the weight.
        weight: its value.
        train: the settings of local training; the learning rate is largest in the first round.
        what: which models would be the worse for it.
    """
    most = 2 * (1 + train.momentum)
    if train.lr * weight < most:
        return []
    return [
        f"train.lr = {train.lr} times {key} = {weight} is not below {most:.3g}, so {what} may diverge; "
        f"take train.lr below {most / weight:.3g}, or a smaller {key}"
    ]


class RunSection(Section):
    """Who takes part, for how long, and where the results go."""

    method: str = Field("fedgen", description="registered name of the method (`fedkd methods` lists them)")
    seed: int = Field(1, ge=0, lt=2**32, description="seed of every random stream of the run")
    rounds: int = Field(50, ge=1, description="communication rounds")
    clients: int = Field(20, ge=1, description="number of clients")
    clients_per_round: int = Field(10, ge=0, description="clients sampled per round, without replacement; 0 means all")
    eval_every: int = Field(1, ge=1, description="rounds between evaluations of all clients; the last is always scored")
    checkpoint_every: int = Field(
        10, ge=1, description="rounds between checkpoints, from which `fedkd resume` goes on with an interrupted run"
    )
    exchange: Literal["updates", "sums"] = Field(
        "updates",
        description="what nodes send: every client's update, or their exact sum where the server only averages; "
        "the last digits differ",
    )
    group: int = Field(
        1,
        ge=1,
        description="clients that a node trains at once, for some methods: small models gain, the last digits differ "
        "(docs/results/speed.md)",
    )
    on_failure: Literal["auto", "fail", "drop"] = Field(
        "auto",
        description="clients that fail, are late or answer wrongly end the run, or are dropped from the round; "
        "auto: drop on devices where the method can do without them, else fail",
    )
    min_clients: int = Field(
        1, ge=1, description="fewest clients that have to answer in a round when others are dropped"
    )
    timeout: float = Field(3600.0, gt=0, description="seconds that the nodes have to answer")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU when there is one")
    dir: str = Field(
        "", description="absolute folder of the results; empty: a new one under $FEDKD_RUNS or ~/fedkd-runs"
    )

    @field_validator("dir")
    @classmethod
    def _absolute(cls, folder: str) -> str:
        if folder and not Path(folder).is_absolute():
            raise ValueError("the folder must be absolute, since Flower runs the app from a copy elsewhere")
        return folder

    @model_validator(mode="after")
    def _cohort(self) -> Self:
        if self.clients_per_round > self.clients:
            raise ValueError(
                f"run.clients-per-round = {self.clients_per_round} is more than run.clients = {self.clients}; "
                "lower it, or set 0 for all"
            )
        if self.min_clients > self.cohort:
            raise ValueError(
                f"run.min-clients = {self.min_clients} is more than the {self.cohort} clients of a round; lower it"
            )
        return self

    @property
    def cohort(self) -> int:
        """Number of clients sampled in a round."""
        return self.clients_per_round or self.clients


class DataSection(Section):
    """Which images, who holds them, and how a client's test data is chosen."""

    name: str = Field("digits", description="digits, mnist, fashion_mnist, cifar10, cifar100, femnist, or a hub name")
    root: str = Field(
        "",
        description="local folder with the data (Parquet or idx); empty: the hub, when it is needed; on devices: the "
        "server's folder of public images, for methods that need them",
    )
    label: str = Field(
        "", description="name of the label column (Parquet, hub); empty: the one there is, or cifar100's fine_label"
    )
    config: str = Field("", description="configuration (subset) of a hub data set; empty: the only one that it has")
    partition: Literal["iid", "dirichlet", "pathological", "natural", "fedgen", "devices"] = Field(
        "dirichlet",
        description="fedgen is the Dirichlet recipe of FedGen's authors, replayed with data.seed; devices: each node "
        "has the data of the clients that its node-config names (docs/deployment.md)",
    )
    alpha: float = Field(0.1, gt=0, description="Dirichlet concentration: smaller is more skewed")
    classes_per_client: int = Field(
        2,
        ge=1,
        description="classes per client of the pathological partition; classes that no client draws are left out",
    )
    min_size: int = Field(10, ge=1, description="fewest examples a client may hold (Dirichlet)")
    newcomers: int = Field(
        0, ge=0, description="further clients of the partition, held out of the run for `fedkd adapt`; 0: none"
    )
    fraction: float = Field(1.0, gt=0, le=1, description="share of the training data that is dealt out")
    test: Literal["pooled", "own-labels", "official"] = Field(
        "pooled",
        description="pooled: train and test pooled, each client re-split; own-labels: official test set by own labels; "
        "official: every client scored on all of it",
    )
    test_fraction: float = Field(0.25, gt=0, lt=1, description="a client's test share under the pooled protocol")
    scaling: Literal["symmetric", "standard", "unit"] = Field(
        "symmetric", description="pixels to [-1, 1], to mean 0 and deviation 1 of the data set, or to [0, 1]"
    )
    seed: int = Field(-1, ge=-1, lt=2**32, description="seed of the partition; -1: the run's seed")
    public_fraction: float = Field(
        -1.0,
        ge=-1,
        lt=1,
        description="share of the pool that is set aside, without labels, before the partition (fedgen: of what its "
        "split leaves over); -1: the method's own (0 but for methods that need public data); compare methods only with "
        "equal values",
    )

    @field_validator("public_fraction")
    @classmethod
    def _share(cls, share: float) -> float:
        if -1 < share < 0:
            raise ValueError("a share is in [0, 1), and -1 leaves it to the method")
        return share


class ModelSection(Section):
    """The model and its normalisation."""

    name: str = Field(
        "auto",
        description="auto (fedgen_cnn, or mlp for images under 16 pixels), fedgen_cnn, fedavg_cnn, "
        "lenet5, linear, mlp, pfl_cnn, resnet18",
    )
    norm: Literal["auto", "batch", "group"] = Field(
        "auto",
        description="normalisation, where the model has one; auto: the model's own (resnet18: group, else batch)",
    )
    norm_statistics: Literal["personal", "averaged"] = Field(
        "personal", description="BatchNorm running statistics stay with the client, or are averaged like parameters"
    )
    hidden: int = Field(64, ge=1, description="hidden width of the mlp")
    init: Literal["stream", "torch-seed"] = Field(
        "stream",
        description="initial weights from the run's own random stream, or those that a plain PyTorch script has after "
        "torch.manual_seed(run.seed), so that published runs can start from the same weights",
    )
    seed: int = Field(-1, ge=-1, lt=2**32, description="seed of the initial weights; -1: the run's seed")
    memory_format: Literal["contiguous", "channels-last"] = Field(
        "contiguous",
        description="how images lie in memory; channels-last makes larger convolutions faster and small ones slower, "
        "and rounds differently (docs/results/speed.md)",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="what convolutions and linear layers compute in, by PyTorch's autocast; weights, their steps and "
        "what is sent stay float32. bfloat16 keeps 8 significant bits and is faster only where the processor computes "
        "in it (docs/results/speed.md)",
    )
    client_models: str = Field(
        "",
        description="comma-separated model names, given to the clients in turn, for methods that exchange no "
        "parameters; empty: model.name for all",
    )

    @property
    def assigned(self) -> tuple[str, ...]:
        """Names of the models that clients get in turn; ``model.name`` stays the server's."""
        return tuple(name.strip() for name in self.client_models.split(",")) if self.client_models else (self.name,)


class TrainSection(Section):
    """Local training, the same for every method: plain SGD."""

    lr: float = Field(0.01, gt=0, description="learning rate of local SGD")
    batch_size: int = Field(32, ge=1, description="examples per step; a smaller client uses all it has")
    local_steps: int = Field(20, ge=0, description="SGD steps per participation; 0: use local-epochs")
    local_epochs: int = Field(1, ge=1, description="passes over the local data when local-steps is 0")
    last_batch: Literal["keep", "drop"] = Field("keep", description="an incomplete last batch of a pass is used or not")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of local SGD, fresh at each participation")
    weight_decay: float = Field(0.0, ge=0, description="L2 coefficient added to the gradient")
    lr_decay: float = Field(1.0, gt=0, le=1, description="factor on the learning rate per round")
    lr_decay_from: Literal["round", "last-participation"] = Field(
        "round",
        description="exponent of lr-decay: the current round, or (FedGen's authors) the client's previous one",
    )

    def doubts(self) -> list[str]:
        """Say so where weight decay pulls past zero by more than what it began with."""
        return overshoots("train.weight-decay", self.weight_decay, self, "models")

    def batches(self, examples: int) -> tuple[int, int]:
        """Return how many of a client's examples a step uses, and how many a whole pass over them."""
        size = min(self.batch_size, examples)
        return size, examples // size * size if self.last_batch == "drop" else examples

    def passes(self, examples: int) -> dict[int, int]:
        """Return how many examples the passes of a participation use: the number of examples to that of passes."""
        size, whole = self.batches(examples)
        if not self.local_steps:
            return {whole: self.local_epochs}
        complete, steps = divmod(self.local_steps, -(-whole // size))
        used = steps * size  # of the last pass, which breaks off
        return {whole: complete, used: 1} if steps else {whole: complete}


class AggregationSection(Section):
    """How the clients' models become one, for methods whose server averages models (docs/robustness.md)."""

    rule: Literal["mean", "median", "trimmed-mean", "krum", "multi-krum"] = Field(
        "mean", description="how the clients' models become one; all but mean withstand some hostile clients"
    )
    trim: float = Field(
        0.2, ge=0, lt=0.5, description="trimmed-mean: share of the clients cut off at each end, rounded down"
    )
    byzantine: int = Field(1, ge=0, description="krum, multi-krum: number of clients of a round taken to be hostile")
    clip_norm: float = Field(
        0.0, ge=0, description="largest L2 norm of a client's change of the model, scaled down by the server; 0: any"
    )
    refuse_norm: float = Field(
        0.0, ge=0, description="largest L2 norm of a client's change of the model that is not refused; 0: any"
    )


class PrivacySection(Section):
    """Client-level differential privacy of the averaged model (docs/robustness.md)."""

    noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="deviation of the noise on the sum of the clients' changes, in units of clip-norm; 0: off",
    )
    clip_norm: float = Field(
        0.0, ge=0, description="largest L2 norm of a client's change of the model, scaled down by the client; 0: any"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="delta at which epsilon is stated")
    noise: Literal["seeded", "secret"] = Field(
        "seeded",
        description="seeded: from run.seed, so that who knows it can take it off; secret: from the operating system, "
        "kept nowhere, so that no run repeats another, as devices need",
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.noise_multiplier and not self.clip_norm:
            raise ValueError(
                f"privacy.noise-multiplier = {self.noise_multiplier} needs privacy.clip-norm, the largest norm of a "
                "client's change; set it above 0"
            )
        return self

    @property
    def on(self) -> bool:
        """Whether clients clip what they send."""
        return self.clip_norm > 0


class Config(BaseModel):
    """A whole configuration: the common sections and the section of the method that runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunSection
    data: DataSection
    model: ModelSection
    train: TrainSection
    aggregation: AggregationSection
    privacy: PrivacySection
    hyper: HyperParameters

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> Config:
        """Build a configuration from ``section.key`` scalars; keys that are not given have their defaults.

        A key whose default -1 means "the method's own" gets the value that ``Method.defaults`` states.  Sections of
        other registered methods are checked and left out.

        Raises:
            UserError: an unknown key (with the nearest right one), a wrong type, or a value out of range.
        """
        from fedkd.method import check_group, load

        method = load(str(flat.get("run.method", RunSection().method)))
        known = set(defaults())
        sections: dict[str, dict[str, Scalar]] = {name: {} for name in (*_COMMON, method.name)}
        for key, value in flat.items():
            if key not in known:
                raise UserError(f"unknown key '{key}'{nearest(key, known)} (`fedkd show --keys` lists all)")
            if isinstance(value, int) and abs(value) >= 2**63:
                shown = value if value.bit_length() < 256 else "..."  # thousands of digits are no text for anybody
                raise UserError(f"{key} = {shown}: a whole number has to fit into 64 bits")
            section, name = key.split(".", 1)
            sections.setdefault(section, {})[name] = value
        for key, value in {**LEFT_TO_METHODS, **method.defaults}.items():
            section, name = key.split(".", 1)
            if sections[section].get(name, -1) == -1:
                sections[section][name] = value
        parsed: dict[str, Section] = {}
        for section, values in sections.items():
            kind = _COMMON.get(section) or load(section).hyper
            try:
                parsed[section] = kind.model_validate(values)
            except ValidationError as error:
                raise UserError(_first_line(section, error)) from None
        config = cls(hyper=parsed[method.name], **{section: parsed[section] for section in _COMMON})
        check_group(config)
        return config

    @classmethod
    def read(cls, text: str) -> Config:
        """Read the JSON of flat keys in which a configuration travels.

        Raises:
            UserError: it is none, or as :meth:`from_flat`.
        """
        try:
            flat = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the settings cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
        if not isinstance(flat, dict):
            raise UserError("the settings cannot be read: they are no keys with values")
        return cls.from_flat(flat)

    def flat(self) -> dict[str, Scalar]:
        """Return every setting that matters to this run as ``section.key`` scalars."""
        out: dict[str, Scalar] = {}
        for section in _COMMON:
            out |= _flatten(section, getattr(self, section))
        return out | _flatten(self.run.method, self.hyper)

    def toml(self) -> str:
        """Return the configuration as TOML, one table per section."""
        tables: dict[str, dict[str, Scalar]] = {}
        for key, value in self.flat().items():
            section, name = key.split(".", 1)
            tables.setdefault(section, {})[name] = value
        return tomli_w.dumps(tables)

    def settings_hash(self) -> str:
        """Return a short hash of every setting but the folders of the results and of the data."""
        flat = {k: v for k, v in self.flat().items() if k not in ("run.dir", "data.root")}
        return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def data_seed(self) -> int:
        """Seed of the partition."""
        return self.run.seed if self.data.seed < 0 else self.data.seed


_COMMON: dict[str, type[Section]] = {
    "run": RunSection,
    "data": DataSection,
    "model": ModelSection,
    "train": TrainSection,
    "aggregation": AggregationSection,
    "privacy": PrivacySection,
}


LEFT_TO_METHODS: dict[str, Scalar] = {"data.public-fraction": 0.0}
"""Keys that a method may give its own default, and what they are for all others; their own default is -1."""


def _flatten(section: str, values: Section) -> dict[str, Scalar]:
    return {f"{section}.{name}": value for name, value in values.model_dump(by_alias=True).items()}


def sections() -> dict[str, type[Section]]:
    """Return every section there is, the common ones first, then one for each method."""
    from fedkd.method import load, names

    return {**_COMMON, **{name: load(name).hyper for name in names()}}


def defaults() -> dict[str, Scalar]:
    """Return every key there is, of all sections and all methods, with its default."""
    out: dict[str, Scalar] = {}
    for section, kind in sections().items():
        out |= _flatten(section, kind())
    return out


def descriptions() -> dict[str, str]:
    """Return the one-line description of every key."""
    return {
        f"{section}.{name.replace('_', '-')}": field.description or ""
        for section, kind in sections().items()
        for name, field in kind.model_fields.items()
    }


def parse_assignment(text: str) -> tuple[str, Scalar]:
    """Parse one ``section.key=value``; the value is a TOML scalar, and a bare word is a string.

    Raises:
        UserError: no ``=``, or a value that is not a scalar.
    """
    key, sign, raw = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"'{text}' is not an assignment; write section.key=value, e.g. train.lr=0.1")
    try:
        parsed = tomllib.loads(f"value = {raw.strip()}")
        value = parsed["value"] if len(parsed) == 1 else raw.strip()  # more than one: a line break in the word
    except (ValueError, RecursionError):  # no TOML, or nothing that it could be meant for
        value = raw.strip()
    if not isinstance(value, (str, int, float, bool)):
        raise UserError(f"'{key.strip()}' takes one scalar value, not {raw.strip()}")
    return key.strip(), value


def read_toml(path: Path) -> dict[str, Scalar]:
    """Read a ``config.toml`` back into flat keys.

    Raises:
        UserError: a file that cannot be read, or that is no TOML of sections.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as settings: {error}") from error


def _first_line(section: str, error: ValidationError) -> str:
    """Say in one line what the first validation error is, with the key and the value as the user wrote them."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    key = f"{section}.{first['loc'][0]}".replace("_", "-") if section in _COMMON else f"{section}.{first['loc'][0]}"
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}"
