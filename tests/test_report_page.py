"""The page of a report: its record, its tables, its plots, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from ddfast.errors import UserError
from ddfast.report import METRICS, Point, Report, Row, Study, read_report, write_page
from ddfast.report.page import content, gap_closed, markdown_text, three_digits, to_html, to_markdown
from ddfast.report.plots import Plot, draw

VOID = {"meta", "img"}


def row(name: str, kind: Any, passes: int, fd: list[float], ms: tuple[float, float], **values: list[float]) -> Row:
    return Row(name, kind, passes, {"FD": fd, **values}, {"1": ms[0], "64": ms[1]})


def make_study(**changes: Any) -> Study:
    """Three seeds; the rows in no order, with figures that are easily checked by hand."""
    rows = [
        row("onestep*", "baseline", 1, [2.2, 2.4, 2.3], (0.2, 0.0123), precision=[0.5]),
        row("DD-1", "student", 1, [0.6, 0.7, 0.8], (2.0, 0.3), precision=[0.8], recall=[0.7]),
        row("DD-2", "student", 2, [0.5, 0.6, 0.4], (4.0, 0.6), precision=[0.9], recall=[0.7]),
        row("pre-trained-1-2", "involved", 3, [0.55, 0.55, 0.55], (6.0, 0.7), precision=[0.85]),
        row("skip-1", "baseline", 9, [26.789], (18.0, 1.0), precision=[0.1], recall=[0.2]),
        row("teacher", "teacher", 10, [0.3, 0.4, 0.2], (20.0, 1.2), precision=[0.9], recall=[0.9]),
    ]
    training = [Point(x, way, {"FD": [3 - x / 500]}) for x in (1000, 250, 500) for way in ("1 step", "2 steps")]
    pairs = [Point(x, "1 step", {"FD": [2000 / x, 2200 / x]}) for x in (1000, 4000)]
    facts = {"guidance": 0.5, "seeds": [0, 1, 2], "solver": {"kind": "dpm", "exact": False}, "top_k": None}
    return replace(Study("digits-var", "student-var", "FD", rows, training, pairs, {}, facts), **changes)


def make_report(*studies: Study, **changes: Any) -> Report:
    report = Report("Digits", "a CPU", "2026-01-02", list(studies or [make_study()]), ["A note."])
    return replace(report, **changes)


_DRAWN: dict[str, list[Plot]] = {}


def drawn(studies: list[Study]) -> list[Plot]:
    """``draw``, which takes half a second, only once for equal studies."""
    key = repr(studies)
    if key not in _DRAWN:
        _DRAWN[key] = draw(studies)
    return _DRAWN[key]


@pytest.fixture(autouse=True)
def draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddfast.report.page.draw", drawn)


class Page(HTMLParser):
    """Tags in balance; tables as lists of rows of (text, bold); pictures as (source, alt); text outside of tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[tuple[str, bool]]]] = []
        self.images: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs)
        self.attributes += [(tag, name, value) for name, value in given.items()]
        if tag == "img":
            self.images.append((given["src"], given["alt"]))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", False))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            text, bold = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = text + data, bold or "strong" in self.open


def markdown_tables(text: str) -> list[list[list[tuple[str, bool]]]]:
    """As :attr:`Page.tables`, of a Markdown page."""
    page = Page(f"<body>{MarkdownIt().enable('table').render(text).replace(' />', '>')}</body>")
    return page.tables


def rendered(report: Report) -> tuple[Page, str]:
    """Both pages without their plots."""
    blocks = list(content(report, [], {}))
    return Page(to_html(report.title, blocks)), to_markdown(blocks)


def written(folder: Path, report: Report) -> tuple[Page, str]:
    """Both pages, written to the folder and read back."""
    write_page(folder, report)
    return Page((folder / "report.html").read_text()), (folder / "report.md").read_text()


def cells(table: list[list[tuple[str, bool]]], name: str) -> dict[str, str]:
    """The row of a name: text by column, in ** if bold."""
    head = [text for text, _ in table[0]]
    line = next(line for line in table[1:] if line[0][0] == name)
    return {h: f"**{text}**" if bold else text for h, (text, bold) in zip(head, line, strict=True)}


