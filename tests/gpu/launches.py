"""Timings of real launches, against the independent float32 reference on the same GPU: small ones and of full size."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.gpu import graphs
from tests.gpu.report import Report, Skipped, say
from tests.gpu.scene import TOKENS, Scene
from tests.helpers.published_reader import read_published
from tests.helpers.reference import LARGEST, Expected, cosine, relative_error
from vqa_embeddings.layers.device import find_device

ROOT = Path(__file__).parent.parent.parent
RELATIVE, COSINE = 1e-4, 0.999  # the contract's: of float32, of the narrower formats
LIMIT = 300  # seconds of a launch
GRACE = 30  # seconds that one has to end when it is stopped
SHOWN = 25  # lines of what a launch that failed has said, of the first and of the last


@dataclass(frozen=True)
class Case:
    """One extraction to be checked."""

    model: str  # "small", "original": the small one in the original layout, or "full"
    ranks: int
    dtype: str
    attention: str = "sdpa"
    lora: str = "merged"


SMALL_CASES = [
    Case("small", 1, "bfloat16"),
    Case("small", 2, "float32", lora="adapter"),
    Case("original", 1, "float32", "eager"),
    Case("small", 2, "float16"),
    Case("small", 1, "float32"),
]
DEVICES_CASES = [Case("small", 2, "float32"), Case("small", 2, "bfloat16")]
FULL_CASES = [Case("full", 1, "bfloat16"), Case("full", 2, "bfloat16")]
OTHER_FULL_CASES = [
    Case("full", 1, "float32"),
    Case("full", 1, "bfloat16", lora="adapter"),
    Case("full", 1, "float16"),
]


def formats(scene: Scene, report: Report) -> str:
    """The small checkpoint in both layouts, in every format."""
    return _check(scene, report, [*SMALL_CASES, *_with_flash(scene, "small")])


def devices(scene: Scene, report: Report) -> str:
    """Two ranks on a GPU each, and captures on the second GPU in this process."""
    if scene.device.count < 2:
        raise Skipped(f"found {scene.device.count} GPUs; expected 2 or more")
    told = _check(scene, report, DEVICES_CASES)
    torch.cuda.graph.default_capture_stream = None  # torch keeps the first GPU's; a rank has but one GPU
    scene.device = find_device(1)  # as LOCAL_RANK 1 has it
    try:
        model = scene.load(scene.small, "bfloat16")
        return f"{told}; {graphs.compare(model, report, f'{scene.device.name}, bfloat16')}"
    finally:
        torch.cuda.graph.default_capture_stream = None


def full(scene: Scene, report: Report) -> str:
    """The checkpoint of full size in its own format."""
    return _check(scene, report, FULL_CASES)


def full_formats(scene: Scene, report: Report) -> str:
    """The checkpoint of full size in the other formats."""
    return _check(scene, report, [*OTHER_FULL_CASES, *_with_flash(scene, "full")])


def _with_flash(scene: Scene, model: str) -> list[Case]:
    return [] if scene.device.no_flash else [Case(model, 1, "bfloat16", "flash_attention_2")]


def _check(scene: Scene, report: Report, cases: Sequence[Case]) -> str:
    """Run every case, and print its row of the table when it is done."""
    full_size = cases[0].model == "full"
    table = scene.full_rows if full_size else scene.small_rows
    models = {case.model: getattr(scene, case.model) for case in cases}
    expected = scene.full_reference if full_size else scene.small_reference
    scene.leave_gpu()
    say(f"      errors and cosines of all dimensions / without the {LARGEST} largest of each vector")
    say("      | model | ranks | dtype | attention | LoRA | largest relative error | smallest cosine | answers | s |")
    say("      |---|---|---|---|---|---|---|---|---|")
    before, worst = report.off, 1.0
    for case in cases:
        begun = time.monotonic()
        out = scene.scratch / "-".join(map(str, vars(case).values()))
        found = _extract(case, models[case.model], table, scene.images, out)
        errors, cosines, answers = _compare(found, expected)
        worst = min(worst, *cosines)
        right = found.keys() == expected.keys()
        right &= (
            max(errors) < RELATIVE and answers == len(expected) if case.dtype == "float32" else min(cosines) > COSINE
        )
        settings = f"{case.model} | {case.ranks} | {case.dtype} | {case.attention} | {case.lora}"
        figures = " / ".join(f"{one:.1e}" for one in errors) + " | " + " / ".join(f"{one:.6f}" for one in cosines)
        figures += f" | {answers} of {len(expected)} | {time.monotonic() - begun:.0f}"
        report.check(right, f"| {settings} | {figures} |")
    return f"{len(cases) - report.off + before} of {len(cases)} cases are right, smallest cosine {worst:.6f}"


def _extract(case: Case, model: Path, table: Path, images: Path, out: Path) -> dict[str, dict]:
    """A real launch and a merge; the rows of the parts by question id. A failure is printed, its rows lack."""
    arguments = ["--vqa-dataset", table, "--images-dir", images, "--model", model]
    arguments += ["--output-dir", out, "--max-new-tokens", TOKENS, "--dtype", case.dtype]
    arguments += ["--attn-implementation", case.attention, "--lora", case.lora]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", case.ranks]
    for command in ([*launcher, ROOT / "extract_dist.py", *arguments], [ROOT / "merge_shards.py", "--output-dir", out]):
        if not _run([sys.executable, *map(str, command)]):
            break
    return read_published(out)


def _run(command: list[str]) -> bool:
    """Run a command for LIMIT seconds at most. Returns whether it went well; where not, what it said is printed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        say(f"stopped after {LIMIT} s")
        process.terminate()  # which a launcher passes on to its ranks
        try:
            said, _ = process.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
    lines = said.splitlines()
    if len(lines) > 2 * SHOWN:  # the ranks speak first, their launcher last
        lines[SHOWN:-SHOWN] = ["…"]
    if process.returncode:
        say("\n".join([f"exit status {process.returncode}: {' '.join(command)}", *lines]))
    return not process.returncode


def _compare(found: dict[str, dict], expected: dict[str, Expected]) -> tuple[list[float], list[float], int]:
    """The largest relative error and the smallest cosine over all vectors, and how many answers are the same.

    Errors and cosines are of all dimensions, and without the largest of each vector.
    """
    pairs, answers = [], 0
    for question_id, row in found.items():
        wanted = expected[question_id]
        answers += row["answer"] == wanted.answer
        pairs += [(row["vision_only"], wanted.vision_only)]
        for name in ("vision_token", "query_token"):
            pairs += [(vector, getattr(wanted, name)[layer]) for layer, vector in row[name].items()]
    left_out = 0, LARGEST
    errors = [max((relative_error(*pair, without) for pair in pairs), default=0.0) for without in left_out]
    cosines = [min((cosine(*pair, without) for pair in pairs), default=1.0) for without in left_out]
    return errors, cosines, answers
