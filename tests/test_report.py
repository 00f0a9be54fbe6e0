"""The page of some runs: what is in it, what cannot get into it, and how it behaves in a real browser."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser, chromium
from invented import finish, invent
from test_cli import fedkd

from fedkd.errors import UserError
from fedkd.results import Run
from plots.report import collect, report
from plots.significance import claims

pytestmark = pytest.mark.slow

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"
METHODS = ("local", "fedavg", "fedavg_ft", "fedgen", "pgfed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Four seeds of five methods with a hundred clients each."""
    return invent(tmp_path_factory.mktemp("runs"), METHODS, seeds=4, clients=100, classes=10)


@pytest.fixture(scope="module")
def page_file(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report(runs), encoding="utf-8")
    return path


def embedded(page: str) -> dict[str, Any]:
    """Return the data in a page."""
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return dict(json.loads(text))


def column(table: dict[str, Any], name: str, key: str = "shown") -> list[Any]:
    (found,) = [column[key] for column in table["columns"] if column["name"] == name]
    return list(found)


class TestContent:
    def test_same_runs_give_the_same_page_with_all_of_it(self, runs: list[Run]) -> None:
        page = report(runs)
        assert page == report(runs)
        data = embedded(page)
        assert data["title"] == "20 runs of 5 methods"
        assert [group["label"] for group in data["groups"]] == list(METHODS)
        assert len(data["clients"]) == 20
        assert {len(run["client"]) for run in data["clients"]} == {100}

    def test_nothing_is_fetched(self, runs: list[Run]) -> None:
        page = report(runs)
        assert "default-src 'none'" in page
        assert not re.findall(r"""(?:src|href)=["']|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", page)

    def test_claims_rest_on_paired_differences(self, runs: list[Run]) -> None:
        found = embedded(report(runs))["claims"]
        expected = [claim for control in ("fedavg_ft", "local", "fedavg") for claim in claims(runs, control)]
        assert column(found["table"], "control") == [claim.control for claim in expected]
        assert column(found["table"], "verdict") == [claim.verdict for claim in expected]
        first = ", ".join(f"{seed}: {value:+.2f}" for (seed, _), value in expected[0].differences.items())
        assert column(found["table"], "by seed")[0] == first
        assert column(found["table"], "seeds") == ["4"] * 12
        assert "same seed and the same clients" in found["basis"]
        assert not found["notes"]

    def test_nothing_is_claimed_without_a_control_or_seeds(self, runs: list[Run]) -> None:
        alone = embedded(report([run for run in runs if run.config.run.method == "fedgen"]))["claims"]
        assert alone["table"]["rows"] == []
        assert alone["notes"] == [
            "There is no control among the runs (fedavg_ft, local, fedavg), so nothing is claimed."
        ]
        once = embedded(report([run for run in runs if run.config.run.seed == 1]))["claims"]
        assert set(column(once["table"], "verdict")) == {"one seed: no test"}
        assert set(column(once["table"], "p")) == {"–"}

    def test_settings_that_differ(self, tmp_path: Path) -> None:
        runs = invent(tmp_path, ["fedgen"]) + invent(tmp_path, ["fedgen", "fedavg"], **{"train.lr": 0.5})
        tables = embedded(report(runs))["tables"]
        assert [found["name"] for found in tables["settings"]["columns"]] == ["run", "run.method", "train.lr"]
        assert column(tables["settings"], "train.lr") == ["0.01", "0.5", "0.5"]
        common = dict(zip(column(tables["common"], "setting"), column(tables["common"], "value"), strict=True))
        assert common["run.clients"] == "8"
        assert common["fedgen.temperature"] == "1.0"
        assert common["environment.python"] == sys.version.split()[0]

    def test_state_of_a_run(self, tmp_path: Path) -> None:
        ended, failed, stopped = invent(tmp_path, ["fedgen", "fedavg", "fedprox"], rounds=2)
        finish(ended)
        (failed.folder / "error.txt").write_text("client 3 failed\n", encoding="utf-8")
        states = column(embedded(report([ended, failed, stopped]))["tables"]["runs"], "state")
        assert states == ["finished", "failed: client 3 failed", "stopped after round 2"]

    def test_runs_that_cannot_be_compared(self, runs: list[Run]) -> None:
        with pytest.raises(UserError, match="there are no runs"):
            report([])
        with pytest.raises(UserError, match="are both local"):
            report([runs[0], runs[0].open(runs[0].folder)])

    def test_what_comes_from_files_cannot_leave_its_place(self, tmp_path: Path) -> None:
        page = report(hostile(tmp_path))
        assert page.count("<script") == 2
        assert page.count("</script>") == 2
        assert "<img" not in page
        assert HOSTILE in column(embedded(page)["tables"]["runs"], "state")[0]


def hostile(folder: Path) -> list[Run]:
    """Return runs whose data set, failure and label are written to break out of a page."""
    run, control = invent(folder, ["fedgen", "local"], **{"data.name": HOSTILE})
    (run.folder / "error.txt").write_text(HOSTILE, encoding="utf-8")
    return [Run(run.folder, label=HOSTILE), control]


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if chromium() is None:
        pytest.skip("no Chromium is installed (apt-get install chromium, or set $CHROMIUM)")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(window: Page, page_file: Path) -> Page:
    window.complaints.clear()
    window.open(page_file)
    return window


def point(page: Page, selector: str) -> tuple[float, float]:
    """Scroll to the figure of a point, switched off or not, and return where the point is, in pixels of the window."""
    x, y = page.run(
        f"(() => {{ const point = document.querySelector({json.dumps(selector)}), svg = point.ownerSVGElement; "
        "svg.scrollIntoView({block: 'center'}); const box = svg.getBoundingClientRect(), "
        "scale = box.width / svg.viewBox.baseVal.width; "
        "return [box.x + scale * point.cx.baseVal.value, box.y + scale * point.cy.baseVal.value]; })()"
    )
    return x, y


class TestCommand:
    def test_writes_one_file(
        self, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert fedkd(monkeypatch, "report", str(runs[0].folder.parent)) == 0
        assert capsys.readouterr().out == "runs/report.html\n"
        assert len(embedded((tmp_path / "runs" / "report.html").read_text(encoding="utf-8"))["clients"]) == 20
        assert fedkd(monkeypatch, "report", str(runs[0].folder), "--out", "mine.html") == 0
        assert embedded((tmp_path / "mine.html").read_text(encoding="utf-8"))["title"] == "1 run of 1 method"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "runs"]

    def test_mistakes_write_nothing(
        self, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder").mkdir()
        for words, said in (
            ([str(runs[0].folder), "--out", "folder"], "--out folder is a folder"),
            (["nothing", "--out", "new/page.html"], "nothing holds no run"),
            ([str(runs[0].folder), str(runs[0].folder), "--out", "new/page.html"], "are both local"),
        ):
            assert fedkd(monkeypatch, "report", *words) == 2
            assert said in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


class TestBrowser:
    def test_opens_in_under_two_seconds(self, opened: Page, page_file: Path) -> None:
        """Twenty runs of a hundred clients; the best of three, since the machine may be busy otherwise."""
        times = []
        for _ in range(3):
            opened.open(page_file)
            times.append(opened.run("performance.getEntriesByType('navigation')[0].loadEventEnd"))
        assert opened.run("document.querySelectorAll('#clients circle').length") == 2000
        assert 0 < min(times) < 2000
        assert not opened.complaints

    def test_no_complaints_and_no_requests(self, opened: Page) -> None:
        assert opened.run("document.title") == "20 runs of 5 methods"
        assert opened.run("[...document.querySelectorAll('h2')].length") == 8
        assert not opened.complaints

    def test_complaints_would_be_seen(self, window: Page, tmp_path: Path) -> None:
        path = tmp_path / "broken.html"
        path.write_text("<script>console.error('mine'); nothing.here</script><img src='http://localhost:9/x.png'>")
        window.open(path)
        assert any("mine" in text for text in window.complaints)
        assert any("nothing is not defined" in text for text in window.complaints)
        assert any("localhost:9" in text for text in window.complaints)
        window.complaints.clear()

    def test_a_table_is_sorted_by_its_headings(self, opened: Page) -> None:
        cells = "[...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[3].textContent)"
        before = [float(text) for text in opened.run(cells)]
        opened.click("#runs th:nth-child(4) button")
        assert [float(text) for text in opened.run(cells)] == sorted(before) != before
        assert opened.run("document.querySelector('#runs th:nth-child(4)').ariaSort") == "ascending"
        opened.click("#runs th:nth-child(4) button")
        assert [float(text) for text in opened.run(cells)] == sorted(before, reverse=True)
        opened.click("#runs th:nth-child(1) button")
        methods = opened.run("[...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[0].textContent)")
        assert methods == sorted(methods)
        assert opened.run("document.querySelectorAll('#runs [aria-sort]').length") == 1

    def test_numbers_are_sorted_as_numbers_and_missing_ones_come_last(self, opened: Page) -> None:
        cells = "[...document.querySelectorAll('#methods tbody tr')].map(row => row.cells[4].textContent)"
        for _ in range(2):
            opened.click("#methods th:nth-child(5) button")
            assert opened.run(cells)[-1] == "–"  # local has no global model
        signed = "[...document.querySelectorAll('#claims tbody tr')].map(row => parseFloat(row.cells[3].textContent))"
        opened.click("#claims th:nth-child(4) button")
        found = opened.run(signed)
        assert found == sorted(found)
        assert found[0] < found[1] < 0 < found[-1]  # as texts their order would be another

    def test_what_claims_rest_on_is_to_be_read(self, opened: Page, runs: list[Run]) -> None:
        """Under their heading: how they were tested, and in each line the seeds and the difference of every one."""
        text = (
            "[...document.querySelectorAll('h2')].find(h => h.textContent.startsWith('Claims')).nextSibling.innerText"
        )
        basis = opened.run(text)
        assert "two runs with the same seed and the same clients" in basis
        assert "paired t-test" in basis
        headings = opened.run("[...document.querySelectorAll('#claims th')].map(cell => cell.innerText)")
        lines = opened.run(
            "[...document.querySelectorAll('#claims tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
        )
        shown = {(line[0], line[1]): dict(zip(headings, line, strict=True)) for line in lines}
        expected = [claim for control in ("fedavg_ft", "local", "fedavg") for claim in claims(runs, control)]
        assert len(shown) == len(lines) == len(expected)
        for claim in expected:
            mine = shown[claim.label, claim.control]
            each = [f"{seed}: {value:+.2f}" for (seed, _), value in claim.differences.items()]
            assert (mine["verdict"], mine["seeds"], mine["by seed"]) == (claim.verdict, "4", ", ".join(each))

    def test_a_method_is_switched_off_and_on_everywhere(self, opened: Page) -> None:
        shown = "[...document.querySelectorAll('[data-group=\"3\"]')].map(node => getComputedStyle(node).display)"
        others = shown.replace('"3"', '"2"')
        before = opened.run(shown)
        assert len(before) > 8
        assert "none" not in before
        opened.click("nav button:nth-of-type(4)")
        assert set(opened.run(shown)) == {"none"}
        assert "none" not in opened.run(others)
        assert opened.run("document.querySelector('nav button:nth-of-type(4)').ariaPressed") == "false"
        opened.run(
            "(() => { const s = document.querySelector('#curves select:nth-of-type(1)'); s.selectedIndex = 2; "
            "s.dispatchEvent(new Event('change')); })()"
        )
        assert set(opened.run(shown)) == {"none"}  # also in a figure that is drawn anew
        opened.click("nav button:nth-of-type(4)")
        assert "none" not in opened.run(shown)

    def test_all_are_switched_off_and_on(self, opened: Page) -> None:
        off = "document.querySelectorAll('[data-group]:not(.off)').length"
        opened.click("nav button:last-of-type")
        assert opened.run(off) == 0
        opened.click("nav button:last-of-type")
        assert opened.run("document.querySelectorAll('.off').length") == 0

    def test_the_mouse_finds_a_client(self, opened: Page, runs: list[Run]) -> None:
        opened.click("nav button:last-of-type")
        opened.click("nav button:nth-of-type(4)")  # fedgen alone, so that its points are uncovered
        opened.move(*point(opened, "#clients g[data-group='3'] circle:nth-of-type(8)"))
        said = opened.run("tip.textContent")
        client, seed = map(int, re.findall(r"client (\d+) of fedgen, seed (\d)", said)[0])
        run = next(run for run in runs if (run.config.run.method, run.config.run.seed) == ("fedgen", seed))
        row = [row for row in run.rows("evaluations") if row["client"] == client][-1]
        assert f"accuracy: {row['personal_correct'] / 2:.2f} %" in said
        examples = run.partition.query(f"split == 'train' and client == {client}")["examples"].iloc[0]
        assert f"{examples} training examples" in said
        assert opened.run("tip.hidden") is False
        assert opened.run("document.querySelectorAll('#clients .near').length") == 5  # the same client in all methods
        opened.move(5, 5)
        assert opened.run("tip.hidden") is True
        assert opened.run("document.querySelectorAll('.near').length") == 0

    def test_the_mouse_finds_a_round_but_nothing_that_is_switched_off(self, opened: Page) -> None:
        place = "#curves g[data-group='4'] circle:nth-of-type(3)"
        opened.move(*point(opened, place))
        said = r"pgfed\ncommunication round: 3\n\d+\.\d\d % ± \d+\.\d\d over 4 seeds"
        assert re.fullmatch(said, opened.run("tip.textContent"))
        opened.click("nav button:nth-of-type(5)")
        opened.move(*point(opened, place))
        assert opened.run("tip.hidden") is True

    def test_settings_that_differ_are_a_table_that_can_be_sorted(self, window: Page, tmp_path: Path) -> None:
        path = tmp_path / "settings.html"
        made = [invent(tmp_path, ["fedgen"], rounds=1, **{"train.lr": rate})[0] for rate in (0.5, 0.01, 0.1)]
        path.write_text(report([*made, *invent(tmp_path, ["fedavg"], rounds=1)]), encoding="utf-8")
        window.complaints.clear()
        window.open(path)
        rows = "[...document.querySelectorAll('#settings tr')].map(row => [...row.cells].map(cell => cell.textContent))"
        assert window.run(rows)[0] == ["run", "run.method", "train.lr"]
        window.click("#settings th:nth-child(3) button")
        assert [row[2] for row in window.run(rows)[1:]] == ["0.01", "0.01", "0.1", "0.5"]
        common = "[...document.querySelectorAll('#common tr')].map(row => row.cells[0].textContent)"
        assert "train.lr" not in window.run(common)
        assert {"run.clients", "fedgen.temperature"} <= set(window.run(common))
        assert not window.complaints

    def test_a_narrow_window_keeps_letters_of_figures_legible(self, opened: Page) -> None:
        """Figures are as wide as they have to be and are scrolled, not the page."""
        size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        opened.send("Emulation.setDeviceMetricsOverride", **size)
        try:
            widths = "[...document.querySelectorAll('figure > svg')].map(svg => svg.getBoundingClientRect().width)"
            assert min(opened.run(widths)) >= 640  # of 900, for letters of 12
            assert opened.run("document.documentElement.scrollWidth") <= 400
        finally:
            opened.send("Emulation.clearDeviceMetricsOverride")

    def test_every_choice_of_a_figure_is_drawn(self, opened: Page) -> None:
        for figure, least in (("curves", 20), ("clients", 2000)):
            counts = opened.run(
                f"[...document.querySelectorAll('#{figure} select')].flatMap(select => "
                "[...select.options].map((_, i) => {"
                "select.selectedIndex = i; select.dispatchEvent(new Event('change'));"
                f"return document.querySelectorAll('#{figure} circle').length; }}))"
            )
            assert min(counts) >= least
        inside = opened.run(
            "[...document.querySelectorAll('svg text')].every(text => { const a = text.getBoundingClientRect(), "
            "b = text.ownerSVGElement.getBoundingClientRect(); "
            "return a.left >= b.left - 1 && a.right <= b.right + 1 && a.bottom <= b.bottom + 1; })"
        )
        assert inside
        assert not opened.complaints

    def test_local_alone_has_nothing_to_draw_in_places(self, window: Page, tmp_path: Path) -> None:
        path = tmp_path / "local.html"
        path.write_text(report(invent(tmp_path, ["local"], clients=1, rounds=1)), encoding="utf-8")
        window.complaints.clear()
        window.open(path)
        made = window.run(
            "[...document.querySelectorAll('select')].flatMap(select => [...select.options].map((_, i) => {"
            "select.selectedIndex = i; select.dispatchEvent(new Event('change')); "
            "return document.querySelector('main').outerHTML; })).join()"
        )
        assert "NaN" not in made
        assert "Infinity" not in made
        assert "nothing is claimed" in made
        assert made.count("None of the runs has such a model.") == 1  # as long as the global model is chosen
        assert not window.complaints

    def test_hostile_texts_stay_texts(self, window: Page, tmp_path: Path) -> None:
        path = tmp_path / "hostile.html"
        path.write_text(report(hostile(tmp_path)), encoding="utf-8")
        window.complaints.clear()
        window.open(path)
        assert not window.complaints
        assert window.run("document.querySelectorAll('img').length") == 0
        assert window.run("document.querySelectorAll('script').length") == 2
        assert HOSTILE in window.run("document.querySelector('nav').textContent")


def test_collect_is_plain_numbers_and_texts(runs: list[Run]) -> None:
    content = collect(runs)
    assert set(content["curves"]["lines"]) == {"accuracy", "global", "worst_decile"}
    assert [line["group"] for line in content["curves"]["lines"]["global"]["round"]] == [1, 2, 3, 4]  # local has none
