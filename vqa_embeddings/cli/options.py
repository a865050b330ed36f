"""The options of both commands: parsed, checked, and filled into a dataclass each. Imports nothing slow."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from vqa_embeddings.app.options import ExtractOptions, MergeOptions
from vqa_embeddings.base.commands import EXTRACT, MERGE, Command, name_of, with_names
from vqa_embeddings.data.decode_options import MAX_MEGAPIXELS
from vqa_embeddings.models.hub import MODEL_CACHE
from vqa_embeddings.models.registry import default_family

MODEL = default_family().default_model
DTYPES = ("auto", "bfloat16", "float16", "float32")
ATTENTION = ("auto", "flash_attention_2", "sdpa", "eager")
LORA = ("merged", "adapter", "none")
TRUNCATED = ("fail", "show")
MOST_MEGAPIXELS = 1e6  # a larger limit is a slip


def parse_extract(usage: str | None, argv: Sequence[str] | None = None) -> ExtractOptions:
    """Read the arguments of `extract_dist.py`; what cannot be right ends the program with status 2."""
    parser = _parser(EXTRACT, usage)
    add = parser.add_argument_group("published options").add_argument
    add("--vqa-dataset", type=Path, metavar="CSV", help="table of the questions (required unless --demo)")
    add("--images-dir", type=Path, metavar="DIR", help="folder of the pictures (required unless --demo)")
    add("--output-dir", type=Path, metavar="OUT", default="./output", help="where shards and parts go (%(default)s)")
    add("--model", help=f"hub name or folder of the checkpoint (default: {MODEL})")
    cache = "cache of hub models (default: the hub library's own where HF_HOME or its like is set or it has the model, "
    cache += f"else ./{MODEL_CACHE})"
    add("--cache-dir", type=Path, metavar="DIR", help=cache)
    add("--checkpoint-interval", type=_positive, metavar="N", default=1000, help="rows of a segment (%(default)s)")
    add("--test", action="store_true", help="extract 3 rows only, sampled with seed 42")

    add = parser.add_argument_group("more options").add_argument
    add("--revision", help="revision of a hub model (default: the one with the native layout)")
    add("--plan", action="store_true", help="say what is to do, and whether there is room for it, and stop")
    add("--demo", action="store_true", help="small random model, shipped photographs: no network, no GPU needed")
    add("--dtype", choices=DTYPES, default="auto", help="number format of the model (%(default)s)")
    add("--attn-implementation", choices=ATTENTION, default="auto", help="attention kernels (%(default)s)")
    add(
        "--batch-size",
        type=_or_auto(_positive),
        metavar="N",
        default="auto",
        help="rows answered together (%(default)s)",
    )
    add("--max-new-tokens", type=_positive, metavar="N", default=200, help="tokens of the longest answer (%(default)s)")
    workers = "pictures that are opened at a time, 4 with a GPU and 2 without (%(default)s)"
    add("--num-workers", type=_or_auto(_natural), metavar="N", default="auto", help=workers)
    add("--slice", type=_slice, metavar="i/n", help="part i of n of the table, i from 0 (default: the Slurm array's)")
    add("--retry-failed", action="store_true", help="extract the rows that failed before, and only those")
    lora = "vision LoRA added to the weights, as layers, or none: the weights hold it already (%(default)s)"
    add("--lora", choices=LORA, default="merged", help=lora)
    add("--pixel-mean", action="store_true", help="also store the published script's mean of the pixels, [448]")
    truncated = "rows fail whose picture is cut off, or are asked about what there is of it (%(default)s)"
    add("--truncated-pictures", choices=TRUNCATED, default="fail", help=truncated)
    largest = "the largest picture that is opened (%(default)s)"
    add("--max-megapixels", type=_megapixels, metavar="N", default=MAX_MEGAPIXELS, help=largest)
    check = "rows that are first held against the model library's own results, 0 for none (%(default)s)"
    add("--self-check", type=_natural, metavar="N", default=0, help=check)

    options = ExtractOptions(**vars(parser.parse_args(argv)))
    missing = [name for name in ("vqa_dataset", "images_dir") if getattr(options, name) is None]
    if missing and not options.demo:
        names = " and ".join("--" + name.replace("_", "-") for name in missing)
        parser.error(f"{names} not given: name the CSV and the picture folder, or try --demo")
    if options.revision and ((options.demo and options.model is None) or Path(options.model or MODEL).is_dir()):
        model = options.model or "the demo's model"
        parser.error(f"--revision {options.revision} is for models of the hub, and {model} is a folder: leave it out")
    return options


def parse_merge(usage: str | None, argv: Sequence[str] | None = None) -> MergeOptions:
    """Read the arguments of `merge_shards.py`; what cannot be right ends the program with status 2."""
    parser = _parser(MERGE, usage)
    add = parser.add_argument
    add("--output-dir", type=Path, metavar="OUT", default="./output", help="output of the extraction (%(default)s)")
    add("--check", action="store_true", help="say what is done and what is missing, and write nothing")
    add("--verify", action="store_true", help="hash the parts too, and repair damaged ones, or with --check name them")
    add("--part-size", type=_positive, metavar="S", default=1000, help="rows of the CSV in a part (%(default)s)")
    layouts = ["grouped", "columnar"]
    add("--layout", choices=layouts, default="grouped", help="a group a question, or matrices of rows (%(default)s)")
    add("--compression", choices=["none", "gzip"], default="none", help="gzip as published, or none (%(default)s)")
    add("--jobs", type=_positive, metavar="N", default=1, help="processes, where there are no ranks (%(default)s)")
    add("--prune", action="store_true", help="then remove the segments whose rows all lie in verified parts")
    options = MergeOptions(**vars(parser.parse_args(argv)))
    if options.check and options.prune:  # the other options say how a merge writes, and a check may ignore them
        parser.error("--prune would have no effect, as --check changes nothing: leave out one or the other")
    return options


def _parser(command: Command, usage: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name_of(command),
        description=with_names(usage) if usage else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _natural(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return value


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return value


def _megapixels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_MEGAPIXELS:  # NaN fails this too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, and {MOST_MEGAPIXELS:.0f} at most")
    return value


def _or_auto(parse: Callable[[str], int]) -> Callable[[str], int | None]:
    return lambda text: None if text == "auto" else parse(text)


def _slice(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    if not (slash and first.isascii() and first.isdigit() and second.isascii() and second.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form i/n, such as 0/4")
    index, count = int(first), int(second)
    if index >= count:
        raise argparse.ArgumentTypeError(f"{text!r} asks for slice {index} of {count}; i runs from 0 to n-1")
    return index, count
