"""The mark of a row on a truncated picture goes with the row through segments, parts, the reader and the report."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.helpers.output_folders import PART_SIZE, ROWS, assert_right, begin_run, commit, contents, coverage, record
from tests.unit.store.test_embeddings import COLUMNS
from vqa_embeddings import open_embeddings
from vqa_embeddings.app.assignment import Assignment, read_work_state
from vqa_embeddings.app.launch import LaunchSetup
from vqa_embeddings.app.merge import check, merge
from vqa_embeddings.app.plan_summary import summarize_plan
from vqa_embeddings.cli.options import parse_extract, parse_merge
from vqa_embeddings.cluster.world import World
from vqa_embeddings.records import Extracted, Failed
from vqa_embeddings.store.run import read_run, read_run_rows

MARKED = {0, 3, 4, 11, 22}


def marked(row: int) -> Extracted:
    return replace(record(row), truncated=row in MARKED)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return begin_run(tmp_path)


def merged(out: Path, *arguments: object) -> tuple[int, str]:
    """The exit status of a merge in this process, and what it says."""
    options = parse_merge(None, ["--output-dir", str(out), *map(str, arguments)])
    outcome = (check if options.check else merge)(options)
    return outcome.status, "\n".join(outcome.sentences(options))


def assert_marked(out: Path, rows: set[int]) -> None:
    """Only the rows in `MARKED` carry the mark, wherever they lie, and they are counted."""
    e = open_embeddings(out)
    assert {int(name[1:]) for name, truncated in zip(e.ids, e.truncated, strict=True) if truncated} == MARKED & rows
    assert e[f"q{min(rows)}"]["answer"] == record(min(rows)).answer
    assert coverage(out)["truncated_pictures"] == len(MARKED & rows)
    for path in sorted(out.glob("*embeddings*.h5")):
        with h5py.File(path) as part:
            attributes = {int(name[1:]): dict(row.attrs) for name, row in part.items()}
            expected = {row: {"picture_truncated": True} if row in MARKED else {} for row in attributes}
            assert attributes == expected
            assert ("truncated_pictures" in part.attrs) == bool(MARKED & attributes.keys())
    for path in sorted(out.glob("*columns*.h5")):
        with h5py.File(path) as part:
            flags = part["picture_truncated"][:] if "picture_truncated" in part else np.zeros(len(part["row"]), bool)
            assert [row in MARKED for row in part["row"][:].tolist()] == flags.tolist()


@pytest.mark.parametrize("layout", ["grouped", "columnar"])
def test_the_mark_goes_with_its_row_wherever_that_goes(out, layout):
    arguments = ["--part-size", PART_SIZE, "--layout", layout]
    done = set(range(ROWS)) - {12}
    commit(out, [marked(row) for row in done])
    commit(out, [Failed(12, "PictureUnreadable", "it is cut off")])
    sentence = f"{len(MARKED)} of the extracted rows are on pictures that are cut off (--truncated-pictures show)"
    assert sentence in merged(out, "--check")[1]
    status, said = merged(out, *arguments, "--prune")
    assert status == 4 and sentence in said
    assert "5 of the extracted rows are on pictures that are cut off" in (out / "report.html").read_text()
    assert_marked(out, done)
    assert len(list(out.glob("shards/*/*.h5"))) == 1  # that of the row that failed
    before = contents(out)
    assert merged(out, *arguments)[0] == 4
    assert contents(out) == before
    commit(out, [marked(12)])  # its part is written again from what the parts alone hold
    assert merged(out, *arguments, "--compression", "gzip")[0] == 0
    assert_marked(out, set(range(ROWS)))
    if layout == "grouped":
        assert_right(out, set(range(ROWS)))
    other = "columnar" if layout == "grouped" else "grouped"
    assert merged(out, "--part-size", PART_SIZE, "--layout", other)[0] == 0
    assert_marked(out, set(range(ROWS)))


def test_where_no_picture_is_cut_off_nothing_is_written_of_it(out):
    commit(out, [record(row) for row in range(ROWS)])
    assert merged(out, "--part-size", PART_SIZE, "--layout", "columnar")[0] == 0
    assert "cut off" not in (out / "report.html").read_text()
    for path in [*out.glob("shards/*/*.h5"), out / COLUMNS.format(1)]:
        with h5py.File(path) as file:
            assert "picture_truncated" not in file


def test_the_mark_of_the_copy_that_counts_counts(out):
    commit(out, [record(row) for row in range(ROWS)])
    commit(out, [replace(record(row), truncated=True) for row in range(ROWS)])
    assert merged(out, "--part-size", PART_SIZE)[0] == 0
    assert coverage(out)["truncated_pictures"] == 0 and not open_embeddings(out).truncated.any()


def test_the_plan_says_how_many_there_are(out):
    commit(out, [marked(row) for row in range(ROWS)])
    options = parse_extract(None, ["--demo", "--output-dir", str(out)])
    run = read_run(out)
    table = read_run_rows(out, run)
    state = read_work_state(options, run, table)
    assignment = Assignment(
        type(state).from_bytes(state.to_bytes(), ROWS), (0, 1), ROWS, 0, table.pictures(), np.arange(0)
    )
    unused = dict.fromkeys(("folder", "write_rows", "checkpoint", "device", "dtype", "attention"))
    setup = LaunchSetup(options=options, table=table, run=run, **unused)
    lines = list(islice(summarize_plan(setup, assignment, World()), 4))
    assert lines[2:] == [
        f"done before: {ROWS} rows extracted, 0 failed",
        f"{len(MARKED)} rows done before on pictures that are cut off",
    ]
