"""The command line: ``fedkd``.  Heavy imports happen inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from fedkd.errors import UserError
from plots.figures import DEFAULT, chosen, draw_all, listing
from sims.show import (
    error_console,
    out_console,
    show_adaptation,
    show_audit,
    show_comparison,
    show_partition,
    show_summary,
)

if TYPE_CHECKING:
    from fedkd.config import Config, Scalar
    from fedkd.results import Run
    from sims.doctor import Finding

app = typer.Typer(
    name="fedkd",
    help="Federated personalized distillation on Flower: methods, baselines and controls on one protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class EngineName(StrEnum):
    """Where a run happens."""

    inline = "inline"
    simulation = "simulation"
    deployment = "deployment"


class TableEngine(StrEnum):
    """Where the runs of a published table happen: not on devices, which have data of their own."""

    inline = "inline"
    simulation = "simulation"


class TrackerName(StrEnum):
    """Where each round is shown beside the terminal."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


class Axis(StrEnum):
    """What a convergence figure has on its horizontal axis."""

    round = "round"
    bytes = "bytes"
    time = "time"


class TableFormat(StrEnum):
    """File format of exported tables."""

    csv = "csv"
    parquet = "parquet"


def _folder(text: str | Path) -> Path:
    """Read a folder from the command line; an empty word is a variable that was never set, not this folder."""
    if not str(text).strip():
        raise typer.BadParameter("the name of the folder is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # a user who is not there
        raise typer.BadParameter(f"{text}: {error}") from error


def _out(text: str) -> Any:
    return typer.Option("--out", parser=_folder, metavar="DIR", help=text)


DataOption = Annotated[
    str | None, typer.Option("--data", help="digits, mnist, fashion_mnist, cifar10, cifar100, femnist or a hub name.")
]
RootOption = Annotated[
    Path | None,
    typer.Option("--root", parser=_folder, metavar="DIR", help="Local folder with the data (data.root)."),
]
ClientsOption = Annotated[int | None, typer.Option("--clients", help="Number of clients.")]
CohortOption = Annotated[int | None, typer.Option("--clients-per-round", help="Clients sampled per round; 0: all.")]
RoundsOption = Annotated[int | None, typer.Option("--rounds", help="Communication rounds.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. train.lr=0.1 (`fedkd show --keys` lists all)."),
]
EngineOption = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="inline: this process; simulation: flwr run with Ray; deployment: devices. The results are the same.",
    ),
]
SuperLinkOption = Annotated[
    str,
    typer.Option(
        "--superlink",
        metavar="DIR|NAME",
        help="Of a deployment: the folder of `fedkd deploy init`, or a name in Flower's configuration.",
    ),
]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Parallel nodes. Default: 1 inline, one per core in simulation.")
]
CpusOption = Annotated[
    int | None, typer.Option("--cpus-per-node", min=1, help="CPU cores reserved for a node (simulation). Default: 1.")
]
GpusOption = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-node",
        min=0,
        help="GPUs, or a share of one, reserved for a node (simulation). Default: those there are, shared by all.",
    ),
]
JobsOption = Annotated[int | None, typer.Option("--jobs", min=1, help="Inline runs at a time. Default: the CPU cores.")]
TrackOption = Annotated[
    TrackerName | None,
    typer.Option("--track", help="Show each round as it ends in TensorBoard, Weights & Biases or MLflow too."),
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
    out: Annotated[Path | None, _out("Folder of the results. Default: a new one in runs/.")] = None,
    nodes: NodesOption = None,
    cpus_per_node: CpusOption = None,
    gpus_per_node: GpusOption = None,
    superlink: SuperLinkOption = "",
    track: TrackOption = None,
) -> None:
    """Run one method and print what came out.

    Examples:

      fedkd run fedgen

      fedkd run fedprox --data mnist --root /data --set fedprox.mu=0.01 --set data.alpha=0.05

      fedkd run fedavg --engine simulation --clients 100 --set data.partition=iid --rounds 20

      fedkd run fedgen --engine deployment --superlink DIR --clients 8
    """
    from sims.launch import check_resources, launch, on_devices, place, prepare

    check_resources(engine.value, cpus_per_node, gpus_per_node)
    options = {"data.name": data, "data.root": root, "run.clients": clients, "run.rounds": rounds, "run.seed": seed}
    flat = _flat({"run.method": method, **options, "run.clients-per-round": clients_per_round}, settings, [method])
    config = place(prepare(on_devices(flat, engine.value, nodes, superlink)), out)
    _warn_of_ignored([config], flat)
    _warn_of_untested(config)
    finished = launch(config, engine.value, nodes, cpus_per_node, gpus_per_node, superlink, track or "")
    show_summary(finished)


