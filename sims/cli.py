"""The command line: ``fedkd``.  Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedkd.errors import UserError

if TYPE_CHECKING:
    from fedkd.config import Scalar
    from fedkd.results import Run

app = typer.Typer(
    name="fedkd",
    help="Federated personalized distillation on Flower: methods, baselines and controls on one protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out_console = Console()
error_console = Console(stderr=True)


class EngineName(StrEnum):
    """Where a run happens."""

    inline = "inline"
    simulation = "simulation"


class TableFormat(StrEnum):
    """File format of exported tables."""

    csv = "csv"
    parquet = "parquet"


DataOption = Annotated[
    str | None, typer.Option("--data", help="digits, mnist, fashion_mnist, cifar10, cifar100, femnist or a hub name.")
]
RootOption = Annotated[Path | None, typer.Option("--root", help="Local folder with the data (data.root).")]
ClientsOption = Annotated[int | None, typer.Option("--clients", help="Number of clients.")]
CohortOption = Annotated[int | None, typer.Option("--clients-per-round", help="Clients sampled per round; 0: all.")]
RoundsOption = Annotated[int | None, typer.Option("--rounds", help="Communication rounds.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. train.lr=0.1 (`fedkd show --keys` lists all)."),
]
EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="inline: this process; simulation: flwr run with Ray. The results are the same."),
]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Parallel nodes. Default: 1 inline, one per core in simulation.")
]


@app.command()
def run(
    method: Annotated[str, typer.Argument(help="Method to run (`fedkd methods` lists them).")],
    data: DataOption = None,
    root: RootOption = None,
    engine: EngineOption = EngineName.inline,
    clients: ClientsOption = None,
    clients_per_round: CohortOption = None,
    rounds: RoundsOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of every random stream.")] = None,
    settings: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results. Default: a new one in runs/.")
    ] = None,
    nodes: NodesOption = None,
) -> None:
    """Run one method and print what came out.

    Examples:

      fedkd run fedgen

      fedkd run fedprox --data mnist --root /data --set fedprox.mu=0.01 --set data.alpha=0.05

      fedkd run fedavg --engine simulation --clients 100 --set data.partition=iid --rounds 20
    """
    from sims.launch import launch, place, prepare

    flat = _flat(method, data, root, clients, clients_per_round, rounds, settings) | _given("run.seed", seed)
    config = place(prepare(flat), out)
    finished = launch(config, engine.value, nodes)
    _print_summary(finished)


@app.command()
def compare(
    methods: Annotated[list[str], typer.Argument(help="Methods to compare; `local` among them adds who is hurt.")],
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, separated by commas.")] = "1,2,3",
    data: DataOption = None,
    root: RootOption = None,
    engine: EngineOption = EngineName.inline,
    clients: ClientsOption = None,
    clients_per_round: CohortOption = None,
    rounds: RoundsOption = None,
    settings: SetOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs, the table and the figures.")] = Path(
        "runs/compare"
    ),
    nodes: NodesOption = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Inline runs at a time. Default: the CPU cores.")
    ] = None,
) -> None:
    """Run methods side by side: one table, one figure of each kind.

    Finished runs in the folder are used, not run again, so a comparison that was stopped goes on.

    Examples:

      fedkd compare local fedavg fedavg_ft fedgen

      fedkd compare fedavg fedprox --data mnist --root /data --seeds 1,2,3,4,5 --out runs/prox
    """
    from fedkd.results import Run
    from sims.launch import launch_all, place_series, prepare
    from sims.simulation import default_nodes

    if len(set(methods)) < len(methods):
        raise UserError("a method is named twice; name each once")
    waiting, folders = [], []
    for seed in _seeds(seeds):
        for method in methods:
            flat = _flat(method, data, root, clients, clients_per_round, rounds, settings, methods) | {"run.seed": seed}
            config, finished = place_series(prepare(flat), out / f"{method}-s{seed}")
            folders.append(config.run.dir)
            if finished:
                error_console.print(f"{method} seed {seed}: already finished in {config.run.dir}", highlight=False)
            else:
                waiting.append(config)
    if waiting:
        launch_all(waiting, engine.value, nodes, jobs or default_nodes())
    _report([Run.open(folder) for folder in folders], out)


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="Experiment; without one, the list.")] = None,
    root: RootOption = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, separated by commas.")] = "1,2,3",
    settings: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder. Default: runs/reproduce/NAME.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Runs at a time. Default: the CPU cores.")] = None,
) -> None:
    """Make a published table again, with the published values and the controls beside ours.

    Example: fedkd reproduce fedgen --root /data
    """
    from plots.tables import markdown
    from sims import reproduce as tables
    from sims.simulation import default_nodes

    if name is None:
        for known in tables.experiments():
            out_console.print(f"{known}: {tables.Experiment.read(known).title}", highlight=False)
        return
    experiment = tables.Experiment.read(name)
    folder = out or Path("runs/reproduce") / name
    overrides = _flat(None, None, root, None, None, None, settings)
    runs = tables.reproduce(experiment, overrides, _seeds(seeds), folder, jobs or default_nodes())
    text = markdown(tables.table(experiment, runs))
    (folder / "table.md").write_text(f"{text}\n", encoding="utf-8")
    out_console.print(experiment.title, highlight=False)
    print(text)
    _print_files([folder / "table.md"])


@app.command()
def methods() -> None:
    """List the methods with their papers and variants."""
    from fedkd.method import load, names

    table = Table("method", "what it does", "variants", "source", title="Methods")
    for name in names():
        method = load(name)
        table.add_row(name, method.summary, ", ".join(method.variants) or "-", str(method.paper or "-"))
    out_console.print(table)


@app.command()
def show(
    method: Annotated[str | None, typer.Argument(help="Method to show.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every setting with its default instead.")] = False,
) -> None:
    """Print a method's contract, client half and server half one after another; or all settings with --keys."""
    from rich.syntax import Syntax

    from fedkd.config import defaults, descriptions
    from fedkd.method import load

    if method is not None:
        load(method)
    if keys or method is None:
        described = descriptions()
        table = Table("key", "default", "meaning", title="Settings")
        for key, value in defaults().items():
            if method is None or key.startswith(("run.", "data.", "model.", "train.", f"{method}.")):
                table.add_row(key, repr(value), described[key])
        out_console.print(table)
        return
    home = Path(__file__).resolve().parent.parent
    for title, folder in (("contract", "fedkd/methods"), ("client half", "clients"), ("server half", "strategies")):
        path = home / folder / f"{method}.py"
        out_console.rule(f"{title}: {folder}/{method}.py")
        out_console.print(Syntax(path.read_text(encoding="utf-8"), "python", background_color="default"))


