"""The GPU of a rank: its own from the first moment on, shared fairly, and exact in float32."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import flash_stand_in
from tests.helpers.launching import ROOT
from vqa_embeddings.app.plan_summary import describe_memory
from vqa_embeddings.errors import InputError
from vqa_embeddings.layers import device as devices
from vqa_embeddings.layers import gpu_claims as claims
from vqa_embeddings.layers.device import (
    Device,
    _no_flash_package,
    choose_attention,
    choose_dtype,
    fair_share,
    find_device,
    lacks_binaries,
    to_host,
)
from vqa_embeddings.layers.gpu_claims import Claim

BUILT = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]  # of torch, in most tests


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (1, 1), (7, 7), (9, 1)])
def test_the_gpu_of_a_rank_is_the_current_device_before_anything_is_asked_of_it(
    monkeypatch, tmp_path, local_rank, index
):
    asked: list[str] = []

    def answer(name, value):
        return lambda *given: (asked.append(f"{name} {given[0]}"), value)[1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name, value in {
        "set_device": None,
        "get_device_name": "a GPU",
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(uuid=f"gpu-{index}", total_memory=80 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer(name, value))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT)
    monkeypatch.setattr(devices, "claims_folder", lambda: tmp_path / "claims")
    monkeypatch.setattr(devices, "_claims", {})
    device = find_device(local_rank)
    assert (device.name, device.memory) == (f"cuda:{index}", 80 << 30)
    assert asked[0] == f"set_device cuda:{index}"
    assert devices.count_processes(device.name) == 1
    other = Claim(tmp_path / "claims", f"gpu-{index}")  # of a rank that comes later
    assert devices.count_processes(device.name) == 2
    other.withdraw()


@pytest.mark.parametrize(
    ("capability", "built", "lacks"),
    [
        ((7, 0), BUILT, True),
        ((7, 5), BUILT, False),
        ((8, 9), BUILT, False),
        ((10, 3), BUILT, False),
        ((11, 0), BUILT, True),
        ((11, 0), [*BUILT, "compute_100"], False),
        ((7, 0), [*BUILT, "compute_120"], True),
        ((9, 0), ["sm_90a"], False),
        ((9, 0), ["gfx90a", "gfx942"], False),
        ((7, 0), [], False),
    ],
)
def test_a_gpu_that_torch_has_no_binaries_for_is_known(capability, built, lacks):
    assert lacks_binaries(capability, built) == lacks


def test_a_gpu_that_torch_has_no_binaries_for_is_refused_before_it_is_claimed(monkeypatch):
    monkeypatch.setattr(devices, "_claim", lambda index: pytest.fail("it is claimed"))
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_name": "Tesla V100",
        "get_device_capability": (7, 0),
        "get_arch_list": BUILT,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(
        InputError, match=r"^Tesla V100 has compute capability 7.0, torch .* is built for sm_75, sm_80,"
    ):
        find_device(0)


def test_processes_on_one_gpu_know_of_each_other_and_forget_those_that_were_killed(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from vqa_embeddings.layers.gpu_claims import Claim\n"
        "claim = Claim(Path(sys.argv[1]), sys.argv[2]); print('claimed', flush=True); time.sleep(600)"
    )
    folder = tmp_path / "claims"
    own = Claim(folder, "GPU-1")
    assert own.count() == 1
    others = [
        subprocess.Popen([sys.executable, "-c", script, str(folder), gpu], cwd=ROOT, stdout=subprocess.PIPE)
        for gpu in ("GPU-1", "GPU-1", "GPU-12")
    ]
    try:
        for other in others:
            assert other.stdout.readline() == b"claimed\n"
        assert own.count() == 3, "of the others, two are on this GPU"
        others[0].kill()
        others[0].wait()
        assert own.count() == 2
    finally:
        for other in others:
            other.kill()
            other.wait()
    own.withdraw()
    last = Claim(folder, "GPU-1")
    assert last.count() == 1
    for path in folder.iterdir():
        path.unlink()  # as what clears temporary files does
    assert last.count() == 1


def test_a_claim_is_locked_before_others_can_see_it(tmp_path, monkeypatch):
    """Otherwise one who counts in this moment would take it for left behind, and remove it."""
    lock, seen = claims.fcntl.flock, []
    monkeypatch.setattr(claims.fcntl, "flock", lambda *given: (seen.extend(tmp_path.glob("GPU-1.*")), lock(*given))[1])
    Claim(tmp_path, "GPU-1")
    assert not seen and list(tmp_path.glob("GPU-1.*"))


@given(st.integers(1, 1 << 40), st.integers(1, 8), st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_what_processes_take_of_a_gpu_never_exceeds_it(total, processes, weights):
    """Whoever measures first, and whatever the others hold by then."""
    held = [int(weight * total / processes) for weight in weights[:processes]]
    shares = [fair_share(total - sum(held), total, own, processes) for own in held]
    assert all(share >= 0 for share in shares)
    assert sum(held) + sum(shares) <= total
    if processes > 1:
        first = fair_share(total - held[0], total, held[0], processes)  # while the others hold nothing yet
        assert held[0] + first <= total / processes + 1


def test_memory_that_torch_keeps_in_reserve_counts_as_free(monkeypatch):
    """After a capture that failed it gives nothing back to the driver; the next cache can have it all the same."""
    figures = {"mem_get_info": (10, 80), "memory_allocated": 9, "memory_reserved": 70, "empty_cache": None}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, figure=figure: figure)
    assert devices.free_memory(torch.device("cuda", 0)) == 10 + 70 - 9
    monkeypatch.setattr(devices, "count_processes", lambda name: 2)
    assert devices.free_memory(torch.device("cuda", 0)) == 80 // 2 - 9


def test_the_plan_says_what_each_process_on_a_gpu_may_take():
    assert describe_memory(80 << 30, 1) == "80.0 GiB on the GPU"
    assert describe_memory(80 << 30, 2) == "80.0 GiB on the GPU, 40.0 for each of 2 processes on it"


def test_a_process_alone_takes_all_that_is_free():
    assert fair_share(70, 80, 10, 1) == 70


@pytest.mark.slow
@pytest.mark.parametrize("reference", [False, True])
def test_float32_is_float32_where_the_environment_asks_for_tf32(checkpoint, reference):
    """In the extraction and in what it is compared with."""
    load = (
        "from tests.helpers.reference import Reference; Reference(folder)"
        if reference
        else "from tests.helpers.asking import load; load(folder)"
    )
    script = (
        "import sys, torch; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "assert torch.backends.cuda.matmul.allow_tf32, 'the environment was to ask for it'\n"
        f"{load}\n"
        "print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)"
    )
    environment = {
        **os.environ,
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "False False\n", done.stdout + done.stderr


def test_tensors_that_are_received_in_one_piece_are_what_they_were():
    """As if they came from a device: in one piece, whatever their formats and shapes."""
    tensors = [
        torch.tensor([3, -1, 1 << 40]),
        torch.randn(2, 3, 5),
        torch.tensor([torch.nan, -torch.inf]),
        torch.empty(0, 4),
    ]
    assert to_host(*tensors)[1] is tensors[1]
    pieces = devices.in_one_piece(tensors)
    for found, wanted in zip(pieces, tensors, strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


CPU = Device("cpu", "CPU", bfloat16=True, no_flash="flash-attn needs a GPU")
GPU = Device("cuda:0", "a GPU", bfloat16=True, no_flash="")
OLD_GPU = Device("cuda:0", "an old GPU", bfloat16=False, no_flash="flash-attn needs compute capability 8.0")


@pytest.mark.parametrize(
    ("device", "asked", "dtype", "attention"),
    [
        (CPU, "auto", "float32", "sdpa"),
        (CPU, "bfloat16", "bfloat16", "sdpa"),
        (GPU, "auto", "bfloat16", "flash_attention_2"),
        (GPU, "float32", "float32", "sdpa"),
        (OLD_GPU, "auto", "float16", "sdpa"),
        (Device("cuda:0", "a GPU", True, "flash-attn is not installed"), "auto", "bfloat16", "sdpa"),
    ],
)
def test_what_is_chosen_suits_the_device_and_says_why(device, asked, dtype, attention):
    chosen = choose_dtype(asked, device)
    kernels = choose_attention("auto", chosen.value, device)
    assert (chosen.value, kernels.value) == (dtype, attention)
    assert chosen.reason and kernels.reason


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CPU, "bfloat16", "flash-attn needs a GPU; use sdpa"),
        (OLD_GPU, "float16", "needs compute capability 8.0; use sdpa"),
        (GPU, "float32", "computes in float16 or bfloat16 only; use sdpa"),
    ],
)
def test_kernels_that_cannot_run_are_refused_with_the_reason(device, dtype, reason):
    with pytest.raises(InputError, match=reason):
        choose_attention("flash_attention_2", dtype, device)


def test_a_format_that_the_device_lacks_is_refused():
    with pytest.raises(InputError, match="an old GPU has none; use float16 or float32"):
        choose_dtype("bfloat16", OLD_GPU)


def test_a_flash_attn_built_for_another_torch_is_not_chosen(tmp_path, monkeypatch):
    assert _no_flash_package() == "flash-attn is not installed"
    monkeypatch.syspath_prepend(tmp_path)
    for fault in ("ImportError('undefined symbol')", "OSError('libcudart.so.12: cannot open shared object file')"):
        (tmp_path / "flash_attn.py").write_text(f"raise {fault}")
        assert _no_flash_package().startswith("flash-attn is installed but cannot be imported (")
        importlib.invalidate_caches()


def test_a_flash_attn_that_the_library_does_not_take_is_not_chosen(monkeypatch):
    """Asked for its kernels all the same, it would look for others to download."""
    flash_stand_in.install(monkeypatch)
    assert _no_flash_package() == "transformers does not take this flash-attn for version 2"
