"""The demo: the first thing a newcomer types."""

from __future__ import annotations

from tests.helpers.launching import command, merge, run
from tests.helpers.published_reader import read_published
from tests.helpers.tables import table_rows
from vqa_embeddings.app.demo import DATA, NOTICE
from vqa_embeddings.models.phi4mm.random_checkpoint import make_checkpoint


def test_the_demo_needs_nothing_but_itself(tmp_path):
    """Two ranks that both find no checkpoint: one of them makes it, the other takes it or makes the same."""
    inputs = ["--demo", "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--max-new-tokens", 8]
    done = run(command(2, *inputs))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(NOTICE) == 1
    assert merge(tmp_path / "out").returncode == 0
    assert read_published(tmp_path / "out").keys() == {row["question_id"] for row in table_rows()}
    assert len(list((tmp_path / "cache").iterdir())) == 1, "something was left beside the checkpoint"
    again = run(command(2, *inputs))
    assert again.returncode == 0
    assert "0 rows to do now" in again.stdout and "nothing to do" in again.stdout
    assert len(list((tmp_path / "out").glob("shards/*"))) == 2, "a launch with nothing to do left a shard"


def test_the_demo_checkpoint_is_the_same_wherever_it_is_made(tmp_path, checkpoint):
    make_checkpoint(tmp_path / "again")
    files = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    assert any("vision-lora" in str(name) for name in files)
    for name in files:
        assert (checkpoint / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_photographs_come_with_their_licence_note():
    assert {row["image_id"] for row in table_rows()} | {"vqa.csv", "LICENSES.md"} == {p.name for p in DATA.iterdir()}