@app.command()
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that was interrupted.")],
    root: RootOption = None,
    engine: EngineOption = EngineName.inline,
    nodes: NodesOption = None,
    cpus_per_node: CpusOption = None,
    gpus_per_node: GpusOption = None,
    superlink: SuperLinkOption = "",
) -> None:
    """Go on with a run that was interrupted, from its last checkpoint; the results are those of one that was not.

    The engine may be another one than before.  A finished run is left as it is (exit code 0).

    Example: fedkd resume runs/fedgen-digits-s1
    """
    from fedkd.results import Run
    from sims.launch import check_resources, launch, on_devices
    from sims.resume import going_on

    check_resources(engine.value, cpus_per_node, gpus_per_node)
    run = Run(run_folder)
    if run.finished:
        _warn(f"{run_folder} is finished already")
    else:
        config, said = going_on(run_folder, root)
        for line in said:
            _warn(f"{run_folder}: {line}")
        on_devices(config.flat(), engine.value, nodes, superlink)
        run = launch(config, engine.value, nodes, cpus_per_node, gpus_per_node, superlink)
    show_summary(run)


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
    out: Annotated[Path, _out("Folder of the runs, the table and the figures.")] = Path("runs/compare"),
    nodes: NodesOption = None,
    cpus_per_node: CpusOption = None,
    gpus_per_node: GpusOption = None,
    jobs: JobsOption = None,
    superlink: SuperLinkOption = "",
    track: TrackOption = None,
) -> None:
    """Run methods side by side: one table, one figure of each kind.

    Finished runs in the folder are used and interrupted ones go on, so a comparison that was stopped goes on.

    Examples:

      fedkd compare local fedavg fedavg_ft fedgen

      fedkd compare fedavg fedprox --data mnist --root /data --seeds 1,2,3,4,5 --out runs/prox
    """
    from sims.launch import on_devices, place_series, prepare
    from sims.together import prepare_all

    _check_methods(methods)
    _check_series(engine, cpus_per_node, gpus_per_node, out)
    options = {"data.name": data, "data.root": root, "run.clients": clients, "run.rounds": rounds}
    flat = _flat({**options, "run.clients-per-round": clients_per_round}, settings, methods)
    flat = on_devices(flat, engine.value, nodes, superlink)
    wanted = [{**flat, "run.method": method, "run.seed": seed} for seed in _seeds(seeds) for method in methods]
    configs = prepare_all(wanted, prepare)
    planned = [place_series(config, out / f"{config.run.method}-s{config.run.seed}") for config in configs]
    _say_unconcerned(flat, methods)
    runs = _run_series(planned, flat, engine, nodes, jobs, cpus_per_node, gpus_per_node, superlink, track)
    _report(runs, out)