def decoded(source: str) -> Image.Image:
    """The picture of a data URI."""
    head, _, data = source.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == f"data:{Image.MIME[str(image.format)]};base64"
    image.load()
    return image


def pictures(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=np.int16)


# -- the record


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    report = make_report(make_study(), make_study(teacher="other", metric="FD", training=[]))
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    write_page(tmp_path, report)
    assert read_report(tmp_path / "report.json") == report


def test_facts_become_what_json_holds() -> None:
    assert make_study(facts={"timesteps": (0, 2)}).facts == {"timesteps": [0, 2]}
    with pytest.raises(UserError, match="digits-var: facts hold what JSON cannot"):
        make_study(facts={"weights": Path("x")})


def spoil(values: dict[str, Any], path: str, value: Any) -> None:
    """Set, or with ``...`` delete, an entry at a dotted path."""
    *parents, last = [int(p) if p.isdecimal() and p != "1" else p for p in path.split(".")]
    place: Any = values
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("hardware", ..., "report lacks key 'hardware'"),
        ("extra", 1, "report has the unknown key 'extra'"),
        ("studies.0.rows.0.passes", ..., r"report.studies\[0\].rows\[0\] lacks key 'passes'"),
        ("studies.0.rows.0.passes", 1.5, r"passes is 1.5; it must be int"),
        ("studies.0.rows.0.passes", True, r"passes is True; it must be int"),
        ("studies.0.rows.0.passes", 0, "onestep\\*: passes is 0; it must be at least 1"),
        ("studies.0.rows.0.kind", "student-like", "it must be 'teacher' or 'student' or 'involved' or 'baseline'"),
        ("studies.0.rows.0.values.FD", 2.2, r"rows\[0\].values\['FD'\] is 2.2; it must be list"),
        ("studies.0.rows.0.values.FD", [float("nan")], "onestep\\*: FD is nan; values must be finite"),
        ("studies.0.rows.0.values.FD", [], "onestep\\*: FD has no values"),
        ("studies.0.rows.0.values.FD", [1.0, 2.0], "rows have 2 and 3 values of FD"),
        ("studies.0.rows.0.values.FD", ..., "onestep\\* was not measured in FD"),
        ("studies.0.rows.0.values.KID", [1.0], "onestep\\*: metric 'KID' is unknown; use FD, FID"),
        ("studies.0.rows.0.ms_per_image.1", 0.0, "0.0 ms an image at batch 1; it must be positive"),
        ("studies.0.rows.0.ms_per_image.all", 1.0, "batch size 'all'"),
        ("studies.0.rows.0.name", "DD-1", "rows of digits-var: 'DD-1' comes twice"),
        ("studies.0.rows", [], "the study has no rows"),
        ("studies.0.metric", "IS", "metric 'IS' cannot be the chief one; use FD, FID, FD_T, sFID$"),
        ("studies.0.training.0.x", 250, r"training of digits-var: \('1 step', 250\) comes twice"),
        ("studies.0.training.0.values", {"FD_T": [1.0]}, "1 step at 1000 was not measured in FD"),
        ("studies.0.pairs.0.x", 0, "pairs has a point at 0"),
        ("studies.0.pictures", ["a.png"], "pictures is .'a.png'.; it must be dict"),
        ("studies", [], "the report has no studies"),
        ("studies", "all", "report.studies is 'all'; it must be list"),
    ],
)
def test_a_record_that_is_not_whole_is_refused(path: str, value: Any, message: str) -> None:
    values = make_report().to_dict()
    Report.from_dict(values)
    spoil(values, path, value)
    with pytest.raises(UserError, match=message):
        Report.from_dict(values)


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(UserError, match="it must be dict"):
        read_report(tmp_path / "report.json")


# -- tables


