"""Reports: a page of every kind of run, and what a real browser makes of it."""

from __future__ import annotations

import json
import re
import sys
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pfsurgery import run_folder
from pfsurgery.errors import SurgeryError
from pfsurgery.report import write_report
from pfsurgery.report.palette import colors, family
from pfsurgery.report.search import front
from pfsurgery.run_folder import note_run
from tests import browser, runs, test_cli, test_cli_finetune

cli, folder = test_cli.cli, test_cli.folder
pytest.importorskip("plotly")
pytest.importorskip("jinja2")

HOSTILE = '<script>document.title="taken"</script><b>bold</b>'
MADE: dict[str, Callable[[Path], Any]] = {
    "sensitivity": lambda folder: runs.sensitivity(),
    "search": lambda folder: runs.search(),
    "layer": lambda folder: runs.layer(),
    "nas": lambda folder: runs.nas(),
    "robustness": runs.robustness,
}
FILES = {kind: f"{kind}.json" for kind in MADE} | {"sensitivity": "sensitivity.jsonl"}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run folder of a kind; `change` may edit what the kind's file says."""

    def make(kind: Any, change: Callable[[Any], None] = lambda values: None) -> Path:
        values = MADE[kind](tmp_path / kind)
        change(values)
        return runs.write(tmp_path / kind, kind, values)

    return make


def text_of(page: Path) -> str:
    """The page without its scripts, styles and data."""
    html = page.read_text(encoding="utf-8")
    return re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)


def fine_tuned(cli: Any, folder: Path, out: Path) -> Path:
    """A run folder that the command line wrote."""
    result = cli(*test_cli_finetune.SHORT, "--data", folder, "--out", out)
    assert result.code == 0, result.err
    return out


@pytest.mark.parametrize("kind", MADE)
def test_every_kind_has_a_page_that_needs_nothing_else(made, kind):
    page = write_report(made(kind))
    assert page.name == "report.html"
    html = page.read_text(encoding="utf-8")
    outside = text_of(page)
    assert not re.search(r'(src|href)="(?!#|data:)', outside)
    assert html.count("<script>") == 2
    assert "default-src &#39;none&#39;" in html
    assert "How it was made" in outside
    assert "test_resnet" in outside


def test_the_same_folder_gives_the_same_page(made, tmp_path):
    run = made("search")
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert first == write_report(run, tmp_path / "deeper" / "b.html").read_bytes()


def test_a_fine_tuning_on_the_command_line(cli, folder, tmp_path, monkeypatch):
    run = fine_tuned(cli, folder, tmp_path / "run")
    shown: list[str] = []
    monkeypatch.setattr(webbrowser, "open", shown.append)
    result = cli("report", run, "--open")
    assert result.code == 0, result.err
    assert str(run / "report.html") in result.out
    assert shown == [(run / "report.html").as_uri()]
    outside = text_of(run / "report.html")
    said = json.loads((run / "report.json").read_text())
    assert f"{said['steps'][-1]['accuracy']['top1']:.2f} %" in outside
    assert "<span>--policy</span> <span>maxpool_deep</span>" in outside
    for heading in ("What was saved", "Accuracy", "Training", "The network", "The plan"):
        assert f"<h2>{heading}</h2>" in outside
    for site in (d["site"]["name"] for d in said["plan"]["decisions"]):
        assert f">{site}<" in outside

    (run / "run.json").unlink()
    (run / "report.json").unlink()
    left = text_of(write_report(run, tmp_path / "log.html"))
    assert "<h2>Training</h2>" in left
    assert "no command that does it again" in left
    (run / "log.jsonl").unlink()
    assert "<h2>Training</h2>" in text_of(write_report(run, tmp_path / "epochs.html"))


def test_only_our_own_command_is_noted(tmp_path, monkeypatch):
    for program, noted in (
        ("/usr/bin/pfsurgery", "pfsurgery report run"),
        (str(Path(run_folder.__file__).parent / "cli/__main__.py"), "pfsurgery report run"),
        ("/home/me/cli/mine.py", ""),
        ("train.py", ""),
    ):
        monkeypatch.setattr(sys, "argv", [program, "report", "run"])
        assert note_run(tmp_path, "nas").command == noted