@app.command()
def sweep(
    methods: Annotated[list[str], typer.Argument(help="Methods to run; `local` among them adds who is hurt.")],
    over: Annotated[
        list[str],
        typer.Option(
            "--over",
            metavar="KEY=VALUE,VALUE",
            help="A setting and its values; given again, every combination is run. A value with a comma: in quotes.",
        ),
    ],
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, separated by commas.")] = "1,2,3",
    data: DataOption = None,
    root: RootOption = None,
    engine: EngineOption = EngineName.inline,
    clients: ClientsOption = None,
    clients_per_round: CohortOption = None,
    rounds: RoundsOption = None,
    settings: SetOption = None,
    out: Annotated[Path, _out("Folder of the runs, the table and the figures.")] = Path("runs/sweep"),
    nodes: NodesOption = None,
    cpus_per_node: CpusOption = None,
    gpus_per_node: GpusOption = None,
    jobs: JobsOption = None,
    superlink: SuperLinkOption = "",
    track: TrackOption = None,
) -> None:
    """Run methods with every combination of some settings: one table, a figure, and which setting came out best.

    A setting of one method is varied for that method alone.  Finished runs in the folder are used and interrupted ones
    go on, also when settings or values are added, so a sweep that was stopped goes on with the same command.

    Examples:

      fedkd sweep fedgen --over fedgen.temperature=1,2,4 --over data.alpha=0.05,0.1,1 --seeds 1,2,3

      fedkd sweep local fedavg fedprox --over fedprox.mu=0.01,0.1,1 --over train.lr=0.01,0.1 --out runs/prox
    """
    from plots import style
    from sims import sweep as sweeps
    from sims.launch import on_devices, prepare, writable

    _check_methods(methods)
    axes: dict[str, list[Scalar]] = {}
    for text in over:
        key, values = sweeps.parse_axis(text)
        _check_key("--over", key, methods)
        if key in axes:
            raise UserError(f"--over {key} is given twice; name all its values at once")
        axes[key] = values
    sweeps.check_axes(axes)
    options = {"data.name": data, "data.root": root, "run.clients": clients, "run.rounds": rounds}
    flat = _flat({**options, "run.clients-per-round": clients_per_round}, settings, methods)
    if twice := sorted(axes.keys() & flat.keys()):
        raise UserError(f"{twice[0]} is given twice: as {flat[twice[0]]!r} and with --over")

    def configuration(keys: Mapping[str, Scalar]) -> Config:
        return prepare(on_devices(_cohort_that_fits(keys), engine.value, nodes, superlink))

    _check_series(engine, cpus_per_node, gpus_per_node, out)
    planned = sweeps.plan(axes, flat, methods, _seeds(seeds), writable(out), configuration)
    _say_unconcerned([*flat, *axes], methods)
    runs = _run_series(planned, [*flat, *axes], engine, nodes, jobs, cpus_per_node, gpus_per_node, superlink, track)
    _report(runs, out)
    said = sweeps.best(runs)
    drawn, left_out = sweeps.draw(runs)
    for reason in left_out:
        _warn(f"left out: {reason}")
    for name, figure in drawn.items():
        _print_files(style.save(figure, out / name))
    if said:
        (out / "best.txt").write_text("".join(f"{line}\n" for line in said), encoding="utf-8")
    for line in said:
        out_console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="ID", help="Table, as --list names it.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the tables that can be made again.")] = False,
    scale: Annotated[str, typer.Option("--scale", help="smoke: a minute; cpu: as measured here; paper.")] = "cpu",
    root: RootOption = None,
    engine: Annotated[
        TableEngine,
        typer.Option("--engine", help="inline: this machine; simulation: flwr run with Ray. The results are the same."),
    ] = TableEngine.inline,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Seeds, separated by commas. Default: the table's.")
    ] = None,
    settings: SetOption = None,
    out: Annotated[Path | None, _out("Folder. Default: runs/reproduce/ID/SCALE.")] = None,
    nodes: NodesOption = None,
    cpus_per_node: CpusOption = None,
    gpus_per_node: GpusOption = None,
    jobs: JobsOption = None,
    track: TrackOption = None,
) -> None:
    """Make a published table again: the published value, ours and the controls beside each other, and the figures.

    Finished runs in the folder are used and interrupted ones go on, so a table that was stopped goes on.
    Without --out, those of the paper's other tables are used too.

    Examples:

      fedkd reproduce --list

      fedkd reproduce pgfed/cifar10 --scale smoke

      fedkd reproduce fedgen/table1 --root /data --jobs 4
    """
    from sims import reproduce as tables
    from sims.launch import check_resources, writable
    from sims.simulation import default_nodes

    if name is None or show_list:
        for known in tables.experiments():
            out_console.print(f"{known}: {tables.title(known)}", soft_wrap=True, highlight=False, markup=False)
        return
    experiment = tables.Experiment.read(name, scale)
    check_resources(engine.value, cpus_per_node, gpus_per_node)
    folder = writable(out or Path("runs/reproduce") / experiment.name / scale)
    beside = [] if out else sorted(folder.parent.parent.glob(f"*/{scale}"))
    overrides = _flat({"data.root": root}, settings, [row.method for row in experiment.rows])
    chosen = experiment.seeds if seeds is None else _seeds(seeds)
    runs = tables.reproduce(
        experiment,
        overrides,
        chosen,
        folder,
        jobs or default_nodes(),
        beside,
        track=track or "",
        engine=engine.value,
        nodes=nodes,
        cpus=cpus_per_node,
        gpus=gpus_per_node,
    )
    files = tables.write(experiment, runs, folder)
    out_console.print(f"{experiment.title} (scale {scale})", soft_wrap=True, highlight=False, markup=False)
    print((folder / "table.md").read_text(encoding="utf-8"))
    _print_files(files)


