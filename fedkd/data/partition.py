"""Who holds which image: partitions of the labels, through flwr-datasets, and the replay of FedGen's recipe."""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedkd.config import DataSection
from fedkd.errors import UserError

if TYPE_CHECKING:
    import datasets
    from flwr_datasets import partitioner as flower

Integers = npt.NDArray[np.int64]
DRAWS = 330
"""From so many draws flwr-datasets' Dirichlet split is chosen: 30 partitioners, each of which gives up after 11."""
_DRAWS_OF_ONE = 11


def partition(config: DataSection, labels: Integers, writers: Integers, clients: int, seed: int) -> list[Integers]:
    """Deal examples out to clients.

    Args:
        config: the ``data`` section.
        labels: ``[n]`` class of each example.
        writers: ``[n]`` writer of each example (length zero: unknown).
        clients: number of clients, newcomers included.
        seed: seed of the partition.

    Returns:
        for each client, the sorted positions of its examples.

    Raises:
        UserError: more clients than examples, or a partition that these labels do not allow.
    """
    kept = max(1, round(config.fraction * len(labels)))
    if clients > kept:
        raise UserError(
            f"{_number(config)} = {clients} is more than the {kept} examples to deal out; "
            "take fewer clients or a larger data.fraction"
        )
    if config.partition == "fedgen":
        return fedgen_partition(labels, clients, config.alpha, config.fraction, config.min_size, seed)
    positions = np.arange(len(labels))
    if config.fraction < 1:
        positions = np.sort(np.random.default_rng(seed).choice(len(labels), kept, replace=False))
    return _through_flwr_datasets(config, labels, writers, positions, clients, seed)


def _number(config: DataSection) -> str:
    """Return what the number of clients that are dealt to is made of."""
    return "run.clients + data.newcomers" if config.newcomers else "run.clients"


def _through_flwr_datasets(
    config: DataSection, labels: Integers, writers: Integers, positions: Integers, clients: int, seed: int
) -> list[Integers]:
    import datasets
    from flwr_datasets import partitioner as flower

    columns = {"label": labels[positions], "position": positions}
    kind: flower.Partitioner
    if config.partition == "dirichlet":
        return _dirichlet(config, datasets.Dataset.from_dict(columns), clients, seed)
    if config.partition == "iid":
        kind = flower.IidPartitioner(num_partitions=clients)
    elif config.partition == "pathological":
        kind = flower.PathologicalPartitioner(
            clients, "label", config.classes_per_client, class_assignment_mode="random", seed=seed
        )
    else:
        if len(writers) == 0:
            raise UserError(f"data.partition = 'natural' needs writers, and data.name = '{config.name}' has none")
        known = np.unique(writers[positions])
        if clients > len(known):
            raise UserError(f"{_number(config)} = {clients} is more than the {len(known)} writers of '{config.name}'")
        drawn = np.random.default_rng(seed).choice(known, clients, replace=False)
        cut = clients - config.newcomers  # who is held out is random too, not the writers of the last numbers
        chosen = np.concatenate([np.sort(drawn[:cut]), np.sort(drawn[cut:])])
        mine, order = np.isin(writers[positions], chosen), np.argsort(chosen)
        columns = {name: values[mine] for name, values in columns.items()}
        columns["writer"] = order[np.searchsorted(chosen[order], writers[positions[mine]])]
        kind = flower.NaturalIdPartitioner("writer")
    rows = datasets.Dataset.from_dict(columns)
    if config.partition == "iid":  # flwr-datasets cuts contiguous blocks
        rows = rows.shuffle(seed=seed)
    try:
        parts = _parts(kind, rows, clients)
    except ValueError as error:
        raise UserError(
            f"data.partition = '{config.partition}' does not come out for {clients} clients and {len(positions)} "
            f"examples ({str(error).splitlines()[0].rstrip('.')}); take fewer clients"
            f"{' or a smaller data.classes-per-client' * (config.partition == 'pathological')}"
        ) from error
    if config.partition == "natural":
        parts.sort(key=lambda part: int(part["writer"][0]))
    return [_positions(part) for part in parts]