def test_all_calls_at_a_site_are_in_the_time_taken(made):
    def in_two_calls(records: list[dict[str, Any]]) -> None:
        for number, record in enumerate(records):
            record["seconds"] = 100 if number % 4 == 3 else 20

    page = text_of(write_report(made("sensitivity", in_two_calls)))
    sites = len(runs.sensitivity()) // 4
    assert f"{120 * sites:,} s" in page


def test_text_from_a_run_is_text(made):
    def rename(values: list[Any]) -> None:
        for record in values[:4]:
            record.update(site=HOSTILE, op=HOSTILE)

    html = write_report(made("sensitivity", rename)).read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert "&lt;script&gt;document.title" in html
    for data in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL):
        assert "<" not in data
        json.loads(data)


@pytest.mark.parametrize(("predicted", "warned"), [(5.1, True), (4.1, False), (3.0, True)])
def test_a_prediction_that_does_not_hold_is_said(made, predicted, warned):
    page = text_of(write_report(made("search", lambda v: v.update(predicted_gain_ms=predicted))))
    assert ("not within 15 %" in page) == warned
    without = text_of(write_report(made("search", lambda v: v.update(measured_gain_ms=None))))
    assert "15 %" not in without


def test_the_front_leaves_out_what_is_beaten():
    points = [{"macs": m, "damage": d} for m, d in ((3, 1.0), (1, 3.0), (2, 3.0), (3, 2.0))]
    best = front(points, "macs", lambda p: p["damage"])
    assert [(p["macs"], p["damage"]) for p in best] == [(1, 3.0), (3, 1.0)]


def test_ops_have_a_colour_each():
    labels = ["max_pool+pointwise", "max_pool", "thin: 16 -> 24", "max_pool_5x5", "mine", "other"]
    found = colors(labels)
    assert list(map(family, labels)) == [
        *("max_pool", "max_pool", "thin", "max_pool_5x5", "mine", "other")
    ]
    assert len(set(found.values())) == len(found) == 5
    assert colors(["thin"])["thin"] == found["thin"]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"a": 1}', "null", '[{"depth": "x"}]', '{"depth": 1}\n{\n{}']
)
def test_damaged_files_are_named(made, kind, content):
    run = made(kind)
    (run / FILES[kind]).write_text(content)
    if kind == "sensitivity" and content in ("", "{"):
        assert "not tried anything" in text_of(write_report(run))
        return
    with pytest.raises(SurgeryError, match=FILES[kind]) as raised:
        write_report(run)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("kind", MADE)
def test_missing_files_are_named(made, kind, cli):
    run = made(kind)
    (run / FILES[kind]).unlink()
    result = cli("report", run)
    assert result.code == 2
    assert FILES[kind] in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_what_is_no_run_folder(cli, tmp_path):
    for run, said in ((tmp_path, "not a run folder"), (tmp_path / "none", "no folder")):
        result = cli("report", run)
        assert result.code == 2
        assert said in result.err
    (tmp_path / "log.jsonl").write_text('{"kind": "epoch"}\n')
    with pytest.raises(SurgeryError, match=r"log\.jsonl is damaged"):
        write_report(tmp_path)


def test_a_folder_that_cannot_be_written(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SurgeryError, match="cannot be written"):
        write_report(made("nas"), tmp_path / "file" / "page.html")


def test_a_picture_comes_from_the_folder_alone(made, tmp_path):
    (tmp_path / "secret.png").write_bytes((made("robustness") / "gradcam.png").read_bytes())
    page = write_report(made("robustness", lambda v: v.update(gradcam="../secret.png")))
    assert "no longer in the run folder" in text_of(page)
    run = made("robustness")
    assert "data:image/png;base64," in text_of(write_report(run))
    (run / "gradcam.png").write_text("none")
    with pytest.raises(SurgeryError, match="not a PNG"):
        write_report(run)


def test_without_its_libraries_the_extra_is_named(made, monkeypatch):
    run = made("nas")
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(SurgeryError, match=r'pip install "pfsurgery\[study\]"'):
        write_report(run)


@pytest.mark.parametrize("kind", MADE)
def test_tables_have_a_cell_for_each_column(made, kind):
    tables = re.findall(r"<table>.*?</table>", text_of(write_report(made(kind))), re.DOTALL)
    assert tables
    for table in tables:
        columns = table.count("<th ")
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.DOTALL)[1:]:
            assert row.count("<td ") == columns


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    if browser.CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    window = browser.Browser()
    yield window
    window.close()


