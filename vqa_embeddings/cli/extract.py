"""Extract hidden-state vectors and answers of Phi-4-multimodal for every row of a VQA table.

A small example, which needs no GPU and no network:
    python extract_dist.py --demo
One node with eight GPUs:
    accelerate launch --multi_gpu --num_processes 8 extract_dist.py --vqa-dataset vqa.csv --images-dir images
One task of a Slurm array (its slice is the array's; --slice 0/4 says it by hand):
    srun python extract_dist.py --vqa-dataset vqa.csv --images-dir images

Killed, preempted or stopped, the same command goes on after the last committed segment, with any number of ranks.
Afterwards: python merge_shards.py --output-dir OUT
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from vqa_embeddings.app.options import ExtractOptions
from vqa_embeddings.cli.options import parse_extract
from vqa_embeddings.cluster.messages import fail, refuse, say, say_for_rank
from vqa_embeddings.cluster.signals import StopFlag, run_program, stop_with_launcher
from vqa_embeddings.cluster.world import World, read_world, same_command
from vqa_embeddings.errors import InputError, NothingFiniteError, SelfCheckError, StorageError

if TYPE_CHECKING:
    from vqa_embeddings.app.assignment import Assignment
    from vqa_embeddings.app.launch import LaunchSetup
    from vqa_embeddings.models.base import VisionLanguageModel

# What is imported further down is slow, and --help and a refusal should not have to wait for it.


def main() -> int:
    """Parse and run. Returns the exit status: 0 done, or stopped by a signal; 2 refused before any work; 1 an error."""
    options = parse_extract(__doc__)
    world = World()
    stop = StopFlag().install(
        lambda name: say_for_rank(world, f"stopped by {name} before a row was begun; {same_command(options.slice)}")
    )
    try:
        world = read_world()
        stop_with_launcher(world)
        extract_share(options, world, stop)
    except InputError as refusal:
        return refuse(refusal, world)
    except (StorageError, NothingFiniteError, SelfCheckError, OSError) as failure:
        return fail(failure, world, same_command(options.slice))
    return 0


def extract_share(options: ExtractOptions, world: World, stop: StopFlag) -> None:
    """Do what this rank has to do: plan, load, loop, report."""
    from vqa_embeddings.app.assignment import assign_rows
    from vqa_embeddings.app.demo import NOTICE, demo_options
    from vqa_embeddings.app.launch import set_up_launch
    from vqa_embeddings.app.plan_summary import summarize_plan
    from vqa_embeddings.app.self_check import SelfChecker
    from vqa_embeddings.store.run import check_run, claim_run, keep_rows
    from vqa_embeddings.store.self_check import record_self_check

    if options.demo:
        if options.model is None:
            say(world, NOTICE)
        options = demo_options(options)
    setup = set_up_launch(options, world.local_rank)
    if options.plan and not world.main:
        return
    joined = check_run(options.output_dir, setup.run, make=not options.plan)
    assignment = assign_rows(options, world, setup.run, setup.table)
    if world.main:
        for sentence in summarize_plan(setup, assignment, world):
            say(world, sentence)
    if options.plan:
        return
    checker = SelfChecker(setup, assignment) if options.self_check and world.main else None
    if not len(assignment.rows) and checker is None:
        if world.main:
            keep_rows(options.output_dir, setup.write_rows)
        return

    model = setup.checkpoint.family.load(
        setup.checkpoint,
        device=setup.device.name,
        dtype=setup.dtype.value,
        attention=setup.attention.value,
        max_new_tokens=options.max_new_tokens,
    )
    check = checker.check(model) if checker else None
    if check:
        say(world, f"self-check: {check}")
    if not len(assignment.rows):
        if check:
            record_self_check(options.output_dir, check)
        keep_rows(options.output_dir, setup.write_rows)
        return
    began = claim_run(options.output_dir, setup.run)
    if check:
        record_self_check(options.output_dir, check)
    if began or (joined and world.main):  # one copy of the table, not one of every task that starts at this moment
        keep_rows(options.output_dir, setup.write_rows)
    stop.defer()
    left = extract_rows(model, setup, assignment, world, stop)
    if left and stop.requested():
        say_for_rank(world, f"stopped by {stop.signal} after a commit; {same_command(options.slice)}")
    else:
        keep_rows(options.output_dir, setup.write_rows)  # where the one who began the run has not come to it


def extract_rows(
    model: VisionLanguageModel, setup: LaunchSetup, assignment: Assignment, world: World, stop: StopFlag
) -> int:
    """Extract the rows of this rank and commit them, segment by segment. Returns how many are left."""
    from vqa_embeddings.app.extract import extract
    from vqa_embeddings.app.nan_guard import NaNGuard
    from vqa_embeddings.app.progress import Progress
    from vqa_embeddings.base.timings import Timings
    from vqa_embeddings.data.decode_options import DecodeOptions
    from vqa_embeddings.store.segments import ShardWriter

    options, rows, launch_name = setup.options, assignment.rows, assignment.state.launch_name
    timings = Timings()
    records = extract(
        model,
        setup.table,
        rows,
        setup.folder,
        batch_size=options.batch_size,
        workers=setup.workers,
        stopping=stop.requested,
        timings=timings,
        decode_options=DecodeOptions(options.max_megapixels, options.truncated_pictures == "show"),
    )
    finite_before = assignment.state.extracted > 0
    nan_guard = NaNGuard(rows, assignment.pictures[rows], setup.dtype.value, finite_before)
    run, interval = setup.run, options.checkpoint_interval
    shard = ShardWriter(options.output_dir, launch_name, world.rank, run, setup.table, interval)
    try:
        of_all = assignment.slice_pending
        with shard, Progress(world, options.output_dir, launch_name, len(rows), of_all, setup.device) as bar:
            for finished in nan_guard.release(records):
                with timings("waiting for the disk"):
                    shard.add(finished)
                    if stop.is_new():  # the KILL that follows need not wait for the rows in hand
                        shard.begin_commit()
                bar.update(finished)
    finally:
        left = len(rows) - shard.committed
        done = f"{shard.committed - shard.failed} rows extracted, {shard.failed} failed, {left} left"
        for note, times in timings.notes.items():
            say_for_rank(world, f"{note} ({times} times)" if times > 1 else note)
        say_for_rank(world, f"{done}; in {timings.total():.1f} s, {timings.outside():.1%} of them outside the model")
    return left


def run() -> NoReturn:
    """The program: `main`, and the end of the process with its status."""
    run_program(main)


if __name__ == "__main__":
    run()
