"""Reading what was extracted: the same values wherever they lie, and one layer as a matrix in a moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.helpers.launching import ROOT
from tests.helpers.output_folders import LAYERS, PART_SIZE, ROWS, begin_run, commit, contents, coverage, record
from tests.helpers.published_reader import read_published
from tests.system.test_damage import links_away, links_within, shows_another_file, stores_away
from vqa_embeddings import open_embeddings
from vqa_embeddings.app import merge as merging
from vqa_embeddings.cli.options import parse_merge
from vqa_embeddings.records import Failed
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN

COLUMNS = "phi4_multimodal_columns_part_{:03d}.h5"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return begin_run(tmp_path)


def merged(out: Path, *arguments: object) -> int:
    """The exit status of a merge, which here leaves out its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "write_report", lambda *_: None)
        outcome = merging.merge(parse_merge(None, ["--output-dir", str(out), *map(str, arguments)]))
    assert outcome is not None
    return outcome.status


def assert_all_right(out: Path, rows: list[int]) -> None:
    e = open_embeddings(out)
    wanted = [record(row) for row in rows]
    assert len(e) == len(rows) and e.ids == [f"q{row}" for row in rows]
    assert e.answers == [one.answer for one in wanted]
    for index, layer in enumerate(LAYERS):
        for found, values in (
            (e.query_token(layer), [one.vectors[QUERY_TOKEN][index] for one in wanted]),
            (e.vision_token(layer), [one.vectors[VISION_TOKEN][index] for one in wanted]),
        ):
            assert found.dtype == np.float32 and np.array_equal(found, np.stack(values))
    assert np.array_equal(e.vision_only(), np.stack([one.vectors[VISION_ONLY] for one in wanted]))
    table = e.table()
    assert list(table) == ["question_id", "image_id", "question", "ground_truth_answer", "answer"]
    assert table["question"].tolist() == [f"question {row}" for row in rows]
    one = e[f"q{rows[-1]}"]
    assert (one["answer"], one["image_id"]) == (wanted[-1].answer, f"image{rows[-1] // 3}.jpg")
    assert np.array_equal(one["query_token"][LAYERS[1]], wanted[-1].vectors[QUERY_TOKEN][1])
    assert np.array_equal(one["vision_token"][LAYERS[2]], wanted[-1].vectors[VISION_TOKEN][2])


ORDER = [*range(1, ROWS, 2), *range(0, ROWS, 2)]


def extract_all(out: Path) -> None:
    commit(out, [record(row) for row in ORDER])


def test_rows_that_are_not_merged_yet(out):
    commit(out, [record(row) for row in (3, 9, 4, 17)])
    assert_all_right(out, [3, 4, 9, 17])


def test_rows_of_which_there_are_several_copies(out):
    extract_all(out)
    commit(out, [record(row) for row in range(9)])
    assert_all_right(out, list(range(ROWS)))


def test_rows_of_which_a_segment_holds_some_that_an_earlier_one_has_too(out):
    for rows in ([1, 3, 6], [0, 1, 2, 3], [3, 4, 5], [6, 7, 8, 9]):
        commit(out, [record(row) for row in rows])
    assert_all_right(out, list(range(10)))


@pytest.mark.parametrize("layouts", [["grouped"], ["columnar"], ["grouped", "columnar"], ["columnar", "grouped"]])
@pytest.mark.parametrize("prune", [False, True])
def test_rows_in_parts_of_either_layout_with_and_without_their_segments(out, layouts, prune):
    extract_all(out)
    for layout in layouts:
        again = ["--prune"] if prune else []
        assert merged(out, "--part-size", PART_SIZE, "--layout", layout, *again) == 0
    assert bool(list(out.glob("shards/*/*.h5"))) != prune
    assert_all_right(out, list(range(ROWS)))
    if "columnar" in layouts:
        assert len(list(out.glob(COLUMNS.format(0).replace("000", "*")))) == 5
    if "grouped" in layouts:
        assert len(read_published(out)) == ROWS
    assert merged(out, "--part-size", PART_SIZE, "--layout", layouts[-1], "--verify") == 0
    names = [entry["file"] for entry in coverage(out)["parts"]]
    assert len(names) == len(set(names)) == 5 * len(layouts)
    before = contents(out)
    for layout in layouts:
        assert merged(out, "--part-size", PART_SIZE, "--layout", layout) == 0
        assert {entry["file"] for entry in coverage(out)["parts"]} == set(names)
    assert {name: data for name, data in contents(out).items() if name.endswith(".h5")} == {
        name: data for name, data in before.items() if name.endswith(".h5")
    }