@app.command()
def methods() -> None:
    """List the methods with their papers and variants."""
    from fedkd.method import load, names

    table = Table("method", "what it does", "variants", title="Methods", show_lines=True)
    for name in names():
        method = load(name)
        what = f"{method.summary}\n[dim]{escape(str(method.paper))}[/]" if method.paper else method.summary
        table.add_row(name, what, ", ".join(method.variants) or "-")
    out_console.print(table, highlight=False)


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
        table = Table(Column("key", no_wrap=True), Column("default", overflow="fold"), "meaning", title="Settings")
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
    out: Annotated[Path, _out("Folder of the picture and the table.")] = Path("runs/partition"),
) -> None:
    """Show who holds what: a table and a picture.

    Example: fedkd partition --data mnist --root /data --clients 20 --set data.alpha=0.05
    """
    import pandas as pd

    from fedkd.data import federate
    from plots import style
    from plots.partition import partition as figure
    from sims.launch import checked, writable

    options = {"data.name": data, "data.root": root, "run.clients": clients, "run.seed": seed}
    flat = _flat(options, settings)
    writable(out)
    config = checked(flat)
    _warn_of_ignored([config], flat)
    for key in sorted(flat.keys() - {"run.clients", "run.clients-per-round", "run.seed"}):
        if not key.startswith("data."):
            _warn(f"{key} has no effect on who holds what")
    federated = federate(config)
    show_partition(federated)
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
    out: Annotated[Path, _out("Folder of the table and the figures.")] = Path("runs/figures"),
    by: Annotated[Axis, typer.Option("--by", help="Horizontal axis of the convergence figure.")] = Axis.round,
    target: Annotated[
        list[float] | None,
        typer.Option("--target", min=0, max=1, help="Accuracy, e.g. 0.8, to say who reaches it, when, at what cost."),
    ] = None,
    figure: Annotated[
        str, typer.Option("--figure", metavar="NAME[,NAME]", help=f"all, or any of: {listing()}.")
    ] = ",".join(DEFAULT),
) -> None:
    """Draw figures of any runs, and their table.

    Each figure is a PNG, a PDF, a text file with its caption, and a CSV file with the numbers drawn.

    Examples:

      fedkd plot runs/compare --by bytes --target 0.8 --target 0.9

      fedkd plot runs/compare --figure violin,pareto,differences

      fedkd plot runs/compare --figure all
    """
    _report(_open_all(runs), out, by, target or [], chosen(figure))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of a comparison.")],
    out: Annotated[
        Path, typer.Option("--out", parser=_folder, metavar="FILE", help="The page; one that is there is replaced.")
    ] = Path("runs/report.html"),
) -> None:
    """Make one self-contained HTML page of any runs: claims and what they rest on, tables, figures, differences.

    The page needs no network: sort a table, hover a client, switch a method off.

    Example: fedkd report runs/compare --out report.html
    """
    from fedkd.files import write_whole
    from plots.report import report as page
    from sims.launch import writable

    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file, such as {out / 'report.html'}")
    writable(out.parent)
    text = page(_open_all(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text.encode())
    _print_files([out])


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    file_format: Annotated[TableFormat, typer.Option("--format", help="csv or parquet.")] = TableFormat.csv,
    out: Annotated[Path | None, _out("Where to. Default: RUN/export.")] = None,
) -> None:
    """Write a run's logs as tables: rounds, clients, evaluations, partition."""
    from fedkd.checkpoints import LOGS
    from fedkd.results import Run
    from sims.launch import writable

    opened = Run.open(run_folder)
    frames = {name: opened.frame(name) for name in LOGS} | {"partition": opened.partition}
    folder = writable(out or run_folder / "export")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, frame in frames.items():
        path = folder / f"{name}.{file_format.value}"
        if file_format is TableFormat.csv:
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path, index=False)
        files.append(path)
    _print_files(files)


