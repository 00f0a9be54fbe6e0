"""The configuration: what is wrong with it is said in one line before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import TINY, TINY_METHOD, tiny

import strategies
from fedkd import memory
from fedkd.config import Config, Scalar, defaults, descriptions, parse_assignment, read_toml, sections
from fedkd.data import federate, load_images
from fedkd.device import pick_device
from fedkd.errors import UserError, nearest
from fedkd.method import load, names
from fedkd.results import Run
from sims.inline import run
from sims.launch import prepare

WRONG: dict[str, tuple[dict[str, Scalar], tuple[str, ...]]] = {
    "unknown method": ({"run.method": "fedgn"}, ("fedgn", "did you mean 'fedgen'?")),
    "unknown key": ({"train.lr-rate": 0.1}, ("train.lr-rate", "did you mean 'train.lr")),
    "underscore": ({"train.batch_size": 8}, ("train.batch_size", "did you mean 'train.batch-size'?")),
    "no section": ({"lr": 0.1}, ("unknown key 'lr'",)),
    "unknown section": ({"trian.lr": 0.1}, ("trian.lr", "did you mean 'train.lr'?")),
    "key of a method": ({"fedprox.mi": 0.1}, ("fedprox.mi", "did you mean 'fedprox.mu'?")),
    "wrong type": ({"run.rounds": "many"}, ("run.rounds", "'many'", "integer")),
    "not a whole number": ({"run.rounds": 2.5}, ("run.rounds", "2.5", "integer")),
    "text for a number": ({"train.lr": "fast"}, ("train.lr", "'fast'", "number")),
    "number for text": ({"data.name": 3}, ("data.name", "3", "string")),
    "too small": ({"run.rounds": 0}, ("run.rounds", "0", "greater than or equal to 1")),
    "zero rate": ({"train.lr": 0.0}, ("train.lr", "0.0", "greater than 0")),
    "not a number": ({"train.lr": float("nan")}, ("train.lr", "nan")),
    "infinite": ({"train.lr": float("inf")}, ("train.lr", "inf", "finite")),
    "too large": ({"train.momentum": 1.0}, ("train.momentum", "1.0", "less than 1")),
    "unknown choice": ({"data.partition": "dirichlett"}, ("data.partition", "dirichlett", "'dirichlet'")),
    "unknown variant": ({"fedgen.variant": "mine"}, ("fedgen.variant", "mine", "'paper' or 'authors'")),
    "range of a method": (
        {"run.method": "fedprox", "fedprox.mu": -1.0},
        ("fedprox.mu", "-1.0", "greater than or equal to 0"),
    ),
    "relative folder": ({"run.dir": "results"}, ("run.dir", "'results'", "absolute")),
    "hyphenated method": (
        {"run.method": "fedavg_ft", "fedavg_ft.score": "later"},
        ("fedavg_ft.score", "later", "'last-participation'"),
    ),
    "cohort larger than clients": (
        {"run.clients": 5, "run.clients-per-round": 6},
        ("run.clients-per-round = 6", "run.clients = 5"),
    ),
}
"""What is wrong, and what the message has to hold: the key, the value and the likely fix."""


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    """Return the message after checking that it is one."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("case", WRONG)
def test_says_what_is_wrong_in_one_line(case: str) -> None:
    """The message names the key and the value as the user wrote them, and what would do."""
    flat, expected = WRONG[case]
    with pytest.raises(UserError) as error:
        Config.from_flat({"run.method": "fedgen", **flat})
    assert not [part for part in expected if part not in one_line(error)], str(error.value)


BUILD: dict[str, tuple[dict[str, Scalar], tuple[str, ...]]] = {
    "unknown data set": ({"data.name": "digit"}, ("'digit'", "did you mean 'digits'?")),
    "more clients than samples": (
        {"run.clients": 2000, "data.partition": "iid"},
        ("run.clients = 2000", "1797", "data.fraction"),
    ),
    "more clients than a share of the samples": (
        {"run.clients": 100, "data.fraction": 0.05},
        ("run.clients = 100", "90"),
    ),
    "minimum that no split gives": ({"data.min-size": 1000}, ("data.partition = 'dirichlet'", "data.min-size")),
    "more classes than there are": (
        {"data.partition": "pathological", "data.classes-per-client": 11},
        ("data.partition = 'pathological'", "11"),
    ),
    "no writers": ({"data.partition": "natural"}, ("data.partition = 'natural'", "'digits'")),
    "no official test set": ({"data.test": "own-labels"}, ("data.test = 'own-labels'", "data.test=pooled")),
    "no such folder": ({"data.name": "mnist", "data.root": "/no/such"}, ("data.root = '/no/such'",)),
    "unknown model": ({"model.name": "resnet"}, ("model.name = 'resnet'", "did you mean 'resnet18'?")),
    "model for larger images": ({"model.name": "fedavg_cnn"}, ("model.name = 'fedavg_cnn'", "1x8x8", "model.name=mlp")),
    "unknown stage": (
        {"run.method": "fedgen", "fedgen.layer": "hiden"},
        ("fedgen.layer = 'hiden'", "did you mean 'hidden'?", "hidden, head"),
    ),
}


