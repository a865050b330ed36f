"""The CUDA side of an extraction on tensors without values: where it computes, what it waits for, what it keeps.

Then each of the faults that it guards against, put back, is found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.gpu.fake import Report, Scene, run
from tests.gpu.fake_device import FakeDevice
from tests.helpers.launching import ROOT
from vqa_embeddings.engine import capacity, core, cuda_graphs, runner
from vqa_embeddings.engine.cuda_graphs import CapturedGraph, CudaGraphRunner
from vqa_embeddings.engine.runner import Runner
from vqa_embeddings.layers import device as devices
from vqa_embeddings.models.phi4mm import decoder

pytestmark = pytest.mark.slow  # each is a whole extraction, operator by operator

SMALL = Scene(rank=1)
FEW = Scene(rank=1, pictures=((640, 480), (448, 448)), questions=8, new_tokens=16)  # for what shows at once
CARDS = {78.0: 10, 40.0: 6, 23.0: 3, 15.0: 2}  # GiB, and how many pictures with 28 questions fill the batch there
FULL = Scene(rank=1, full=True, questions=28, new_tokens=8, ends=0.05)
MANY_ROWS = Scene(rank=1, pictures=((448, 448),) * 12, questions=14, new_tokens=48, ends=0.05, batch_size=16)


def right(report: Report) -> Report:
    assert report.wrong() == []
    assert report.records == len(report.scene.pictures) * report.scene.questions
    assert not report.failed
    return report


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_every_rank_computes_and_captures_on_its_own_gpu_and_waits_only_where_it_must(rank):
    report = right(run(replace(SMALL, rank=rank)))
    assert report.steps / 2 < report.replays < report.steps
    waits = sum(count for what, count in report.notes.items() if what.startswith("waits"))
    assert waits == report.steps + report.calls["questions"]


def test_rows_of_many_lengths_need_few_graphs():
    report = right(run(MANY_ROWS))
    assert 3 <= report.graphs[0] < report.replays / 10


LACKS = {
    "in a picture": (("vision", 40),),
    "in a prefix": (("prefix", 40),),
    "in questions": (("questions", 300),),
    "in a step": (("decoding", 1000),),
    "in the halving": (("decoding", 200), ("cache", 2)),
    "in the first cache": (("cache", 1),),
    "three times": (("vision", 60), ("questions", 300), ("decoding", 1000)),
}


@pytest.mark.parametrize("lacks", LACKS.values(), ids=LACKS)
def test_after_a_lack_of_memory_nothing_of_the_old_cache_is_alive_and_no_row_is_lost(lacks):
    """Without a collector of cycles: what keeps itself alive stays."""
    report = right(run(replace(FEW, lacks=lacks)))
    assert report.lacks == len(lacks)
    assert len(report.before_caches) == len(lacks) + 1
    cache = 0.4  # GiB, far less than any cache here
    assert max(report.before_caches) < report.weights + cache


def test_a_capture_for_which_memory_lacks_costs_its_shape_the_graph_and_nothing_else():
    whole = run(FEW)
    report = right(run(replace(FEW, new_tokens=24, lacks=(("capture", 300),))))
    assert report.lacks == 1 and len(report.before_caches) == 1
    assert 0 < report.replays < whole.replays


def test_ranks_on_one_gpu_share_its_memory():
    alone, shared = right(run(FEW)), right(run(replace(FEW, processes=2)))
    assert shared.planned == alone.planned / 2


@pytest.mark.parametrize("memory", CARDS)
def test_at_full_size_the_peak_is_below_what_is_planned(memory):
    report = right(run(replace(FULL, pictures=((640, 480),) * CARDS[memory], memory=memory)))
    assert report.peak > 0.6 * memory, "the memory was to be used"


def test_at_full_size_two_ranks_fit_on_one_gpu():
    right(run(replace(FULL, pictures=((640, 480),) * 6, processes=2)))


def test_the_figures_are_a_command():
    command = [sys.executable, "-m", "tests.gpu.fake", "--rank", "7", "--json", "--pictures", "1", "--questions", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == [] and report["replays"] > 0
    assert {"vision", "prefix", "questions", "decoding"} <= report["costliest"].keys()


# What must be found -------------------------------------------------------------------------------------------------


def no_current_device(monkeypatch):
    monkeypatch.setattr(FakeDevice, "set_device", lambda self, device: None)


def work_of_the_host_in_a_capture(monkeypatch):
    within_a_step(monkeypatch, lambda inputs: torch.zeros(4) + 1)


def a_tensor_of_the_host_in_a_capture(monkeypatch):
    within_a_step(monkeypatch, lambda inputs: torch.tensor([1, 2]))


def a_copy_from_the_host_in_a_capture(monkeypatch):
    within_a_step(monkeypatch, lambda inputs: devices.to_device(torch.ones(3), inputs.num_keys.device))


def a_wait_in_a_capture(monkeypatch):
    within_a_step(monkeypatch, lambda inputs: inputs.num_keys[0].item())


def an_index_of_the_host(monkeypatch):
    within_a_step(monkeypatch, lambda inputs: inputs.num_keys[INDEX])


def a_copy_that_waits(monkeypatch):
    make = Runner._make_inputs
    monkeypatch.setattr(Runner, "_make_inputs", lambda self, rows: (INDEX.to(self._spec.device), make(self, rows))[1])


def a_wait_for_each_row(monkeypatch):
    make = core.make_record
    monkeypatch.setattr(
        core, "make_record", lambda row, *given: (row.entry.image.vision_only.cpu(), make(row, *given))[1]
    )


def a_graph_for_every_length(monkeypatch):
    monkeypatch.setattr(runner, "_power_of_two", int)
    monkeypatch.setattr(capacity, "WIDTH_STEP", 2)
    monkeypatch.setattr(cuda_graphs, "PASSES_BEFORE_CAPTURE", 0)


def no_graph(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "PASSES_BEFORE_CAPTURE", 1000)


def a_graph_of_nothing(monkeypatch):
    monkeypatch.setattr(
        CudaGraphRunner, "_capture", lambda self, advance, step, width: CapturedGraph(torch.cuda.CUDAGraph(), step)
    )


def too_large_a_cache(monkeypatch):
    monkeypatch.setattr(capacity, "BLOCKS_SHARE", {"cuda": 0.97})
    monkeypatch.setattr(decoder, "LONGEST_PREFIX", 1 << 30)


def the_stream_of_a_failed_capture(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "leave_capture", lambda device: None)


def a_second_cache_beside_the_first(monkeypatch):
    begin = Runner.__init__

    def in_a_cycle(self, *given):
        begin(self, *given)
        self._graphs.advance = self._advance  # which holds the runner, and with it the cache

    monkeypatch.setattr(Runner, "__init__", in_a_cycle)


INDEX = torch.tensor([0])


def within_a_step(monkeypatch, do):
    advance = Runner._advance
    monkeypatch.setattr(Runner, "_advance", lambda self, inputs, width: (do(inputs), advance(self, inputs, width))[1])


MANY_STEPS = replace(FEW, new_tokens=40)
BROKEN = [
    (no_current_device, FEW, "is captured on a stream of cuda:0"),
    (no_current_device, FEW, "cuda:0 is used before cuda:1 is the current device"),
    (work_of_the_host_in_a_capture, FEW, "work of the host inside a capture"),
    (a_tensor_of_the_host_in_a_capture, FEW, "a tensor of the host is made inside a capture"),
    (a_copy_from_the_host_in_a_capture, FEW, "a copy from the host inside a capture"),
    (a_wait_in_a_capture, FEW, "waits for the device inside a capture"),
    (an_index_of_the_host, FEW, "a tensor of the host beside the device's in index"),
    (a_copy_that_waits, FEW, "a copy from the host that waits"),
    (a_wait_for_each_row, FEW, "waits for the device: _to_copy"),
    (a_graph_for_every_length, MANY_STEPS, "graphs of one cache"),
    (no_graph, FEW, "no step was a replayed graph"),
    (a_graph_of_nothing, FEW, "an empty graph is replayed"),
    (too_large_a_cache, FEW, "a peak of"),
    (the_stream_of_a_failed_capture, replace(FEW, lacks=(("capture", 100),)), "on the stream of a failed capture"),
    (a_second_cache_beside_the_first, replace(FEW, lacks=(("decoding", 1000),)), "alive after the last row"),
]


@pytest.mark.parametrize(("wrong", "scene", "found"), BROKEN, ids=[wrong.__name__ for wrong, _, _ in BROKEN])
def test_what_must_not_be_is_found(monkeypatch, wrong, scene, found):
    wrong(monkeypatch)
    assert any(found in sentence for sentence in run(scene).wrong())