def _dirichlet(config: DataSection, rows: datasets.Dataset, clients: int, seed: int) -> list[Integers]:
    """Deal out by flwr-datasets' Dirichlet split; where its draws leave a client with too little, begin it anew.

    Its first partitioner has the run's seed, the n-th further one the first 64-bit word of
    ``SeedSequence([seed, n])``: what comes out at once is flwr-datasets' own split of this seed.

    Raises:
        UserError: there are too few examples, or no draw gives each client enough.
    """
    from flwr_datasets import partitioner as flower

    asked = f"data.min-size = {config.min_size} for each of {clients} clients"
    if clients * config.min_size > len(rows):
        raise UserError(
            f"data.partition = 'dirichlet' does not come out: {asked} is more than the {len(rows)} examples to deal "
            "out; take fewer clients or a smaller data.min-size"
        )
    for attempt in range(DRAWS // _DRAWS_OF_ONE):
        derived = np.random.SeedSequence([seed, attempt]).generate_state(1, np.uint64)
        kind = flower.DirichletPartitioner(
            clients,
            "label",
            alpha=config.alpha,
            min_partition_size=config.min_size,
            self_balancing=True,
            seed=int(derived[0]) if attempt else seed,
        )
        with contextlib.suppress(ValueError):  # it has given up
            return [_positions(part) for part in _parts(kind, rows, clients)]
    raise UserError(
        f"data.partition = 'dirichlet' does not come out: with data.alpha = {config.alpha:g} none of {DRAWS} draws of "
        f"{len(rows)} examples left {asked}; take fewer clients, a larger data.alpha or a smaller data.min-size"
    )


def _parts(kind: flower.Partitioner, rows: datasets.Dataset, clients: int) -> list[datasets.Dataset]:
    """Return what a partitioner deals to each client.

    Raises:
        ValueError: the partitioner finds no split.
    """
    kind.dataset = rows
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        warnings.simplefilter("ignore")
        return [kind.load_partition(client) for client in range(clients)]


def _positions(part: datasets.Dataset) -> Integers:
    return np.sort(np.asarray(part["position"], dtype=np.int64))


def fedgen_partition(
    labels: Integers, clients: int, alpha: float, ratio: float, min_size: int, seed: int
) -> list[Integers]:
    """Replay the split of FedGen's authors (zhuangdizhu/FedGen @ dd5807c, generate_niid_dirichlet.py).

    Their generators are NumPy's and Python's global ones, both seeded with 42.  Classes come in shuffled order; of
    each, ``min(ratio * n / clients, ratio * n_class)`` examples are dealt out by Dir(alpha) over the clients, where a
    client that already holds ``ratio * n / clients`` gets none; the whole split is drawn again until every client
    holds ``min_size``.  With MNIST, ratio 0.5 and 20 clients that is 1,500 per class: 15,000 images in all.

    Raises:
        UserError: no split within 1,000 draws.
    """
    order = list(range(int(labels.max()) + 1))
    random.Random(seed).shuffle(order)
    rng = np.random.RandomState(seed)
    by_class = {label: np.flatnonzero(labels == label) for label in order}
    full = ratio * len(labels) / clients
    for _ in range(1000):
        held: list[list[Integers]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients, dtype=np.int64)
        for label in order:
            positions = by_class[label]
            shuffled = list(range(len(positions)))
            rng.shuffle(shuffled)
            if ratio < 1:
                shuffled = shuffled[: int(min(full, int(ratio * len(positions))))]
            shares = rng.dirichlet(np.repeat(alpha, clients)) * (sizes < full)
            if not shares.sum() > 0:  # the class fell wholly to clients that are full already
                sizes[:] = 0
                break
            cuts = (np.cumsum(shares / shares.sum()) * len(shuffled)).astype(int)[:-1]
            for client, part in enumerate(np.split(np.asarray(shuffled, dtype=np.int64), cuts)):
                held[client].append(positions[part])
                sizes[client] += len(part)
        if sizes.min() >= min_size:
            return [np.sort(np.concatenate(parts)) for parts in held]
    raise UserError(
        f"data.partition = 'fedgen' gave no split with {min_size} examples for each of {clients} clients in 1,000 "
        "draws; take fewer clients, a larger data.alpha or a smaller data.min-size"
    )