@app.command()
def adapt(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, or of a comparison.")],
    epochs: Annotated[int, typer.Option("--epochs", help="Local epochs, scored at 0 and after each.")] = 20,
    clients: Annotated[str, typer.Option("--clients", help="Newcomers' numbers, e.g. 20-24,30. Default: all.")] = "",
    split: Annotated[
        str, typer.Option("--split", help="The writers of this split instead, e.g. unseen_writers_test (femnist).")
    ] = "",
    root: RootOption = None,
    out: Annotated[Path | None, _out("Folder. Default: adapt in the run's, runs/adapt for several.")] = None,
) -> None:
    """Let newcomers adapt what runs ended with: clients held out (data.newcomers), or writers of a further split.

    Examples:

      fedkd run fedavg --clients 15 --set data.newcomers=5 --out runs/fedavg

      fedkd adapt runs/fedavg --epochs 20

      fedkd adapt runs/fedavg runs/pgfed --split unseen_writers_test
    """
    from rich.progress import track

    from sims import adapt as newcomers
    from sims.launch import writable

    if epochs < 1:
        raise UserError(f"--epochs {epochs}: it takes one epoch at least")
    opened = _open_all(runs)
    tasks = newcomers.plan(opened, clients, split, str(root or ""))
    folder = writable(out or (opened[0].folder / "adapt" if len(opened) == 1 else Path("runs/adapt")))
    count = sum(len(task.clients) for task in tasks)
    each = (rows for task in tasks for rows in newcomers.adapt(task, epochs))
    rows = [row for rows in track(each, "newcomers", count, console=error_console, transient=True) for row in rows]
    table, files = newcomers.write(rows, folder)
    show_adaptation(table)
    _print_files(files)


@app.command()
def audit(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, or of a comparison.")],
    root: RootOption = None,
    out: Annotated[Path | None, _out("Folder. Default: audit in the run's, runs/audit for several.")] = None,
) -> None:
    """Say how well the models that runs ended with tell the clients' training images from their others.

    Example: fedkd audit runs/compare
    """
    from rich.progress import track

    from sims import audit as membership
    from sims.launch import writable

    opened = _open_all(runs)
    tasks = membership.plan(opened, str(root or ""))
    folder = writable(out or (opened[0].folder / "audit" if len(opened) == 1 else Path("runs/audit")))
    rows = [membership.audit(task) for task in track(tasks, "runs", console=error_console, transient=True)]
    table, files = membership.write(rows, tasks, folder)
    show_audit(table)
    _print_files(files)


@app.command()
def doctor() -> None:
    """Say what is installed and found (GPU, Ray, data), and what to do about what is not."""
    from sims.doctor import examine

    _print_findings(examine())


def _print_findings(findings: Iterable[Finding]) -> bool:
    """Print findings, a line each with what to do; return whether nothing that is needed is missing."""
    fine = True
    for finding in findings:
        fine = fine and finding.fine is not False
        mark = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]--[/]"}[finding.fine]
        out_console.print(f"{mark}  [bold]{finding.what}[/]: {finding.found}", soft_wrap=True, highlight=False)
        if finding.advice:
            out_console.print(f"      {finding.advice}", soft_wrap=True, highlight=False)
    return fine


