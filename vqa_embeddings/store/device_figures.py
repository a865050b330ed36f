"""What ranks have done on each kind of device, by what they said while they worked. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from vqa_embeddings.store.heartbeat import Heartbeat

NOT_RECORDED = "not recorded"  # the device of ranks of earlier versions


def sum_up_devices(heartbeats: Iterable[Heartbeat]) -> list[dict[str, Any]]:
    """An entry for each kind of device, as `coverage.json` has them, by their names.

    Returns:
        `device`; `ranks`, of all launches; `rows` that they have done, failed ones and copies among them;
        `rows_per_second` of one rank, rows of all over seconds of all, each from its first line to its last: None
        where no time has passed between them; `peak_memory`, bytes, the most of any rank: None where none says it.
    """
    by_device: defaultdict[str, list[Heartbeat]] = defaultdict(list)
    for heartbeat in heartbeats:
        by_device[heartbeat.device or NOT_RECORDED].append(heartbeat)
    return [_sum_up(device, ranks) for device, ranks in sorted(by_device.items())]


def _sum_up(device: str, ranks: list[Heartbeat]) -> dict[str, Any]:
    rows = sum(int(rank.done.max()) for rank in ranks)
    seconds = sum(float(rank.times[-1] - rank.times[0]) for rank in ranks)
    return {
        "device": device,
        "ranks": len(ranks),
        "rows": rows,
        "rows_per_second": round(rows / seconds, 3) if seconds > 0 else None,
        "peak_memory": max(rank.memory for rank in ranks) or None,
    }
