"""The self-check: how far two computations may differ, which rows are taken, and which faults it finds."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.launching import arguments_for
from tests.helpers.output_folders import contents
from tests.helpers.tables import table_rows, write_table
from vqa_embeddings.app import self_check
from vqa_embeddings.app.assignment import read_work_state, take_share
from vqa_embeddings.app.demo import DATA
from vqa_embeddings.app.launch import LaunchSetup, set_up_launch
from vqa_embeddings.app.plan_summary import summarize_plan
from vqa_embeddings.app.self_check import SelfChecker, choose_rows, compare, compare_all, judge, tolerance_of
from vqa_embeddings.cli.options import parse_extract
from vqa_embeddings.cluster.world import World
from vqa_embeddings.errors import InputError, SelfCheckError, StorageError
from vqa_embeddings.models.base import ReferenceRow
from vqa_embeddings.models.phi4mm import lora, vision
from vqa_embeddings.records import Extracted
from vqa_embeddings.schema import QUERY_TOKEN, VISION_ONLY, VISION_TOKEN
from vqa_embeddings.store.run import claim_run, read_run
from vqa_embeddings.store.self_check import SelfCheck, VectorCheck, read_self_check, record_self_check


def set_up(tmp_path: Path, *arguments: object) -> LaunchSetup:
    given = [*arguments, "--output-dir", tmp_path / "out", "--self-check", 3]
    return set_up_launch(parse_extract(None, list(map(str, given))), 0)


def checker_of(setup: LaunchSetup) -> SelfChecker:
    state = read_work_state(setup.options, setup.run, setup.table)
    return SelfChecker(setup, take_share(setup.options, World(), state, setup.table))


def load(setup: LaunchSetup):
    attention, tokens = setup.attention.value, setup.options.max_new_tokens
    return setup.checkpoint.family.load(setup.checkpoint, "cpu", setup.dtype.value, attention, tokens)


@pytest.fixture(scope="module")
def checker(checkpoint, tmp_path_factory) -> SelfChecker:
    """What the library makes of three rows; the tests plant their faults on the other side."""
    return checker_of(set_up(tmp_path_factory.mktemp("check"), *arguments_for(DATA / "vqa.csv", checkpoint)))


def test_the_small_model_passes_and_the_rows_are_neighbours_and_spread(checker):
    check = checker.check(load(checker._setup))
    assert check.passed and check.answers_equal == 3 and len(check.vectors) == 1 + 5 + 5 + 1
    assert check.vectors[0].error < 1e-5 and min(vector.cosine for vector in check.vectors) > 0.999999
    assert check.vectors == sorted(check.vectors, key=lambda vector: -vector.error)
    pictures = [row["image_id"] for name in check.rows for row in table_rows() if row["question_id"] == name]
    assert pictures[0] == pictures[1] != pictures[2], "two of them share a prefix"


def without_lora(model, monkeypatch):
    merge = lora._merge
    monkeypatch.setattr(lora, "_merge", lambda layers, dtype: merge(dict(list(layers.items())[:1]), dtype))


def with_causal_vision(model, monkeypatch):
    attend = vision.attend
    monkeypatch.setattr(vision, "attend", lambda module, shown, causal: attend(module, shown, causal=True))


def with_layers_shifted(model, monkeypatch):
    model.decoder._stored = (1, 3, 5, 6, 7)


class NormOfLogitsAlone(torch.nn.Module):
    """The final norm, left out where states are stored: those have more dimensions than what becomes logits."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden):
        return self.norm(hidden) if hidden.ndim == 2 else hidden


def before_the_final_norm(model, monkeypatch):
    model.decoder._norm = NormOfLogitsAlone(model.decoder._norm)


def at_the_token_before(model, monkeypatch):
    forward = model.decoder.forward

    def at_another(kv, inputs):
        states = forward(kv, replace(inputs, ends=(inputs.ends - 1).clamp(min=0)))[1]
        return forward(kv, inputs)[0], states

    monkeypatch.setattr(model.decoder, "forward", at_another)


def at_the_image_token_before(model, monkeypatch):
    prefill = model.decoder.prefill_image

    def at_another(embeddings, *rest):
        states = prefill(embeddings[:-1], *rest)
        prefill(embeddings, *rest)
        return states

    monkeypatch.setattr(model.decoder, "prefill_image", at_another)


def with_another_answer(model, monkeypatch):
    monkeypatch.setattr(type(model), "detokenize", lambda self, output: f"{len(output)} words")


