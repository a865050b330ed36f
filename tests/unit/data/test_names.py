"""Names and texts of every kind, in every locale: each costs its own row at most, and what is recorded is the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.launching import ROOT, run
from tests.helpers.odd_pictures import CAT, encoded, lay
from vqa_embeddings.base.console import print_line
from vqa_embeddings.base.files import new_csv
from vqa_embeddings.cluster.rendezvous import from_rank_zero
from vqa_embeddings.cluster.world import World
from vqa_embeddings.data.table import Table
from vqa_embeddings.data.table_reader import read_rows, read_table
from vqa_embeddings.errors import InputError
from vqa_embeddings.records import Failed
from vqa_embeddings.store.hash_ledger import announced_path, withdraw
from vqa_embeddings.store.parts import Part
from vqa_embeddings.store.segments import _write_failed

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PICTURE = encoded(CAT[:48, :64], "PNG")


@pytest.mark.slow
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
        print_line("图 \udcff")
    assert (tmp_path / "log").read_text(encoding) in ("\\u56fe \\udcff\n", "图 \\udcff\n")


def test_the_output_folder_of_an_array_is_printed_as_it_was_given():
    line = [sys.executable, "-m", "vqa_embeddings.cli.array_output", "--demo", "--output-dir", "größe \udcff"]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True, cwd=ROOT, env={**os.environ, **ASCII})
    assert done.stdout == "größe ".encode() + b"\xff\n"


def test_the_hash_that_a_broken_disk_has_left_beside_a_part_does_not_end_a_merge(tmp_path):
    part = Part(tmp_path / "part.h5", "grouped", 1, 0, 1, 1000, np.zeros(1, np.int64))
    announced_path(part.path).write_bytes(b"\xff\xfe")
    withdraw([part.path], [{"sha256": "0" * 64}])
    assert announced_path(part.path).exists()
