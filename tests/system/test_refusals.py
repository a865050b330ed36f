"""Bad input: refused with status 2 before the model is loaded, in one sentence, without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import h5py
import pytest

from tests.helpers.launching import ROOT, arguments_for, command, merge, run
from tests.helpers.tables import table_rows, write_table
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.cli.options import parse_extract

HEADER = "question_id,image_id,question,answer\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """What should be refused and is not writes its output here, not into the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def refused(*arguments: object, saying: str) -> None:
    done = run(command(0, *arguments))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    sentences = [line for line in done.stderr.splitlines() if line]
    assert len(sentences) == 1, done.stderr
    assert saying in sentences[0], sentences[0]


@pytest.mark.parametrize(
    ("content", "saying"),
    [
        (None, "is not there"),
        (b"", "is empty"),
        (HEADER.encode(), "no rows"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\xff\xfe", "not UTF-8 text"),
        (b"question_id,image_id,question\na\0b,x.jpg,q\n", "NUL"),
        (b"id,image_id,question\n1,x.jpg,q\n", "no column question_id"),
        (
            b"question_id,image_id,image_name,question\n1,5,x.jpg,q\n",
            "image_id and image_name, and the first values of",
        ),
        (b'{"question_id": 1, "image_id": "x.jpg", "question": "q"}\n', "is JSON lines; expected CSV"),
        (b"question_id,picture,question\n1,x.jpg,q\n", "no column image_id or image_name"),
        ((HEADER + "1,x.jpg,q,a\n1,y.jpg,q,a\n").encode(), "line 3: '1' is there already"),
        ((HEADER + ",x.jpg,q,a\n").encode(), "cannot name an HDF5 group"),
        ((HEADER + "a/b,x.jpg,q,a\n").encode(), "'a/b' cannot name an HDF5 group"),
        ((HEADER + "1,x.jpg,q\n").encode(), "line 2 has 3 fields; expected 4"),
        ((HEADER + '1,x.jpg,"q,a\n2,x.jpg,q,a\n').encode(), "line 2 is not CSV"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, checkpoint, content, saying):
    table = tmp_path / "vqa.csv"
    if content is not None:
        table.write_bytes(content)
    refused(*arguments_for(table, checkpoint), "--output-dir", tmp_path / "out", saying=saying)
    assert not (tmp_path / "out").exists()


def test_a_missing_picture_folder_is_refused(tmp_path, checkpoint):
    refused(*arguments_for(DATA / "vqa.csv", checkpoint, tmp_path / "none"), saying="expected the folder of pictures")


def test_a_missing_checkpoint_is_refused(tmp_path):
    refused(*arguments_for(DATA / "vqa.csv", tmp_path / "none"), saying="expected a checkpoint folder or a hub name")
    refused(*arguments_for(DATA / "vqa.csv", tmp_path), saying="holds no config.json")


def test_a_hub_that_cannot_be_reached_is_refused(tmp_path):
    inputs = arguments_for(DATA / "vqa.csv", "nobody/no-such-model")
    refused(*inputs, "--cache-dir", tmp_path, saying="neither a folder nor to be had from the hub")


def test_a_checkpoint_without_its_vision_adapter_is_refused(tmp_path, checkpoint):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    shutil.rmtree(copy / "vision-lora")
    refused(*arguments_for(DATA / "vqa.csv", copy), saying="Vision adapter not found")


def edit_adapter(model: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    path = model / "vision-lora" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def silence(tensors: dict) -> dict:
    last = [key for key in tensors if key.endswith("lora_B.weight")][-1]
    return {**tensors, last: tensors[last] * 0}


ADAPTERS = {
    "one layer silent": (silence, "of no effect in"),
    "one tensor missing": (lambda tensors: dict(list(tensors.items())[1:]), "without"),
    "another size": (lambda tensors: {key: tensor[:-1] for key, tensor in tensors.items()}, "use the adapter of"),
    "a layer too many": (
        lambda t: {**t, "model.layers.99.mlp.down_proj.lora_A.weight": next(iter(t.values())).clone()},
        "99",
    ),
    "not finite": (lambda tensors: {key: tensor * float("nan") for key, tensor in tensors.items()}, "not finite"),
    "without its first matrices": (
        lambda tensors: {key: tensor * 0 if "lora_A" in key else tensor for key, tensor in tensors.items()},
        "of no effect in",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_vision_adapter_that_does_not_fit_is_refused_and_the_folder_stays_free(tmp_path, checkpoint, kind):
    change, saying = ADAPTERS[kind]
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    edit_adapter(copy, change)
    refused(*arguments_for(DATA / "vqa.csv", copy), "--output-dir", tmp_path / "out", saying=saying)
    assert not (tmp_path / "out" / "run.json").exists(), "the mended checkpoint would be refused as another model"


def test_a_vision_adapter_on_some_layers_only_is_refused(tmp_path, checkpoint):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((copy / "vision-lora" / "adapter_config.json").read_text())
    target = "model.layers.0.self_attn.qkv_proj"
    (copy / "vision-lora" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": [target]}))
    edit_adapter(copy, lambda tensors: {key: tensor for key, tensor in tensors.items() if key.startswith(target)})
    refused(*arguments_for(DATA / "vqa.csv", copy), saying="not on model.layers.1.self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("name", "saying"),
    [
        ("tokenizer.json", "download the checkpoint again"),
        ("config.json", "expected 'phi4_multimodal' (the native layout)"),
        ("model.safetensors.index.json", "maps no tensors to files"),
    ],
)
def test_a_damaged_file_of_the_checkpoint_is_refused(tmp_path, checkpoint, name, saying):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    (copy / name).write_text('{"weight_map": ["model.safetensors"]}')
    if "index" in name:
        (copy / "model.safetensors").unlink()
    refused(*arguments_for(DATA / "vqa.csv", copy), saying=saying)


def test_another_layout_is_refused(tmp_path, checkpoint):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "phi3_v"}))
    refused(
        *arguments_for(DATA / "vqa.csv", copy), saying="model_type 'phi3_v'; expected 'phi4_multimodal' (the native"
    )


def test_an_output_folder_of_another_run_is_refused_and_stays_as_it_is(tmp_path, checkpoint):
    out = tmp_path / "out"
    # All pictures of this table are missing, so that the run needs no time.
    rows = [{**row, "image_id": "missing.jpg"} for row in table_rows()[:3]]
    inputs = arguments_for(write_table(tmp_path / "vqa.csv", rows), checkpoint)
    assert run(command(0, *inputs, "--output-dir", out)).returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = arguments_for(write_table(tmp_path / "other.csv", [{**rows[0], "question": "Why?"}, *rows[1:]]), checkpoint)
    refused(*other, "--output-dir", out, saying="rows of the CSV")
    refused(*inputs, "--output-dir", out, "--max-new-tokens", 5, saying="--max-new-tokens: 12 there, 5 now")
    refused(*inputs, "--output-dir", out, "--dtype", "bfloat16", saying="--dtype: float32 there, bfloat16 now")
    refused(*inputs, "--output-dir", out, "--lora", "adapter", saying="--lora: merged there, adapter now")
    refused(*inputs, "--output-dir", out, "--pixel-mean", saying="--pixel-mean")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_output_folder_with_parts_of_unknown_origin_is_refused(tmp_path, photographs):
    stranger = tmp_path / "phi4_multimodal_embeddings_part_001.h5"
    stranger.write_bytes(b"from another program")
    refused(*photographs, "--output-dir", tmp_path, saying="belongs to something else")
    assert list(tmp_path.iterdir()) == [stranger]


def test_a_refused_launch_of_two_ranks_says_why_once(tmp_path, checkpoint):
    done = run(command(2, *arguments_for(tmp_path / "none.csv", checkpoint), "--output-dir", tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("expected the CSV of questions") == 1


def test_a_part_of_another_run_is_refused_and_not_replaced(tmp_path, checkpoint):
    rows = [{**row, "image_id": "missing.jpg"} for row in table_rows()[:3]]
    inputs = [*arguments_for(write_table(tmp_path / "vqa.csv", rows), checkpoint), "--output-dir", tmp_path / "out"]
    assert run(command(0, *inputs)).returncode == 0
    foreign = tmp_path / "out" / "phi4_multimodal_embeddings_part_001.h5"
    with h5py.File(foreign, "w") as file:
        file.attrs["model_type"] = "phi-4-multimodal"
    before = foreign.read_bytes()
    merged = merge(tmp_path / "out")
    assert merged.returncode == 2
    assert "belongs to another run or program" in merged.stderr
    refused(*inputs, saying="belongs to another run or program")
    assert foreign.read_bytes() == before


def test_a_table_that_is_no_file_is_refused(tmp_path, checkpoint):
    os.mkfifo(tmp_path / "pipe")
    refused(*arguments_for(tmp_path / "pipe", checkpoint), saying="not a regular file")
    refused(*arguments_for(tmp_path, checkpoint), saying="not a regular file")


def test_a_slice_given_by_hand_goes_before_the_arrays(tmp_path, checkpoint):
    rows = [{**row, "image_id": "missing.jpg"} for row in table_rows()[:3]]
    inputs = arguments_for(write_table(tmp_path / "vqa.csv", rows), checkpoint)
    uneven = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3"}
    done = run(command(0, *inputs), **uneven)
    assert done.returncode == 2 and "give --slice i/n" in done.stderr
    assert run(command(0, *inputs, "--slice", "0/2"), **uneven).returncode == 0


def test_merging_a_folder_without_a_run_is_refused(tmp_path):
    done = merge(tmp_path)
    assert done.returncode == 2
    assert "holds no run.json" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad", [["--slice", "4/4"], ["--slice", "x"], ["--checkpoint-interval", "0"], ["--dtype", "int8"]]
)
def test_arguments_that_cannot_be_right_are_refused(bad):
    done = run([sys.executable, str(ROOT / "extract_dist.py"), "--demo", *bad])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert bad[0] in done.stderr


@pytest.mark.parametrize("model", [["--model", "."], []])
def test_a_revision_of_what_has_none_is_refused(model, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_extract(None, ["--demo", *model, "--revision", "main"])
    assert ended.value.code == 2
    assert "--revision main is for models of the hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program",
    [
        [str(ROOT / "extract_dist.py")],
        [str(ROOT / "merge_shards.py")],
        ["-m", "vqa_embeddings.cli.extract"],
        ["-m", "vqa_embeddings.cli.merge"],
    ],
)
def test_help_answers_at_once_and_without_torch(program):
    import time

    begun = time.monotonic()
    done = run([sys.executable, "-X", "importtime", *program, "--help"], PYTHONPATH=str(ROOT))
    assert time.monotonic() - begun < 1
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "h5py"}


def test_the_merge_needs_no_torch(tmp_path: Path):
    done = run([sys.executable, "-X", "importtime", str(ROOT / "merge_shards.py"), "--output-dir", str(tmp_path)])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vqa_embeddings.app.merge" in imported
    assert "torch" not in imported
