"""What a launch needs to know before it begins: its input, its model's files, its device, and the run it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from vqa_embeddings.app.options import ExtractOptions
from vqa_embeddings.base.file_names import from_disk
from vqa_embeddings.base.files import copy_file, new_csv
from vqa_embeddings.data.picture_folder import PictureFolder
from vqa_embeddings.data.table import Table, sample, select
from vqa_embeddings.data.table_reader import read_rows, read_table
from vqa_embeddings.errors import InputError
from vqa_embeddings.layers.device import (
    Choice,
    Device,
    choose_attention,
    choose_dtype,
    choose_workers,
    find_device,
    versions,
)
from vqa_embeddings.models.base import Checkpoint
from vqa_embeddings.models.registry import default_family, find_checkpoint
from vqa_embeddings.store.run import Run, known_columns

TEST_ROWS = 3


@dataclass(frozen=True)
class LaunchSetup:
    """What a launch is made of, before anything is loaded or written."""

    options: ExtractOptions
    table: Table
    folder: PictureFolder
    write_rows: Callable[[Path], object]  # writes the table as a CSV
    checkpoint: Checkpoint
    device: Device
    dtype: Choice
    attention: Choice
    run: Run

    @property
    def workers(self) -> int:
        """How many pictures are opened at a time."""
        return choose_workers(self.options.num_workers, self.device)


def set_up_launch(options: ExtractOptions, local_rank: int) -> LaunchSetup:
    """Read the table, find the pictures, the checkpoint and the device, and choose the number format.

    Args:
        options: with a table and a picture folder.
        local_rank: this process's rank on its node, which decides on its GPU.
    Raises:
        InputError: something that was named cannot be used.
    """
    table, folder, write_rows = read_input(options)
    model = options.model or default_family().default_model
    checkpoint = find_checkpoint(model, options.revision, options.cache_dir, options.lora)
    device = find_device(local_rank)
    dtype = choose_dtype(options.dtype, device)
    attention = choose_attention(options.attn_implementation, dtype.value, device)
    if options.self_check:
        checkpoint.family.describe_reference(checkpoint)  # which refuses where there is none
    return LaunchSetup(
        options=options,
        table=table,
        folder=folder,
        write_rows=write_rows,
        checkpoint=checkpoint,
        device=device,
        dtype=dtype,
        attention=attention,
        run=describe_run(options, table, checkpoint, device, dtype, attention),
    )


def read_input(options: ExtractOptions) -> tuple[Table, PictureFolder, Callable[[Path], object]]:
    """The table to extract, its pictures, and what writes it as a CSV: as it was, or the three rows of `--test`.

    Raises:
        InputError: the CSV or the picture folder cannot be used.
    """
    path, images = options.vqa_dataset, options.images_dir
    assert path is not None and images is not None  # parse_extract and demo_options see to it
    folder = PictureFolder(images)
    table = read_table(path, known_columns(options.output_dir), folder.find)
    if not options.test:
        return table, folder, lambda target: copy_file(path, target)
    chosen = sample(len(table), TEST_ROWS)

    def write_sample(target: Path) -> None:
        header, rows = read_rows(path)
        with new_csv(target, header) as add:
            for position, row in enumerate(islice(rows, chosen[-1] + 1)):
                if position in chosen:
                    add(row)

    return select(table, chosen), folder, write_sample


def describe_run(
    options: ExtractOptions, table: Table, checkpoint: Checkpoint, device: Device, dtype: Choice, attention: Choice
) -> Run:
    """The run that these options ask for."""
    return Run(
        rows=len(table),
        rows_sha256=table.fingerprint(),
        model=from_disk(checkpoint.name).encode(errors="backslashreplace").decode(),  # an attribute of every part
        revision=checkpoint.revision,
        model_sha256=checkpoint.fingerprint,
        layout=checkpoint.layout,
        lora=checkpoint.lora,
        dtype=dtype.value,
        attn_implementation=attention.value,
        layers=checkpoint.layers,
        max_new_tokens=options.max_new_tokens,
        pixel_mean=options.pixel_mean,
        hidden_size=checkpoint.hidden_size,
        vision_size=checkpoint.vision_size,
        device=device.kind,
        versions=versions(),
        model_type=checkpoint.family.model_type,
        file_prefix=checkpoint.family.file_prefix,
        extra_vectors=choose_extra_vectors(checkpoint, {"--pixel-mean": options.pixel_mean}),
        images_dir=from_disk(options.images_dir.resolve()) if options.images_dir else "",
        columns=dict(table.columns.names),
    )


def choose_extra_vectors(checkpoint: Checkpoint, asked: Mapping[str, bool]) -> dict[str, int]:
    """The vectors that are stored beside those of every run, their lengths by their names in a part.

    Args:
        asked: whether each option that asks for further ones was given.
    Raises:
        InputError: the model has none for an option that was given.
    """
    found = dict(checkpoint.extra_vectors)
    for option in (name for name, given in asked.items() if given):
        if option not in checkpoint.optional_vectors:
            raise InputError(f"{option} was given, and {checkpoint.family.name} has no such vector; leave it out")
        found.update(checkpoint.optional_vectors[option])
    return found