def test_a_table_says_what_was_measured() -> None:
    page, markdown = rendered(make_report())
    table = page.tables[0]
    assert [line[0][0] for line in table[1:]] == ["teacher", "DD-1", "DD-2", "pre-trained-1-2", "onestep*", "skip-1"]
    assert cells(table, "teacher") == {
        "sampling": "teacher",
        "kind": "teacher",
        "passes": "10",
        "FD ↓": "0.300 ± 0.100",
        "precision ↑": "0.900",
        "recall ↑": "0.900",
        "ms/image, batch 1": "20.0",
        "speed-up, batch 1": "1.00×",
        "ms/image, batch 64": "1.20",
        "speed-up, batch 64": "1.00×",
    }
    assert cells(table, "onestep*") == {
        "sampling": "onestep*",
        "kind": "baseline",
        "passes": "1",
        "FD ↓": "2.30 ± 0.10",
        "precision ↑": "0.500",
        "recall ↑": "–",
        "ms/image, batch 1": "0.200",
        "speed-up, batch 1": "100×",
        "ms/image, batch 64": "0.0123",
        "speed-up, batch 64": "97.6×",
    }
    assert cells(table, "skip-1")["FD ↓"] == "26.79"  # one seed: no spread
    assert page.tables == markdown_tables(markdown)


def test_the_best_without_the_teacher_is_bold() -> None:
    table = rendered(make_report())[0].tables[0]
    bold = {(line[0][0], table[0][i][0]) for line in table[1:] for i, (_, is_bold) in enumerate(line) if is_bold}
    assert bold == {
        ("DD-2", "FD ↓"),
        ("DD-2", "precision ↑"),
        ("DD-1", "recall ↑"),  # as good as DD-2 in what is shown
        ("DD-2", "recall ↑"),
    }


def test_a_metric_of_the_teacher_alone_has_no_best() -> None:
    rows = [replace(r, values={"FD": [1.0]}) for r in make_study().rows]
    rows[-1] = replace(rows[-1], values={"FD": [0.5], "IS": [9.876]})
    table = rendered(make_report(make_study(rows=rows)))[0].tables[0]
    assert cells(table, "teacher")["IS ↑"] == "9.88"
    assert cells(table, "DD-1")["IS ↑"] == "–"


def test_the_gap_closed_is_said_for_each_student() -> None:
    page, markdown = rendered(make_report())
    # DD-1, seed by seed: 1 - .3/1.9, 1 - .3/2, 1 - .6/2.1; DD-2: 1 - .2/1.9, 1 - .2/2, 1 - .2/2.1
    assert gap_closed([0.6, 0.7, 0.8], [0.3, 0.4, 0.2], [2.2, 2.4, 2.3]) == pytest.approx([16 / 19, 0.85, 5 / 7])
    assert "in FD: DD-1 80.2% (least of 3 seeds: 71.4%), DD-2 90.0% (least of 3 seeds: 89.5%)." in page.text
    assert "Gap closed between onestep\\* and the teacher" in markdown


def test_one_value_stands_for_all_seeds_in_the_gap() -> None:
    assert gap_closed([0.5, 0.75], [0.0], [1.0]) == [0.5, 0.25]
    assert gap_closed([0.5], [0.0, 0.25], [1.0, 1.25]) == [0.5, 0.75]


def test_a_gap_that_is_none_is_not_divided_by() -> None:
    assert gap_closed([0.5], [1.0, 0.1], [1.0, 1.0]) is None
    rows = [replace(r, values={"FD": [1.0]}) for r in make_study().rows]
    assert "Gap closed: undefined, for onestep* is no worse" in rendered(make_report(make_study(rows=rows)))[0].text
    without = [r for r in rows if r.name != "onestep*"]
    assert "Gap closed" not in rendered(make_report(make_study(rows=without)))[0].text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (1.2345, "1.23"), (9.996, "10.0"), (99.96, "100"), (123.4, "123"), (12345.0, "12,300")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_one_seed_has_no_spread() -> None:
    rows = [replace(r, values={name: v[:1] for name, v in r.values.items()}) for r in make_study().rows]
    page, _ = rendered(make_report(make_study(rows=rows)))
    assert "±" not in page.text and "seeds:" not in page.text
    assert "DD-1 84.2%, DD-2 89.5%." in page.text