FAULTS = {
    without_lora: r"(query|vision)_token layer \d differs from it by .* of its largest value",
    with_causal_vision: r"\w+_token layer \d|vision_only differs from it by",
    with_layers_shifted: r"_token layer [0246] differs",
    before_the_final_norm: r"_token layer 7 differs",
    at_the_token_before: r"query_token layer \d differs",
    at_the_image_token_before: r"vision_token layer \d differs",
    with_another_answer: r"the answer to row 'question_comb_\d+' is '\d+ words' and not '.+'; expected an error of",
}
WHILE_LOADING = (without_lora,)


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_on_our_side_is_found_and_named(checker, monkeypatch, plant):
    if plant in WHILE_LOADING:
        plant(None, monkeypatch)
        model = load(checker._setup)
    else:
        plant(model := load(checker._setup), monkeypatch)
    with pytest.raises(SelfCheckError, match=FAULTS[plant]) as found:
        checker.check(model)
    assert "against transformers " in str(found.value) and "\n" not in str(found.value)
    assert not (checker._setup.options.output_dir / "run.json").exists()


@pytest.mark.parametrize(
    "plant",
    [
        None,
        without_lora,
        with_layers_shifted,
        with_causal_vision,
        at_the_token_before,
        before_the_final_norm,
        with_another_answer,
    ],
)
def test_in_bfloat16_rounding_passes_and_faults_do_not(checkpoint, tmp_path, monkeypatch, plant):
    setup = set_up(tmp_path, *arguments_for(DATA / "vqa.csv", checkpoint), "--dtype", "bfloat16")
    checker = checker_of(setup)
    if plant is None:
        check = checker.check(load(setup))
        assert check.passed and check.allowed.startswith("a cosine of 0.995 or more and an error of 0.5 at most, and ")
        assert min(vector.cosine for vector in check.vectors) > 0.998, "far from the bound"
        return
    if plant in WHILE_LOADING:
        plant(None, monkeypatch)
        model = load(setup)
    else:
        plant(model := load(setup), monkeypatch)
    found = r"differs from it by .*, cosine -?0\.\d+"
    if plant is with_another_answer:
        found = r"none of 3 answers begins like the reference's: the answer to row '\w+' is '\d+ words' and not '.*'"
    with pytest.raises(SelfCheckError, match=f"{found}; expected a cosine of 0\\.995"):
        checker.check(model)


@pytest.mark.parametrize("mode", ["adapter", "original"])
def test_it_passes_with_the_adapter_beside_the_weights_and_in_the_original_layout(checkpoint, original, tmp_path, mode):
    folder, given = (original, []) if mode == "original" else (checkpoint, ["--lora", "adapter"])
    setup = set_up(tmp_path, *arguments_for(DATA / "vqa.csv", folder), *given)
    check = checker_of(setup).check(load(setup))
    assert check.passed and check.vectors[0].error < 1e-5
    assert ("named by this program" in str(check)) == (mode == "original")


def test_rows_that_cannot_be_used_are_passed_over_and_where_none_can_it_is_refused(checkpoint, tmp_path):
    rows = table_rows()[:6]
    rows[0] = {**rows[0], "question": "What is <|end|> this?"}
    rows[1] = {**rows[1], "image_id": "gone.jpg"}
    rows[2] = {**rows[2], "question": "  "}
    setup = set_up(tmp_path, *arguments_for(write_table(tmp_path / "odd.csv", rows), checkpoint))
    assert checker_of(setup).check(load(setup)).rows == [row["question_id"] for row in rows[3:]]
    rows = [{**row, "image_id": "gone.jpg"} for row in rows]
    setup = set_up(tmp_path, *arguments_for(write_table(tmp_path / "none.csv", rows), checkpoint))
    with pytest.raises(InputError, match=r"none of the 6 rows that were tried can be used, the first one because: '"):
        checker_of(setup)


def test_a_check_that_fails_takes_the_place_of_one_that_passed(checker, tmp_path, monkeypatch):
    options = replace(checker._setup.options, output_dir=tmp_path)
    monkeypatch.setattr(checker, "_setup", replace(checker._setup, options=options))
    (tmp_path / "shards").mkdir()
    claim_run(tmp_path, checker._setup.run)
    assert record_self_check(tmp_path, checker.check(load(checker._setup)))
    assert read_self_check(tmp_path).passed
    key = read_run(tmp_path).key
    with_another_answer(model := load(checker._setup), monkeypatch)
    with pytest.raises(SelfCheckError):
        checker.check(model)
    assert not read_self_check(tmp_path).passed and read_self_check(tmp_path).answers_equal == 0
    assert read_run(tmp_path).key == key
    assert [*contents(tmp_path)] == ["run.json"]


def test_a_row_that_fails_here_and_not_there_is_a_fault(checker, monkeypatch):
    model = load(checker._setup)
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: [_without_a_number(one) for one in encode(pixels)])
    with pytest.raises(SelfCheckError, match=r"row 'question_\w+' fails here and not there \(NonFiniteValues: "):
        checker.check(model)


