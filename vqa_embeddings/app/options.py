"""What the commands were asked to do: one frozen dataclass each, filled in by `cli.options`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExtractOptions:
    """What `extract_dist.py` was asked to do. With `--demo`, `None` stands for the demo's own."""

    vqa_dataset: Path | None
    images_dir: Path | None
    output_dir: Path
    model: str | None
    revision: str | None
    cache_dir: Path | None  # None: `./model_cache` or the hub library's, see `hub.choose_cache`
    checkpoint_interval: int
    test: bool
    plan: bool
    demo: bool
    dtype: str
    attn_implementation: str
    batch_size: int | None  # None: found from the free memory
    max_new_tokens: int
    num_workers: int | None  # None: chosen by the device
    slice: tuple[int, int] | None
    retry_failed: bool
    lora: str
    pixel_mean: bool
    truncated_pictures: str
    max_megapixels: float
    self_check: int  # rows


@dataclass(frozen=True)
class MergeOptions:
    """What `merge_shards.py` was asked to do."""

    output_dir: Path
    check: bool
    verify: bool
    part_size: int
    layout: str
    compression: str
    jobs: int
    prune: bool
