"""Extractions on a GPU against the independent reference in float32 on the same GPU; see check.sh."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from original_layout import write_original
from PIL import Image
from published_reader import read_published
from reference import Expected, Reference, cosine, relative_error

from tests.benchmarks.inputs import FULL
from vqa_embeddings.compute import find_device, versions
from vqa_embeddings.demo import DATA, make_checkpoint

ROOT = Path(__file__).parent.parent.parent
TOKENS = 8
RELATIVE, COSINE = 1e-4, 0.999  # the contract's: of float32, of the narrower formats
PICTURES = {"coffee.jpg": 4, "astronaut.jpg": 4}  # with masked patches, and without any; how many questions of each
LONG_PICTURE = ("long.png", (2048, 1536))  # 5133 image tokens


@dataclass(frozen=True)
class Case:
    """One extraction to be checked."""

    model: str
    ranks: int
    dtype: str
    attention: str = "sdpa"
    lora: str = "merged"


SMALL_CASES = [
    Case("small", 1, "float32"),
    Case("small", 2, "float32", lora="adapter"),
    Case("small, original layout", 1, "float32", "eager"),
    Case("small", 1, "bfloat16"),
    Case("small", 2, "float16"),
]
FULL_CASES = [
    Case("full size", 1, "float32"),
    Case("full size", 1, "bfloat16"),
    Case("full size", 2, "bfloat16"),
    Case("full size", 1, "bfloat16", lora="adapter"),
    Case("full size", 1, "float16"),
]


def main() -> int:
    quick = "--quick" in sys.argv[1:]
    device = find_device(0)
    if device.kind == "cpu" and not quick:
        print("no CUDA GPU found; expected one, or --quick", file=sys.stderr)
        return 2
    print(f"{device.description}; " + ", ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"flash-attn: {device.no_flash or 'used'}; {time.strftime('%Y-%m-%d')}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        return check(Path(scratch), quick, device.name, [] if device.no_flash else ["flash_attention_2"])


def check(scratch: Path, quick: bool, device: str, flash: list[str]) -> int:
    """Make the checkpoints and the references, run every case, print the table."""
    rows = write_input(scratch, quick)
    models = {"small": scratch / "small", "small, original layout": scratch / "original"}
    make_checkpoint(models["small"])
    write_original(models["small"], models["small, original layout"])
    expected = dict.fromkeys(models, refer(models["small"], scratch, rows, device))
    cases = SMALL_CASES + [Case("small", 1, "bfloat16", attention) for attention in flash]
    if not quick:
        models["full size"] = scratch / "full"
        make_checkpoint(models["full size"], sizes=FULL, device=device, dtype="bfloat16")
        size = sum(path.stat().st_size for path in models["full size"].rglob("*.safetensors"))
        print(f"full size: {size / 2e9:.2f} billion parameters", flush=True)
        expected["full size"] = refer(models["full size"], scratch, rows, device)
        cases += FULL_CASES + [Case("full size", 1, "bfloat16", attention) for attention in flash]
    print("| model | ranks | dtype | attention | LoRA | largest relative error | smallest cosine | answers | s | |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    wrong = 0
    for number, case in enumerate(cases):
        begun = time.monotonic()
        wanted = expected[case.model]
        found = extract(case, models[case.model], scratch, scratch / f"out{number}")
        error, closeness, answers = compare(found, wanted)
        exact = case.dtype == "float32"
        right = found.keys() == wanted.keys()
        right &= error < RELATIVE and answers == len(wanted) if exact else closeness > COSINE
        wrong += not right
        settings = f"{case.model} | {case.ranks} | {case.dtype} | {case.attention} | {case.lora}"
        figures = f"{error:.1e} | {closeness:.6f} | {answers} of {len(wanted)} | {time.monotonic() - begun:.0f}"
        print(f"| {settings} | {figures} | {'ok' if right else 'OFF'} |", flush=True)
    print(f"{len(cases) - wrong} of {len(cases)} cases are right")
    return 1 if wrong else 0


def write_input(scratch: Path, quick: bool) -> list[dict[str, str]]:
    """A table and its pictures below `scratch`: a few questions on photographs, and one on a picture of many tokens."""
    (scratch / "images").mkdir()
    with open(DATA / "vqa.csv", newline="", encoding="utf-8") as stream:
        shipped = list(csv.DictReader(stream))
    rows = []
    for name, count in PICTURES.items():
        (scratch / "images" / name).write_bytes((DATA / name).read_bytes())
        rows += [row for row in shipped if row["image_id"] == name][:count]
    if not quick:
        name, size = LONG_PICTURE
        Image.open(DATA / "coffee.jpg").resize(size).save(scratch / "images" / name)
        rows.append({**rows[0], "question_id": "long", "image_id": name})
    with open(scratch / "vqa.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def refer(model: Path, scratch: Path, rows: list[dict[str, str]], device: str) -> dict[str, Expected]:
    """The reference's values by question id."""
    begun = time.monotonic()
    reference = Reference(model, device)
    values = {r["question_id"]: reference.row(scratch / "images" / r["image_id"], r["question"], TOKENS) for r in rows}
    del reference
    if device != "cpu":
        torch.cuda.empty_cache()  # the extractions need the memory
    print(f"reference of {model.name}: {len(values)} rows, {time.monotonic() - begun:.0f} s", flush=True)
    return values


def extract(case: Case, model: Path, scratch: Path, out: Path) -> dict[str, dict]:
    """A real launch and a merge; the rows of the parts by question id. A failure is printed, its rows lack."""
    arguments = ["--vqa-dataset", scratch / "vqa.csv", "--images-dir", scratch / "images", "--model", model]
    arguments += ["--output-dir", out, "--max-new-tokens", TOKENS, "--dtype", case.dtype]
    arguments += ["--attn-implementation", case.attention, "--lora", case.lora]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", case.ranks]
    for command in ([*launcher, ROOT / "extract_dist.py", *arguments], [ROOT / "merge_shards.py", "--output-dir", out]):
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            print(f"exit status {done.returncode}: {command}\n{done.stdout}{done.stderr}", file=sys.stderr)
    return read_published(out)


def compare(found: dict[str, dict], expected: dict[str, Expected]) -> tuple[float, float, int]:
    """The largest relative error and the smallest cosine over all vectors, and how many answers are the same."""
    errors, cosines, answers = [0.0], [1.0], 0
    for question_id, row in found.items():
        wanted = expected[question_id]
        answers += row["answer"] == wanted.answer
        pairs = [(row["vision_only"], wanted.vision_only)]
        for name in ("vision_token", "query_token"):
            pairs += [(vector, getattr(wanted, name)[layer]) for layer, vector in row[name].items()]
        errors += [relative_error(*pair) for pair in pairs]
        cosines += [cosine(*pair) for pair in pairs]
    return max(errors), min(cosines), answers


if __name__ == "__main__":
    sys.exit(main())
