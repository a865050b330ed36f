"""The figures of the devices: what all ranks of a folder have done on each kind, also those that were killed."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.launching import merge
from tests.helpers.output_folders import ROWS, begin_run, commit, contents, coverage, record
from vqa_embeddings.layers.device import peak_memory
from vqa_embeddings.store import heartbeat as heartbeat_module
from vqa_embeddings.store.device_figures import sum_up_devices
from vqa_embeddings.store.heartbeat import (
    DEVICE_BYTES,
    HEADER,
    LINE_BYTES,
    HeartbeatWriter,
    name_device,
    read_heartbeat,
    read_heartbeats,
    read_latest,
)

H200, A100 = "NVIDIA H200", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"
GIB = 1 << 30


def write_pace(out: Path, shard: str, *lines: str, header: str = HEADER) -> Path:
    path = out / "shards" / shard / "pace.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_a_kind_of_device_has_one_entry_with_the_speed_of_one_rank(tmp_path):
    write_pace(tmp_path, "a-r0", f"100,50,0,0,{GIB},{H200}", f"110,50,50,1,{3 * GIB},{H200}")
    write_pace(tmp_path, "a-r1", f"100,50,0,0,{GIB},{H200}", f"130,50,50,0,{2 * GIB},{H200}")
    write_pace(tmp_path, "b-r0", f"500,9,0,0,0,{A100}", f"502,9,9,0,{GIB},{A100}")
    assert sum_up_devices(read_heartbeats(tmp_path)) == [
        {"device": A100, "ranks": 1, "rows": 9, "rows_per_second": 4.5, "peak_memory": GIB},
        {"device": H200, "ranks": 2, "rows": 100, "rows_per_second": 2.5, "peak_memory": 3 * GIB},
    ]
    assert sum_up_devices([]) == []


def test_a_rank_that_was_killed_counts_as_far_as_it_has_spoken_and_damage_for_nothing(tmp_path):
    damage = ["\0\ufffd,,", f"120,50,x,0,5,{H200}", f"120,50,20,0,-5,{H200}", f"120,50,20,0,{9 * GIB},a\tb"]
    path = write_pace(tmp_path, "a-r0", f"100,50,0,0,{GIB},{H200}", *damage, f"105,50,10,0,{2 * GIB},{H200}")
    with open(path, "a") as stream:
        stream.write(f"110,50,30,0,{8 * GIB},NVID")  # the line at which it was killed
    (entry,) = sum_up_devices(read_heartbeats(tmp_path))
    assert entry == {"device": H200, "ranks": 1, "rows": 10, "rows_per_second": 2.0, "peak_memory": 2 * GIB}
    assert read_latest(path) == (10, 0)


def test_files_of_earlier_versions_are_read_and_a_moment_has_no_speed(tmp_path):
    write_pace(tmp_path, "old-r0", "100,50,0,0", "120,50,50,2", header="time,to_do,done,failed")
    write_pace(tmp_path, "new-r0", f"100,5,0,0,{GIB},CPU")
    cpu, unknown = sum_up_devices(read_heartbeats(tmp_path))
    assert cpu == {"device": "CPU", "ranks": 1, "rows": 0, "rows_per_second": None, "peak_memory": GIB}
    expected = {"device": "not recorded", "ranks": 1, "rows": 50, "rows_per_second": 2.5, "peak_memory": None}
    assert unknown == expected


def test_what_a_rank_writes_is_read_back_and_its_lines_stay_short(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "WRITE_SECONDS", 0.0)
    (tmp_path / "shards").mkdir()
    strange, most = "ACME,\n Wörter\tCo " + "x" * 99, 10**9
    writer = HeartbeatWriter(tmp_path, "launch", 0, most, strange, lambda: 10**13)
    writer.update(most, most, last=True)
    path = tmp_path / "shards" / "launch-r0" / "pace.csv"
    read = read_heartbeat(path)
    assert read.device == name_device(strange) and read.device.startswith("ACME W rter Co xxx")
    assert len(read.device) <= DEVICE_BYTES and read.memory == 10**13 and read.done.tolist() == [0, most]
    assert max(map(len, path.read_bytes().splitlines())) < LINE_BYTES
    assert read_latest(path) == (most, most)


def test_a_merge_records_and_shows_them_and_says_the_same_again(tmp_path):
    out = begin_run(tmp_path)
    commit(out, [record(row) for row in range(ROWS)])
    write_pace(out, "z-r0", f"100,50,0,0,{GIB},{H200} <1>", f"110,50,25,1,{3 * GIB},{H200} <1>")
    assert merge(out, "--prune").returncode == 0
    (entry,) = coverage(out)["devices"]
    assert (entry["device"], entry["rows_per_second"]) == (f"{H200} <1>", 2.5)
    cells = "".join(f"<td>{cell}</td>" for cell in (f"{H200} &lt;1&gt;", 1, 25, 2.5, "3.0 GiB"))
    assert cells in (out / "report.html").read_text()
    before = contents(out)
    assert merge(out).returncode == 0
    assert contents(out) == before


def test_the_peak_of_this_process_is_in_bytes():
    assert 20 << 20 < peak_memory("cpu") < 1 << 40