deploy = typer.Typer(name="deploy", help="Run on real devices: keys and commands, a check, data.", no_args_is_help=True)
app.add_typer(deploy)


@deploy.command("init")
def deploy_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=_folder, help="A new folder.")],
    nodes: Annotated[int, typer.Option("--nodes", help="Number of devices.")],
    clients: Annotated[int | None, typer.Option("--clients", help="Number of clients. Default: one a device.")] = None,
    address: Annotated[str, typer.Option("--address", help="Host name or address of the server.")] = "localhost",
    port: Annotated[int, typer.Option("--port", help="Its port.")] = 8000,
) -> None:
    """Write certificates, a key for each device, Flower's configuration, service files and the exact commands.

    Example: fedkd deploy init lab --nodes 4 --clients 8 --address server.example.org
    """
    from sims.deploy import Deployment

    Deployment(folder, nodes, nodes if clients is None else clients, address, port).write()
    out_console.print(str(folder / "README.md"), soft_wrap=True, highlight=False, markup=False)


@deploy.command("check")
def deploy_check(
    keys: Annotated[Path, typer.Argument(metavar="DIR", parser=_folder, help="Folder with ca.pem and node.key.")],
    superlink: Annotated[str, typer.Option("--superlink", metavar="HOST:PORT", help="The server.")],
    clients: Annotated[str, typer.Option("--clients", help="Numbers of the clients here, e.g. 0,1 or 4-7.")],
    data_folder: Annotated[
        Path, typer.Option("--data-folder", parser=_folder, metavar="DIR", help="Folder of their data.")
    ],
    data: DataOption = None,
    settings: SetOption = None,
) -> None:
    """Say from a device whether it reaches the server, is trusted, finds its data and has what it needs.

    Exit code 1 when something that is needed is missing.

    Example: fedkd deploy check /etc/fedkd --superlink server:8000 --clients 0,1 --data-folder /srv/fedkd/data
    """
    from fedkd.config import Config
    from sims.deploy import check

    flat = _flat({"data.name": data, "data.partition": "devices"}, settings)
    if not _print_findings(check(keys, superlink, clients, data_folder, Config.from_flat(flat))):
        raise typer.Exit(1)


@deploy.command("split")
def deploy_split(
    out: Annotated[Path, _out("A new folder: a folder per client, as devices hold them.")],
    data: DataOption = None,
    root: RootOption = None,
    clients: ClientsOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the partition.")] = None,
    settings: SetOption = None,
) -> None:
    """Write each client's own images of a partition, to be put on the devices.

    Example: fedkd deploy split --clients 8 --set data.alpha=0.3 --out shards
    """
    from fedkd.data.devices import write_split
    from sims.launch import checked, writable

    flat = _flat({"data.name": data, "data.root": root, "run.clients": clients, "run.seed": seed}, settings)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; take another folder")
    writable(out)
    config = checked(flat)
    _warn_of_ignored([config], flat)
    _print_files(write_split(config, out))


_OWNED = {"run.method": "the command's argument", "run.dir": "--out", "run.seed": "--seed or --seeds"}
"""Keys that have an option or argument of their own and no ``--set``."""


def _flat(
    options: Mapping[str, str | int | Path | None], settings: list[str] | None, methods: Sequence[str] = ()
) -> dict[str, Scalar]:
    """Return the flat keys of a command.

    Args:
        options: those that have an option or argument of their own; None: not given.
        settings: what ``--set`` brings.
        methods: what will run, so that ``--set`` takes no other method's keys; empty: any.

    Raises:
        UserError: a word of ``--set`` that is no assignment, or a key that is given twice or is not for ``--set``.
    """
    from fedkd.config import parse_assignment

    given = {key: value for key, value in options.items() if value is not None}
    flat: dict[str, Scalar] = {key: str(v) if isinstance(v, Path) else v for key, v in given.items()}
    for assignment in settings or []:
        key, value = parse_assignment(assignment)
        _check_key("--set", key, methods)
        if key in flat:
            raise UserError(f"{key} is given twice: {flat[key]!r} and {value!r}")
        flat[key] = value
    return _cohort_that_fits(flat)


