"""SigLIP and the projector over the pictures' own patches: no padding, no layer that is not read, no waiting.

A crop's padding is masked as a key, and nothing reads what is computed from it, but for the 2x2 pooling at the edge.
So only the needed patches are computed. The patches of all crops, of several pictures, are the rows of one matrix;
crops with equally many of them attend in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqa_embeddings.errors import InputError
from vqa_embeddings.layers.attention import attend
from vqa_embeddings.layers.device import to_device

# How many patches go through SigLIP at once: the more the better for a GPU; a CPU gains little beyond a picture's.
PATCHES_AT_ONCE = {"cuda": 32_768, "cpu": 8192}


@dataclass(frozen=True)
class Pixels:
    """A picture as the library's image processor makes it."""

    crops: Tensor  # [crops, 3, 448, 448] in the model's format: the global view, then the real crops, none padding
    mask: Tensor  # [crops, 32, 32], 1 where a patch shows the picture
    size: tuple[int, int]  # height and width of the crops laid out, pixels
    tokens: int  # how many image tokens stand for the picture in the prompt
    mean: np.ndarray  # float32 [448], over crops, channels and rows, as the published script has it
    truncated: bool = False  # it is cut off

    @property
    def patches(self) -> int:
        """How many patches SigLIP is to compute."""
        return int(needed_patches(self.mask.bool()).sum())


@dataclass(frozen=True)
class Seen:
    """What SigLIP and the projector make of a picture."""

    tokens: Tensor  # [image tokens, hidden], as the decoder reads them
    mean: Tensor  # float32 [vision]: of the patch features that the projector reads, over the unmasked patches


