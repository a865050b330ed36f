"""A model of the hub: the cache that holds it, or that it is downloaded to. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vqa_embeddings.base.environment import names_hub_cache
from vqa_embeddings.errors import InputError, one_line

MODEL_CACHE = Path("./model_cache")  # as published; the demo's model lies there too
WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def download(
    model: str, revision: str, cache_dir: Path | None, is_whole: Callable[[Path], bool], unwanted: Sequence[str]
) -> tuple[Path, str]:
    """Find a model in a cache, or download it.

    Args:
        cache_dir: the cache; None: see `choose_cache`.
        is_whole: whether a snapshot's folder has all of the model's weights.
        unwanted: patterns of files that are not downloaded.
    Returns:
        Its folder, and its revision: a commit.
    Raises:
        InputError: it is neither there nor to be had.
    """
    from huggingface_hub import constants

    caches = [cache_dir] if cache_dir else [MODEL_CACHE, Path(constants.HF_HUB_CACHE)]
    whole = [len(caches) > 1 and _has(model, revision, cache, is_whole) for cache in caches]
    begun = [bool(_revisions(model, cache)) for cache in caches]
    cache = choose_cache(caches, whole, begun, names_hub_cache())
    try:
        path = _snapshot(model, revision, cache, unwanted)
    except Exception as error:  # no network, no such model, no access: the hub has many ways to say no
        raise InputError(
            f"{model} (revision {revision}) is neither a folder nor to be had from the hub: {one_line(error)}; "
            f"{_what_is_there(model, caches)}; check --model and the network, or give the folder of a downloaded "
            "checkpoint"
        ) from None
    return path, path.name  # a snapshot's folder is named after its commit


def choose_cache(caches: Sequence[Path], whole: Sequence[bool], begun: Sequence[bool], named: bool) -> Path:
    """The cache to take a model from, so that nothing is downloaded twice.

    Args:
        caches: this program's own, from which earlier runs had theirs, and the hub library's; or one that was given.
        whole: whether each has all of the wanted revision; the first that has goes before all.
        begun: whether each has some of the model.
        named: whether the environment says where the library's is: then downloads go there, and not on where some is.
    """
    if any(whole):
        return caches[list(whole).index(True)]
    if named:
        return caches[-1]
    return caches[list(begun).index(True) if any(begun) else 0]


def _snapshot(model: str, revision: str, cache: Path, unwanted: Sequence[str] = (), offline: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    patterns = {"allow_patterns": WANTED, "ignore_patterns": [*unwanted]}
    return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=offline, **patterns))


def _has(model: str, revision: str, cache: Path, is_whole: Callable[[Path], bool]) -> bool:
    try:
        return is_whole(_snapshot(model, revision, cache, offline=True))
    except Exception:  # as above: asking for it says what is wrong
        return False


def _revisions(model: str, cache: Path) -> list[str]:
    """The revisions of a model of which a cache has something, by their names or their commits."""
    folder = cache.expanduser() / f"models--{model.replace('/', '--')}"
    refs = folder / "refs"
    try:
        names = {path.relative_to(refs).as_posix(): path.read_text() for path in refs.rglob("*") if path.is_file()}
        commits = {path.name for path in (folder / "snapshots").glob("*")}
    except (OSError, ValueError):  # a cache that may not be read, or is damaged, has nothing for us
        return []
    return sorted(names) + sorted(commits - set(names.values()))


def _what_is_there(model: str, caches: Sequence[Path]) -> str:
    """Where a model was looked for, and which of its revisions are there."""
    found = {cache: ", ".join(_revisions(model, cache)) for cache in caches}
    there = " and in ".join(f"{at} (which has {held})" if held else f"{at}" for at, held in found.items())
    return f"looked in {there}" + ("; --revision takes one that is there" if any(found.values()) else "")