def _check_key(option: str, key: str, methods: Sequence[str]) -> None:
    """Check that a key is for an option, and no other method's than those that run (empty: any)."""
    from fedkd.method import names

    if key in _OWNED:
        raise UserError(f"{option} {key}: that is what {_OWNED[key]} says")
    section = key.partition(".")[0]
    if methods and section in names() and section not in methods:
        raise UserError(f"{option} {key}: '{section}' is not what runs ({', '.join(dict.fromkeys(methods))})")


def _cohort_that_fits(flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the keys with all clients in each round where the default cohort is larger than their number."""
    from fedkd.config import RunSection

    number = flat.get("run.clients")
    if "run.clients-per-round" not in flat and isinstance(number, int) and number < RunSection().clients_per_round:
        return {**flat, "run.clients-per-round": 0}
    return dict(flat)


def _check_methods(methods: Sequence[str]) -> None:
    if len(set(methods)) < len(methods):
        raise UserError("a method is named twice; name each once")


def _say_unconcerned(given: Iterable[str], methods: Sequence[str]) -> None:
    """Say which methods run without some of the keys that were given."""
    from sims.together import SECTIONS, unconcerned

    told = ", ".join(key for key in given if key.startswith(SECTIONS))
    for method in unconcerned(given, methods):
        error_console.print(f"{told}: not for {method}, whose clients send no model", soft_wrap=True, highlight=False)


def _check_series(engine: EngineName, cpus: int | None, gpus: float | None, out: Path) -> None:
    """Check that the engine has what its nodes need, and that ``out`` can be the folder of several runs."""
    from fedkd.results import started
    from sims.launch import check_resources, writable

    check_resources(engine.value, cpus, gpus)
    if started(writable(out)):
        raise UserError(f"--out {out} holds a run itself; take another folder")


def _run_series(
    planned: Sequence[tuple[Config, bool]],
    given: Iterable[str],
    engine: EngineName,
    nodes: int | None,
    jobs: int | None,
    cpus: int | None,
    gpus: float | None,
    superlink: str,
    track: TrackerName | None,
) -> list[Run]:
    """Run what is not finished of several runs, and return them all.

    Args:
        planned: each run, and whether it is finished.
        given: keys that were given, so that those without effect are named.
    """
    from fedkd.results import Run
    from sims.launch import launch_all
    from sims.simulation import default_nodes

    configs, waiting = [config for config, _ in planned], [config for config, finished in planned if not finished]
    for config, finished in planned:
        if finished:
            said = f"{config.run.method} seed {config.run.seed}: already finished in {config.run.dir}"
            error_console.print(said, highlight=False)
    _warn_of_ignored(configs, given)
    for config in {config.data_seed: config for config in configs}.values():
        _warn_of_untested(config)
    if waiting:
        at_once = jobs or default_nodes()
        launch_all(waiting, engine.value, nodes, at_once, cpus, gpus, superlink, track or "")
    return [Run.open(config.run.dir) for config in configs]


def _warn_of_ignored(configs: Sequence[Config], given: Iterable[str]) -> None:
    """Say which of the keys that were given none of the runs reads, and what the methods doubt of their settings."""
    from fedkd.ignored import ignored

    keys = [key for key in given if key not in _OWNED]
    said = [ignored(config, keys) for config in configs]
    for line in dict.fromkeys(line for lines in said for line in lines):
        if all(line in lines for lines in said):
            _warn(line)
    for line in dict.fromkeys(line for config in configs for line in _doubts(config)):
        _warn(line)


def _doubts(config: Config) -> list[str]:
    """Return what is doubtful in the settings of training, and in the method's own beside them and the model."""
    import torch

    from fedkd.config import HyperParameters
    from fedkd.data import federate
    from fedkd.setup import Setup

    doubts = config.train.doubts()
    if type(config.hyper).doubts is HyperParameters.doubts:
        return doubts  # no need of the model
    if config.data.partition == "devices":
        return doubts  # what images they have, and so the model, is not known here
    data = federate(config)
    setup = Setup.build(config, data.shape, data.classes, torch.device("cpu"))
    return doubts + config.hyper.doubts(config.train, config.model, setup.sizes["statistics"])


def _warn_of_untested(config: Config) -> None:
    """Say how many clients have no test data, since means over clients are then over fewer."""
    from fedkd.data import federate

    if config.data.partition == "devices":
        return
    if none := sum(not len(rows) for rows in federate(config).test):
        seed = config.data_seed
        _warn(f"{none} of {config.run.clients} clients have no test data at seed {seed} and are left out of all means")


def _warn(line: str) -> None:
    error_console.print(f"fedkd: {line}", style="yellow", soft_wrap=True, highlight=False, markup=False)


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
        try:
            inside = [] if (folder / "rounds.jsonl").exists() else sorted(folder.glob("*/rounds.jsonl"))
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}") from error
        runs += [Run.open(path.parent) for path in inside] or [Run.open(folder)]
    return runs