@app.command()
def partition(
    data: DataOption = None,
    root: RootOption = None,
    clients: ClientsOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the partition.")] = None,
    settings: SetOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the picture and the table.")] = Path("runs/partition"),
) -> None:
    """Show who holds what: a table and a picture.

    Example: fedkd partition --data mnist --root /data --clients 20 --set data.alpha=0.05
    """
    import io

    import pandas as pd

    from fedkd.config import Config
    from fedkd.data import federate
    from plots import style
    from plots.partition import partition as figure

    flat = _flat(None, data, root, clients, 0 if clients else None, None, settings) | _given("run.seed", seed)
    federated = federate(Config.from_flat(flat))
    classes = federated.images.classes
    table = Table("client", "train", "test", *classes, title=f"Training examples per class of {federated.images.name}")
    counts, tests = federated.class_counts(), federated.class_counts("test")
    for client, row in enumerate(counts):
        cells = [str(n) if n else "·" for n in row]
        table.add_row(str(client), str(row.sum()), str(tests[client].sum()), *cells)
    out_console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "partition.csv").write_text(federated.csv(), encoding="utf-8")
    files = style.save(figure(pd.read_csv(io.StringIO(federated.csv()))), out / "partition")
    _print_files([out / "partition.csv", *files])


@app.command()
def digest(runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")]) -> None:
    """Print the sha256 of a run's history without its times: equal digests mean equal results."""
    from fedkd.results import Run

    for folder in runs:
        value = Run.open(folder).digest()
        print(value if len(runs) == 1 else f"{value}  {folder}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of a comparison.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the table and the figures.")] = Path("runs/figures"),
) -> None:
    """Draw the convergence and fairness figures of any runs, and their table."""
    _report(_open_all(runs), out)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    file_format: Annotated[TableFormat, typer.Option("--format", help="csv or parquet.")] = TableFormat.csv,
    out: Annotated[Path | None, typer.Option("--out", help="Where to. Default: RUN/export.")] = None,
) -> None:
    """Write a run's logs as tables: rounds, clients, evaluations, partition."""
    from fedkd.results import LOGS, Run

    opened = Run.open(run_folder)
    folder = out or run_folder / "export"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in (*LOGS, "partition"):
        frame = opened.partition if name == "partition" else opened.frame(name)
        path = folder / f"{name}.{file_format.value}"
        if file_format is TableFormat.csv:
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path, index=False)
        files.append(path)
    _print_files(files)


@app.command()
def doctor() -> None:
    """Say what is installed and found (GPU, Ray, data), and what to do about what is not."""
    from sims.doctor import examine

    for finding in examine():
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]--[/]"}[finding.fine]
        out_console.print(f"{mark}  [bold]{finding.what}[/]: {finding.found}", soft_wrap=True, highlight=False)
        if finding.advice:
            out_console.print(f"      {finding.advice}", soft_wrap=True, highlight=False)


def _given(key: str, value: Scalar | None) -> dict[str, Scalar]:
    return {} if value is None else {key: value}


_OWNED = {"run.method": "the command's argument", "run.dir": "--out", "run.seed": "--seed or --seeds"}
"""Keys that have an option or argument of their own."""