class Vision:
    """The library's SigLIP up to the layer that the projector reads, and the projector.

    Its attention looks both ways, which the library's own does not where no patch is masked.

    Raises:
        InputError: crops of an odd number of patches a side, which the model's pooling would pad.
    """

    def __init__(self, image_embed: Any, config: Any) -> None:
        tower = image_embed.img_processor
        read = config.feature_layer
        layers = list(tower.encoder.layers)
        self._layers = layers[: read if read >= 0 else len(layers) + 1 + read]
        self._embeddings = tower.embeddings
        self._embed = image_embed
        self._device: torch.device = image_embed.img_projection_up.weight.device
        self.dtype: torch.dtype = tower.embeddings.patch_embedding.weight.dtype
        self._heads: int = config.num_attention_heads
        self._crop: int = config.crop_size
        self._side: int = config.image_size // config.patch_size
        if self._side % 2:
            raise InputError(f"the checkpoint's crops have {self._side} patches a side; expected an even number")
        # What is not read need not stay in memory.
        tower.encoder.layers = nn.ModuleList(self._layers)
        tower.head = tower.post_layernorm = nn.Identity()

    def __call__(self, pictures: Sequence[Pixels]) -> list[Seen]:
        """Run SigLIP and the projector over pictures, together. Each comes to what it comes to alone."""
        device = self._device
        masks = [picture.mask.bool() for picture in pictures]
        needed = [needed_patches(mask) for mask in masks]
        features = self._features(torch.cat([p.crops for p in pictures]), torch.cat(masks), torch.cat(needed))
        seen, start = [], 0
        for picture, mask, need in zip(pictures, masks, needed, strict=True):
            own = features[start : (start := start + int(need.sum()))]
            place = torch.cumsum(need.flatten(), 0).view(need.shape) - 1  # of each patch among the picture's own
            mean = own[to_device(place[mask], device)].float().mean(dim=0)
            seen.append(Seen(self._project(own, place, mask, picture.size), mean))
        return seen

    def _features(self, crops: Tensor, masks: Tensor, needed: Tensor) -> Tensor:
        """Patch features that the projector reads, [needed patches, vision]: crop after crop, in reading order."""
        limit = max(1, PATCHES_AT_ONCE[self._device.type] // self._side**2)
        made = []
        for first in range(0, len(crops), limit):
            chunk = slice(first, first + limit)
            pixels, positions = (
                to_device(crops[chunk], self._device),
                to_device(patch_positions(masks[chunk]), self._device),
            )
            patches = self._embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
            embedded = patches + self._embeddings.position_embedding(positions)
            made.append(self._encode(embedded.flatten(0, 1), masks[chunk].flatten(1), needed[chunk].flatten(1)))
        return torch.cat(made)

    def _encode(self, embedded: Tensor, mask: Tensor, needed: Tensor) -> Tensor:
        """SigLIP's layers over the needed patches of crops, [crops * patches, vision] to [needed, vision].

        Args:
            mask, needed: bool [crops, patches]; what is needed holds what is unmasked.
        """
        order, groups = _group_crops(mask, needed)
        hidden = embedded[to_device(order, self._device)]
        for layer in self._layers:
            hidden = self._attention(layer.self_attn, layer.layer_norm1(hidden), groups).add_(hidden)
            hidden = layer.mlp(layer.layer_norm2(hidden)).add_(hidden)
        back = torch.argsort(order)  # the needed patches in reading order
        return hidden[to_device(back, self._device)]

    def _attention(self, module: Any, hidden: Tensor, groups: Sequence[tuple[int, int, int]]) -> Tensor:
        queries, keys, values = module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden)
        made, start = [], 0
        for crops, patches, unmasked in groups:
            own = slice(start, start := start + crops * patches)

            def split(states: Tensor, own: slice = own, crops: int = crops) -> Tensor:
                return states[own].view(crops, -1, self._heads, states.shape[-1] // self._heads).transpose(1, 2)

            shown = split(queries), split(keys)[:, :, :unmasked], split(values)[:, :, :unmasked]
            mixed = attend(module, shown, causal=False)
            made.append(mixed.reshape(crops * patches, -1))
        return module.out_proj(torch.cat(made) if len(made) > 1 else made[0])

    def _project(self, features: Tensor, place: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
        """The picture's tokens, [image tokens, hidden].

        Args:
            features: [needed patches, vision] of the picture.
            place: int64 [crops, side, side], where among them each patch lies.
            mask: bool of the same shape.
            size: height and width of the crops laid out, pixels.
        """
        cells, order = lay_out_tokens(place, mask, size[0] // self._crop, size[1] // self._crop)
        module = self._embed
        separators = [module.sub_img_feature_extensor.view(1, -1), module.global_img_feature_extensor.view(1, -1)]
        cell_means = features[to_device(cells, self._device)].mean(dim=1)
        laid_out = torch.cat([cell_means, *separators])[to_device(order, self._device)]
        return module.img_projection_down(nn.functional.gelu(module.img_projection_up(laid_out)))


def lay_out_tokens(place: Tensor, mask: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """In which order a picture's patches become tokens: its crops laid out, row by row, then its global view.

    Four patches, a cell, are pooled into one token. A separator ends each row of cells, another one the first view.

    Args:
        place: int64 [crops, side, side], where each patch lies among the picture's own; the global view comes first.
        mask: bool of the same shape, where a patch shows the picture.
        rows, columns: how the other crops lie.
    Returns:
        int64 [cells, 4], the patches of each cell; int64 [tokens], the cell of each token. Behind the last cell's
        number come those of the two separators: of rows, and of views.
    """
    half = place.shape[-1] // 2
    cells = place.view(-1, half, 2, half, 2).permute(0, 1, 3, 2, 4).reshape(-1, half, half, 4)
    shown = _join_crops(mask[1:, ::2, ::2], rows, columns)[..., 0]
    joined = _join_crops(cells[1:], rows, columns)[: int(shown[:, 0].sum()), : int(shown[0].sum())]
    height, width = joined.shape[:2]
    count = height * width + half * half
    line_end, view_end = count, count + 1
    views = torch.arange(height * width).view(height, width), torch.arange(height * width, count).view(half, half)
    first, second = (torch.cat([view, torch.full((len(view), 1), line_end)], dim=1).flatten() for view in views)
    order = torch.cat([first, torch.tensor([view_end]), second])
    return torch.cat([joined.reshape(-1, 4), cells[0].reshape(-1, 4)]), order


def _join_crops(of_crops: Tensor, rows: int, columns: int) -> Tensor:
    """Cells of crops, [crops, height, width, ...], as those of the picture, [rows * height, columns * width, n]."""
    height, width = of_crops.shape[1:3]
    side_by_side = of_crops.view(rows, columns, height, width, -1).transpose(1, 2)
    return side_by_side.reshape(rows * height, columns * width, -1)


def patch_positions(mask: Tensor) -> Tensor:
    """Which of SigLIP's learned positions each patch has, int64 [crops, side * side]: a small crop's are spread evenly.

    In whole numbers: the library's fractions, rounded to bfloat16 up to transformers 5.17, fall into the wrong place
    where a crop shows 17, 19, 21, 27, 29 or 31 patches a side.

    Args:
        mask: bool [crops, side, side], in each crop a rectangle from its first patch on.
    """
    side = mask.shape[-1]
    counts = mask[:, :, 0].sum(dim=1), mask[:, 0].sum(dim=1)
    rows, columns = (torch.arange(side) * side // count.clamp(min=1)[:, None] for count in counts)
    positions = rows[:, :, None] * side + columns[:, None]
    return positions.masked_fill(~mask, 0).flatten(1)


def needed_patches(mask: Tensor) -> Tensor:
    """Which patches SigLIP has to compute: those that show the picture, and what is pooled together with them.

    Args:
        mask: bool [crops, side, side], the global view first: of it the projector reads all.
    """
    cells = mask.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).any(dim=(2, 4))
    needed = cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    needed[0] = True
    return needed


def _group_crops(mask: Tensor, needed: Tensor) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Put crops with equally many patches next to one another, in each the unmasked patches first.

    Returns:
        int64 [needed patches], which patch comes where; and of each group its crops, patches of a crop, and how many of
        them are unmasked.
    """
    members: dict[tuple[int, int], list[Tensor]] = {}
    for crop, (shown, need) in enumerate(zip(mask, needed, strict=True)):
        patches = torch.cat([shown.nonzero()[:, 0], (need & ~shown).nonzero()[:, 0]]) + crop * mask.shape[1]
        if len(patches):
            members.setdefault((len(patches), int(shown.sum())), []).append(patches)
    order = torch.cat([patches for group in members.values() for patches in group])
    return order, [(len(group), *counts) for counts, group in members.items()]