@pytest.mark.parametrize("case", BUILD)
def test_says_what_data_and_model_do_not_allow(case: str) -> None:
    """What only the data can tell is said in the same way."""
    flat, expected = BUILD[case]
    config = tiny(str(flat.get("run.method", "fedavg")), **flat)
    with pytest.raises(UserError) as error:
        strategies.build(config, federate(config))
    assert not [part for part in expected if part not in one_line(error)], str(error.value)


def whole_numbers() -> list[tuple[str, str, dict[str, Scalar]]]:
    """Return every key of a whole number, a method that reads it, and what else it takes for it to be read."""
    found: list[tuple[str, str, dict[str, Scalar]]] = []
    for section, kind in sections().items():
        for name, field in kind.model_fields.items():
            if field.annotation is int:
                extra: Any = field.json_schema_extra or {}
                needed = {
                    other if "." in other else f"{section}.{other.replace('_', '-')}": value
                    for other, value in extra.get("only", {}).items()
                }
                method = section if section in names() else "fedavg"
                found.append((method, f"{section}.{name.replace('_', '-')}", needed))
    return found


REPEATS = ("rounds", "steps", "epochs", "iterations", "sweeps")
"""How the names of those end that say how often something is done, which takes for ever and no memory."""


@pytest.mark.slow
@pytest.mark.parametrize("value", [100_000_000, 4_000_000_000, 2**62], ids=str)
@pytest.mark.parametrize(("method", "key", "needed"), whole_numbers(), ids=[key for _, key, _ in whole_numbers()])
def test_an_absurd_number_is_refused_by_name_or_runs(
    method: str, key: str, needed: dict[str, Scalar], value: int, tmp_path: Path
) -> None:
    """PyTorch's own word about memory comes late, and names no setting."""
    flat = {**TINY, **TINY_METHOD.get(method, {}), **needed, "run.method": method, "run.dir": str(tmp_path)}
    flat |= {"run.rounds": 1, key: value}
    try:
        config = prepare(flat)
    except UserError as error:
        said = str(error)
        assert key in said, said
        assert str(value) in said or key in ("data.min-size", "data.newcomers"), said
        return
    if not key.endswith(REPEATS):
        run(config)
        assert Run.open(tmp_path).finished


@pytest.mark.slow
@pytest.mark.parametrize("method", names())
def test_no_batch_is_too_large(method: str, tmp_path: Path) -> None:
    """A client uses all it has, whatever the method."""
    flat = {**TINY, **TINY_METHOD.get(method, {}), "run.method": method, "run.dir": str(tmp_path), "run.rounds": 1}
    run(prepare({**flat, "train.batch-size": 2**62}))
    assert Run.open(tmp_path).finished


def test_generated_batches_have_a_bound() -> None:
    """Of what is generated there is no end, as there is of a client's examples."""
    for key in ("fedgen.batch", "fedgen.generator-batch", "fedftg.batch"):
        with pytest.raises(UserError, match=f"^{key} = 4000000000: input should be less than or equal to"):
            Config.from_flat({"run.method": key.partition(".")[0], key: 4_000_000_000})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_does_not_fit_is_said_with_the_sizes(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A width within bounds may still be too much for this machine; an ordinary one is not even asked about."""
    monkeypatch.setattr(memory, "_free", lambda device: 2_000)
    monkeypatch.setattr(memory, "ORDINARY", 9)
    config = tiny("fedavg", **{"model.hidden": 10, "model.precision": precision})
    with pytest.raises(
        UserError, match=r"^model\.hidden = 10 needs 0\.0 GB of memory, and 0\.0 GB are free; take less$"
    ):
        strategies.build(config, federate(config))
    monkeypatch.setattr(memory, "ORDINARY", 10)
    strategies.build(config, federate(config))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried"), TypeError("Overflow")],
)
def test_running_out_of_memory_is_a_matter_of_the_settings(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not say how much there is, PyTorch fails; other errors stay what they are."""
    monkeypatch.setattr(memory, "_free", lambda device: None)
    for raised, kind in ((error, UserError), (ValueError("other"), ValueError)):
        monkeypatch.setattr("fedkd.setup.FlatModel", Mock(side_effect=raised))
        config = tiny("fedavg")
        with pytest.raises(kind, match=r"^model\.name = 'auto' needs more memory" if kind is UserError else "^other$"):
            strategies.build(config, federate(config))


def test_an_empty_data_folder_is_named(tmp_path: Path) -> None:
    """A folder without data is as bad as none."""
    with pytest.raises(UserError, match=r"holds neither train-\*\.parquet nor idx files") as error:
        load_images("mnist", str(tmp_path))
    assert str(tmp_path) in one_line(error)


def test_an_unreadable_parquet_file_is_named(tmp_path: Path) -> None:
    """A download that was cut short is a user's error, not a traceback."""
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="'mnist' cannot be read from the folder") as error:
        load_images("mnist", str(tmp_path))
    assert str(tmp_path) in one_line(error)


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a GPU by name must not fall back silently."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match=r"run\.device = 'cuda'"):
        pick_device("cuda")


