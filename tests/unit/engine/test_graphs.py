"""Steps by captured graphs, in values: the same tokens as without, and another answer where a graph is wrong."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.asking import ask, load
from tests.helpers.recorded_graph import recorded_graphs
from tests.helpers.tables import table_rows
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.engine import cuda_graphs as steps_room
from vqa_embeddings.engine.cuda_graphs import CapturedGraph, CudaGraphRunner
from vqa_embeddings.engine.runner import Runner
from vqa_embeddings.layers.kv_cache import KVPool
from vqa_embeddings.models.phi4mm.model import Phi4
from vqa_embeddings.records import Extracted

pytestmark = pytest.mark.slow  # every test answers all 31 rows with answers of 60 tokens

LONG_ANSWERS = 60  # tokens, so that widths change and rows finish at many different steps


@pytest.fixture(scope="module")
def model(checkpoint) -> Phi4:
    return load(checkpoint, tokens=LONG_ANSWERS)


@pytest.fixture(scope="module")
def pictures() -> list[tuple[object, list[str]]]:
    questions: dict[str, list[str]] = {}
    for row in table_rows():
        questions.setdefault(row["image_id"], []).append(row["question"])
    return [(open_picture(DATA / name), asked) for name, asked in questions.items()]


@pytest.fixture(scope="module")
def without_graphs(model, pictures) -> list[str]:
    return answers(ask(model, pictures, 5))


def answers_with_graphs(model, pictures, batch_size) -> tuple[list[str], list[object]]:
    with recorded_graphs() as graphs:
        return answers(ask(model, pictures, batch_size)), graphs


def answers(records) -> list[str]:
    """What each row came to: its answer, or why it has none."""
    return [record.answer if isinstance(record, Extracted) else record.message for record in records]


@pytest.mark.parametrize("batch_size", [5, 31])
def test_steps_by_captured_graphs_choose_the_same_tokens(model, pictures, without_graphs, batch_size):
    """Rows of several pictures that finish one by one, and whose slots others take: few graphs, many replays."""
    found, graphs = answers_with_graphs(model, pictures, batch_size)
    assert found == without_graphs
    replays = sum(graph.replays for graph in graphs)
    assert 2 <= len(graphs) < replays / 5


def test_what_a_cache_held_before_reaches_no_row(model, pictures, monkeypatch):
    """Not through the empty slots of a graph, whose tokens are none: of its eight, two or three here."""
    few = [(picture, asked[:2]) for picture, asked in pictures[:3]]
    wanted = answers(ask(model, few, 32))
    make = KVPool.__init__

    def full_of_nan(self, *given):
        make(self, *given)
        for pool in (self._block_keys, self._block_values, self._slot_keys, self._slot_values):
            pool.fill_(torch.nan)

    monkeypatch.setattr(KVPool, "__init__", full_of_nan)
    found, graphs = answers_with_graphs(model, few, 32)
    assert graphs and found == wanted


def bake_in_a_number(monkeypatch):
    advance = Runner._advance

    def baked(self, inputs, width):
        advance(self, inputs, width)
        inputs.num_keys.copy_(torch.full_like(inputs.num_keys, int(inputs.num_keys[0])))

    monkeypatch.setattr(Runner, "_advance", baked)


def move_a_tensor(monkeypatch):
    def moved(self, inputs):
        self._own.copy_sharing_from(inputs)
        object.__setattr__(self._own, "tokens", inputs.tokens.clone())
        self._own.num_keys.copy_(inputs.num_keys)
        self._graph.replay()
        inputs.tokens.copy_(self._own.tokens)
        inputs.num_keys.add_(1)

    monkeypatch.setattr(CapturedGraph, "run", moved)


def keep_an_old_sharing(monkeypatch):
    run = CapturedGraph.run

    def stale(self, inputs):
        self._holds = inputs
        run(self, inputs)

    monkeypatch.setattr(CapturedGraph, "run", stale)


def share_graphs_of_two_widths(monkeypatch):
    find = CudaGraphRunner._find_graph
    monkeypatch.setattr(
        CudaGraphRunner, "_find_graph", lambda self, advance, inputs, width: find(self, advance, inputs, 64)
    )


@pytest.mark.parametrize("wrong", [bake_in_a_number, move_a_tensor, keep_an_old_sharing, share_graphs_of_two_widths])
def test_a_graph_that_is_wrong_gives_another_answer(model, pictures, without_graphs, monkeypatch, wrong):
    """The stand-in shows what a real graph would do: it does not call the step again."""
    wrong(monkeypatch)
    found, graphs = answers_with_graphs(model, pictures, 5)
    assert graphs and found != without_graphs


@pytest.mark.parametrize("error", [RuntimeError("capturing"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_capture_that_fails_leaves_its_shape_without_a_graph_and_the_run_goes_on(
    model, pictures, without_graphs, monkeypatch, error
):
    """The second and the third of them fail; their shapes are not tried again.

    After an error that may leave the pool half open, the graphs that follow share another.
    """
    tried = []
    advance = Runner._advance
    left, notes, take = [], [], Runner.take_notes
    monkeypatch.setattr(steps_room, "leave_capture", left.append)
    monkeypatch.setattr(Runner, "take_notes", lambda self: (notes.extend(found := take(self)), found)[1])

    def advances(self, inputs, width):
        if any(mode.__class__.__name__ == "Recorded" for mode in _modes()):
            tried.append((inputs.shape(), width))
            if len(tried) in (2, 3):
                raise error
        advance(self, inputs, width)

    monkeypatch.setattr(Runner, "_advance", advances)
    found, graphs = answers_with_graphs(model, pictures, 5)
    assert found == without_graphs
    assert len(notes) == 2 and all("run without a CUDA graph" in note for note in notes)
    pools = [graph.pool() for graph in graphs]
    assert pools[0] is graphs[0]
    assert pools[1] is (graphs[0] if isinstance(error, torch.OutOfMemoryError) else graphs[1])
    assert all(pool is pools[1] for pool in pools[1:])
    assert len(left) == 2 and len(set(tried)) == len(tried) == len(graphs) + 2 > 2


def _modes() -> list[object]:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return _get_current_dispatch_mode_stack()
