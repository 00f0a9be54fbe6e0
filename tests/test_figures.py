"""Every figure by name: the numbers drawn against those worked out here, no text over another, and how it looks.

How a figure looks is compared coarsely and without its texts, so that versions of matplotlib may differ a little.
After a change that is meant, look at the figures and write the pictures anew: ``FEDKD_NEW_FIGURES=1 pytest
tests/test_figures.py``.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import os
import pkgutil
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from invented import finish, invent
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy import stats
from test_cli import fedkd

import plots
from fedkd.errors import UserError
from fedkd.method import names
from fedkd.methods.fedftg import ImageGenerator
from fedkd.models import FlatModel, LatentGenerator
from fedkd.results import Run
from fedkd.samples import images
from plots import clients, figures, style
from plots.adapt import adaptation
from plots.audit import GRID, roc
from plots.communication import pareto
from plots.fairness import distribution, histogram, violin
from plots.heterogeneity import gain, heterogeneity
from plots.mechanisms import apfl_alpha, fedd2s_drops, pgfed_alpha
from plots.partition import partition_of
from plots.rows import number, rows
from plots.samples import fedftg_images, fedgen_latent
from plots.significance import claims, differences, holm, ranks
from plots.sweep import gains, heatmap

pytestmark = pytest.mark.slow

PICTURES = Path(__file__).parent / "fixtures" / "figures"
COARSENESS, TOLERANCE = 5, 1.5
"""Pixels of a figure at 100 dpi, along a side, that are averaged to one of its picture, and the root of the mean square
difference, 0 to 255, between two pictures that are the same."""
EXCEPTIONS = {"fedftg-images": (20, 5.0)}
"""Versions of matplotlib place the pixels of an image differently."""

FIVE = ("local", "fedavg_ft", "fedgen", "apfl", "fedd2s")


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Three seeds of five methods."""
    return invent(tmp_path_factory.mktemp("five"), FIVE, seeds=3)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two seeds of FedGen over two settings, one combination left out."""
    folder, runs = tmp_path_factory.mktemp("sweep"), []
    for alpha, temperature in itertools.product((0.05, 0.1, 1.0), (1.0, 2.0)):
        if (alpha, temperature) != (1.0, 2.0):
            keys = {"data.alpha": alpha, "fedgen.temperature": temperature}
            runs += invent(folder, ["fedgen"], seeds=2, rounds=2, clients=4 if alpha < 1 else 5, **keys)
    return runs


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Finished runs of the methods whose final state is drawn: generators with random weights, and a matrix."""
    folder, draws = tmp_path_factory.mktemp("ended"), np.random.default_rng(5)
    latent = FlatModel(LatentGenerator(32, 4, 256, (16,)))
    image = FlatModel(ImageGenerator(100, 4, 16, (1, 8, 8)))
    fedgen, fedftg, pgfed = invent(folder, ["fedgen", "fedftg", "pgfed"], rounds=1)
    alpha = np.full((8, 8), 1 / 8, dtype=np.float32)
    alpha[2:, :4] += draws.normal(0, 0.05, (6, 4)).astype(np.float32)
    return [
        finish(fedgen, **_state(latent, draws)),
        finish(fedftg, **_state(image, draws)),
        finish(pgfed, alpha=alpha),
    ]


def _state(model: FlatModel, draws: np.random.Generator) -> dict[str, np.ndarray]:
    parameters = draws.normal(0, 0.3, len(model.parameters)).astype(np.float32)
    return {"generator": parameters, "generator_statistics": np.abs(parameters[: len(model.statistics)]) + 0.5}