def _without_a_number(image):
    image.vision_only[0] = torch.nan
    return image


def test_a_difference_hides_neither_behind_a_few_large_values_nor_behind_a_scale():
    expected = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    same = compare(expected, expected)
    assert same.error == 0 and same.cosine == pytest.approx(1)
    assert compare(2 * expected, expected).error == pytest.approx(1)
    large = expected.copy()
    large[:4] = 30_000
    other = np.concatenate([large[:4], -large[4:]])
    assert compare(other, large).error > 1 and compare(other, large).cosine < -0.99
    zero = np.zeros(96, np.float32)
    assert compare(zero, zero).error == 0 and compare(zero, zero).cosine == 1
    assert compare(zero, expected).cosine == 0 and compare(expected, zero).error > 1
    scaled = [
        self_check.VectorCheck("x", None, compare(factor * expected, expected).error, 1.0) for factor in (1.1, 30)
    ]
    assert [tolerance_of("bfloat16").accepts(one) for one in scaled] == [True, False], "a cosine sees no scale"
    assert not tolerance_of("float32").accepts(self_check.VectorCheck("x", None, float("nan"), 1.0))


def test_each_vector_is_shown_at_its_worst_row_and_the_worst_vector_first():
    tokens = {name: np.ones((2, 4)) for name in (VISION_TOKEN, QUERY_TOKEN)}
    one = {VISION_ONLY: np.ones(3), "other": np.ones(1), **tokens}
    two = {name: values.copy() for name, values in one.items() if name != "other"}
    two[QUERY_TOKEN][1, 0] = 1.5
    checks = compare_all([one, one], [one, two], [0, 7])
    assert (str(checks[0]), checks[0].error) == ("query_token layer 7", pytest.approx(1 / 3))
    assert {check.name for check in checks} == one.keys() and max(check.error for check in checks[1:]) == 0
    assert [check.layer for check in checks if check.name == VISION_TOKEN] == [0, 7]
    assert checks[-1].error == 0 and checks[0].cosine < 1


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("wanted", range(1, 9))
def test_as_many_rows_are_taken_as_were_asked_for_and_can_be_used(count, wanted):
    for usable in itertools.product([True, False], repeat=count):
        take = dict(enumerate(used or None for used in usable)).__getitem__
        chosen = [row for row, _ in choose_rows(range(count), wanted, take)]
        assert len(chosen) == len(set(chosen)) == min(wanted, sum(usable))
        assert all(usable[row] for row in chosen)


def test_they_are_spread_over_the_share_two_by_two():
    assert [row for row, _ in choose_rows(range(100), 6, lambda row: row + 1)] == [0, 1, 33, 34, 66, 67]
    assert [row for row, _ in choose_rows(range(100), 3, lambda row: row + 1)] == [0, 1, 50]
    tried = []
    assert not list(choose_rows(range(10_000), 3, lambda row: tried.append(row)))
    assert len(tried) == self_check.FRUITLESS


def made_up(setup: LaunchSetup, answers=("a cat",)):
    """What a reference gives for some rows, and the same as extracted."""
    sizes = {column.name: column.size for column in setup.run.vectors}
    several = {column.name for column in setup.run.vectors if column.layer is not None}
    vectors = {
        name: np.ones((len(setup.run.layers), size) if name in several else size, np.float32)
        for name, size in sizes.items()
    }
    expected = {row: ReferenceRow(dict(vectors), answer) for row, answer in enumerate(answers)}
    records = {
        row: Extracted(row, {name: values.copy() for name, values in vectors.items()}, answer)
        for row, answer in enumerate(answers)
    }
    return expected, records


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_is_as_far_as_can_be_and_run_json_stays_valid(checker, tmp_path, value, dtype):
    setup = replace(checker._setup, dtype=replace(checker._setup.dtype, value=dtype))
    expected, records = made_up(setup, ["a cat", "a dog"])
    records[0].vectors[QUERY_TOKEN][1, 5] = value
    both = [[one.vectors for one in rows.values()] for rows in (records, expected)]
    worst = compare_all(*both, setup.run.layers)[0]
    assert (worst.name, worst.layer) == (QUERY_TOKEN, setup.run.layers[1])
    assert (worst.error, worst.cosine) == (np.inf, -1)
    check = judge(setup, "it", expected, records)
    assert not check.passed and f"query_token layer {setup.run.layers[1]} differs" in check.fault
    run_of(tmp_path, setup)
    assert record_self_check(tmp_path, check)
    json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert read_self_check(tmp_path) == check


def run_of(folder: Path, setup: LaunchSetup) -> None:
    (folder / "shards").mkdir()
    claim_run(folder, setup.run)