def test_a_study_of_one_row_has_its_page(tmp_path: Path) -> None:
    only = make_study(rows=make_study().rows[1:2], training=[], pairs=[])
    page, _ = written(tmp_path, make_report(only))
    assert cells(page.tables[0], "DD-1")["speed-up, batch 1"] == "–"  # there is no teacher
    assert len(page.tables[0]) == 2 and len(page.images) == 2
    untimed = replace(only, rows=[replace(only.rows[0], ms_per_image={})], facts={})
    page, _ = written(tmp_path, make_report(untimed))
    assert [text for text, _ in page.tables[0][0]] == ["sampling", "kind", "passes", "FD ↓", "precision ↑", "recall ↑"]
    assert len(page.images) == 1


# -- pages


def test_the_html_page_stands_alone(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "same noise.png")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "b.jpg")
    study = make_study(pictures={"Same noise": "same noise.png", "Classes": "b.jpg"})
    page, markdown = written(tmp_path, make_report(study))
    assert page.tags["html"] == page.tags["head"] == page.tags["title"] == page.tags["h1"] == 1
    assert ("html", "lang", "en") in page.attributes
    assert not page.tags["script"] + page.tags["link"]
    assert [v for _, name, v in page.attributes if name == "href"] == ["https://arxiv.org/abs/2412.17153"]
    images = [decoded(source) for source, _ in page.images]
    assert [image.format for image in images] == ["PNG"] * 5 + ["JPEG"]
    assert all(alt for _, alt in page.images)
    for name in ("passes", "time", "training", "pairs"):
        assert (tmp_path / "figures" / f"{name}.png").is_file() and f"(figures/{name}.png)" in markdown
    assert "(same%20noise.png)" in markdown
    assert "prefers-color-scheme: dark" in (tmp_path / "report.html").read_text()
    assert {"solver.kind", "dpm", "solver.exact", "no", "0, 1, 2", "none"} <= {t for r in page.tables[1] for t, _ in r}
    assert not list(tmp_path.rglob("*.tmp"))


def test_text_is_escaped(tmp_path: Path) -> None:
    nasty = """<script>alert("1")</script> & 'x' | `y` *z* $a$ [b](c) &amp; \\| _d_ ~~e~~"""
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    rows = [replace(make_study().rows[0], name=nasty)]
    study = make_study(teacher=nasty, student=nasty, rows=rows, pictures={nasty: "p.png"}, facts={nasty: nasty})
    page, markdown = written(tmp_path, make_report(study, title=nasty, notes=[nasty], hardware=nasty, created=nasty))
    assert not page.tags["script"] + page.tags["a"] - 1
    assert page.text.count(nasty) == 14
    assert page.tables[0][1][0] == (nasty, False)
    assert any(nasty in alt for _, alt in page.images)
    tables = markdown_tables(markdown)
    assert tables[0][1][0] == (nasty, False) and tables[1][1] == [(nasty, False)] * 2
    shown = Page(f"<body>{MarkdownIt().enable(['table', 'strikethrough']).render(markdown).replace(' />', '>')}</body>")
    assert shown.text.count(nasty) == 13  # no title
    assert not shown.tags["script"] + shown.tags["em"] + shown.tags["code"] + shown.tags["s"]


@pytest.mark.parametrize("text", ["- a", "1. a", "12) a", "+ a", "---", "===", "# a", "> a", "1.5 a", "a\n\n- b"])
def test_a_text_stays_a_paragraph_in_markdown(text: str) -> None:
    shown = " ".join(text.split()).replace(">", "&gt;")
    assert MarkdownIt().render(f"{markdown_text(text)}\n") == f"<p>{shown}</p>\n"