def lines(axes: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def last(run: Run) -> np.ndarray:
    """Return the accuracies ``[clients]`` at the last round from the log itself, in percent."""
    rows = [row for row in run.rows("evaluations") if row["round"] == run.config.run.rounds]
    return np.array([100 * row["personal_correct"] / row["total"] for row in rows])


def of(runs: Sequence[Run], method: str) -> list[Run]:
    return [run for run in runs if run.config.run.method == method]


class TestClients:
    def test_holdings(self, five: list[Run]) -> None:
        counts = five[0].partition.query("split == 'train'").filter(like="class_").to_numpy(dtype=float)
        found = clients.holdings(five[0])
        assert found["examples"].tolist() == counts.sum(axis=1).tolist()
        assert found["classes"].tolist() == (counts > 0).sum(axis=1).tolist()
        expected = [stats.entropy(row) / math.log(counts.shape[1]) for row in counts]
        assert found["entropy"].tolist() == pytest.approx(expected)

    def test_alone(self, five: list[Run]) -> None:
        run = of(five, "fedgen")[1]
        found = clients.table(run, five)
        assert found["accuracy"].tolist() == pytest.approx(last(run).tolist())
        assert found["alone"].tolist() == pytest.approx(last(of(five, "local")[1]).tolist())
        assert clients.table(run, [run])["alone"].isna().all()


class TestSpread:
    def test_distribution(self, five: list[Run]) -> None:
        x, y = lines(distribution(of(five, "fedgen")).axes[0])["fedgen"]
        at_median = [100 * np.mean(last(run) <= x[len(x) // 2]) for run in of(five, "fedgen")]
        assert y[len(x) // 2] == pytest.approx(np.mean(at_median))
        assert (x[0], x[-1], y[-1]) == (0, 100, 100)

    def test_histogram(self, five: list[Run]) -> None:
        figure = histogram(five)
        heights = [patch.get_height() for patch in figure.axes[2].patches]
        each = [100 * np.histogram(last(run), np.linspace(0, 100, 11))[0] / 8 for run in of(five, "fedgen")]
        assert heights == pytest.approx(np.mean(each, axis=0).tolist())
        assert [axes.get_title() for axes in figure.axes] == list(FIVE)
        assert len(histogram(five[:1]).axes[0].containers) == 1  # bars, no whiskers

    def test_violin(self, five: list[Run]) -> None:
        figure = violin(five)
        numbers = figure.numbers.set_index(["series", "statistic"])["x"]
        values = np.array([last(run) for run in of(five, "fedgen")])
        assert numbers["fedgen", "mean"] == pytest.approx(values.mean())
        assert numbers["fedgen", "median"] == pytest.approx(np.median(values))
        assert numbers["fedgen", "worst tenth"] == pytest.approx(values.min(axis=1).mean())
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(FIVE)

    def test_equal_accuracies_have_a_shape(self, five: list[Run], tmp_path: Path) -> None:
        (run,) = invent(tmp_path, ["fedavg"], rounds=1)
        path = run.folder / "evaluations.jsonl"
        path.write_text("".join(f'{{"round": 1, "client": {n}, "total": 2, "global_correct": 2}}\n' for n in range(8)))
        shape = violin([Run.open(run.folder)]).axes[0].collections[0].get_paths()[0].vertices
        assert np.asarray(shape)[:, 0].min() > 98
        assert np.asarray(shape)[:, 0].max() == 100


class TestEachClient:
    def test_gain(self, five: list[Run]) -> None:
        figure = gain(five)
        assert len(figure.axes) == 4  # local itself is not compared
        mine, alone = (np.concatenate([last(run) for run in of(five, name)]) for name in ("fedgen", "local"))
        drawn = figure.numbers[figure.numbers["series"] == "fedgen"]
        assert drawn["x"].tolist() == pytest.approx(alone.tolist())
        assert drawn["y"].tolist() == pytest.approx(mine.tolist())
        assert figure.axes[1].get_title() == f"fedgen\n{(mine < alone).sum()}/24 worse"

    def test_gain_needs_local(self, five: list[Run]) -> None:
        with pytest.raises(UserError, match="runs of 'local' with the same seeds"):
            gain(of(five, "fedgen"))
        with pytest.raises(UserError, match="runs of 'local' with the same seeds"):
            gain([of(five, "local")[0], of(five, "fedgen")[1]])

    def test_heterogeneity(self, five: list[Run], tmp_path: Path) -> None:
        runs = invent(tmp_path, ["fedgen"], clients=40)
        figure = heterogeneity(runs)
        size = clients.holdings(runs[0])["examples"].to_numpy()
        drawn = figure.numbers[figure.numbers["panel"] == "examples"]
        order = np.argsort(size, kind="stable")
        quarter = np.array_split(order, 4)
        assert drawn["x"].tolist() == pytest.approx([size[part].mean() for part in quarter], rel=0.1)
        assert np.average(drawn["y"], weights=[10] * 4) == pytest.approx(last(runs[0]).mean(), abs=1)
        rank = stats.spearmanr(size, last(runs[0])).statistic
        assert f"left and right: fedgen {rank:.2f} and" in figure.caption
        assert any(line.get_alpha() for line in figure.axes[0].get_lines())  # the clients themselves
        assert not any(line.get_alpha() for line in heterogeneity(five).axes[0].get_lines())

    def test_equal_clients_are_one_place(self, five: list[Run]) -> None:
        run = five[0]
        frame = run.partition.copy()
        frame.loc[:, [name for name in frame.columns if name.startswith("class_")]] = 3
        frame.to_csv(run.folder.parent / "equal.csv", index=False)
        twin = Run(run.folder)
        twin.__dict__["partition"] = pd.read_csv(run.folder.parent / "equal.csv")
        figure = heterogeneity([twin])
        assert figure.numbers["x"].tolist() == pytest.approx([12, 1])
        assert "undefined and undefined" in figure.caption


class TestPareto:
    def test_points_and_front(self, five: list[Run]) -> None:
        figure = pareto(five)
        numbers = figure.numbers.set_index("series")
        assert numbers.loc["fedgen", "x"] == pytest.approx(0.6 * 8 * 6)  # 0.3 MB down and up, 8 clients, 6 rounds
        means = [last(run).mean() for run in of(five, "fedgen")]
        assert numbers.loc["fedgen", "y"] == pytest.approx(np.mean(means))
        assert numbers.loc["fedgen", "deviation"] == pytest.approx(np.std(means, ddof=1))
        (front,) = [line for line in figure.axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
        assert len(front.get_xdata()) == 4  # each better and dearer than the one before

    def test_a_beaten_method_is_not_on_the_front(self, tmp_path: Path) -> None:
        better, worse = invent(tmp_path, ["fedprox", "moon"])
        path = worse.folder / "evaluations.jsonl"
        path.write_text(path.read_text().replace('"total": 200', '"total": 2000'))
        (front,) = [
            line
            for line in pareto([better, Run.open(worse.folder)]).axes[0].get_lines()
            if line.get_drawstyle() == "steps-post"
        ]
        assert len(front.get_xdata()) == 1

    def test_a_method_that_sends_nothing_is_a_level(self, five: list[Run]) -> None:
        assert "local (sends nothing)" in lines(pareto(five).axes[0])
        assert pareto(of(five, "local")).axes[0].get_xlim()[0] == 0


class TestSignificance:
    def test_claims(self, five: list[Run]) -> None:
        found = {claim.label: claim for claim in claims(five, "fedavg_ft")}
        assert list(found) == ["local", "fedgen", "apfl", "fedd2s"]
        pairs = zip(of(five, "fedgen"), of(five, "fedavg_ft"), strict=True)
        expected = np.array([last(mine).mean() - last(other).mean() for mine, other in pairs])
        claim = found["fedgen"]
        assert list(claim.differences.values()) == pytest.approx(expected.tolist())
        test = stats.ttest_1samp(expected, 0)
        interval = test.confidence_interval(0.95)
        assert claim.p == pytest.approx(test.pvalue)
        assert (claim.mean - claim.half, claim.mean + claim.half) == pytest.approx(tuple(interval))
        assert claim.verdict == ("better" if claim.corrected < 0.05 else "not told apart")
        assert found["local"].mean < 0

    def test_verdicts(self, five: list[Run]) -> None:
        (claim,) = claims([of(five, "local")[0], of(five, "fedgen")[0]], "local")
        assert (claim.verdict, math.isnan(claim.half)) == ("one seed: no test", True)
        best = {claim.label: claim.verdict for claim in claims(five, "fedd2s")}
        assert best["local"] == "worse"
        best = {claim.label: claim.verdict for claim in claims(five, "local")}
        assert best["fedd2s"] == "better"

    def test_the_setting_of_the_control_with_the_same_clients(self, sweep: list[Run], tmp_path: Path) -> None:
        controls = invent(tmp_path, ["local"], seeds=2, rounds=2, clients=4, **{"data.alpha": 0.05})
        controls += invent(tmp_path, ["local"], seeds=2, rounds=2, clients=5, **{"data.alpha": 1.0})
        found = {claim.label: claim.control for claim in claims(sweep + controls, "local")}
        assert found["fedgen (run.clients=4, data.alpha=0.05, fedgen.temperature=2.0)"].startswith(
            "local (run.clients=4"
        )
        assert found["fedgen (run.clients=5, data.alpha=1.0, fedgen.temperature=1.0)"].startswith(
            "local (run.clients=5"
        )

    def test_holm(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        corrected = holm([0.6, float("nan"), 0.7])
        assert corrected[::2] == [1.0, 1.0]
        assert math.isnan(corrected[1])

    def test_differences(self, five: list[Run]) -> None:
        figure = differences(five)
        assert figure.axes[0].get_xlabel() == "accuracy minus that of fedavg_ft (points)"
        assert differences(five, "local").axes[0].get_xlabel() == "accuracy minus that of local (points)"
        claim = next(claim for claim in claims(five, "fedavg_ft") if claim.label == "fedd2s")
        row = figure.numbers[figure.numbers["series"] == "fedd2s"]
        assert row["x"].tolist() == pytest.approx(list(claim.differences.values()))
        assert row["mean"].iloc[0] == pytest.approx(claim.mean)
        with pytest.raises(UserError, match="against a control"):
            differences(of(five, "fedgen"))
        with pytest.raises(UserError, match="no run of 'fedavgft' to compare with; did you mean 'fedavg_ft'"):
            differences(five, "fedavgft")
        with pytest.raises(UserError, match="no other method has a seed"):
            differences([of(five, "fedavg_ft")[0], of(five, "fedgen")[1]])

    def test_ranks(self, five: list[Run]) -> None:
        figure = ranks(five)
        accuracy = np.array([[last(run).mean() for run in of(five, method)] for method in FIVE]).T
        expected = stats.rankdata(-accuracy, axis=1).mean(axis=0)
        assert figure.numbers.set_index("series")["x"].reindex(FIVE).tolist() == pytest.approx(expected.tolist())
        # Table 5 of Demšar 2006: q of Nemenyi's test for five methods at 0.05 is 2.728.
        assert figure.numbers["critical"].iloc[0] == pytest.approx(2.728 * math.sqrt(5 * 6 / (6 * 3)), rel=1e-3)
        friedman = stats.friedmanchisquare(*accuracy.T).pvalue
        assert f"p = {friedman:.2g}" in figure.caption

    def test_ranks_leaves_out_what_is_not_everywhere(self, five: list[Run]) -> None:
        runs = [run for run in five if (run.config.run.method, run.config.run.seed) != ("apfl", 2)]
        figure = ranks(runs)
        assert "apfl" not in figure.numbers["series"].tolist()
        assert "left out: apfl" in figure.caption
        with pytest.raises(UserError, match="at least three methods"):
            ranks(of(five, "local") + of(five, "fedgen"))
        with pytest.raises(UserError, match="at least two seeds"):
            ranks([run for run in five if run.config.run.seed == 1])

    def test_blocks_are_settings_of_data_and_methods_have_their_own(self, sweep: list[Run], tmp_path: Path) -> None:
        more = invent(tmp_path, ["fedavg"], seeds=2, rounds=2, clients=4, **{"data.alpha": 0.05})
        more += invent(tmp_path, ["fedavg"], seeds=2, rounds=2, clients=4, **{"data.alpha": 0.1})
        figure = ranks([run for run in sweep if run.config.data.alpha < 1] + more)
        labels = ["fedgen (fedgen.temperature=1.0)", "fedgen (fedgen.temperature=2.0)", "fedavg"]
        assert figure.numbers["series"].tolist() == labels
        assert figure.numbers["blocks"].iloc[0] == 4


class TestHeatmap:
    def test_cells(self, sweep: list[Run]) -> None:
        figure = heatmap([run for run in sweep if run.config.run.clients == 4])
        shown = [text.get_text() for text in figure.axes[0].texts]
        cell = [run for run in sweep if (run.config.data.alpha, run.config.flat()["fedgen.temperature"]) == (0.1, 2.0)]
        means = [last(run).mean() for run in cell]
        assert f"{np.mean(means):.1f}\n±{np.std(means, ddof=1):.1f}" in shown
        assert len(shown) == 4

    def test_missing_combination(self, five: list[Run], tmp_path: Path) -> None:
        runs = invent(tmp_path, ["fedavg", "fedprox"], rounds=1) + invent(
            tmp_path, ["fedavg"], rounds=1, **{"train.lr": 1.0}
        )
        figure = heatmap(runs)
        assert "1 combinations that were not run" in figure.caption
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["fedavg", "fedprox"]

    def test_other_numbers_of_settings(self, five: list[Run], sweep: list[Run]) -> None:
        with pytest.raises(UserError, match=r"differ in: run.method \(5 values\)"):
            heatmap(five)
        with pytest.raises(UserError, match="differ in: none"):
            heatmap(five[:1])
        with pytest.raises(UserError, match=r"run\.clients"):
            heatmap(sweep)


@pytest.fixture
def published() -> pd.DataFrame:
    """A table of four rows: two controls, one of them a line, a method over two steps, one of a single seed."""
    common = {"control": False, "line": False, "at": "", "published": ""}
    alone = {**common, "row": "local", "method": "local", "control": True, "line": True, "published": "61.5"}
    after = {**common, "row": "FedAvg after the same local steps", "method": "fedavg_ft", "control": True}
    ours = {**common, "row": "FedGen", "method": "fedgen", "published": "70.00 ± 1.50"}
    draws = np.random.default_rng(2)
    drawn = pd.DataFrame(
        {**row, "seed": seed, "value": draws.normal(mean, 2)}
        for row, mean in (
            (alone, 60),
            (after, 66),
            ({**ours, "at": "alpha 0.1"}, 68),
            ({**ours, "at": "alpha 1"}, 72),
        )
        for seed in (1, 2, 3)
    )
    single = {**common, "row": "APFL", "method": "apfl", "at": "alpha 1", "seed": 1, "value": 63.0}
    return pd.concat([drawn, pd.DataFrame([single])], ignore_index=True)


class TestRows:
    def test_values(self, published: pd.DataFrame) -> None:
        figure = rows(published, "accuracy in %")
        numbers = figure.numbers.set_index("series")
        mine = published["value"][published["at"] == "alpha 0.1"]
        assert numbers.loc["FedGen, alpha 0.1", "x"] == pytest.approx(mine.mean())
        assert numbers.loc["FedGen, alpha 0.1", "deviation"] == pytest.approx(mine.std())
        assert numbers.loc["FedGen, alpha 0.1", ["published", "published_deviation"]].tolist() == [70.0, 1.5]
        assert numbers.loc["local", "published"] == 61.5
        assert math.isnan(numbers.loc["FedAvg after the same local steps", "published"])
        assert numbers.loc["APFL, alpha 1", "x"] == 63.0
        assert math.isnan(numbers.loc["APFL, alpha 1", "deviation"])
        [axes] = figure.axes
        drawn = [np.asarray(line.get_xdata()) for line in axes.get_lines() if line.get_markersize() < 2]
        assert sorted(np.concatenate(drawn)) == pytest.approx(sorted(published["value"]))
        broken = [line.get_xdata() for line in axes.get_lines() if line.is_dashed()]
        alone = published["value"][published["row"] == "local"].mean()
        assert broken == [pytest.approx([alone, alone])] * 3  # beside what has no step, and beside either step
        assert axes.get_xlabel() == "accuracy in %"

    def test_one_colour_per_method_and_none_for_controls(self, published: pd.DataFrame) -> None:
        [axes] = rows(published, "accuracy in %").axes
        marks = [(line.get_marker(), line.get_color()) for line in axes.get_lines() if 3 < line.get_markersize() < 4]
        controls = [style.line(method)["marker"] for method in ("local", "fedavg_ft")]
        assert [marks.count((marker, style.GREY)) for marker in controls] == [1, 1]
        assert marks.count(("D", style.GREY)) == 1
        assert marks.count((style.line("apfl")["marker"], style.colour("apfl"))) == 1
        assert marks.count(("o", style.colour("fedgen"))) == marks.count(("D", style.colour("fedgen"))) == 2

    def test_symbols_are_named_where_there_are_any(self, published: pd.DataFrame) -> None:
        def named(frame: pd.DataFrame) -> list[str]:
            return [text.get_text() for text in rows(frame, "accuracy in %").legends[0].get_texts()]

        assert named(published) == ["mean over seeds", "control", "one seed", "published", "local"]
        assert named(published[published["row"] == "APFL"]) == ["mean over seeds", "one seed"]
        caption = rows(published, "accuracy in %").caption
        assert "sample standard deviation" in caption
        assert "Broken lines: the mean of local." in caption
        assert "Hollow" not in rows(published[published["published"] == ""], "accuracy in %").caption

    def test_a_control_has_the_same_dashes_wherever_its_line_is(self, published: pd.DataFrame) -> None:
        """Alone and beside another; and the legend has them."""

        def dashes(frame: pd.DataFrame) -> dict[str, object]:
            figure = rows(frame, "accuracy in %")
            [legend] = figure.legends
            texts = [text.get_text() for text in legend.get_texts()]
            drawn = dict(zip(texts, legend.legend_handles, strict=True))
            broken = [line for line in figure.axes[0].get_lines() if line.is_dashed()]
            found = {}
            for row, mine in frame[frame["line"]].groupby("row"):
                [*_, line] = [line for line in broken if np.isclose(line.get_xdata()[0], mine["value"].mean())]
                found[str(row)] = vars(line)["_dash_pattern"]
                assert vars(drawn[str(row)])["_dash_pattern"] == found[str(row)]
            return found

        both = published.assign(line=published["control"])
        found = dashes(both)
        assert len(found) == 2
        assert len({str(pattern) for pattern in found.values()}) == 2
        for row, pattern in found.items():
            assert dashes(both.assign(line=both["row"] == row)) == {row: pattern}

    def test_what_is_varied_stands_before_its_steps(self, published: pd.DataFrame) -> None:
        def headings(over: str) -> list[str]:
            return [text.get_text() for text in rows(published, "accuracy in %", over=over).axes[0].texts]

        assert headings("") == ["alpha 0.1", "alpha 1"]
        assert headings("label skew") == ["label skew: alpha 0.1", "label skew: alpha 1"]
        assert_legible(rows(published, "accuracy in %", over="label skew"))

    def test_an_axis_of_ratios_begins_at_zero(self, published: pd.DataFrame) -> None:
        low, high = rows(published, "milliseconds", from_zero=True).axes[0].get_xlim()
        assert low == 0
        assert high == pytest.approx(rows(published, "milliseconds").axes[0].get_xlim()[1])

    def test_published_texts(self) -> None:
        assert number("93.03 ± 0.32") == (93.03, 0.32)
        assert [number("60.00")[0], math.isnan(number("60.00")[1])] == [60.0, True]
        assert all(math.isnan(part) for part in number(""))

    def test_legible(self, published: pd.DataFrame) -> None:
        assert_legible(rows(published, "accuracy in %, last round"))
        assert_legible(rows(published[published["seed"] == 1], "accuracy in %, last round"))

    def test_looks_as_it_did(self, published: pd.DataFrame, tmp_path: Path) -> None:
        assert_looks_as_it_did("rows", rows(published, "accuracy in %"), tmp_path)


class TestMechanisms:
    def test_apfl_alpha(self, five: list[Run]) -> None:
        figure = apfl_alpha(five)
        rows = of(five, "apfl")[0].frame("clients")
        final = rows[rows["round"] == 6].set_index("client")["alpha_sum"]
        drawn = figure.numbers.query("panel == 'last' and seed == 1")
        assert drawn["y"].tolist() == pytest.approx(final.tolist())
        mean = figure.numbers.query("panel == 'mean'")["y"].tolist()
        every = [run.frame("clients").groupby("round")["alpha_sum"].mean() for run in of(five, "apfl")]
        assert mean == pytest.approx(np.mean(every, axis=0).tolist())

    def test_a_client_keeps_its_alpha_between_participations(self, tmp_path: Path) -> None:
        (run,) = invent(tmp_path, ["apfl"], clients=2, rounds=3)
        path = run.folder / "clients.jsonl"
        rows = [row for row in path.read_text().splitlines() if '"round": 2, "client": 0' not in row]
        path.write_text("\n".join(row for row in rows if '"round": 1, "client": 1' not in row) + "\n")
        drawn = apfl_alpha([Run.open(run.folder)]).numbers.query("panel == 'clients'")
        first, second = (drawn[drawn["client"] == client]["y"].tolist() for client in (0, 1))
        assert first[0] == first[1] != first[2]
        assert second[0] == 0.5 != second[1]

    def test_apfl_alpha_needs_trained_weights(self, five: list[Run], tmp_path: Path) -> None:
        with pytest.raises(UserError, match="apfl-alpha is drawn from runs of 'apfl'; there are runs of: local"):
            apfl_alpha(of(five, "local"))
        with pytest.raises(UserError, match=r"apfl\.adaptive=true"):
            apfl_alpha(invent(tmp_path, ["apfl"], **{"apfl.adaptive": False}))

    def test_pgfed_alpha(self, ended: list[Run]) -> None:
        figure = pgfed_alpha(ended)
        (mesh,) = [part for part in figure.axes[0].collections if hasattr(part, "get_array")]
        matrix = np.asarray(mesh.get_array()).reshape(8, 8)
        assert matrix[:2] == pytest.approx(1 / 8)
        assert figure.numbers["value"].to_numpy().reshape(8, 8) == pytest.approx(matrix)
        assert "24 of 64 have moved" in figure.caption
        assert figure.axes[0].yaxis_inverted()

    def test_fedd2s_drops(self, five: list[Run]) -> None:
        figure = fedd2s_drops(five)
        depth = figure.numbers.query("panel == 'depth'")["y"].tolist()
        assert depth == [2, 2, 2, 1, 1, 1]
        dotted = [line.get_xdata()[0] for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
        assert dotted == [3.5]


class TestSamples:
    def test_latent(self, ended: list[Run]) -> None:
        figure = fedgen_latent(ended)
        numbers = figure.numbers
        assert (numbers["panel"] == "features").sum() == 400
        first = numbers[(numbers["panel"] == "features") & (numbers["series"] == "1")]
        mean = numbers[(numbers["panel"] == "means") & (numbers["label"] == "1")]
        assert first["x"].mean() == pytest.approx(mean["x"].iloc[0], abs=1e-4)
        assert [text.get_text() for text in figure.axes[0].texts] == ["0", "1", "2", "3"]
        assert numbers.query("panel == 'features'")["x"].mean() == pytest.approx(0, abs=1e-4)

    def test_images(self, ended: list[Run]) -> None:
        (image,) = fedftg_images(ended).axes[0].get_images()
        shown = np.asarray(image.get_array()).reshape(4, 9, 8, 9).transpose(0, 2, 1, 3)  # class, sample, height, width
        made, _ = images(ended[1], 8)
        assert (shown[:, :, -1] == 1).all()  # white between the images
        assert (shown[:, :, :, -1] == 1).all()
        pixels = made.numpy().reshape(4, 8, 8, 8)
        assert np.corrcoef(shown[:, :, :-1, :-1].ravel(), pixels.ravel())[0, 1] > 0.98  # but for the brightest

    @pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
    def test_images_have_the_size_of_the_data(self, ended: list[Run], tmp_path: Path, shape: tuple[int, ...]) -> None:
        (run,) = invent(tmp_path, ["fedftg"], rounds=1, classes=10)
        finish(run, **_state(FlatModel(ImageGenerator(100, 10, 16, shape)), np.random.default_rng(0)))
        made, labels = images(run, 2)
        assert made.shape == (20, *shape)
        assert labels.tolist() == [n // 2 for n in range(20)]

    def test_a_real_run(self, run_inline: Callable[..., Run]) -> None:
        for method, function in (("fedgen", fedgen_latent), ("fedftg", fedftg_images)):
            assert function([run_inline(method)]).caption
        assert pgfed_alpha([run_inline("pgfed")]).caption

    def test_runs_without_an_end(self, five: list[Run], tmp_path: Path) -> None:
        with pytest.raises(UserError, match="fedgen-latent is drawn from the state at the end of a run"):
            fedgen_latent(five)
        (run,) = invent(tmp_path, ["fedgen"])
        finish(run, generator=np.zeros(7, dtype=np.float32))
        with pytest.raises(UserError, match="holds no 'generator' that fits the settings"):
            fedgen_latent([run])
        (run.folder / "final.safetensors").write_bytes(b"broken")
        with pytest.raises(UserError, match=r"final\.safetensors cannot be read"):
            fedgen_latent([run])
        (run.folder / "final.safetensors").unlink()
        with pytest.raises(UserError, match=r"has no final\.safetensors"):
            fedgen_latent([run])


class TestPartition:
    def test_other_partitions_are_named(self, five: list[Run]) -> None:
        assert "not drawn here, have the seeds 2, 3" in partition_of(five).caption
        assert "not drawn" not in partition_of(five[:1]).caption
        with pytest.raises(UserError, match="no runs"):
            partition_of([])


class TestNames:
    def test_chosen(self) -> None:
        assert figures.chosen("violin, pareto,violin") == ("violin", "pareto")
        assert figures.chosen("all") == tuple(figures.FIGURES)
        assert figures.chosen("violin,all") == tuple(figures.FIGURES)
        assert figures.chosen("") == figures.chosen(" , ") == ("convergence", "fairness")
        with pytest.raises(UserError, match="unknown figure 'violins'; did you mean 'violin'"):
            figures.chosen("violins")

    def test_all_draws_what_applies_and_says_what_does_not(self, five: list[Run]) -> None:
        drawn, left_out = figures.draw_all(figures.chosen("all"), five[:3], by="bytes")
        assert "convergence" in drawn
        assert "bytes" in drawn["convergence"].axes[0].get_xlabel()
        assert len(drawn) + len(left_out) == len(figures.FIGURES)
        assert any(reason.startswith("fedftg-images is drawn from runs of 'fedftg'") for reason in left_out)
        with pytest.raises(UserError, match="gain compares"):
            figures.draw_all(["violin", "gain"], of(five, "fedgen"))

    def test_page_has_an_example_of_each(self) -> None:
        page = (Path(__file__).parent.parent / "docs" / "plots.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| `([a-z0-9-]+)` \| .* \| `fedkd plot runs/(.*)` \|$", page, re.MULTILINE)
        assert [name for name, _ in rows] == list(figures.FIGURES)
        for name, example in rows:
            assert f"--figure {name}" in example or name == "convergence"

    def test_command(
        self,
        five: list[Run],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folders = [str(run.folder) for run in five[:3]]
        out = tmp_path / "figures"
        assert fedkd(monkeypatch, "plot", *folders, "--figure", "violin,heatmap", "--out", str(out)) == 2
        assert "heatmap is drawn over two settings" in capsys.readouterr().err
        assert not out.exists()
        assert fedkd(monkeypatch, "plot", *folders, "--figure", "violin, partition", "--out", str(out)) == 0
        made = {path.name for path in out.iterdir() if not path.name.startswith(("table", "summaries"))}
        assert made == {
            *(f"violin.{suffix}" for suffix in ("png", "pdf", "txt", "csv")),
            "partition.png",
            "partition.pdf",
            "partition.txt",
        }
        assert pd.read_csv(out / "violin.csv")["series"].unique().tolist() == ["local"]
        assert fedkd(monkeypatch, "plot", "--help") == 0
        shown = "".join(capsys.readouterr().out.split())
        assert all(name in shown for name in figures.FIGURES)

    def test_every_figure_says_what_its_error_bands_are(
        self, five: list[Run], sweep: list[Run], ended: list[Run]
    ) -> None:
        for name in figures.FIGURES:
            caption = figures.draw(name, _runs_for(name, five, sweep, ended)).caption
            assert any(word in caption for word in ("deviation", "no error bands", "interval")), name


def _runs_for(name: str, five: list[Run], sweep: list[Run], ended: list[Run]) -> list[Run]:
    if name == "heatmap":
        return [run for run in sweep if run.config.run.clients == 4]
    if name == "setting":
        return [run for run in sweep if (run.config.run.clients, run.config.data.alpha) == (4, 0.1)]
    return ended if name in ("pgfed-alpha", "fedgen-latent", "fedftg-images") else five


def of_gains() -> style.CaptionedFigure:
    """Three rows above a control over four steps with long names, three seeds each."""
    steps = ("head, latent", "head, latent, conv2", "latent, conv2, conv1", "all four")
    rows = {
        "FedAvg after the same local steps": ("fedavg_ft", (1.0, 1.0, 1.0, 1.0)),
        "pooled-linear": ("fedd2s", (-1.1, 0.2, -0.4, -0.2)),
        "deep-layers": ("fedd2s", (-4.0, -5.1, -8.2, -5.0)),
    }
    draws = np.random.default_rng(1)
    above = pd.DataFrame(
        {"row": row, "method": method, "at": at, "gain": mean + draws.normal(0, 0.8)}
        for row, (method, means) in rows.items()
        for at, mean in zip(steps, means, strict=True)
        for _ in range(3)
    )
    return gains(above, "fedd2s.dropping-set", "local")


def of_newcomers() -> style.CaptionedFigure:
    """Ten epochs of five newcomers, three seeds, with what four rows of a table give them; two are of one method."""
    rows = {
        "local": ("local", 0.09, 0.55),
        "FedAvg (mu = 0)": ("fedavg_ft", 0.29, 0.65),
        "Per-FedAvg": ("per_fedavg", 0.31, 0.70),
        "PGFed": ("pgfed", 0.31, 0.74),
        "PGFedMo": ("pgfed", 0.24, 0.79),
    }
    draws = np.random.default_rng(2)
    found: list[dict[str, object]] = []
    for label, (method, first, last) in rows.items():
        for seed, client in itertools.product((1, 2, 3), range(20, 25)):
            shift = draws.normal(0, 0.05)
            for epoch in range(11):
                accuracy = np.clip(first + (last - first) * (1 - 0.7**epoch) + shift, 0, 1)
                row = {"label": label, "method": method, "seed": seed, "partition_seed": seed, "client": client}
                found.append(row | {"epoch": epoch, "correct": round(60 * accuracy), "total": 60, "loss_sum": 60.0})
    return adaptation(pd.DataFrame(found))


def of_audits() -> style.CaptionedFigure:
    """Curves of losses that are normal, closer together for global models; two seeds, and the control of each."""
    found: list[dict[str, object]] = []
    rows = {"local": ("local", {"personal": 1.1}), "FedAvg": ("fedavg", {"global": 0.15, "personal": 0.3})}
    rows |= {
        f"FedGen, {name}": ("fedgen", {"global": 0.1 * number, "personal": 0.5 * number})
        for number, name in enumerate(("released", "as printed"), 1)
    }
    for (label, (method, kinds)), seed in itertools.product(rows.items(), (0, 1)):
        apart = {kind: distance * (1 + 0.1 * seed) for kind, distance in kinds.items()} | {"initial": 0.0}
        models = {kind: {"roc": stats.norm.cdf(stats.norm.ppf(GRID) + far).tolist()} for kind, far in apart.items()}
        found.append({"label": label, "method": method, "seed": seed, "models": models})
    return roc(found)


OTHERS: dict[str, Callable[[], style.CaptionedFigure]] = {
    "gains": of_gains,
    "adaptation": of_newcomers,
    "roc": of_audits,
}
"""Figures of tables and of what other commands wrote, not of runs, by the names of their functions."""


def _drawn(name: str, five: list[Run], sweep: list[Run], ended: list[Run]) -> style.CaptionedFigure:
    return OTHERS[name]() if name in OTHERS else figures.draw(name, _runs_for(name, five, sweep, ended))


def test_every_public_function_that_draws_is_looked_at() -> None:
    """By name among those of the command line, or beside them, so that there is a picture of each."""
    drawing = set()
    for module in pkgutil.iter_modules(plots.__path__):
        for name, function in inspect.getmembers(importlib.import_module(f"plots.{module.name}"), inspect.isfunction):
            own = function.__module__ == f"plots.{module.name}" and not name.startswith("_")
            if own and str(inspect.signature(function).return_annotation).endswith("CaptionedFigure"):
                drawing.add(f"{module.name}.{name}")
    drawing -= {"style.new_figure", "figures.draw", "partition.partition"}  # empty, any, and what partition_of calls
    named = {f"{kind.module}.{kind.function}" for kind in figures.FIGURES.values()}
    assert drawing - named == {"sweep.gains", "adapt.adaptation", "audit.roc", "rows.rows"}
    assert {path.stem for path in PICTURES.iterdir()} == {*figures.FIGURES, *OTHERS, "rows"}


def texts(figure: Figure) -> list[Text]:
    """Return what is written in a figure that has been drawn, but for empty texts."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        found += [*axes.texts, axes.title]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [axis.label, axis.get_offset_text()]
            found += [text for tick in ticks for text in (tick.label1, tick.label2) if text.get_visible()]
    return [text for text in found if text.get_text().strip() and text.get_visible()]


def assert_legible(figure: Figure) -> None:
    """Check that no text leaves the figure or lies on another, and that letters are large enough to read."""
    with style.styled():
        figure.draw_without_rendering()
        boxes = [(text, Text.get_window_extent(text).padded(-0.8)) for text in texts(figure)]  # without arrows
    for text, box in boxes:
        assert text.get_fontsize() >= 5, text.get_text()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside, f"'{text.get_text()}' leaves the figure"
    for (one, mine), (other, theirs) in itertools.combinations(boxes, 2):
        assert not mine.overlaps(theirs), f"'{one.get_text()}' lies on '{other.get_text()}'"
    assert figure.get_figwidth() in (style.SINGLE, style.DOUBLE)


@pytest.mark.parametrize("name", [*figures.FIGURES, *OTHERS])
def test_legible(name: str, five: list[Run], sweep: list[Run], ended: list[Run]) -> None:
    assert_legible(_drawn(name, five, sweep, ended))


@pytest.mark.parametrize("name", figures.FIGURES)
def test_one_run_is_legible(name: str, five: list[Run]) -> None:
    runs = {"apfl-alpha": of(five, "apfl"), "fedd2s-drops": of(five, "fedd2s")}.get(name, of(five, "fedgen"))[:1]
    if name in ("gain", "differences", "ranks", "heatmap", "setting", "pgfed-alpha", "fedgen-latent", "fedftg-images"):
        with pytest.raises(UserError, match=name):
            figures.draw(name, runs)
    else:
        assert_legible(figures.draw(name, runs))


@pytest.mark.slow
def test_all_methods_and_many_clients_and_classes_are_legible(tmp_path: Path) -> None:
    runs = invent(tmp_path, names(), seeds=2, clients=100, classes=62, rounds=3)
    drawn, left_out = figures.draw_all(figures.chosen("all"), runs)
    assert len(left_out) == 5  # what is drawn over settings, and what is drawn from the state at the end
    for figure in drawn.values():
        assert_legible(figure)
        assert figure.get_figheight() <= 9.2  # a page


@pytest.mark.slow
def test_many_classes_of_generated_samples_are_legible(tmp_path: Path) -> None:
    draws = np.random.default_rng(3)
    fedgen, fedftg, pgfed = invent(tmp_path, ["fedgen", "fedftg", "pgfed"], clients=100, classes=62, rounds=1)
    finish(fedgen, **_state(FlatModel(LatentGenerator(32, 62, 256, (16,))), draws))
    finish(fedftg, **_state(FlatModel(ImageGenerator(100, 62, 16, (1, 28, 28))), draws))
    finish(pgfed, alpha=draws.random((100, 100)).astype(np.float32))
    for function, run in ((fedgen_latent, fedgen), (fedftg_images, fedftg), (pgfed_alpha, pgfed)):
        assert_legible(function([run]))


def test_gains_are_the_means_over_seeds() -> None:
    """The mean over seeds of what each row is above the control, a step beside the other."""
    steps = ("2", "4", "8")
    draws = np.random.default_rng(1)
    above = pd.DataFrame(
        {"row": row, "method": "fedd2s", "at": at, "gain": draws.normal()}
        for row in ("pooled-linear", "deep-layers")
        for at in steps
        for _ in range(3)
    )
    [axes] = gains(above, "fedd2s.rounds-per-drop", "local").axes
    drawn = {line.get_label(): line for line in axes.get_lines()}
    for row in ("pooled-linear", "deep-layers"):
        expected = [above["gain"][(above["row"] == row) & (above["at"] == at)].mean() for at in steps]
        assert list(drawn[row].get_ydata()) == pytest.approx(expected)
    assert axes.get_ylabel() == "points above local"


def test_targets_near_each_other_are_legible(five: list[Run]) -> None:
    assert_legible(figures.draw("convergence", five, targets=(0.9303, 0.9016, 0.901)))


def test_settings_with_long_names_are_legible(sweep: list[Run]) -> None:
    for name in ("convergence", "fairness", "histogram", "violin", "pareto", "heterogeneity", "heatmap"):
        assert_legible(figures.draw(name, [run for run in sweep if run.config.run.clients == 4]))


def picture(figure: style.CaptionedFigure, path: Path, coarse: int = COARSENESS) -> Image.Image:
    """Return what is drawn in a figure, coarsely and without its texts, whose widths differ between versions."""
    figure.set_layout_engine("none")
    figure.set_size_inches(4, 3)
    for legend in list(figure.legends):
        legend.remove()
    for axes in list(figure.axes):
        spec = axes.get_subplotspec()
        if spec is None:  # a bar of colours
            axes.remove()
        else:
            axes.set_position(spec.get_position(figure))
    for text in figure.findobj(Text):
        text.set_visible(False)
    with style.styled():
        figure.savefig(path, dpi=100)
    with Image.open(path) as image:
        return image.convert("RGB").reduce(coarse)


def distance(one: Image.Image, other: Image.Image) -> float:
    """Return the root of the mean square difference of two pictures, 0 to 255; 255 if their sizes differ."""
    if one.size != other.size:
        return 255.0
    mine, theirs = (np.asarray(image, dtype=float) for image in (one, other))
    return float(np.sqrt(((mine - theirs) ** 2).mean()))


@pytest.mark.parametrize("name", [*figures.FIGURES, *OTHERS])
def test_looks_as_it_did(name: str, five: list[Run], sweep: list[Run], ended: list[Run], tmp_path: Path) -> None:
    assert_looks_as_it_did(name, _drawn(name, five, sweep, ended), tmp_path)


def assert_looks_as_it_did(name: str, figure: style.CaptionedFigure, tmp_path: Path) -> None:
    """Compare a figure with its picture."""
    coarse, tolerance = EXCEPTIONS.get(name, (COARSENESS, TOLERANCE))
    made = picture(figure, tmp_path / "figure.png", coarse)
    known = PICTURES / f"{name}.png"
    if os.environ.get("FEDKD_NEW_FIGURES"):
        PICTURES.mkdir(exist_ok=True)
        made.save(known, optimize=True)
    with Image.open(known) as image:
        assert distance(made, image.convert("RGB")) < tolerance


def test_looks_differ_where_they_should(five: list[Run], tmp_path: Path) -> None:
    """The comparison would notice a line that is missing, another colour, and panels that are swapped."""
    known = picture(figures.draw("convergence", five), tmp_path / "figure.png")
    assert distance(known, picture(figures.draw("convergence", five), tmp_path / "figure.png")) == 0

    def changed(change: Callable[[Axes], object]) -> float:
        figure = figures.draw("convergence", five)
        change(figure.axes[0])
        return distance(known, picture(figure, tmp_path / "figure.png"))

    assert changed(lambda axes: axes.get_lines()[-1].remove()) > TOLERANCE
    assert changed(lambda axes: axes.collections[-1].remove()) > TOLERANCE
    assert changed(lambda axes: axes.get_lines()[-1].set_color("red")) > TOLERANCE
    assert changed(lambda axes: axes.set_ylim(0, 100)) > TOLERANCE