def test_what_was_not_compared_has_not_passed(checker):
    setup = checker._setup
    expected, records = made_up(setup, ["a cat", "a dog"])
    assert judge(setup, "it", expected, records).passed
    lost = judge(setup, "it", expected, {0: records[0]})
    assert lost.fault == f"row {setup.table.ids[1]!r} is neither extracted nor failed here"
    for row in expected.values():
        del row.vectors[VISION_ONLY]
    left_out = judge(setup, "it", expected, records)
    assert left_out.fault == f"{VISION_ONLY} is stored and was not compared"


def test_in_16_bits_one_of_three_answers_has_to_begin_alike(checker):
    setup = replace(checker._setup, dtype=replace(checker._setup.dtype, value="bfloat16"))
    for given, passed in (
        (["a cat is there", "no", ""], True),
        (["the", "the", "the"], False),
        (["the", "the"], True),
        (["a", "no no no no", "."], False),
    ):
        expected, records = made_up(setup, ["a cat is here", "yes", "two"][: len(given)])
        records = {row: replace(records[row], answer=answer) for row, answer in enumerate(given)}
        assert judge(setup, "it", expected, records).passed == passed, given


def test_the_vector_that_exhausts_most_of_what_is_allowed_is_named(checker):
    setup = replace(checker._setup, dtype=replace(checker._setup.dtype, value="bfloat16"))
    expected, records = made_up(setup)
    records[0].vectors[VISION_ONLY][:] *= 30  # whose cosine is 1
    records[0].vectors[QUERY_TOKEN][0, ::8] *= 1.4  # whose cosine is a little too small
    check = judge(setup, "it", expected, records)
    assert sum(not tolerance_of("bfloat16").accepts(one) for one in check.vectors) == 2
    assert check.fault.startswith("vision_only differs")


@pytest.mark.parametrize("error", [StorageError("full"), InputError("no run")])
def test_a_record_that_cannot_be_written_does_not_hide_what_was_found(checker, monkeypatch, error):
    def fail(folder, check):
        raise error

    monkeypatch.setattr(self_check, "record_self_check", fail)
    with_another_answer(model := load(checker._setup), monkeypatch)
    with pytest.raises(SelfCheckError, match="--batch-size 1 passes"):
        checker.check(model)


CHECK = SelfCheck(
    "it", "float32", "CPU", ["1"], [VectorCheck(VISION_ONLY, None, 0.5, 0.9)], 1, "little", False, "much", "2026"
)


def test_a_failure_stays_until_a_check_on_the_same_device(checker, tmp_path):
    run_of(tmp_path, checker._setup)
    passed = replace(CHECK, passed=True, fault="")
    assert record_self_check(tmp_path, replace(passed, device="H100")) and record_self_check(tmp_path, CHECK)
    assert not record_self_check(tmp_path, replace(passed, device="H100"))
    assert read_self_check(tmp_path) == CHECK
    assert record_self_check(tmp_path, passed) and read_self_check(tmp_path) == passed
    elsewhere = replace(CHECK, device="H100")
    assert all(record_self_check(tmp_path, one) for one in (CHECK, elsewhere)), "a failure was not recorded"
    assert not record_self_check(tmp_path, passed) and read_self_check(tmp_path) == elsewhere


@pytest.mark.parametrize(
    "wrong",
    [
        {"fault": 3},
        {"device": None},
        {"rows": "1"},
        {"rows": [1]},
        {"answers_equal": "1"},
        {"passed": "yes"},
        *(
            {"vectors": [{"name": "x", "layer": None, "error": 0.1, "cosine": 1.0, **one}] * 2}
            for one in (
                {"cosine": "near"},
                {"cosine": None},
                {"error": "small"},
                {"error": True},
                {"layer": "0"},
                {"name": 1},
            )
        ),
        {"vectors": [CHECK.vectors[0].__dict__, {"name": "x", "layer": None, "error": [], "cosine": 1.0}]},
    ],
    ids=str,
)
def test_a_record_that_is_malformed_is_none(checker, tmp_path, wrong):
    run_of(tmp_path, checker._setup)
    record_self_check(tmp_path, CHECK)
    assert read_self_check(tmp_path) == CHECK
    path = tmp_path / "run.json"
    values = json.loads(path.read_text())
    values["self_check"] |= wrong
    path.write_text(json.dumps(values))
    assert read_self_check(tmp_path) is None
    assert record_self_check(tmp_path, CHECK) and read_self_check(tmp_path) == CHECK


def test_the_plan_says_which_rank_waits(checker):
    setup = checker._setup
    state = read_work_state(setup.options, setup.run, setup.table)
    for size, ends in ((1, ", before the first row is committed"), (2, "its first row; other ranks do not wait")):
        world = World(size=size)
        plan = summarize_plan(setup, take_share(setup.options, world, state, setup.table), world)
        (line,) = [line for line in plan if line.startswith("self-check: ")]
        assert line.endswith(ends)