@pytest.mark.parametrize("method", names())
def test_flat_keys_round_trip(method: str) -> None:
    """``flat`` is the whole configuration: nothing is lost on the way through Flower's run config."""
    config = tiny(method, **{"train.lr": 0.125, "data.seed": 7})
    assert Config.from_flat(config.flat()) == config
    assert Config.from_flat(config.flat()).settings_hash() == config.settings_hash()


@pytest.mark.parametrize("method", names())
def test_toml_round_trips(method: str, tmp_path: Path) -> None:
    """A run's ``config.toml`` gives the configuration back, types and all."""
    config = tiny(method, **{"train.weight-decay": 5e-4, "data.root": 'a "quoted" \\ path'})
    path = tmp_path / "config.toml"
    path.write_text(config.toml(), encoding="utf-8")
    assert read_toml(path) == config.flat()
    assert Config.from_flat(read_toml(path)) == config


def test_every_key_has_a_default_and_a_description() -> None:
    """What ``fedkd show --keys`` prints is complete."""
    assert descriptions().keys() == defaults().keys()
    assert not [key for key, text in descriptions().items() if not text]


@pytest.mark.parametrize("method", names())
def test_defaults_make_a_valid_run(method: str) -> None:
    """Naming the method is enough."""
    assert Config.from_flat({"run.method": method}).run.method == method
    assert isinstance(Config.from_flat({"run.method": method}).hyper, load(method).hyper)


def test_sections_of_other_methods_are_checked_and_left_out() -> None:
    """``flwr run`` passes every key of pyproject.toml, those of other methods too."""
    with pytest.raises(UserError, match=r"fedprox\.mu = -1\.0"):
        Config.from_flat({**defaults(), "run.method": "local", "fedprox.mu": -1.0})
    config = Config.from_flat({**defaults(), "run.method": "local", "fedprox.mu": 2.0})
    assert not [key for key in config.flat() if key.startswith(("fedprox.", "fedgen."))]


def test_the_hash_of_settings_ignores_only_folders() -> None:
    """Two runs that differ in where they read and write are the same experiment."""
    config = tiny()
    assert tiny(**{"run.dir": "/elsewhere", "data.root": "/data"}).settings_hash() == config.settings_hash()
    assert tiny(**{"run.seed": 2}).settings_hash() != config.settings_hash()


def test_seeds_and_cohorts_have_their_fallbacks() -> None:
    """The partition follows the run's seed unless it has its own; a cohort of 0 is everybody."""
    assert tiny(**{"run.seed": 5}).data_seed == 5
    assert tiny(**{"run.seed": 5, "data.seed": 0}).data_seed == 0
    assert tiny(**{"run.clients-per-round": 0}).run.cohort == TINY["run.clients"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=0.1", ("train.lr", 0.1)),
        ("train.lr = 1e-3", ("train.lr", 1e-3)),
        ("run.rounds=5", ("run.rounds", 5)),
        ("run.dir=", ("run.dir", "")),
        ("run.dir=/a=b", ("run.dir", "/a=b")),
        ("data.name=digits", ("data.name", "digits")),
        ('data.name="digits"', ("data.name", "digits")),
        ("x.flag=true", ("x.flag", True)),
        ("data.name=owner/data", ("data.name", "owner/data")),
    ],
)
def test_parses_an_assignment(text: str, expected: tuple[str, Scalar]) -> None:
    """Values are TOML scalars, and bare words need no quotes."""
    key, value = parse_assignment(text)
    assert (key, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["train.lr", "=1", "", "train.lr=[1, 2]", "train.lr={a = 1}", "run.dir=2026-01-01"])
def test_refuses_what_is_no_assignment(text: str) -> None:
    """The message shows what was written."""
    with pytest.raises(UserError) as error:
        parse_assignment(text)
    assert text.partition("=")[0] in one_line(error)


def test_nearest_is_silent_when_nothing_is_near() -> None:
    """A far-fetched suggestion is worse than none."""
    assert nearest("zzz", ["alpha", "beta"]) == ""
    assert nearest("alhpa", ["alpha", "beta"]) == "; did you mean 'alpha'?"