def test_the_same_rows_give_the_same_columnar_bytes_whoever_held_them(out):
    extract_all(out)
    assert merged(out, "--part-size", PART_SIZE, "--layout", "columnar") == 0
    first = {path.name: path.read_bytes() for path in out.glob("*columns*")}
    for path in out.glob("*columns*"):
        path.unlink()
    assert merged(out, "--part-size", PART_SIZE, "--prune") == 0
    assert not list(out.glob("shards/*/*.h5"))
    assert merged(out, "--part-size", PART_SIZE, "--layout", "columnar") == 0, "made from the grouped parts"
    assert {path.name: path.read_bytes() for path in out.glob("*columns*")} == first


def test_a_damaged_columnar_part_is_made_anew_from_the_other_layout(out):
    extract_all(out)
    assert merged(out, "--part-size", PART_SIZE, "--layout", "columnar") == 0
    assert merged(out, "--part-size", PART_SIZE, "--prune") == 0
    victim = out / COLUMNS.format(2)
    good = victim.read_bytes()
    victim.write_bytes(good[:-9] + b"x" + good[-8:])
    assert merged(out, "--part-size", PART_SIZE, "--layout", "columnar", "--verify") == 0
    assert victim.read_bytes() == good
    assert victim.with_name(victim.name + ".damaged").exists()


def test_gzip_packs_columns_too(out):
    extract_all(out)
    assert merged(out, "--layout", "columnar", "--compression", "gzip") == 0
    with h5py.File(out / COLUMNS.format(1)) as file:
        assert file["query_token_representation/layer_2"].compression == "gzip"
    assert merged(out, "--layout", "columnar", "--prune") == 0
    assert_all_right(out, list(range(ROWS)))


def test_rows_that_failed_are_not_there(out):
    commit(out, [*(record(row) for row in range(ROWS - 1)), Failed(ROWS - 1, "PictureNotFound", "gone")])
    assert_all_right(out, list(range(ROWS - 1)))
    for layout in ("grouped", "columnar"):
        assert merged(out, "--part-size", 2, "--layout", layout) == 4
    for path in out.glob("shards/*/*"):
        path.unlink()
    assert_all_right(out, list(range(ROWS - 1)))
    e = open_embeddings(out)
    with pytest.raises(KeyError):
        e[f"q{ROWS - 1}"]


LAYOUTS = [[], ["--layout", "grouped"], ["--layout", "columnar"]]  # not merged, and merged


