"""A client's store: versions by round, whole files or none, and never more than a rollback needs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.errors import UserError
from fedkd.methods.fedavg import State
from fedkd.payload import Count, ParameterVector, PayloadError, Record
from fedkd.state import ClientStore

SIZES = {"parameters": 3}


@dataclass(frozen=True)
class Kept(Record):
    """A state that knows the round it is from."""

    parameters: ParameterVector
    last_round: Count


def kept(round: int) -> Kept:
    """Return the state after a round."""
    return Kept(parameters=torch.full((3,), float(round)), last_round=torch.tensor(round))


def files(store: ClientStore, client: int) -> list[str]:
    """Return the names of a client's files."""
    return sorted(path.name for path in (store.folder / f"{client:06d}").iterdir())


def found(store: ClientStore, client: int, version: int) -> bool:
    """Return whether a client's state of a round is there; it has to be that round's."""
    try:
        state = store.load(Kept, client, version, SIZES)
    except UserError:
        return False
    assert state is not None
    assert int(state.last_round) == version
    return True


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    """Return an empty store."""
    return ClientStore(tmp_path / "state")


def test_a_newcomer_has_no_state(store: ClientStore) -> None:
    """Looking leaves no folder behind."""
    assert store.load(Kept, 0, 0, SIZES) is None
    assert not store.folder.exists()


def test_a_state_comes_back_as_it_was(store: ClientStore) -> None:
    """Bits, dtypes and type."""
    state = Kept(parameters=torch.tensor([0.1, -0.0, 3e-39]), last_round=torch.tensor(2**31 - 1))
    store.save(state, 3, 5, 0)
    back = store.load(Kept, 3, 5, SIZES)
    assert type(back) is Kept
    assert back.parameters.numpy().tobytes() == state.parameters.numpy().tobytes()
    assert int(back.last_round) == 2**31 - 1