def _flat(
    method: str | None,
    data: str | None,
    root: Path | None,
    clients: int | None,
    clients_per_round: int | None,
    rounds: int | None,
    settings: list[str] | None,
    compared: Sequence[str] = (),
) -> dict[str, Scalar]:
    """Collect the options into flat keys; ``--set`` takes the sections of ``method`` and of the ``compared`` ones."""
    from fedkd.config import RunSection, parse_assignment
    from fedkd.method import names

    flat: dict[str, Scalar] = _given("run.method", method)
    flat |= _given("data.name", data) | _given("data.root", str(root) if root else None)
    flat |= _given("run.clients", clients) | _given("run.rounds", rounds)
    flat |= _given("run.clients-per-round", clients_per_round)
    for assignment in settings or []:
        key, value = parse_assignment(assignment)
        if key in _OWNED:
            raise UserError(f"--set {key}: that is what {_OWNED[key]} says")
        section = key.partition(".")[0]
        if method and section in names() and section not in (method, *compared):
            raise UserError(f"--set {key}: '{section}' is not what runs ({', '.join(compared or [method])})")
        flat[key] = value
    number = flat.get("run.clients")
    if "run.clients-per-round" not in flat and isinstance(number, int) and number < RunSection().clients_per_round:
        flat["run.clients-per-round"] = 0  # the default cohort does not fit: all clients
    return flat


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds '{text}' is not a list of whole numbers such as 1,2,3") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds '{text}' must be different numbers, none below 0")
    return seeds


def _open_all(folders: Sequence[Path]) -> list[Run]:
    """Open runs; a folder that is none stands for the runs in it."""
    from fedkd.results import Run

    runs = []
    for folder in folders:
        if (folder / "rounds.jsonl").exists():
            runs.append(Run.open(folder))
            continue
        inside = sorted(path.parent for path in folder.glob("*/rounds.jsonl") if ".interrupted" not in path.parent.name)
        if not inside:
            Run.open(folder)
        runs += [Run.open(path) for path in inside]
    return runs


def _report(runs: Sequence[Run], out: Path) -> None:
    """Write and print the comparison table and the figures."""
    from plots import style
    from plots.convergence import convergence
    from plots.fairness import fairness
    from plots.tables import comparison, markdown

    frame = comparison(runs)
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "table.csv", index=False)
    (out / "table.md").write_text(markdown(frame) + "\n", encoding="utf-8")
    _print_comparison(frame)
    files = [out / "table.csv", out / "table.md"]
    files += style.save(convergence(runs), out / "convergence") + style.save(fairness(runs), out / "fairness")
    _print_files(files)


def _print_comparison(frame: Any) -> None:
    from fedkd.results import spread

    table = Table(
        *("method", "seeds", "last round", "best round", "worst tenth", "hurt", "MB", "s"),
        title="Accuracy on the clients' own test data (%), mean over clients, ± over seeds",
    )
    for row in frame.to_dict("records"):
        hurt = "-" if row["hurt"] != row["hurt"] else f"{row['hurt']:.1f}"
        table.add_row(
            row["method"],
            str(row["seeds"]),
            spread(row["last"], row["last_std"]),
            spread(row["best"], row["best_std"]),
            spread(row["worst_decile"], row["worst_decile_std"]),
            hurt,
            f"{row['megabytes']:.1f}",
            f"{row['seconds']:.0f}",
        )
    out_console.print(table)


def _print_summary(finished: Run) -> None:
    summary = finished.summary()
    table = Table(show_header=False, title=f"{summary['method']}, seed {summary['seed']}")
    if "last" in summary:
        table.add_row("accuracy, last round", f"{summary['last']:.2%} (weighted {summary['last_weighted']:.2%})")
        table.add_row("accuracy, best round", f"{summary['best']:.2%} (round {summary['best_round']})")
        if summary["last_global"] == summary["last_global"]:
            table.add_row("global model, last round", f"{summary['last_global']:.2%}")
        fair = summary["fairness"]
        table.add_row("worst and best tenth", f"{fair['worst_decile']:.2%} and {fair['best_decile']:.2%}")
        table.add_row("spread over clients", f"{fair['deviation']:.2%}")
    table.add_row("bytes down and up", f"{summary['bytes_down']:,} and {summary['bytes_up']:,}")
    table.add_row("seconds", f"{summary['seconds']:.1f}")
    out_console.print(table)
    out_console.print(f"digest {summary['digest']}", soft_wrap=True, highlight=False)
    out_console.print(f"results in {finished.folder}", soft_wrap=True, highlight=False, markup=False)


def _print_files(files: Sequence[Path]) -> None:
    for path in files:
        if path.suffix != ".txt":
            out_console.print(str(path), soft_wrap=True, highlight=False, markup=False)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: one clear line and exit code 2 for the user's mistakes, 1 for failures, 130 when interrupted."""
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal ends a run as Ctrl-C does
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    try:
        app()
    except UserError as error:
        error_console.print(f"fedkd: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        error_console.print("fedkd: stopped; the rounds that were finished are in the results folder", style="yellow")
        sys.exit(130)
    except (RuntimeError, OSError) as error:
        error_console.print(f"fedkd: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