def values(e) -> list[object]:
    """All that is read of files, as plain values."""
    matrices = [e.query_token(LAYERS[1]), e.vision_token(LAYERS[2]), e.vision_only()]
    return [e.ids, e.answers, e.table().to_dict("list"), *(matrix.tolist() for matrix in matrices)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_rows_are_those_of_all_whatever_chooses_them(out, layout):
    extract_all(out)
    if layout:
        assert merged(out, "--part-size", PART_SIZE, *layout, "--prune") == 0
    e = open_embeddings(out)
    everything = values(e)
    table = e.table()
    mask = table["image_id"] == "image2.jpg"
    for key, rows in [
        (slice(3, 9), range(3, 9)),
        (slice(-4, None), range(ROWS - 4, ROWS)),
        (slice(ROWS, 999), []),
        (slice(None, None, -5), range(ROWS - 1, -1, -5)),
        (mask, [6, 7, 8]),
        (mask.to_numpy(), [6, 7, 8]),
        (mask.astype("boolean"), [6, 7, 8]),
        (table.set_index("question_id")["image_id"] == "image2.jpg", [6, 7, 8]),
        ([False] * ROWS, []),
        (["q7", "q2", "q21", "q7"], [7, 2, 21, 7]),
        (table["question_id"][[20, 4]], [20, 4]),
        (np.array(["q3", "q22"]), [3, 22]),
        ([], []),
    ]:
        some = e[key]
        assert len(some) == len(rows)
        for found, of_all in zip(values(some), everything, strict=True):
            if isinstance(found, dict):
                assert found == {name: [column[row] for row in rows] for name, column in of_all.items()}
            else:
                assert found == [of_all[row] for row in rows]
    assert e[5:12][["q8"]][:]["q8"]["answer"] == record(8).answer
    assert [target for _, target in e[2:4].dataset(2)] == ["q2", "q3"]


def test_a_file_without_rows_that_are_asked_for_is_not_touched(out):
    extract_all(out)
    assert merged(out, "--part-size", PART_SIZE, "--prune") == 0
    e = open_embeddings(out)
    for part in sorted(out.glob("*.h5"))[1:]:
        part.unlink()
    assert e[:PART_SIZE].answers == [record(row).answer for row in range(PART_SIZE)]
    assert np.array_equal(e[["q4", "q0"]].vision_only()[:, 0], [4, 0])


def test_it_is_a_mapping_by_id(out):
    commit(out, [record(row) for row in (3, 4, 9)])
    e = open_embeddings(out)
    assert list(e) == list(e.keys()) == e.ids == ["q3", "q4", "q9"]
    assert "q4" in e and "q5" not in e and 4 not in e and None not in e
    assert [row["answer"] for row in e.values()] == [record(row).answer for row in (3, 4, 9)]
    assert e.get("q5") is None and e.get("q9")["question"] == "question 9"
    assert e == e and e != e[:] and len({e, e[:]}) == 2


def test_a_number_is_an_id_and_not_a_position(tmp_path):
    out = begin_run(tmp_path, name="{}")
    commit(out, [record(row) for row in range(5, ROWS)])
    e = open_embeddings(out)
    for key in (7, np.int64(7), np.uint8(7), "7"):
        assert key in e and e[key]["answer"] == record(7).answer
    assert e[np.array([9, 7])].ids == e[[9, "7"]].ids == ["9", "7"]
    with pytest.raises(KeyError, match=r"'0' is missing: .*; a number is taken for an id, positions go by slice"):
        e[0]
    with pytest.raises(KeyError, match=r"'-1' is not a question_id of .*; a number is taken for an id"):
        e[-1]


def test_a_key_that_leads_nowhere_says_why(out):
    commit(out, [record(row) for row in range(6, ROWS)])
    commit(out, [Failed(5, "PictureNotFound", "it was not there")])
    e = open_embeddings(out)
    for key, why in [
        ("q5", "'q5' has failed (PictureNotFound: it was not there); extract_dist.py --retry-failed tries it again"),
        ("q4", "'q4' is missing: it has not been extracted, the same extract_dist.py command continues"),
        ("q99", f"'q99' is not a question_id of {out}"),
    ]:
        for asked in (key, [key], ["q9", key]):
            with pytest.raises(KeyError) as failed:
                e[asked]
            assert failed.value.args == (why,)
    with pytest.raises(KeyError, match="'q9' is not among the rows that were chosen of"):
        e[:3]["q9"]
    mask = np.ones(ROWS, bool)
    with pytest.raises(IndexError, match=rf"a mask of shape \({ROWS},\); expected \({len(e)},\)"):
        e[mask]
    shuffled = e.table().sample(frac=1, random_state=1)["question"] == "question 9"
    with pytest.raises(ValueError, match="the mask's index is neither"):
        e[shuffled]
    for strange in (None, True, 2.5, [2.5], [[True]], b"q9"):
        with pytest.raises((TypeError, IndexError), match="; expected "):
            e[strange]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_that_a_merge_has_changed_since_is_to_be_opened_again(out, layout):
    """Rows of a columnar part that is replaced lie elsewhere in the new one."""
    commit(out, [*(record(row) for row in range(ROWS) if row != 2), Failed(2, "PictureNotFound", "gone")])
    if layout:
        assert merged(out, "--part-size", PART_SIZE, *layout, "--prune") == 4
    e = open_embeddings(out)
    assert np.array_equal(e.vision_only()[:, 0], [row for row in range(ROWS) if row != 2])
    commit(out, [record(2)])
    assert merged(out, "--part-size", PART_SIZE, *layout, "--prune") == 0
    for read in (e.vision_only, lambda: e.answers, lambda: e["q3"], lambda: e[:3].query_token(LAYERS[0])):
        with pytest.raises(OSError, match=r"a merge has been at work; open the folder again"):
            read()
    assert_all_right(out, list(range(ROWS)))


def test_what_is_not_there_is_said(out, tmp_path):
    with pytest.raises(ValueError, match=r"holds no run.json; expected the output folder of extract_dist.py"):
        open_embeddings(tmp_path / "nowhere")
    e = open_embeddings(out)
    assert len(e) == 0 and e.query_token(LAYERS[0]).shape == (0, 8) and e.answers == []
    with pytest.raises(ValueError, match=r"layer 16 was not extracted; .* has the layers \[0, 2, 3\]"):
        e.query_token(16)
    extract_all(out)
    e = open_embeddings(str(out))
    victim = min(out.glob("shards/*/*.h5"))
    victim.write_bytes(victim.read_bytes()[:3000])
    with pytest.raises(OSError, match=r"cannot be read .* --verify finds what is damaged"):
        e.query_token(LAYERS[0])


def stores_a_vector_away(file: h5py.File, name: str, secret: Path) -> None:
    file.create_dataset(name, (6,), np.float32, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def links_to_a_vector(file: h5py.File, name: str, secret: Path) -> None:
    file[name] = h5py.ExternalLink(str(secret), "vector")


LEADS = [links_away, links_within, stores_away, shows_another_file, stores_a_vector_away, links_to_a_vector]


@pytest.mark.parametrize("lead", LEADS)
def test_a_forged_part_leads_to_no_other_file(out, lead):
    extract_all(out)
    secret = out.parent / "secret"
    with h5py.File(secret, "w") as file:
        file["values"] = np.full((ROWS, 6), 12345, np.float32)
        file["vector"] = np.full(6, 12345, np.float32)
    assert merged(out, "--prune") == 0
    (part,) = out.glob("*.h5")
    with h5py.File(part, "r+") as file:
        del file["q3/vision_only_representation"]
        lead(file, "q3/vision_only_representation", secret)
    with pytest.raises(OSError, match=r"another (file|place)"):
        open_embeddings(out).vision_only()


def test_a_torch_dataset_goes_through_a_loader(out):
    import torch

    extract_all(out)
    e = open_embeddings(out)
    dataset = e.dataset(2, target=lambda row: int(row["question_id"][1:]) % 2)
    assert len(dataset) == ROWS
    loader = torch.utils.data.DataLoader(dataset, batch_size=ROWS)
    [(vectors, targets)] = list(loader)
    assert torch.equal(vectors, torch.from_numpy(e.query_token(2)))
    assert targets.tolist() == [row % 2 for row in range(ROWS)]
    assert e.dataset(3, "vision_token")[4][1] == "q4"
    with pytest.raises(ValueError, match="expected one of query_token, vision_token"):
        e.dataset(2, "image_token")


def test_reading_needs_no_torch(out):
    extract_all(out)
    code = (
        "import sys; from vqa_embeddings import open_embeddings; e = open_embeddings(sys.argv[1]);"
        "e.query_token(2); e.answers; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, cwd=ROOT)