DRAWN = """[...document.querySelectorAll('.plot')].map(plot => ({
    drawn: plot.querySelectorAll('svg.main-svg').length > 0,
    x: [...plot.querySelectorAll('[class^=x][class$=title]')].map(title => title.textContent),
    y: [...plot.querySelectorAll('[class^=y][class$=title]')].map(title => title.textContent),
    ink: getComputedStyle(plot.querySelector('.xtitle')).fill,
    cut: [...plot.querySelectorAll('.infolayer [class$=title], .legendtext')].filter(text => {
        const own = text.getBoundingClientRect(), frame = plot.getBoundingClientRect();
        return own.left < frame.left - 1 || own.right > frame.right + 1
            || own.top < frame.top - 1 || own.bottom > frame.bottom + 1;
    }).map(text => text.textContent),
}))"""
UNITLESS = {"place in the network", "step of the job", "corruption", "parameters", "quantity"}


def look_at(chromium: browser.Browser, page: Path) -> None:
    """Every figure at both widths and in both themes."""
    inks = {}
    for width, dark in ((1280, False), (1280, True), (390, True), (390, False)):
        if not inks:
            chromium.show(page, width=width, dark=dark)
        else:
            chromium.look(width=width, dark=dark)
            chromium.settle()
        plots = chromium.ask(DRAWN)
        assert plots
        for plot in plots:
            assert plot["drawn"]
            assert plot["x"]
            assert plot["y"]
            assert not plot["cut"], (width, plot)
            for title in plot["x"] + plot["y"]:
                assert re.search(r"\(.+\)|MACs|steps|rate", title) or title in UNITLESS, title
        inks[dark] = {plot["ink"] for plot in plots}
        assert chromium.ask("document.documentElement.scrollWidth") <= width
        assert chromium.ask("document.body.scrollWidth") <= width
    assert not inks[True] & inks[False]
    assert chromium.complaints == []
    assert chromium.fetched == []


@pytest.mark.parametrize("kind", MADE)
def test_a_browser_draws_every_kind(made, chromium, kind):
    look_at(chromium, write_report(made(kind)))


def test_a_browser_draws_a_fine_tuning(cli, folder, tmp_path, chromium):
    look_at(chromium, write_report(fine_tuned(cli, folder, tmp_path / "run")))
    chromium.ask("document.querySelector('[data-copy]').click()")
    chromium.settle()
    assert chromium.ask("getSelection().toString()").startswith("pfsurgery finetune --model")
    assert chromium.complaints == []


def test_a_hostile_name_does_not_run_and_is_shown(made, chromium):
    def rename(values: list[Any]) -> None:
        for record in values:
            record.update(site=f"{HOSTILE}{record['site']}", op=HOSTILE)

    chromium.show(write_report(made("sensitivity", rename)), width=1280)
    assert "taken" not in chromium.ask("document.title")
    legend = "[...document.querySelectorAll('.legendtext')].map(text => text.textContent)"
    assert family(HOSTILE) in chromium.ask(legend)
    hover = """(() => {
        Plotly.Fx.hover(document.querySelectorAll('.plot')[1], [{curveNumber: 0, pointNumber: 0}]);
        return document.querySelector('.hoverlayer').textContent;
    })()"""
    assert HOSTILE in chromium.ask(hover.replace("document.querySelector('.hoverlayer')",
                                                 "document.querySelectorAll('.plot')[1]"
                                                 ".querySelector('.hoverlayer')"))  # fmt: skip
    assert chromium.complaints == []


def test_hover_names_the_configuration(made, chromium):
    chromium.show(write_report(made("search")), width=1280)
    shown = chromium.ask(
        """(() => {
            const plot = document.querySelector('.plot');
            const curve = plot.data.findIndex(trace => trace.name === 'optuna');
            Plotly.Fx.hover(plot, [{curveNumber: curve, pointNumber: 0}]);
            return plot.querySelector('.hoverlayer').textContent;
        })()"""
    )
    assert "optuna 7" in shown
    assert "nats" in shown


def test_nothing_else_than_the_page_s_own_scripts_can_run(made, chromium, tmp_path):
    html = write_report(made("nas")).read_text(encoding="utf-8")
    page = tmp_path / "changed.html"
    page.write_text(html.replace("</main>", HOSTILE + "</main>"), encoding="utf-8")
    chromium.show(page, width=1280)
    assert "taken" not in chromium.ask("document.title")
    assert any("Content Security Policy" in said for said in chromium.complaints)
