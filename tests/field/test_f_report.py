"""Section F of the field list: the report page, the plot in README.md and the numbers in docs/benchmarks.md, from the committed runs."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from perf.report import plots, write
from perf.report.run_folder import read_run
from perf.report.verdict import claims, verdict, why_marked
from perf.report.write import RESULTS, readme_plot, sections_of, write_report

ROOT = Path(__file__).parents[2]
RUNS = sorted(path.parent.name for path in (ROOT / RESULTS).glob("*/run.json"))
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"\d[\d,]*(\.\d+)?")


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    return read_run(ROOT / RESULTS / request.param)


@pytest.fixture(scope="module")
def figures(run):
    """Every figure of the page as Matplotlib drew it, without the bars of stages and variants."""
    drawn = []

    class Kept(Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            drawn.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "Figure", Kept)
        sections_of(run)
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
    return drawn


def numbers(text: str) -> list[float]:
    return [float(found[0].replace(",", "")) for found in NUMBER.finditer(text)]


def test_f_the_answer_and_its_plot_come_first_and_the_machine_last(run, tmp_path):
    shutil.copy(run.folder / "run.json", tmp_path)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    answer = re.search(r'<p class="verdict">(.*?)</p>', page, re.DOTALL)
    assert answer and len(re.findall(r"\.(\s|$)", answer[1])) == 1, "one sentence"
    assert page.index('class="verdict"') < page.index("<svg") < page.index("<table")
    links = set(re.findall(r'<a href="(.*?)">', page))
    assert links and all((tmp_path / link).is_file() for link in links), links
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[0] == "FiDO over FiD" and titles[-1] == "Machine, settings, failures and workloads"
    for last in ("<td>commit</td>", "<td>sweep: failures</td>", "what it asks"):
        assert page.index(last) > page.index(f"<h2>{titles[-1]}</h2>")


def test_f_curves_use_the_height_of_their_axes(figures):
    checked = 0
    for axes in itertools.chain.from_iterable(figure.axes for figure in figures):
        heights = [y for line in axes.lines if len(line.get_xdata()) > 1 for y in axes.transData.transform(line.get_xydata())[:, 1]]
        heights += [y for bars in axes.collections for path in bars.get_paths() for y in axes.transData.transform(path.vertices)[:, 1]]
        if axes.patches or not heights or axes.get_xlabel().startswith("operations"):
            continue  # bars start from zero
        inside = [y for y in heights if axes.bbox.y0 <= y <= axes.bbox.y1]
        assert max(inside) - min(inside) > 0.5 * axes.bbox.height, axes.get_xlabel()
        checked += 1
    assert checked >= 3


def test_f_labels_do_not_collide(figures):
    for figure in figures:
        labels = [text for axes in figure.axes for text in axes.findobj(Annotation) if text.get_text()]
        boxes = [(label.get_text(), label.get_window_extent()) for label in labels]
        for (one, box), (other, its_box) in itertools.combinations(boxes, 2):
            assert not box.overlaps(its_box), (one, other)
        for axes in figure.axes:
            for line in axes.lines:
                points = axes.transData.transform(line.get_xydata())
                drawn = list(points)
                for start, end in itertools.pairwise(points) if line.get_linestyle() != "None" else ():
                    drawn += [start + (end - start) * share for share in np.linspace(0, 1, 200)]
                for text, box in boxes:
                    assert not [point for point in drawn if box.contains(*point)], (axes.get_xlabel(), text)


def test_f_the_best_of_the_verdict_is_the_highest_of_the_table(run):
    for reader in ("FiD", "FiDO"):
        found = re.search(rf"best concurrency:.*?\b{reader} ([\d.]+)", " ".join(claims(run)))
        rows = [row for row in run.closed(run.main, reader.lower())]
        assert found and float(found[1]) == pytest.approx(max(row.questions_per_s["median"] for row in rows), rel=0.005)


def test_f_ratios_follow_from_the_numbers_beside_them(run):
    found = re.search(r"answers ([\d.]+) .*?times.*?: ([\d.]+)\*? against ([\d.]+)", verdict(run))
    assert found and float(found[1]) == pytest.approx(float(found[2]) / float(found[3]), rel=0.01)


def test_f_a_claim_against_peers_names_the_strongest_and_says_whether_it_was_compiled(run):
    for reader, name in (("fid", "FiD"), ("fido", "FiDO")):
        (claim,) = [claim for claim in claims(run) if re.match(rf"{name} through Triton|No peer was measured with {name}\.", claim)]
        files = json.loads((run.folder / "run.json").read_text())
        measured = [peer for name, content in files.items() if name.startswith("peers") for peer in content["peers"]]
        for way, kernels in (files.get("library_pytorch") or {}).get("ways", {}).items():
            if not way.endswith("fp8"):  # the claim is about half precision
                names = "with library kernels" if way.startswith("library") else "by hand"
                measured += [
                    {"reader": of, "name": f"PyTorch {names}, compiled", "questions_per_s": found}
                    for of, found in kernels["questions_per_s"].items()
                ]
        peers = [peer for peer in measured if peer["reader"] == reader and peer.get("questions_per_s")]
        if not peers:
            assert claim.startswith("No peer")
            continue
        strongest = max(peers, key=lambda peer: peer["questions_per_s"]["median"])
        named = re.search(r"strongest peer measured, (.*): [\d.]+\*? against", claim)[1]
        assert all(part in named for part in strongest["name"].split(", ")), (named, strongest["name"])
        times, ours, theirs = re.search(r"answers ([\d.]+) times.*: ([\d.]+)\*? against ([\d.]+)\.", claim).groups()
        assert float(times) == pytest.approx(float(ours) / float(theirs), rel=0.01)
        assert ("(not compiled)" in claim) == ("compiled" not in strongest["name"])
        assert ("No compiled peer was measured" in claim) == (not any("compiled" in peer["name"] for peer in peers))


def test_f_every_point_that_was_not_steady_says_why(run):
    (section,) = [section for section in sections_of(run) if section.title.startswith("Points that were not steady")]
    marked = [row for row in run.rows if row.mark]
    assert [row[-1] for row in section.blocks[1].rows] == [why_marked(row) for row in marked]
    assert all(re.search(r"\d", why_marked(row)) for row in marked), "a reason without a number"


def test_f_no_stage_is_a_difference_of_others(run):
    (section,) = [section for section in sections_of(run) if section.title == "Where a question's time goes"]
    table = section.blocks[2]
    assert {"tokenize", "encoder", "decoder steps"} <= {row[1] for row in table.rows}
    assert not {"rest of chain", "triton"} & {row[1] for row in table.rows} and "rest of chain" not in section.blocks[1].svg


def test_f_the_plot_of_the_readme_is_what_the_command_makes(monkeypatch, tmp_path):
    shutil.copytree(ROOT / RESULTS / write.README_RUN, tmp_path / RESULTS / write.README_RUN)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report"])
    assert write.main() == 0
    made = (tmp_path / write.README_PLOT).read_text()
    assert made == (ROOT / write.README_PLOT).read_text(), "stale: make report"
    assert f"({write.README_PLOT})" in (ROOT / "README.md").read_text()
    assert len(made) < 5000 and "prefers-color-scheme:dark" in made and not re.search(r"<script|href|url\(", made)
    ratios = [
        f">{pair.ratio['median']:.1f}<" for pair in map(read_run(tmp_path / RESULTS / write.README_RUN).headline, ("paper", "answers_512"))
    ]
    assert all(ratio in made for ratio in ratios)


def test_f_a_run_without_lengths_has_no_plot_for_the_readme(run):
    with pytest.raises(write.ReportError, match="wanted two lengths"):
        short = {**run.files, "sweep": {**run.files["sweep"], "points": [p for p in run.files["sweep"]["points"] if p["new_tokens"] == 32]}}
        readme_plot(type(run)(run.folder, short))


def tables_of(page: Path) -> list[list[list[str]]]:
    blocks = re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]


def test_f_no_table_puts_two_machines_beside_each_other():
    for page in [*DOCS, *(ROOT / RESULTS).glob("*/*.md")]:
        for head, *_ in tables_of(page):
            assert not ("H100" in " ".join(head) and "H200" in " ".join(head)), (page.name, head)


def test_f_ratios_of_the_documents_follow_from_their_tables():
    checked = 0
    for head, _, *rows in tables_of(ROOT / "docs/benchmarks.md"):
        if "FiDO / FiD" not in head:
            continue
        for row in rows:
            # "136 to 138" is of two rounds, and the ratio the median of theirs
            fid, fido = (np.mean(numbers(row[head.index(name)].split("(")[0])) for name in ("FiD questions/s", "FiDO questions/s"))
            (ratio,) = numbers(row[head.index("FiDO / FiD")])
            assert ratio == pytest.approx(fido / fid, rel=0.01), row
            checked += 1
    assert checked >= 5
    assert not [page.name for page in DOCS if "in every other" in page.read_text()]