def _report(
    runs: Sequence[Run],
    out: Path,
    by: Axis = Axis.round,
    targets: Sequence[float] = (),
    figures: Sequence[str] = DEFAULT,
) -> None:
    """Write and print the comparison table and the figures."""
    from plots import style
    from plots.tables import comparison, describe, markdown, summaries
    from sims.launch import writable

    writable(out)
    frame, about = comparison(runs), describe(runs)
    axes = {Axis.round: "round", Axis.bytes: "bytes", Axis.time: "seconds"}
    drawn, left_out = draw_all(figures, runs, by=axes[by], targets=targets)
    each = json.dumps(summaries(runs, targets), indent=2)
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "table.csv", index=False)
    (out / "table.md").write_text(f"{about}\n\n{markdown(frame)}\n", encoding="utf-8")
    (out / "summaries.json").write_text(f"{each}\n", encoding="utf-8")
    show_comparison(frame, about)
    if targets and "convergence" in drawn:
        out_console.print(drawn["convergence"].caption, highlight=False, markup=False)
    for reason in left_out:
        _warn(f"left out: {reason}")
    files = [out / "table.csv", out / "table.md", out / "summaries.json"]
    for name, figure in drawn.items():
        files += style.save(figure, out / name)
    _print_files(files)


def _print_files(files: Sequence[Path]) -> None:
    for path in files:
        if path.suffix != ".txt":
            out_console.print(str(path), soft_wrap=True, highlight=False, markup=False)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: one clear line and exit code 2 for the user's mistakes, 1 for failures, 130 when interrupted."""
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal ends a run as Ctrl-C does, unless nohup keeps it away
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "±" shows something else, and not a traceback
    try:
        _check_once(sys.argv[1:])
        code = app(standalone_mode=False, prog_name="fedkd") or 0
    except UserError as error:
        code = _failed(error, 2)
    except KeyboardInterrupt:
        code = 130
    except (RuntimeError, OSError) as error:
        code = _failed(error, 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # that of Click's errors, from whichever copy of it Typer uses
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "fedkd")
        said = error.format_message().strip()  # nothing, when the help was printed for want of a command
        code = _failed(f"{said} (`{command} --help` says what there is)", 2) if said else 2
    if code == 130:
        several = {"compare", "reproduce", "sweep"} & set(sys.argv[1:2])
        on = "the same command goes on" if several else "`fedkd resume` goes on"
        said = f"fedkd: stopped; the rounds that were finished are in the results folder, and {on}"
        error_console.print(said, style="yellow", soft_wrap=True)
    sys.exit(code)


def _check_once(words: Sequence[str]) -> None:
    """Check that no option but those that take several is given twice, where Click would take the last one."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    for option in options:
        if options.count(option) > 1 and option not in ("--set", "--over", "--target"):
            raise UserError(f"{option} is given twice")


def _failed(error: object, code: int) -> int:
    error_console.print(f"fedkd: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
    return code


if __name__ == "__main__":
    main()