def damage(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("absent.png", lambda path: None, "cannot read the report's picture .*absent.png: No such file"),
        ("text.png", lambda path: path.write_text("hello"), "text.png is damaged, or no PNG"),
        ("half.png", damage, "half.png is damaged"),
        ("../above.png", lambda path: Image.new("RGB", (4, 4)).save(path), "above.png lies outside"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, make: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    make(folder / name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        write_page(folder, make_report(make_study(pictures={"One": name})))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    write_page(tmp_path, make_report(title="Before"))
    write_page(tmp_path, make_report(title="After"))
    for name in ("report.html", "report.md", "report.json"):
        text = (tmp_path / name).read_text()
        assert "After" in text and "Before" not in text


# -- plots


def test_plots_are_pictures_of_a_sane_size_with_a_column_a_study() -> None:
    for one, two in zip(drawn([make_study()]), draw([make_study(), make_study(teacher="b")]), strict=True):
        assert one.png.startswith(b"\x89PNG") and one.name == two.name
        height, width = pictures(one.png).shape
        assert 400 <= height <= 1200 and 600 <= width <= 1500
        assert pictures(two.png).shape == (height, 2 * width)
        assert 20 < len(np.unique(pictures(one.png))) and 5_000 < len(one.png) < 300_000


def test_plots_differ_when_data_differ() -> None:
    study = make_study()
    rows = [replace(r, values=r.values | {"FD": [2 * v for v in r.values["FD"]]}) for r in study.rows]
    other = make_study(rows=rows, training=study.training[:-1], pairs=study.pairs[:-1])
    before, again, after = drawn([study]), draw([make_study()]), draw([other])
    assert [plot.name for plot in before] == ["passes", "time", "training", "pairs"]
    for one, same, different in zip(before, again, after, strict=True):
        assert one.png == same.png and one.png != different.png


def test_a_study_without_points_is_left_out_of_a_plot() -> None:
    bare = make_study(teacher="bare", training=[], pairs=[])
    by_name = {plot.name: plot for plot in draw([make_study(), bare])}
    alone = {plot.name: plot for plot in drawn([make_study()])}
    assert by_name["training"].png == alone["training"].png and by_name["pairs"].png == alone["pairs"].png
    assert [plot.name for plot in draw([bare])] == ["passes", "time"]


def test_curves_are_told_in_words() -> None:
    alt = {plot.name: plot.alt for plot in drawn([make_study()])}
    assert "digits-var, 2 steps: 2.5 at 250, 2 at 500, 1 at 1,000." in alt["training"]
    assert "digits-var, 1 step: 2.1 at 1,000, 0.525 at 4,000." in alt["pairs"]


def axes_of(monkeypatch: pytest.MonkeyPatch, study: Study) -> Iterator[Any]:
    """The axes of a study's plots, as they are saved."""
    from matplotlib.figure import Figure

    kept: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self.axes[0]), save(self, *a, **k))[1])
    draw([study])
    yield from kept


def test_axes_are_logarithmic_where_values_span_more_than_tenfold(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, time, training, pairs = axes_of(monkeypatch, make_study())
    assert [a.get_yscale() for a in (passes, time, training, pairs)] == ["log", "log", "linear", "linear"]
    assert [a.get_xscale() for a in (passes, time, training, pairs)] == ["log", "log", "linear", "log"]
    near = [replace(r, values={"FD": [1 + r.passes / 10]}) for r in make_study().rows]
    assert next(axes_of(monkeypatch, make_study(rows=near))).get_yscale() == "linear"


def test_names_in_a_plot_do_not_cover_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    close = [replace(r, passes=2, values={"FD": [1 + i / 100]}) for i, r in enumerate(make_study().rows[:4])]
    close.append(make_study().rows[4])  # far from the others, which crowd into a corner
    for axes in list(axes_of(monkeypatch, make_study(rows=close)))[:2]:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert sorted(text.get_text() for text in axes.texts) == sorted(r.name for r in close)
        window = axes.get_window_extent()
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert window.x0 <= box.x0 and box.x1 <= window.x1


def test_drawing_neither_heeds_nor_changes_the_users_matplotlib_settings() -> None:
    import matplotlib

    plain = drawn([make_study()])
    with matplotlib.rc_context({"font.size": 17, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert draw([make_study()]) == plain
        assert dict(matplotlib.rcParams) == before


def test_plots_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ddfast.report.page.draw", draw)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'ddfast\[report\]'"):
        write_page(tmp_path, make_report())
    assert not list(tmp_path.iterdir())


def test_every_metric_is_explained_where_it_occurs() -> None:
    study = make_study()
    rows = [replace(r, values={name: [0.5] for name in METRICS}) for r in study.rows]
    page, _ = rendered(make_report(replace(study, rows=rows)))
    for name, metric in METRICS.items():
        assert f"{name}: {metric.meaning}; {'higher' if metric.higher else 'lower'} is better." in page.text
    assert "Inception" not in rendered(make_report())[0].text
