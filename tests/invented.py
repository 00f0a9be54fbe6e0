"""Result folders with invented figures, the same on every machine, for figures and pages that need many runs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedkd.config import Config, Scalar
from fedkd.results import Recorder, Run


def invent(
    folder: Path,
    methods: Sequence[str],
    seeds: int = 1,
    clients: int = 8,
    classes: int = 4,
    rounds: int = 6,
    **flat: Scalar,
) -> list[Run]:
    """Write a run per method and seed that has not quite finished (no final state), and return them.

    A client of a seed holds the same data in every method.  Later methods are better, and send more.
    """
    runs = []
    for place, method in enumerate(methods):
        for seed in range(1, seeds + 1):
            own: dict[str, Scalar] = {"apfl.adaptive": True} if method == "apfl" else {}
            keys: dict[str, Scalar] = {
                "run.method": method,
                "run.seed": seed,
                "run.clients": clients,
                "run.clients-per-round": 0,
                "run.rounds": rounds,
            }
            counts = _counts(seed, clients, classes)
            target = folder / f"{method}-s{seed}-{len(list(folder.iterdir()))}"
            recorder = Recorder(target, Config.from_flat(keys | own | flat), _csv(counts), "invented")
            draws = np.random.default_rng([seed, place, zlib.crc32(repr(sorted(flat.items())).encode())])
            skill = 0.3 + 0.5 * (place + 1) / len(methods) + 0.2 * draws.random() * draws.random(clients)
            for number in range(1, rounds + 1):
                recorder.write("clients", [_sent(method, place, number, client, skill) for client in range(clients)])
                accuracy = np.minimum(skill, 1) * (1 - 0.7**number)
                recorder.write("evaluations", [_scored(method, number, c, a) for c, a in enumerate(accuracy.tolist())])
                row = {"round": number, "clients": list(range(clients)), "seconds": 1.0 + place}
                stage = {"depth_sum": float(2 - (2 * number > rounds)), "depth_weight": 1.0}
                recorder.write("rounds", [row | (stage if method == "fedd2s" else {})])
            recorder.close()
            runs.append(Run.open(target))
    return runs


def finish(run: Run, **arrays: np.ndarray) -> Run:
    """Make a run look finished, with this state of the server at the end."""
    save_file(arrays, run.folder / "final.safetensors")
    (run.folder / "summary.json").write_text(json.dumps(run.summary()), encoding="utf-8")
    return run


def _counts(seed: int, clients: int, classes: int) -> np.ndarray:
    draws = np.random.default_rng(seed)
    counts = draws.integers(1, 60, (clients, classes)) * (draws.random((clients, classes)) < 0.5)
    counts[np.arange(clients), np.arange(clients) % classes] += 5
    return counts


def _csv(counts: np.ndarray) -> str:
    lines = [",".join(["client", "split", "examples", *(f"class_{number}" for number in range(counts.shape[1]))])]
    for split in ("train", "test"):
        for client, row in enumerate(counts.tolist()):
            lines.append(",".join(map(str, [client, split, sum(row), *row])))
    return "\n".join(lines) + "\n"


def _sent(method: str, place: int, number: int, client: int, skill: np.ndarray) -> dict[str, Scalar]:
    size = 0 if method == "local" else 100_000 * (place + 1)
    row: dict[str, Scalar] = {"round": number, "client": client, "bytes_down": size, "bytes_up": size, "seconds": 0.1}
    alpha = {"alpha_sum": 0.5 + 0.05 * number * (float(skill[client]) - 0.5), "alpha_weight": 1.0}
    return row | (alpha if method == "apfl" else {})


def _scored(method: str, number: int, client: int, accuracy: float) -> dict[str, Scalar]:
    row: dict[str, Scalar] = {"round": number, "client": client, "total": 200}
    row |= {"personal_correct": round(200 * accuracy), "personal_loss_sum": 1.0}
    return row | ({} if method == "local" else {"global_correct": round(160 * accuracy), "global_loss_sum": 2.0})
