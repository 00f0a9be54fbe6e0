"""Figures and tables against numbers worked out by hand, on result folders with invented figures."""

from __future__ import annotations

import io
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedkd.config import Config, Scalar
from fedkd.errors import UserError
from fedkd.method import names
from fedkd.results import Recorder, Run
from plots import style
from plots.convergence import convergence
from plots.fairness import fairness
from plots.partition import partition
from plots.tables import comparison, markdown, paired
from sims.reproduce import Experiment

PARTITION = """client,split,examples,class_0,class_1
0,train,6,6,0
0,test,10,10,0
1,train,6,3,3
1,test,10,5,5
"""
SAVE_AGAIN = """
import sys
from pathlib import Path

import plots
assert "matplotlib" not in sys.modules

from fedkd.results import Run
from plots import convergence, fairness, partition, style
assert "matplotlib.pyplot" not in sys.modules

folder, runs = Path(sys.argv[1]), [Run.open(path) for path in sys.argv[2:]]
style.save(convergence.convergence(runs), folder / "alpha-0.1")
style.save(fairness.fairness(runs), folder / "fairness")
style.save(partition.partition(runs[0]), folder / "partition")
"""
Write = Callable[..., Run]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return ``write(method, seed, personal, shared, ...)``: a run with these correct answers, of ten or ``totals``."""

    def write(
        method: str,
        seed: int,
        personal: Sequence[Sequence[int]] | None,
        shared: Sequence[Sequence[int]] | None = None,
        every: int = 1,
        size: int = 500_000,
        partition: str = PARTITION,
        totals: Sequence[int] = (10, 10),
        **flat: Scalar,
    ) -> Run:
        folder = tmp_path / f"{method}-{seed}-{len(list(tmp_path.iterdir()))}"
        keys: dict[str, Scalar] = {"run.method": method, "run.seed": seed, "run.clients": 2, "run.clients-per-round": 1}
        recorder = Recorder(folder, Config.from_flat(keys | flat), partition)
        scores = {"personal": personal, "global": shared}
        for number in range(1, every * max(len(rows or ()) for rows in scores.values()) + 1):
            sent = {"bytes_down": size, "bytes_up": size, "seconds": 0.5}
            recorder.write("clients", [{"round": number, "client": 0, **sent}])
            if number % every == 0:
                rows: list[dict[str, Any]] = [{"round": number, "client": c, "total": totals[c]} for c in range(2)]
                for kind, correct in scores.items():
                    for row, count in zip(rows, correct[number // every - 1] if correct else (), strict=False):
                        row |= {f"{kind}_correct": count, f"{kind}_loss_sum": 1.0}
                recorder.write("evaluations", rows)
            recorder.write("rounds", [{"round": number, "clients": [0], "seconds": 2.0}])
        recorder.close()
        return Run.open(folder)

    return write


@pytest.fixture
def runs(write: Write) -> list[Run]:
    """Two seeds of three methods; rows are evaluations, columns clients, entries correct answers of ten."""
    return [
        write("local", 1, [[4, 6], [8, 6]], size=0),
        write("local", 2, [[5, 5], [9, 9]], size=0),
        write("fedavg", 1, None, [[2, 4], [5, 7]]),
        write("fedavg", 2, None, [[4, 8], [3, 7]]),
        write("fedavg_ft", 1, [[6, 6], [9, 7]], [[2, 4], [5, 7]]),
        write("fedavg_ft", 2, [[6, 8], [9, 8]], [[4, 8], [3, 7]]),
    ]


def lines(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.get_lines() if not str(line.get_label()).startswith("_")}


def bands(axes: Axes) -> list[PolyCollection]:
    return [part for part in axes.collections if isinstance(part, PolyCollection)]


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def xy(line: Line2D) -> tuple[list[float], list[float]]:
    x, y = (np.asarray(values, dtype=float).round(9).tolist() for values in (line.get_xdata(), line.get_ydata()))
    return x, y


class TestComparison:
    def test_numbers(self, runs: list[Run]) -> None:
        frame = comparison(runs).set_index("method")
        assert list(frame.index) == ["local", "fedavg", "fedavg_ft"]
        fedavg = frame.loc["fedavg"]
        assert fedavg["seeds"] == 2
        assert fedavg["last"] == pytest.approx((60 + 50) / 2)
        assert fedavg["last_std"] == pytest.approx(math.sqrt(50))  # 60 and 50: (5^2 + 5^2) / (2 - 1)
        assert fedavg["best"] == pytest.approx((60 + 60) / 2)
        assert fedavg["best_std"] == pytest.approx(0)
        assert fedavg["global_last"] == pytest.approx(55)
        assert fedavg["worst_decile"] == pytest.approx((50 + 30) / 2)
        assert fedavg["worst_decile_std"] == pytest.approx(math.sqrt(200))
        assert fedavg["deviation"] == pytest.approx((10 + 20) / 2)  # over the two clients, as a population
        assert fedavg["hurt"] == pytest.approx((1 + 2) / 2)  # 50 < 80, 70 > 60; 30 < 90, 70 < 90
        assert fedavg["megabytes"] == pytest.approx(2)  # two rounds of 0.5 MB down and 0.5 MB up
        assert fedavg["seconds"] == pytest.approx(4)
        assert fedavg["rounds"] == 2

    def test_personal_model_counts_and_the_global_one_is_beside_it(self, runs: list[Run]) -> None:
        row = comparison(runs).set_index("method").loc["fedavg_ft"]
        assert row["last"] == pytest.approx((80 + 85) / 2)
        assert row["global_last"] == pytest.approx(55)
        assert row["hurt"] == pytest.approx((0 + 1) / 2)

    def test_local_has_no_global_accuracy(self, runs: list[Run]) -> None:
        row = comparison(runs).set_index("method").loc["local"]
        assert math.isnan(row["global_last"])
        assert row["hurt"] == 0

    def test_one_seed_has_no_deviation_and_nothing_to_be_hurt_by(self, runs: list[Run]) -> None:
        row = comparison(runs[2:3]).iloc[0]
        assert row["last"] == pytest.approx(60)
        assert all(math.isnan(row[name]) for name in ("last_std", "best_std", "worst_decile_std", "hurt"))

    def test_local_of_another_seed_or_of_other_clients_is_no_comparison(self, write: Write, runs: list[Run]) -> None:
        assert math.isnan(comparison([runs[1], runs[2]])["hurt"].iloc[1])
        other = write("local", 1, [[9, 9]], partition=PARTITION.replace("1,train,6,3,3", "1,train,6,4,2"))
        assert math.isnan(comparison([other, runs[2]])["hurt"].iloc[1])

    def test_settings_of_one_method_are_separate_rows(self, write: Write, runs: list[Run]) -> None:
        more = write("fedavg", 1, None, [[10, 10]], **{"train.lr": 0.5})
        frame = comparison([*runs[2:4], more])
        assert list(frame["method"]) == ["fedavg (train.lr=0.01)", "fedavg (train.lr=0.5)"]
        assert list(frame["seeds"]) == [2, 1]

    def test_nearest_local_setting_is_the_comparison(self, write: Write, runs: list[Run]) -> None:
        weak = write("local", 1, [[0, 0]], **{"train.lr": 0.5})
        mine = write("fedavg", 1, None, [[1, 1]], **{"train.lr": 0.5})
        frame = comparison([runs[0], weak, runs[2], mine]).set_index("method")
        assert frame.loc["fedavg (train.lr=0.5)", "hurt"] == 0
        assert frame.loc["fedavg (train.lr=0.01)", "hurt"] == 1

    def test_unequal_lengths_use_each_last_evaluation_and_say_so(self, write: Write, runs: list[Run]) -> None:
        short = write("fedavg", 2, None, [[1, 1]], **{"run.rounds": 1})
        row = comparison([runs[2], short]).iloc[0]
        assert (row["last"], row["rounds"]) == (pytest.approx((60 + 10) / 2), 1)

    def test_bad_input_is_one_clear_line(self, write: Write, runs: list[Run]) -> None:
        with pytest.raises(UserError, match="no runs"):
            comparison([])
        with pytest.raises(UserError, match=r"are both fedavg with run\.seed = 1"):
            comparison([runs[2], write("fedavg", 1, None, [[1, 1]])])
        empty = write("fedavg", 3, None, [])
        for function in (comparison, convergence, fairness):
            with pytest.raises(UserError, match=f"{empty.folder.name} holds no evaluation"):
                function([*runs, empty])


class TestMarkdown:
    def test_mean_and_deviation_share_a_cell_and_nan_is_a_dash(self, runs: list[Run]) -> None:
        head, rule, local, fedavg, _ = markdown(comparison(runs)).split("\n")
        assert head.startswith("| method | seeds | last round (%) | best round (%) | global model (%) |")
        assert rule.count("---") == head.count("|") - 1
        assert local.startswith("| local | 2 | 80.00 ± 14.14 | 80.00 ± 14.14 | – |")
        assert fedavg == (
            "| fedavg | 2 | 55.00 ± 7.07 | 60.00 ± 0.00 | 55.00 | 40.00 ± 14.14 | 15.00 | 1.5 | 2.00 | 4.0 | 2 |"
        )

    def test_one_seed_has_no_plus_minus(self, runs: list[Run]) -> None:
        assert "±" not in markdown(comparison(runs[:1]))

    def test_some_columns_and_a_bar_in_a_name(self) -> None:
        frame = pd.DataFrame({"method": ["a|b"], "last": [1.0], "last_std": [2.0], "mine": [3.0]})
        assert markdown(frame).split("\n")[-1] == "| a\\|b | 1.00 ± 2.00 | 3.00 |"


class TestPaired:
    def test_numbers(self, runs: list[Run]) -> None:
        found = paired(runs, "fedavg_ft", "fedavg")
        assert found.n == 2
        assert found.mean == pytest.approx(((80 - 60) + (85 - 50)) / 2)
        assert found.std == pytest.approx(15 / math.sqrt(2))
        t = 27.5 / (found.std / math.sqrt(2))
        assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(t))  # Student's t of one degree of freedom

    def test_only_common_seeds(self, runs: list[Run]) -> None:
        found = paired(runs[1:3] + runs[3:4], "fedavg", "local")
        assert (found.n, found.mean) == (1, pytest.approx(-40))
        assert math.isnan(found.std)
        assert math.isnan(found.p)

    def test_equal_differences_have_no_p_value(self, write: Write, runs: list[Run]) -> None:
        more = [write("fedprox", 1, None, [[3, 5], [6, 8]]), write("fedprox", 2, None, [[5, 9], [4, 8]])]
        found = paired(runs + more, "fedprox", "fedavg")
        assert (found.mean, found.std) == (pytest.approx(10), pytest.approx(0))
        assert math.isnan(found.p)

    def test_at_the_last_round_of_both(self, write: Write, runs: list[Run]) -> None:
        short = write("fedprox", 1, None, [[9, 9]], **{"run.rounds": 1})
        assert paired([runs[2], short], "fedprox", "fedavg").mean == pytest.approx(90 - 30)

    def test_bad_input_is_one_clear_line(self, write: Write, runs: list[Run]) -> None:
        with pytest.raises(UserError, match="no run of 'fedagv'; did you mean 'fedavg'"):
            paired(runs, "fedagv", "local")
        with pytest.raises(UserError, match="no seed in common"):
            paired([runs[0], runs[3]], "local", "fedavg")
        other = write("fedprox", 1, None, [[1, 1]], partition=PARTITION.replace("1,train,6,3,3", "1,train,6,4,2"))
        with pytest.raises(UserError, match="other clients"):
            paired([*runs, other], "fedprox", "fedavg")
        rare = write("fedprox", 1, None, [[1, 1]], every=3)
        with pytest.raises(UserError, match="no round in common"):
            paired([runs[2], rare], "fedprox", "fedavg")


class TestConvergence:
    def test_a_settled_axis_leaves_the_rise_out(self, write: Write) -> None:
        """It begins just below the lowest mean after the first fifth and ends just above all; the lines stay."""
        rising = [[0, 0], [4, 4], [8, 8], [9, 9], [9, 9], [9, 10]]
        whole, cut = (convergence([write("fedavg", 1, None, rising)], settled=settled) for settled in (False, True))
        low, high = cut.axes[0].get_ylim()
        assert (low, high) == (pytest.approx(40 - 0.05 * (95 - 40)), pytest.approx(95 + 0.05 * (95 - 40)))
        assert whole.axes[0].get_ylim()[0] < 0
        assert [xy(line) for line in lines(cut.axes[0]).values()] == [
            xy(line) for line in lines(whole.axes[0]).values()
        ]

    def test_lines_bands_and_labels(self, runs: list[Run]) -> None:
        figure = convergence(runs)
        (axes,) = figure.axes
        drawn = lines(axes)
        assert list(drawn) == ["local", "fedavg", "fedavg_ft"] == legend_labels(figure)
        assert xy(drawn["fedavg"]) == ([1, 2], [(30 + 60) / 2, (60 + 50) / 2])
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("communication round", "mean client accuracy (%)")
        assert len(bands(axes)) == 3
        corners = np.asarray(bands(axes)[1].get_paths()[0].vertices)
        at_two = corners[corners[:, 0] == 2, 1]
        assert (at_two.min(), at_two.max()) == pytest.approx((55 - math.sqrt(50), 55 + math.sqrt(50)))
        assert "one sample standard deviation over seeds" in figure.caption
        assert "2 seeds each" in figure.caption
        assert figure.get_figwidth() == style.SINGLE

    def test_clients_count_equally_or_by_their_test_images(self, write: Write) -> None:
        run = write("fedavg", 1, None, [[1, 27], [2, 24]], totals=(10, 30))
        equal, weighted = convergence([run]), convergence([run], column="weighted")
        assert xy(lines(equal.axes[0])["fedavg"])[1] == [50, 50]
        assert xy(lines(weighted.axes[0])["fedavg"])[1] == [100 * 28 / 40, 100 * 26 / 40]
        assert weighted.axes[0].get_ylabel() == "accuracy on all test images (%)"
        assert ("weighted equally" in equal.caption, "by their test images" in weighted.caption) == (True, True)

    def test_one_seed_has_no_band(self, runs: list[Run]) -> None:
        assert not bands(convergence(runs[:1]).axes[0])

    def test_over_bytes_and_seconds(self, runs: list[Run]) -> None:
        (axes,) = convergence(runs, by="bytes").axes
        assert axes.get_xlabel().endswith("(MB)")
        assert xy(lines(axes)["fedavg"])[0] == [1, 2]
        (axes,) = convergence(runs[:1], by="bytes").axes
        assert axes.get_xlabel().endswith("(kB)")
        (axes,) = convergence(runs, by="seconds").axes
        assert axes.get_xlabel().endswith("(s)")
        assert xy(lines(axes)["fedavg"])[0] == [2, 4]

    def test_costs_between_evaluations_are_counted(self, write: Write) -> None:
        (axes,) = convergence([write("fedavg", 1, None, [[1, 1], [2, 2]], every=3)], by="bytes").axes
        assert xy(lines(axes)["fedavg"]) == ([3, 6], [10, 20])

    def test_lines_end_where_a_seed_ends(self, write: Write, runs: list[Run]) -> None:
        short = write("fedavg", 2, None, [[1, 1]], **{"run.rounds": 1})
        drawn = lines(convergence([*runs[:3], short]).axes[0])
        assert xy(drawn["fedavg"]) == ([1], [(30 + 10) / 2])
        assert xy(drawn["local"])[0] == [1, 2]

    def test_round_in_progress_is_not_drawn(self, runs: list[Run]) -> None:
        path = runs[2].folder / "rounds.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
        assert xy(lines(convergence([Run.open(runs[2].folder)]).axes[0])["fedavg"])[0] == [1]

    def test_local_has_no_global_line(self, runs: list[Run]) -> None:
        figure = convergence(runs, column="global")
        drawn = lines(figure.axes[0])
        assert list(drawn) == ["fedavg", "fedavg_ft"]
        assert xy(drawn["fedavg_ft"]) == xy(drawn["fedavg"])
        assert "no such model or no round in common: local" in figure.caption
        with pytest.raises(UserError, match="global model"):
            convergence(runs[:2], column="global")

    def test_targets(self, runs: list[Run]) -> None:
        figure = convergence(runs, targets=(0.55,))
        levels = [line.get_ydata() for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
        assert [list(level) for level in levels] == [pytest.approx([55, 55])]
        assert "first reaches 55 % in: local round 2 (0 kB), fedavg round 2 (2 MB)" in figure.caption
        assert "fedavg round 2 (4 s)" in convergence(runs, by="seconds", targets=(0.55,)).caption
        assert "fedavg never" in convergence(runs, targets=(0.95,)).caption

    def test_unknown_choices(self, runs: list[Run]) -> None:
        with pytest.raises(UserError, match="by = 'rounds'; did you mean 'round'"):
            convergence(runs, by="rounds")  # type: ignore[arg-type]
        with pytest.raises(UserError, match="column = 'globl'; did you mean 'global'"):
            convergence(runs, column="globl")  # type: ignore[arg-type]


class TestFairness:
    def test_sorted_accuracies_and_gains(self, runs: list[Run]) -> None:
        figure = fairness(runs)
        left, right = figure.axes
        assert xy(lines(left)["fedavg"]) == ([25, 75], [(50 + 30) / 2, 70])
        assert xy(lines(left)["fedavg_ft"]) == ([25, 75], [(70 + 80) / 2, 90])
        assert list(lines(right)) == ["fedavg", "fedavg_ft"]
        assert xy(lines(right)["fedavg"]) == ([25, 75], [(-30 - 60) / 2, (10 - 20) / 2])
        assert right.get_ylabel() == "gain over the local model (points)"
        assert legend_labels(figure) == ["local", "fedavg", "fedavg_ft"]
        assert len(bands(left)) == 3
        assert figure.get_figwidth() == style.DOUBLE

    def test_gains_only_of_seeds_with_a_local_run(self, runs: list[Run]) -> None:
        figure = fairness(runs[1:4])
        assert xy(lines(figure.axes[1])["fedavg"])[1] == [-60, -20]
        assert "the same seed, sorted (one seed each)" in " ".join(figure.caption.split())

    def test_distribution_without_local_runs(self, runs: list[Run]) -> None:
        figure = fairness(runs[2:4])
        right = figure.axes[1]
        assert xy(lines(right)["fedavg"]) == ([0, 30, 50, 70, 100], [0, 25, 50, 100, 100])
        assert right.get_ylabel() == "clients at or below (%)"
        assert "distribution" in figure.caption

    def test_only_local(self, runs: list[Run]) -> None:
        assert list(lines(fairness(runs[:2]).axes[1])) == ["local"]

    def test_one_seed_has_no_band(self, runs: list[Run]) -> None:
        assert not any(bands(axes) for axes in fairness([runs[0], runs[2]]).axes)
        assert not any(bands(axes) for axes in fairness([runs[2]]).axes)

    def test_seeds_with_other_numbers_of_clients(self, write: Write, runs: list[Run]) -> None:
        other = write("fedavg", 2, None, [[4, 8]])
        path = other.folder / "evaluations.jsonl"
        path.write_text(path.read_text() + '{"round": 1, "client": 2, "total": 10, "global_correct": 6}\n')
        curve = xy(lines(fairness([runs[2], Run.open(other.folder)]).axes[0])["fedavg"])
        assert curve == ([25, 75], [(50 + 45) / 2, (70 + 75) / 2])  # 40, 60, 80 at 1/6, 3/6, 5/6, read at 1/4 and 3/4


class TestPartition:
    @pytest.fixture
    def frame(self) -> pd.DataFrame:
        return pd.read_csv(io.StringIO(PARTITION))

    def bubbles(self, figure: Figure) -> tuple[list[tuple[float, float]], list[float]]:
        (bubbles,) = [part for part in figure.axes[0].collections if isinstance(part, PathCollection)]
        return [(float(x), float(y)) for x, y in np.asarray(bubbles.get_offsets())], list(bubbles.get_sizes())

    def test_area_is_in_proportion(self, frame: pd.DataFrame) -> None:
        figure = partition(frame)
        places, areas = self.bubbles(figure)
        assert places == [(0, 0), (1, 0), (1, 1)]
        assert [area / areas[0] for area in areas] == pytest.approx([1, 0.5, 0.5])
        assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("client", "class")
        assert legend_labels(figure)[-1] == "6 examples"
        assert "12 examples, 2 clients, 2 classes" in figure.caption
        assert "no error bands" in figure.caption

    def test_split_and_run(self, frame: pd.DataFrame, runs: list[Run]) -> None:
        assert len(self.bubbles(partition(frame, "test"))[0]) == 3
        assert self.bubbles(partition(runs[0])) == self.bubbles(partition(frame))
        with pytest.raises(UserError, match=r"no split 'val' \(there are: test, train\)"):
            partition(frame, "val")
        with pytest.raises(UserError, match="columns"):
            partition(frame[["client", "split"]])

    @pytest.mark.parametrize(("clients", "classes"), [(1, 2), (20, 10), (30, 10), (100, 10), (100, 62), (300, 100)])
    def test_labels_and_bubbles_do_not_overlap(self, clients: int, classes: int) -> None:
        counts = np.random.default_rng(0).integers(0, 40, (clients, classes))
        counts[counts < 30] = 0
        counts[:, 0] = 39
        frame = pd.DataFrame(counts, columns=[f"class_{number}" for number in range(classes)])
        figure = partition(frame.assign(client=range(clients), split="train"))
        (axes,) = figure.axes
        for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
            boxes = sorted(
                (box.intervalx if side == 0 else box.intervaly).tolist()
                for box in (label.get_window_extent() for label in axis.get_ticklabels())
            )
            assert all(mine[1] <= after[0] for mine, after in itertools.pairwise(boxes))
        cell = axes.transData.transform([(1, 1)])[0] - axes.transData.transform([(0, 0)])[0]
        diameter = math.sqrt(max(self.bubbles(figure)[1])) * figure.dpi / 72
        if clients <= 100:  # beyond, a bubble that fitted its cell could not be seen
            assert diameter <= abs(cell).min() + 1e-6
        names = axes.get_xlabel()
        assert names == ("client" if clients <= 30 else f"{clients} clients, sorted by their largest class")

    def test_many_clients_are_sorted_by_class(self) -> None:
        counts = np.zeros((40, 4), dtype=int)
        counts[np.arange(40), np.arange(40) % 4] = 5
        frame = pd.DataFrame(counts, columns=[f"class_{number}" for number in range(4)])
        places, _ = self.bubbles(partition(frame.assign(client=range(40), split="train")))
        assert [y for _, y in sorted(places)] == sorted(y for _, y in places)


class TestStyle:
    def test_a_method_has_one_colour_everywhere(self, runs: list[Run]) -> None:
        seen: dict[str, set[str]] = {}
        figures = [
            convergence(runs),
            convergence(runs[2:4]),
            convergence(runs[::-1]),
            fairness(runs),
            fairness(runs[2:]),
        ]
        for axes in (axes for figure in figures for axes in figure.axes):
            for label, line in lines(axes).items():
                seen.setdefault(label, set()).add(to_hex(line.get_color()).upper())
        assert seen == {name: {style.colour(name)} for name in ("local", "fedavg", "fedavg_ft")}

    def test_settings_of_a_method_share_its_colour(self, write: Write, runs: list[Run]) -> None:
        more = write("fedavg", 1, None, [[10, 10]], **{"train.lr": 0.5})
        first, second = lines(convergence([runs[2], more]).axes[0]).values()
        assert first.get_color() == second.get_color()
        assert first.get_linestyle() != second.get_linestyle()
        assert first.get_marker() != second.get_marker()

    def test_controls_are_dashed(self, runs: list[Run]) -> None:
        drawn = lines(convergence(runs).axes[0])
        assert {name: line.is_dashed() for name, line in drawn.items()} == {
            "local": True,
            "fedavg": False,
            "fedavg_ft": True,
        }

    def test_what_is_compared_most_shares_no_colour(self) -> None:
        usual = ("fedgen", "fedftg", "fedd2s", "apfl", "pgfed", "fedavg", "fedavg_ft", "local")
        assert len({style.colour(name) for name in usual}) == len(usual) == len(style.PALETTE)

    @pytest.mark.parametrize("what", ["linestyle", "marker"])
    def test_looks_differ_in_colour_and_line_and_in_colour_and_marker(self, what: str) -> None:
        """The page of some runs has lines without markers, and figures of single values markers without lines."""
        looks = {(style.line(name)["color"], str(style.line(name)[what])) for name in names()}
        assert len(looks) == len(names())

    def test_colours_differ_also_for_the_colour_blind_and_in_print(self) -> None:
        """All are of Okabe and Ito's palette, but for its yellow, with a grey: chosen to be told apart."""
        okabe_ito = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#999999"}
        assert {style.colour(name) for name in names()} <= okabe_ito

    def test_methods_of_one_table_that_are_drawn_together_share_no_colour(self) -> None:
        """The few methods of the table of newcomers."""
        drawn = {row.method for row in Experiment.read("pgfed/new-clients").rows}
        assert len({style.colour(name) for name in drawn}) == len(drawn) == 4

    def test_looks_are_as_they_have_always_been(self) -> None:
        """A method keeps its look for good: figures of other papers and other versions stay comparable."""
        assert style.line("fedgen") == {"color": "#0072B2", "linestyle": "-", "marker": "o"}
        assert style.line("fedavg_ft") == {"color": "#56B4E9", "linestyle": (0, (4, 1.5)), "marker": "o"}
        assert style.line("scaffold") == {"color": "#D55E00", "linestyle": "-.", "marker": "<"}

    def test_another_method_shifts_no_look(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = {name: style.line(name) for name in names()}
        monkeypatch.setattr("fedkd.method.names", lambda: ("aardvark", *before))
        assert {name: style.line(name) for name in before} == before

    def test_name_without_a_place_has_a_stable_look_that_no_place_has(self) -> None:
        looks = {str(style.line(name)) for name in names()}
        others = {str(style.line(f"method{number}")) for number in range(40)}
        assert not looks & others
        assert len(others) > 20
        assert style.line("somebody's") == style.line("somebody's")
        assert style.line("somebody's") != style.line("somebody's", 1)

    @pytest.mark.slow
    def test_files_are_the_same_bytes_in_another_process(self, runs: list[Run], tmp_path: Path) -> None:
        files = [
            *style.save(convergence(runs), tmp_path / "new" / "alpha-0.1"),
            *style.save(fairness(runs), tmp_path / "new" / "fairness"),
            *style.save(partition(runs[0]), tmp_path / "new" / "partition"),
        ]
        assert [path.name for path in files[:4]] == [f"alpha-0.1.{suffix}" for suffix in ("png", "pdf", "txt", "csv")]
        png, pdf, text, table = (path.read_bytes() for path in files[:4])
        assert png.startswith(b"\x89PNG")
        assert pdf.startswith(b"%PDF")
        assert b"/FontFile2" in pdf  # TrueType (type 42) fonts, embedded
        assert b"Date" not in pdf
        assert b"standard deviation" in b" ".join(text.split())
        assert table.splitlines()[:2] == [b"panel,series,x,y,deviation,seeds", b"communication round,local,1,50,0,2"]
        command = [sys.executable, "-c", SAVE_AGAIN, str(tmp_path / "again"), *(str(run.folder) for run in runs)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
        for path in files:
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()

    def test_user_settings_of_matplotlib_do_not_matter(self, runs: list[Run]) -> None:
        import matplotlib

        with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9}):
            line = lines(convergence(runs).axes[0])["fedavg"]
            assert line.get_linewidth() < 2
            assert matplotlib.rcParams["font.size"] == 30

    @pytest.fixture
    def long_names(self, write: Write) -> list[Run]:
        return [write("fedgen", 1, None, [[n, n]], **{"train.lr": 0.1 + n / 100}) for n in range(9)]

    @pytest.mark.slow
    def test_legend_stays_inside_and_off_the_axes(self, long_names: list[Run], runs: list[Run]) -> None:
        for figure in (convergence(long_names), fairness(long_names), convergence(runs), partition(runs[0])):
            figure.draw_without_rendering()
            legend = figure.legends[0].get_window_extent()
            assert figure.bbox.x0 <= legend.x0
            assert legend.x1 <= figure.bbox.x1
            assert legend.y1 <= figure.bbox.y1
            assert all(legend.y0 >= axes.get_window_extent().y1 for axes in figure.axes)

    def test_unwritable_place(self, runs: list[Run], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot be written"):
            style.save(partition(runs[0]), tmp_path / "file" / "figure")
