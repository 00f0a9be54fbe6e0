"""A client's store: versions by round, whole files or none, and never more than a rollback needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def last(store: ClientStore, client: int, before: int) -> int | None:
    """Return the round of the state that a client would start from."""
    state = store.load(Kept, client, before, SIZES)
    return None if state is None else int(state.last_round)


def files(store: ClientStore, client: int) -> list[str]:
    """Return the names of a client's files."""
    return sorted(path.name for path in (store.folder / f"{client:06d}").iterdir())


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    """Return an empty store."""
    return ClientStore(tmp_path / "state")


def test_a_newcomer_has_no_state(store: ClientStore) -> None:
    """Looking leaves no folder behind."""
    assert last(store, 0, 1) is None
    assert not store.folder.exists()


def test_a_state_comes_back_as_it_was(store: ClientStore) -> None:
    """Bits, dtypes and type."""
    state = Kept(parameters=torch.tensor([0.1, -0.0, 3e-39]), last_round=torch.tensor(2**31 - 1))
    store.save(state, 3, 5)
    back = store.load(Kept, 3, 6, SIZES)
    assert type(back) is Kept
    assert back.parameters.numpy().tobytes() == state.parameters.numpy().tobytes()
    assert int(back.last_round) == 2**31 - 1


def test_a_replayed_round_sees_the_state_before_it(store: ClientStore) -> None:
    """A round that is trained again starts from where it started the first time, and ends the same."""
    for number in (3, 7):
        store.save(kept(number), 0, number)
    assert [last(store, 0, before) for before in (3, 4, 7, 8, 99)] == [None, 3, 3, 7, 7]
    store.save(kept(7), 0, 7)
    assert [last(store, 0, before) for before in (7, 8)] == [3, 7]


def test_clients_do_not_share(store: ClientStore) -> None:
    """Client 1 is not client 11."""
    store.save(kept(1), 1, 1)
    store.save(kept(2), 11, 2)
    assert (last(store, 1, 9), last(store, 11, 9), last(store, 0, 9)) == (1, 2, None)


def test_a_part_of_a_file_is_ignored(store: ClientStore) -> None:
    """A process that died while writing leaves something that is not a state."""
    store.save(kept(1), 0, 1)
    folder = store.folder / "000000"
    whole = (folder / "000001.safetensors").read_bytes()
    (folder / "000002.part4242").write_bytes(whole[: len(whole) // 2])
    assert last(store, 0, 9) == 1
    store.save(kept(3), 0, 3)
    assert last(store, 0, 9) == 3
    assert last(store, 0, 3) == 1


def test_a_death_before_the_rename_leaves_the_old_state(store: ClientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new version appears whole or not at all."""
    store.save(kept(1), 0, 1)

    def die(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            store.save(kept(2), 0, 2)
    assert last(store, 0, 9) == 1


@settings(max_examples=25, deadline=None)
@given(every=st.integers(1, 5), rounds=st.lists(st.integers(1, 30), min_size=1, max_size=12, unique=True).map(sorted))
def test_a_rollback_to_either_checkpoint_finds_every_state(
    tmp_path_factory: pytest.TempPathFactory, every: int, rounds: list[int]
) -> None:
    """While a round is under way, the server may go back to its last checkpoint or, that one damaged, to the other."""
    store = ClientStore(tmp_path_factory.mktemp("store"), every)
    for position, number in enumerate(rounds):
        store.save(kept(number), 0, number)
        next_one = rounds[position + 1] if position + 1 < len(rounds) else number + 2 * every
        for running in range(number, next_one):  # the rounds in which this is the client's newest state
            newest = (running - 1) // every * every
            for checkpoint in (newest, max(newest - every, 0)):
                expected = max((r for r in rounds if r <= checkpoint), default=None)
                assert last(store, 0, checkpoint + 1) == expected
        assert len(files(store, 0)) <= 3
    assert last(store, 0, rounds[-1] + 1) == rounds[-1]


def test_a_state_of_another_model_is_refused(store: ClientStore) -> None:
    """The message names the client, the round and the field."""
    store.save(Kept(parameters=torch.zeros(4), last_round=torch.tensor(1)), 2, 1)
    with pytest.raises(PayloadError, match=r"Kept\.parameters of client 2 \(stored state of round 1\)"):
        store.load(Kept, 2, 2, SIZES)


def test_a_diverged_state_is_refused(store: ClientStore) -> None:
    """A client does not go on from what is not a model."""
    store.save(Kept(parameters=torch.full((3,), float("nan")), last_round=torch.tensor(1)), 2, 1)
    with pytest.raises(PayloadError, match=r"Kept\.parameters of client 2 .* not finite"):
        store.load(Kept, 2, 2, SIZES)


def test_a_replay_far_back_keeps_what_it_writes(store: ClientStore) -> None:
    """After a restart from an older checkpoint, later versions are of a history that is being written again."""
    for number in (3, 5, 7):
        store.save(kept(number), 0, number)
    store.save(kept(4), 0, 4)
    assert [last(store, 0, before) for before in (5, 99)] == [4, 4]


def test_files_hold_data_only(store: ClientStore) -> None:
    """Safetensors: a length, a JSON header, and bytes."""
    store.save(kept(1), 0, 1)
    raw = (store.folder / "000000" / "000001.safetensors").read_bytes()
    assert raw[8:9] == b"{"
    assert int.from_bytes(raw[:8], "little") < len(raw)