def test_a_lost_state_is_an_error(store: ClientStore) -> None:
    """Neither an older one nor a fresh start takes its place; what does not count is nothing, whatever lies there."""
    store.save(kept(3), 0, 3, 0)
    store.save(kept(7), 0, 7, 3)
    (store.folder / "000000" / "000007.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"state of client 0 from round 7 is lost \(000000/000007.safetensors of the run's states\)"
    ):
        store.load(Kept, 0, 7, SIZES)
    assert store.load(Kept, 0, 0, SIZES) is None


def test_a_replayed_round_sees_the_state_before_it(store: ClientStore) -> None:
    """A round that is trained again starts from where it started the first time, and ends the same."""
    store.save(kept(3), 0, 3, 0)
    store.save(kept(7), 0, 7, 3)
    assert found(store, 0, 3)
    store.save(kept(7), 0, 7, 3)
    assert found(store, 0, 3)
    assert found(store, 0, 7)


def test_clients_do_not_share(store: ClientStore) -> None:
    """Client 1 is not client 11."""
    store.save(kept(1), 1, 1, 0)
    store.save(kept(2), 11, 2, 0)
    assert (found(store, 1, 1), found(store, 1, 2), found(store, 11, 2), found(store, 0, 1)) == (
        True,
        False,
        True,
        False,
    )


def test_a_part_of_a_file_is_ignored_and_cleared_away(store: ClientStore) -> None:
    """A process that died while writing leaves something that is not a state."""
    store.save(kept(1), 0, 1, 0)
    folder = store.folder / "000000"
    whole = (folder / "000001.safetensors").read_bytes()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    abandoned, under_way = (folder / f"000002.part{int(pid)}" for pid in (dead.stdout, os.getpid()))
    for part in (abandoned, under_way):
        part.write_bytes(whole[: len(whole) // 2])
    assert not found(store, 0, 2)
    store.save(kept(3), 0, 3, 1)
    assert files(store, 0) == ["000001.safetensors", under_way.name, "000003.safetensors"]


def test_a_death_before_the_rename_leaves_the_old_state(store: ClientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new version appears whole or not at all."""
    store.save(kept(1), 0, 1, 0)

    def die(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            store.save(kept(2), 0, 2, 1)
    assert found(store, 0, 1)
    assert not found(store, 0, 2)


def test_the_late_end_of_an_old_order_takes_nothing_away(store: ClientStore) -> None:
    """A device that hung in round 5, trained in round 7, and then ends what it was asked in round 5."""
    store.save(kept(3), 0, 3, 0)
    store.save(kept(7), 0, 7, 3)
    store.save(kept(5), 0, 5, 3)
    assert found(store, 0, 7)
    store.save(kept(8), 0, 8, 7)
    assert found(store, 0, 7)
    assert found(store, 0, 8)


def test_the_late_end_of_an_old_order_is_no_checkpoints_state(tmp_path: Path) -> None:
    """It lies on the disk after round 4, as a state that counts would, and the checkpoint of round 5 needs another."""
    store = ClientStore(tmp_path, 5)
    store.save(kept(3), 0, 3, 0)
    store.save(kept(6), 0, 6, 3)
    store.save(kept(5), 0, 5, 3)
    for number, version in ((7, 6), (8, 7), (9, 8)):
        store.save(kept(number), 0, number, version)
        assert found(store, 0, 3)


def test_nor_does_it_take_what_a_run_that_went_back_has_written(tmp_path: Path) -> None:
    """The order was of an attempt that went on to round 18; the one after it started from round 10."""
    store, late = ClientStore(tmp_path, 10), 18
    for number in range(1, late + 1):
        store.save(kept(number), 0, number, number - 1)
    for number in (11, 12):
        store.save(kept(number), 0, number, number - 1)
    store.save(kept(late + 1), 0, late + 1, late)
    assert found(store, 0, 10)
    assert found(store, 0, 12)
    for number in range(13, late + 3):
        store.save(kept(number), 0, number, number - 1)
    assert files(store, 0) == [f"{number:06d}.safetensors" for number in (10, 19, 20)]


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    every=st.integers(1, 5),
    rounds=st.dictionaries(st.integers(1, 30), st.booleans(), min_size=1, max_size=12).map(lambda d: sorted(d.items())),
)
def test_what_counts_is_there_after_any_rollback(
    tmp_path_factory: pytest.TempPathFactory, every: int, rounds: list[tuple[int, bool]]
) -> None:
    """Some updates are dropped; while a round is under way, the server may go back to either of two checkpoints."""
    store, counted = ClientStore(tmp_path_factory.mktemp("store"), every), [0]
    for position, (number, counts) in enumerate(rounds):
        store.save(kept(number), 0, number, counted[-1])
        if counts:
            counted.append(number)
        next_one = rounds[position + 1][0] if position + 1 < len(rounds) else number + 2 * every
        for running in range(number, next_one):  # the rounds in which this is the client's newest state
            newest = (running - 1) // every * every
            for checkpoint in (running, newest, max(newest - every, 0)):
                version = max(r for r in counted if r <= checkpoint)
                assert not version or found(store, 0, version)
        assert len(files(store, 0)) <= 4


def test_a_state_of_another_model_is_refused(store: ClientStore) -> None:
    """The message names the client, the round and the field."""
    store.save(Kept(parameters=torch.zeros(4), last_round=torch.tensor(1)), 2, 1, 0)
    with pytest.raises(PayloadError, match=r"Kept\.parameters of client 2 \(stored state of round 1\)"):
        store.load(Kept, 2, 1, SIZES)


def test_a_state_of_another_version_is_refused(store: ClientStore) -> None:
    """A run that an older version of a method began cannot go on."""
    store.save(State(statistics=torch.ones(3)), 2, 1, 0)
    with pytest.raises(PayloadError, match=r"Kept of client 2 \(stored state of round 1\) has statistics"):
        store.load(Kept, 2, 1, SIZES)


def test_a_diverged_state_is_refused(store: ClientStore) -> None:
    """A client does not go on from what is not a model."""
    store.save(Kept(parameters=torch.full((3,), float("nan")), last_round=torch.tensor(1)), 2, 1, 0)
    with pytest.raises(PayloadError, match=r"Kept\.parameters of client 2 .* not finite"):
        store.load(Kept, 2, 1, SIZES)


def test_a_history_that_is_written_again_takes_the_place_of_the_old_one(store: ClientStore) -> None:
    """After a restart from an older checkpoint, what comes after it goes as the rounds come by."""
    for number, version in ((3, 0), (5, 3), (7, 5)):
        store.save(kept(number), 0, number, version)
    store.save(kept(6), 0, 6, 5)
    store.save(kept(8), 0, 8, 6)
    assert [number for number in range(1, 9) if found(store, 0, number)] == [6, 8]


def test_what_holds_nothing_takes_no_file(store: ClientStore) -> None:
    """Without BatchNorm a client of FedAvg keeps nothing, so its disk is left alone; it is no newcomer for that."""
    store.save(State(statistics=torch.zeros(0)), 0, 3, 0)
    assert not store.folder.exists()
    assert store.load(State, 0, 0, {"statistics": 0}) is None
    kept = store.load(State, 0, 3, {"statistics": 0})
    assert kept is not None
    assert kept.check({"statistics": 0}, "it").statistics.shape == (0,)


def test_files_hold_data_only(store: ClientStore) -> None:
    """Safetensors: a length, a JSON header, and bytes."""
    store.save(kept(1), 0, 1, 0)
    raw = (store.folder / "000000" / "000001.safetensors").read_bytes()
    assert raw[8:9] == b"{"
    assert int.from_bytes(raw[:8], "little") < len(raw)
