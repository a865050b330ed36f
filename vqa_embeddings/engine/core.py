"""From preprocessed pictures and questions to records: the loop between what is decided and what is done."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Listed

import torch

from vqa_embeddings.base.timings import Timings
from vqa_embeddings.engine.capacity import find_capacity
from vqa_embeddings.engine.outcome import Record, failed, make_record
from vqa_embeddings.engine.runner import Runner
from vqa_embeddings.engine.scheduler import (
    Decode,
    EncodeImages,
    MakeCache,
    Prefill,
    PrefillImage,
    Scheduler,
    TakeImages,
    TakenImage,
    Work,
)
from vqa_embeddings.engine.sequence import NOT_FINITE, ImageEntry, Sequence
from vqa_embeddings.errors import RowError
from vqa_embeddings.layers.device import free_memory, is_out_of_memory
from vqa_embeddings.models.base import FinishReason, Pixels, VisionLanguageModel

Images = Iterator[tuple[list[int], Pixels | RowError]]


class Engine:
    """Answers the questions on pictures, in units of work between which a run can stop.

    A row's values do not depend on the rows beside it.

    Args:
        questions: of the table, by row.
        images: for each picture its rows, and its pixels or why there are none.
        batch_size: rows in the batch; None leaves it to the free memory.
        timings: take the time of what is done.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        questions: Listed[str],
        images: Images,
        batch_size: int | None,
        timings: Timings,
    ) -> None:
        self.scheduler = Scheduler(model.spec.max_new_tokens, batch_size)
        self._model = model
        self._questions = questions
        self._images = images
        self._timings = timings
        self._cached: Runner | None = None  # none at first, and while memory for a cache is looked for

    @property
    def is_running(self) -> bool:
        """Whether rows are in the batch."""
        return bool(self.scheduler.running)

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.scheduler.is_done

    @torch.inference_mode()
    def advance(self, begin: bool = True) -> list[Record]:
        """Do one unit of work.

        Args:
            begin: whether further rows may be begun.
        Returns:
            The records of the rows that it finished.
        Raises:
            RuntimeError: the memory of the device runs out, with one row in the batch.
        """
        try:
            return self._do(self.scheduler.schedule(begin))
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self.scheduler.can_halve:
                raise
        self._halve()  # here, where the error no longer holds on to the memory
        return []

    def _halve(self) -> None:
        self._cached = None
        self._timings.notes[self.scheduler.on_out_of_memory()] += 1

    def _do(self, work: Work) -> list[Record]:
        match work:
            case MakeCache():
                return self._make_cache(work)
            case TakeImages():
                return self._take_images(work)
            case EncodeImages():
                return self._encode_images(work)
            case PrefillImage():
                return self._prefill_image(work)
            case Prefill():
                return self._prefill(work)
            case Decode():
                return self._decode(work)

    @property
    def _runner(self) -> Runner:
        assert self._cached is not None
        return self._cached

    def _make_cache(self, work: MakeCache) -> list[Record]:
        self._cached = None
        spec = self._model.spec
        free = free_memory(spec.device)
        capacity = find_capacity(work.request, spec.kv_groups, spec.dtype, spec.device.type, free)
        self.scheduler.on_cache(capacity)
        self._cached = Runner(self._model, capacity)
        return []

    def _take_images(self, work: TakeImages) -> list[Record]:
        """Take the next pictures, as many as the free slots and one pass of the vision tower have room for."""
        records: list[Record] = []
        taken: list[TakenImage] = []
        rows = patches = 0
        while rows < work.rows and patches < self._model.spec.patches_at_once:
            with self._timings("waiting for pictures"):
                found = next(self._images, None)
            if found is None:
                self.scheduler.on_images(taken, more=False)
                return records
            of_image, pixels = found
            if isinstance(pixels, RowError):
                records += [failed(row, pixels) for row in of_image]
                continue
            taken.append(TakenImage(of_image, pixels))
            rows += len(of_image)
            patches += pixels.patches
        self.scheduler.on_images(taken, more=True)
        return records

    def _encode_images(self, work: EncodeImages) -> list[Record]:
        """Run the vision tower, and tokenize the questions. Returns the rows of which no prompt can be made."""
        with self._timings("vision"):
            images = self._model.encode_images([image.pixels for image in work.images])
        records: list[Record] = []
        sequences = []
        with self._timings("records"):
            for taken, image in zip(work.images, images, strict=True):
                entry = ImageEntry(image)
                for row in taken.rows:
                    try:
                        question = self._model.tokenize(self._questions[row])
                        sequences.append(Sequence(row, entry, question, self._model.rope_variant(image, question)))
                    except RowError as failure:
                        records.append(failed(row, failure))
        self.scheduler.on_encoded(sequences)
        return records

    def _prefill_image(self, work: PrefillImage) -> list[Record]:
        with self._timings("prefix"):
            work.entry.states[work.rope_variant] = self._runner.prefill_image(work)
        self.scheduler.on_image_prefilled(work)
        return []

    def _prefill(self, work: Prefill) -> list[Record]:
        """Read questions, and bring to the host what is stored of the pictures whose first rows these are."""
        sequences = work.sequences
        new = {
            (id(sequence.entry), sequence.rope_variant): sequence.entry
            for sequence in sequences
            if sequence.rope_variant not in sequence.entry.vision_token
        }
        stored = [(entry.states[variant], entry.image.vision_only) for (_, variant), entry in new.items()]
        with self._timings("questions"):
            found = self._runner.prefill(sequences, work.first_slot, [tensor for pair in stored for tensor in pair])
        self.scheduler.on_prefilled()
        beside = iter(found.beside)
        for (_, variant), entry in new.items():
            entry.vision_token[variant], entry.vision_only = next(beside), next(beside)
        for sequence, states in zip(sequences, found.states, strict=True):
            if sequence.query_token is None:  # not of a row that begins again: its prompt had ended before
                sequence.query_token = states
                sequence.vision_token = sequence.entry.vision_token[sequence.rope_variant]
        return self._take_tokens(sequences, found.tokens)

    def _decode(self, work: Decode) -> list[Record]:
        with self._timings("decoding"):
            tokens = self._runner.decode(work.sequences)
            self._timings.notes.update(self._runner.take_notes())
        return self._take_tokens(work.sequences, tokens)

    def _take_tokens(self, sequences: Listed[Sequence], tokens: Listed[int]) -> list[Record]:
        """Add a token to each answer. Returns the records of the rows whose answers have ended."""
        records: list[Record] = []
        finished: list[Sequence] = []
        restarts: list[Sequence] = []
        spec = self._model.spec
        with self._timings("records"):
            for sequence, token in zip(sequences, tokens, strict=True):
                sequence.output.append(token)
                reason = self._finish_reason(sequence)
                if reason is None:
                    continue
                finished.append(sequence)
                if reason is FinishReason.RESTART:
                    restarts.append(sequence)
                else:
                    records.append(make_record(sequence, spec.layers, spec.dtype, self._model.detokenize))
            if finished:
                self._runner.move(self.scheduler.on_finished(finished))
            for sequence in restarts:
                variant = self._model.rope_variant(sequence.entry.image, sequence.tokens)
                self.scheduler.on_restart(sequence, variant)
        return records

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.output[-1] == NOT_FINITE:
            return FinishReason.STOP
        return self._model.finish_reason(sequence.prompt_length, sequence.output, sequence.rope_variant)
