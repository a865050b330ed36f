"""The stages of the check, one after another, and what they come to; see check.sh."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gpu.report import Report, Skipped, say
from tests.gpu.requirements import lacks_before_torch, lacks_of_gpu

if TYPE_CHECKING:
    from tests.gpu.scene import Scene


@dataclass(frozen=True)
class Stage:
    """One stage: a function of its name, in a module beside this one, that takes the scene and a report."""

    name: str
    module: str
    what: str
    full: bool = False  # needs the checkpoint of full size
    small: bool = True  # has something to do with the small ones

    def run(self, scene: Scene, report: Report) -> str:
        """Do it. Returns its figures."""
        module = importlib.import_module(f"tests.gpu.{self.module}")
        return getattr(module, self.name.replace("-", "_"))(scene, report)


STAGES = [
    Stage("graphs", "graphs", "steps by captured graphs against eager ones, token for token"),
    Stage("not-finite", "not_finite", "logits that become NaN in the middle of an answer cost that row alone"),
    Stage("memory", "memory", "running out of memory changes no answer"),
    Stage("formats", "launches", "real launches in every number format against the float32 reference"),
    Stage("devices", "launches", "two ranks on two GPUs"),
    Stage("full", "launches", "real launches at full size in bfloat16, one rank and two", True, False),
    Stage("full-graphs", "graphs", "captured graphs against eager steps at full size, peak memory", True, False),
    Stage("full-memory", "memory", "running out of memory at full size, on a fifth of the GPU", True, False),
    Stage("profile", "kernels", "the costliest kernels of a step of 256 rows", True),
    Stage("full-formats", "launches", "real launches at full size in the other formats", True, False),
    Stage("failed-captures", "memory", "captures that fail cost their graph and change no answer"),
]


def main() -> int:
    """Run the stages that the command line asks for."""
    quick, stages = _read_arguments()
    full = any(stage.full for stage in stages) and not quick
    lacks = lacks_before_torch(full)
    if not lacks and not quick:
        lacks = lacks_of_gpu(full)
    for lack in lacks:
        print(f"error: {lack}", file=sys.stderr)
    if lacks:
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        return _run(stages, quick, Path(scratch))


def _read_arguments() -> tuple[bool, list[Stage]]:
    names = [stage.name for stage in STAGES]
    listed = "".join(f"  {stage.name:16}{stage.what}\n" for stage in STAGES)
    parser = argparse.ArgumentParser(
        prog="check.sh",
        usage="bash tests/gpu/check.sh [--quick] [STAGE ...]",
        description="What only a GPU can show.",
        epilog=f"stages, all by default:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the small checkpoints only; needs no GPU")
    parser.add_argument("names", metavar="STAGE", nargs="*", help="run only these, in the order below")
    given = parser.parse_args()
    if strange := [name for name in given.names if name not in names]:
        parser.error(f"found the stage {strange[0]}; expected some of {', '.join(names)}")
    return given.quick, [stage for stage in STAGES if not given.names or stage.name in given.names]


def _run(stages: list[Stage], quick: bool, scratch: Path) -> int:
    begun = time.monotonic()
    from tests.gpu.scene import Scene

    scene = Scene(scratch, quick)
    say(f"{scene.description()}; ready after {time.monotonic() - begun:.0f} s")
    ended = [_run_one(stage, scene) for stage in stages]
    say("\nsummary")
    for _, line in ended:
        say(line)
    states = [state for state, _ in ended]
    say(
        f"{states.count('ok')} of {len(states)} stages are right, {states.count('OFF')} off, "
        f"{states.count('skipped')} skipped; {time.monotonic() - begun:.0f} s"
    )
    for line in scene.closing:
        say(line)
    return 1 if "OFF" in states else 0


def _run_one(stage: Stage, scene: Scene) -> tuple[str, str]:
    """A stage, whatever it raises. Returns "ok", "OFF" or "skipped", and its summary."""
    say(f"\n{stage.name}: {stage.what}")
    begun, report = time.monotonic(), Report()
    try:
        if scene.quick and not stage.small:
            raise Skipped("--quick makes no checkpoint of full size")
        figures = stage.run(scene, report)
        state = "OFF" if report.off else "ok"
    except Skipped as reason:
        state, figures = "skipped", str(reason)
    except Exception:
        state, figures = "OFF", traceback.format_exc().strip().splitlines()[-1]
        say(traceback.format_exc())
    wrong = f" ({report.off} of {report.checks} checks are off)" if report.off else ""
    line = f"{stage.name}: {state}{wrong}, {figures}, {time.monotonic() - begun:.0f} s"
    say(line)
    try:
        scene.tidy()
    except Exception:  # a GPU that is past use says so at the next stage, too
        say(traceback.format_exc())
    return state, line


if __name__ == "__main__":
    sys.exit(main())
