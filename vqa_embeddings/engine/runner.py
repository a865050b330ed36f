"""Does on the device what the scheduler decides: prefills and decoding steps on one cache."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqa_embeddings.engine.capacity import round_width, split_passes, tokens_at_once
from vqa_embeddings.engine.cuda_graphs import CudaGraphRunner, DecodeInputs
from vqa_embeddings.engine.greedy import choose_tokens
from vqa_embeddings.engine.scheduler import Move, PrefillImage
from vqa_embeddings.engine.sequence import Sequence
from vqa_embeddings.layers.device import to_device, to_host
from vqa_embeddings.layers.kv_cache import Capacity, KVCache
from vqa_embeddings.layers.prefix_sharing import PrefixSharing, share_first_blocks, share_named_blocks
from vqa_embeddings.models.base import ForwardInputs, VisionLanguageModel


class Prefilled(NamedTuple):
    """What reading the questions of rows came to, on the host."""

    tokens: list[int]  # the first of each answer, NOT_FINITE where there was none to choose
    states: np.ndarray  # float32 [rows, layers, hidden], at the last token that was read
    beside: list[np.ndarray]  # what was asked for with it


class Runner:
    """A model with one cache, whose rows lie in slots without gaps."""

    def __init__(self, model: VisionLanguageModel, capacity: Capacity) -> None:
        """Allocate the cache."""
        self.capacity = capacity
        self._model = model
        self._spec = model.spec
        self._kv = KVCache(self._spec.kv_groups, capacity, self._spec.dtype, self._spec.device)
        self._suppressed = torch.tensor(self._spec.suppressed_tokens, dtype=torch.int64, device=self._spec.device)
        self._graphs = CudaGraphRunner(self._spec.device)
        self._inputs: DecodeInputs | None = None  # of the next step, None where the rows have changed

    def prefill_image(self, work: PrefillImage) -> Tensor:
        """Put a picture's keys and values into its blocks. Returns the states at its end, float32 [layers, hidden]."""
        return self._model.prefill_image(work.entry.image, work.rope_variant, self._kv, work.blocks)

    def prefill(self, sequences: Listed[Sequence], first_slot: int, beside: Listed[Tensor] = ()) -> Prefilled:
        """Read the questions of rows, and choose the first token of each answer.

        Args:
            first_slot: of the first row; the others follow it.
            beside: other tensors, float32, that are wanted on the host, so that it waits only once.
        """
        made, slot = [], first_slot
        self._kv.clear_slots(slot, len(sequences))
        for some in split_passes(sequences, self._spec.attention_heads):
            made.append(self._read_questions(some, slot))
            slot += len(some)
        chosen, states = (torch.cat(tensors) for tensors in zip(*made, strict=True))
        chosen, states, *others = to_host(chosen, states, *beside)
        for sequence in sequences:
            sequence.num_keys = sequence.num_tokens
        self._inputs = None
        return Prefilled(chosen.tolist(), states.numpy(), [other.numpy() for other in others])

    def decode(self, sequences: Listed[Sequence]) -> list[int]:
        """The next token of every row; `sequences` are all rows in the order of their slots."""
        if self._inputs is None:
            self._inputs = self._make_inputs(sequences)
        width = self._round_width(1 + max(sequence.num_keys for sequence in sequences))
        chosen = self._graphs.run(self._advance, self._inputs, width)
        for sequence in sequences:
            sequence.num_keys += 1
            sequence.written = max(sequence.written, sequence.num_keys)
        return chosen[: len(sequences)]  # what is chosen beyond the rows is padding

    def move(self, moves: Listed[Move]) -> None:
        """Rows have finished; others take their slots."""
        for move in moves:
            self._kv.move_slot(move.source, move.target, move.width)
        self._inputs = None

    def take_notes(self) -> list[str]:
        """What the user should know of the steps since this was asked last."""
        notes, self._graphs.notes = self._graphs.notes, []
        return notes

    def _read_questions(self, sequences: Listed[Sequence], first_slot: int) -> tuple[Tensor, Tensor]:
        """One pass over the questions of rows, or several over parts of a question that is very long.

        Returns:
            The chosen tokens, int64 [rows], and what `VisionLanguageModel.forward` gives as states.
        """
        device, sharing, blocks = self._spec.device, {}, {}
        for group in self._spec.kv_groups:
            of_group, named = share_named_blocks([sequence.prefix[group.name] for sequence in sequences])
            sharing[group.name] = of_group.to(device)
            blocks[group.name] = to_device(torch.tensor(named), device)
        longest = max(sequence.num_tokens for sequence in sequences)
        for sequence in sequences:
            sequence.written = longest
        step = tokens_at_once(sequences, self._spec.attention_heads)
        for start in range(0, longest, step):
            part = [sequence.tokens[start : start + step] for sequence in sequences]
            length = max(map(len, part))
            padded = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in part])
            logits, states = self._model.forward(
                self._kv,
                ForwardInputs(
                    sharing=sharing,
                    blocks=blocks,
                    first_slot=first_slot,
                    tokens=to_device(padded, device),
                    starts=torch.full((len(sequences),), start, device=device),
                    ends=to_device(torch.tensor([len(tokens) - 1 for tokens in part]), device),
                    width=self._round_width(start + length),
                ),
            )
        return choose_tokens(logits, self._suppressed), states

    def _make_inputs(self, sequences: Listed[Sequence]) -> DecodeInputs:
        """What a step computes on, from the rows as they are now. Sizes are rounded up where graphs are captured."""
        round_up: Callable[[int], int] = _power_of_two if self._graphs.captures else int
        count = min(round_up(len(sequences)), self.capacity.slots)
        sharing = {group.name: self._share(group.name, sequences, count, round_up) for group in self._spec.kv_groups}
        state = torch.zeros(2, count, dtype=torch.int64)
        for slot, sequence in enumerate(sequences):
            state[0, slot], state[1, slot] = sequence.output[-1], sequence.num_keys
        return DecodeInputs(sharing, *state).to(self._spec.device)

    def _share(
        self, group: str, sequences: Listed[Sequence], count: int, round_up: Callable[[int], int]
    ) -> PrefixSharing:
        prefixes = [sequence.prefix[group] for sequence in sequences]
        used = 1 + max(block for prefix in prefixes for block in prefix.blocks)
        step = max(1, round_up(used) // 8) if self._graphs.captures else 1  # finer: each block is read at every step
        blocks = min(-(-used // step) * step, self.capacity.blocks[group])
        return share_first_blocks(prefixes, blocks, count, round_up)

    def _advance(self, inputs: DecodeInputs, width: int) -> None:
        """Read the newest token of every row, and choose the next, in place."""
        logits, _ = self._model.forward(
            self._kv,
            ForwardInputs(
                sharing=inputs.sharing,
                blocks={name: len(sharing.masked) for name, sharing in inputs.sharing.items()},
                first_slot=0,
                tokens=inputs.tokens[:, None],
                starts=inputs.num_keys,
                ends=torch.zeros_like(inputs.num_keys),
                width=width,
            ),
        )
        inputs.tokens.copy_(choose_tokens(logits, self._suppressed))
        inputs.num_keys.add_(1)

    def _round_width(self, keys: int) -> int:
        return min(round_width(keys), self.capacity.width)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
