"""Steps by captured graphs, in values: the same tokens as without, and another answer where a graph is wrong."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.recorded_graph import recorded_graphs
from tests.helpers.tables import table_rows
from tests.unit.models.test_model import ask, load
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.data.decode import open_picture
from vqa_embeddings.engine import cuda_graphs as steps_room
from vqa_embeddings.engine.cuda_graphs import Steps, _Captured
from vqa_embeddings.engine.runner import Batch
from vqa_embeddings.layers.kv_cache import KVCache
from vqa_embeddings.models.phi4mm.model import Phi4
from vqa_embeddings.records import Extracted

LONG_ANSWERS = 60  # tokens, so that widths change and rows leave at many different steps


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
    """Rows of several pictures that leave one by one, and whose seats others take: few graphs, many replays."""
    found, graphs = answers_with_graphs(model, pictures, batch_size)
    assert found == without_graphs
    replays = sum(graph.replays for graph in graphs)
    assert 2 <= len(graphs) < replays / 5


def test_what_a_cache_held_before_reaches_no_row(model, pictures, monkeypatch):
    """Not through the seats of a graph that are nobody's, whose tokens are none: of its eight, two or three here."""
    few = [(picture, asked[:2]) for picture, asked in pictures[:3]]
    wanted = answers(ask(model, few, 32))
    make = KVCache.__init__

    def full_of_nan(self, *given):
        make(self, *given)
        for pool in (self._page_keys, self._page_values, self._seat_keys, self._seat_values):
            pool.fill_(torch.nan)

    monkeypatch.setattr(KVCache, "__init__", full_of_nan)
    found, graphs = answers_with_graphs(model, few, 32)
    assert graphs and found == wanted


def bake_in_a_number(monkeypatch):
    advance = Batch._advance

    def baked(self, step, width):
        advance(self, step, width)
        step.kept.copy_(torch.full_like(step.kept, int(step.kept[0])))

    monkeypatch.setattr(Batch, "_advance", baked)


def move_a_tensor(monkeypatch):
    def moved(self, step):
        self._own.company.copy_from(step.company)
        object.__setattr__(self._own, "newest", step.newest.clone())
        self._own.kept.copy_(step.kept)
        self._graph.replay()
        step.newest.copy_(self._own.newest)
        step.kept.add_(1)

    monkeypatch.setattr(_Captured, "run", moved)


def keep_an_old_company(monkeypatch):
    run = _Captured.run

    def stale(self, step):
        self._holds = step
        run(self, step)

    monkeypatch.setattr(_Captured, "run", stale)


def share_graphs_of_two_widths(monkeypatch):
    graph = Steps._graph
    monkeypatch.setattr(Steps, "_graph", lambda self, advance, step, width: graph(self, advance, step, 64))


@pytest.mark.parametrize("wrong", [bake_in_a_number, move_a_tensor, keep_an_old_company, share_graphs_of_two_widths])
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
    advance = Batch._advance
    left, notes, take = [], [], Batch.take_notes
    monkeypatch.setattr(steps_room, "leave_capture", left.append)
    monkeypatch.setattr(Batch, "take_notes", lambda self: (notes.extend(found := take(self)), found)[1])

    def advances(self, step, width):
        if any(mode.__class__.__name__ == "Recorded" for mode in _modes()):
            tried.append((step.shape(), width))
            if len(tried) in (2, 3):
                raise error
        advance(self, step, width)

    monkeypatch.setattr(Batch, "_advance", advances)
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
