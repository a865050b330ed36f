"""Names and texts of every kind, in every locale: each costs its own row at most, and what is recorded is the same."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, arguments_for, command, run, write_table
from tests.helpers.odd_pictures import CAT, encoded, lay
from tests.helpers.published_reader import read_published
from vqa_embeddings import open_embeddings
from vqa_embeddings.app.merge import _withdraw
from vqa_embeddings.base.console import speak
from vqa_embeddings.base.files import new_csv
from vqa_embeddings.cluster.world import World, from_rank_zero
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.table import Table, read_rows, read_table
from vqa_embeddings.errors import InputError, RowError
from vqa_embeddings.models.checkpoint import find_checkpoint
from vqa_embeddings.records import Failed
from vqa_embeddings.store.parts import Part, announced_path
from vqa_embeddings.store.segments import _write_failed

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PICTURE = encoded(CAT[:48, :64], "PNG")
THERE = (
    "plain.png",
    "图片 🐈.png",
    "größe/Ä.png",
    "שלום\u202e.png",
    "\ufffe\uffff\u2028\x7f\x85\x1b[31m.png",
    "line\nfeed\rtab\t.png",
    "quo\"te', comma.png",
    "back\\slash.png",
    " blanks around ",
    "dots...",
    "%00.png",
    "-rf",
    "~",
    "$HOME;a&b|c*?[d]`e`",
    "x" * 251 + ".png",
)
ABSENT = ("nicht da 图.png", "é" * 200, "caf\ufffd.png", "/größe/Ä.png", "图/../Ä.png", "\u3000", "\ufeff")
IDS = (
    "x" * 70_000,
    "..",
    " ",
    "\n",
    "\r",
    "e\u0301",
    "é",
    "\ufeff",
    "\x01\x1f\x7f",
    "\U0001d54f\u2029\uffff",
    "<b>&\"'",
    "-1",
    "NaN",
)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory) -> tuple[Path, Path]:
    """A table of such names, ids and texts, and its pictures, in folders whose names are no better."""
    base = tmp_path_factory.mktemp("names") / "grö\udcffe 图"  # the byte is no UTF-8
    images = base / "bilder 图"
    for name in THERE:
        lay(images, name, PICTURE)
    lay(images, "caf\udce9.png", PICTURE)
    named = [(f"{number} {name}".replace("/", "|"), name) for number, name in enumerate((*THERE, *ABSENT))]
    rows = [*named, *((identity, "plain.png") for identity in IDS)]
    texts = [{"question_id": i, "image_id": n, "question": f"{n[:99]}?", "answer": i[:99]} for i, n in rows]
    return write_table(base / "vqa 表.csv", texts), images


def test_every_row_of_a_nasty_table_is_extracted_or_has_failed_in_a_locale_without_utf8(tmp_path, nasty, checkpoint):
    table, images = nasty
    model, out = tmp_path / "modell \udcff ü", tmp_path / "größe \udcff"
    shutil.copytree(checkpoint, model)
    (model / "notiz ü.txt").touch()
    inputs = [*arguments_for(table, model, images), "--max-new-tokens", 1, "--num-workers", 1]
    done = run(command(0, *inputs, "--output-dir", out), **ASCII)
    assert done.returncode == 0, done.stdout + done.stderr
    good, bad = len(THERE) + len(IDS), len(ABSENT)
    assert f"{good} rows extracted, {bad} failed, 0 left" in done.stdout
    for layout in ("grouped", "columnar"):
        line = [sys.executable, str(ROOT / "merge_shards.py"), "--output-dir", str(out), "--layout", layout]
        merged = run(line, **ASCII)
        assert merged.returncode == 4, merged.stdout + merged.stderr
        assert f"rows: {good + bad}; extracted: {good}; failed: {bad}; missing: 0" in merged.stdout

    run_file = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run_file["images_dir"] == str(images)
    assert run_file["model_sha256"] == find_checkpoint(str(model), None, tmp_path).fingerprint

    given = read_table(table)
    by_id = {row[0]: row for row in map(given.row, range(len(given)))}
    published = read_published(out)
    assert published.keys() == by_id.keys() - {row[0] for row in by_id.values() if row[1] in ABSENT}
    first = published[next(iter(published))]["vision_only"]
    for identity, row in published.items():
        assert [row[name] for name in ("image_id", "question", "ground_truth_answer")] == by_id[identity][1:]
        assert np.allclose(row["vision_only"], first, rtol=1e-4), "another picture was read"
    opened = open_embeddings(out)
    assert opened.answers == [published[identity]["answer"] for identity in opened.ids]

    folder = PictureFolder(images)  # in the locale of this process: the reasons are the same
    with open(out / "failed.csv", newline="", encoding="utf-8") as stream:
        failed = list(csv.DictReader(stream))
    assert [row["image_id"] for row in failed] == list(ABSENT)
    for row in failed:
        with pytest.raises(RowError) as failure:
            folder.read(row["image_id"], lambda path: path)
        told = str(failure.value).encode(errors="backslashreplace").decode()
        assert (row["error"], row["message"]) == (type(failure.value).__name__, told)
    assert 'src="data:image' in (out / "report.html").read_text(encoding="utf-8"), "the report has no pictures"


def test_a_picture_is_found_by_its_utf8_name_and_named_so_in_a_locale_of_latin_1(tmp_path):
    if not shutil.which("localedef"):
        pytest.skip("there is no localedef to make a locale with")
    made = subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(tmp_path / "de_DE.ISO-8859-1")])
    if made.returncode:
        pytest.skip("localedef cannot make the locale")
    lay(tmp_path / "größe", "图片 ö.png", PICTURE)
    lay(tmp_path / "größe", "half ö.png", PICTURE[:60])
    (tmp_path / "names").write_text("图片 ö.png\nhalf ö.png\n图片 ö.jpg\n", encoding="utf-8")
    script = (
        "import sys; from pathlib import Path; from vqa_embeddings.data.picture_folder import PictureFolder\n"
        "from vqa_embeddings.errors import RowError; from vqa_embeddings.data.decode_pool import DecodePool\n"
        "folder, pool = PictureFolder(Path(sys.argv[1])), DecodePool()\n"
        "for name in open(sys.argv[2], encoding='utf-8').read().splitlines():\n"
        "    try: print(folder.read(name, pool).size)\n"
        "    except RowError as failure: sys.stdout.buffer.write(f'{failure}\\n'.encode())\n"
        "    sys.stdout.flush()"
    )
    line = [sys.executable, "-c", script, str(tmp_path / "größe"), str(tmp_path / "names")]
    done = run(line, LC_ALL="de_DE.ISO-8859-1", LOCPATH=str(tmp_path), PYTHONPATH=str(ROOT))
    size, half, absent = done.stdout.splitlines()
    assert size == "(64, 48)", done.stderr
    assert half.startswith("half ö.png cannot be read as a picture")
    assert absent.startswith("'图片 ö.jpg' cannot be found") and "there is '图片 ö.png'" in absent


@pytest.mark.parametrize("texts", [["a\rb", "c"], ["a\r\nb", ""], ["\ud800", "\n"], ["\u2028\x85\x0c", '"'], ["\r"]])
def test_a_row_that_is_written_is_the_row_that_is_read(tmp_path, texts):
    with new_csv(tmp_path / "rows.csv", ["x"] * len(texts)) as add:
        add(texts)
        add(texts)
    _, rows = read_rows(tmp_path / "rows.csv")
    assert list(rows) == 2 * [[text.replace("\ud800", "\\ud800") for text in texts]]


def test_an_id_of_any_length_is_refused_in_a_short_sentence(tmp_path):
    (tmp_path / "vqa.csv").write_text(f"question_id,image_id,question\n/{'x' * 70_000},a.png,?\n", encoding="utf-8")
    with pytest.raises(InputError, match="cannot name an HDF5 group") as refused:
        read_table(tmp_path / "vqa.csv")
    assert len(str(refused.value)) < 1000


def test_a_reason_with_bytes_that_are_no_text_can_be_committed_and_told_to_other_ranks(tmp_path):
    import h5py

    with h5py.File(tmp_path / "segment.h5", "w") as file:
        _write_failed(
            file, [Failed(0, "PictureNotFound", "/data/\udcff is not there")], Table(["1"], ["a"], ["?"], [""])
        )
        assert file["message"].asstr()[0] == "/data/\\udcff is not there"

    def refuse() -> bytes:
        raise InputError("/data/\udcff is not there")

    main, other = (World("srun", rank, 2, rank, "job-0-0") for rank in (0, 1))
    for rank, told in ((main, "/data/\udcff is"), (other, r"/data/\\udcff is")):
        with pytest.raises(InputError, match=told):
            from_rank_zero(rank, tmp_path, refuse)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_terminal_cannot_show_is_said_in_escapes(tmp_path, monkeypatch, encoding):
    with open(tmp_path / "log", "w", encoding=encoding, errors="strict") as log:
        monkeypatch.setattr(sys, "stdout", log)
        speak("图 \udcff")
    assert (tmp_path / "log").read_text(encoding) in ("\\u56fe \\udcff\n", "图 \\udcff\n")


def test_the_output_folder_of_an_array_is_printed_as_it_was_given():
    code = "from vqa_embeddings.cli.options import print_output_of_array; print_output_of_array()"
    line = [sys.executable, "-c", code, "--demo", "--output-dir", "größe \udcff"]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True, cwd=ROOT, env={**os.environ, **ASCII})
    assert done.stdout == "größe ".encode() + b"\xff\n"


def test_the_hash_that_a_broken_disk_has_left_beside_a_part_does_not_end_a_merge(tmp_path):
    part = Part(tmp_path / "part.h5", "grouped", 1, 0, 1, 1000, np.zeros(1, np.int64))
    announced_path(part.path).write_bytes(b"\xff\xfe")
    _withdraw([part], [{"sha256": "0" * 64}])
    assert announced_path(part.path).exists()
