"""Rendered flowers in front of backgrounds, as a phone sees them (domain A) and as a DSLR does (domain B).

A scene is a function of (seed, index) alone and has no size: the same scene rendered larger shows more detail. Both
cameras stand in the same place with the same framing, so that the two renderings of a scene are a true pair, aligned
to the pixel; training sets take different scenes for A and B, as unpaired training supposes.

Depth of field is that of a thin lens: a point at distance d (metres), seen by a lens of focal length f and f-number N
focused at s, makes a disc of diameter c = (f / N) f |d - s| / (d (s - f)) on the sensor. The phone (4.2 mm, f/1.8, a
5.6 mm sensor) has discs below a pixel at any usual size; the DSLR (85 mm, f/2 to f/5.6, full frame) has discs of up to
a fifth of the frame. Light is added up in linear units, so that a highlight keeps its energy and becomes a bright disc.

With several styles each DSLR picture has one of so many colour grades, drawn for its scene: what the phone's picture
does not tell. `graded` shifts the chroma of the whole picture, by the same amount in one of `styles` directions.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from cyclegan_fast.data._camera import PHONE, Exposure, develop_dslr, develop_phone, dslr
from cyclegan_fast.data._raster import Bools, Floats
from cyclegan_fast.data._scene import Scene, draw_scene, rasterise
from cyclegan_fast.data.folder import SPLITS, DataError
from cyclegan_fast.machine import usable_cores
from cyclegan_fast.progress import Bar

Picture: TypeAlias = npt.NDArray[np.uint8]

_TRUTH = {"testA": "truthB", "testB": "truthA"}
_INDEX = "synthetic.json"
_MAKER = "cyclegan_fast.data.synthetic"
_FORMAT = 2  # raised whenever the renderer draws a different picture for the same (seed, index, size)
_GRADE = 28.0  # shift of the chroma between a picture and its graded one, of 255
_STYLE_STREAM = 1  # separates the draw of a scene's grade from that of the scene
_STALE = 3600.0  # seconds without a new picture after which a half-built folder is taken for abandoned
_PIXELS_WORTH_A_PROCESS = 64 * 128 * 128  # below this, starting processes takes longer than rendering


def scene(seed: int, index: int) -> Scene:
    """Scene `index` of the endless sequence of a seed; both are integers >= 0."""
    return draw_scene(np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index)))))


def render_phone(what: Scene, size: int) -> Picture:
    """The scene as a phone renders it, uint8 sRGB [size, size, 3] (domain A). Raises ValueError as `render_pair`."""
    return _render(what, size, "A")[0]


def render_dslr(what: Scene, size: int) -> Picture:
    """The scene as a DSLR renders it, focused on the main flower, uint8 sRGB [size, size, 3] (domain B)."""
    return _render(what, size, "B")[0]


def render_pair(seed: int, index: int, size: int) -> tuple[Picture, Picture, Floats]:
    """Both renderings of scene `index` of `seed`: (phone, DSLR, depth).

    The pictures are uint8 sRGB [size, size, 3]; depth is float32 [size, size], the distance in metres of the nearest
    surface. Raises ValueError for a size outside 16..4096.
    """
    depth = np.full((size, size), np.inf, np.float32)
    phone, reflex = _render(scene(seed, index), size, "AB", depth)
    return phone, reflex, depth


def in_focus(seed: int, index: int, size: int) -> Bools:
    """Where the DSLR's rendering of scene `index` of `seed` is sharp, bool [size, size]: the true subject.

    There the nearest surface belongs to a layer whose disc (see above) has a diameter of less than 1/256 of the frame,
    a pixel of a picture of 256: the main flower and most of its stem. Raises ValueError as `render_pair`.
    """
    _check_size(size)
    what = scene(seed, index)
    lens = dslr(what.aperture)
    sharp = np.zeros((size, size), bool)
    for distance, rgba, _ in rasterise(what, size, distances=False):
        sharp[rgba[3] > 0.5] = lens.circle_of_confusion(distance, what.focus) < 1 / 256
    return sharp


def scene_of(picture: str | Path) -> tuple[int, int] | None:
    """(seed, index) of the scene in a picture of a rendered data set, ROOT/testA/000002.jpg for instance.

    None for any other picture, and for one of a set that another version has rendered.
    """
    path = Path(picture)
    try:
        index = json.loads((path.absolute().parent.parent / _INDEX).read_text(encoding="utf-8"))
        seed, number = index["seed"], int(path.stem)
        known = index["made_by"] == _MAKER and index["format"] == _FORMAT and path.name == f"{number:06d}.jpg"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (seed, number) if known and isinstance(seed, int) and seed >= 0 <= number else None


def style_of(seed: int, index: int, styles: int) -> int:
    """The grade, 0 to styles - 1, of scene `index` of `seed`."""
    return int(np.random.SeedSequence((seed, index, _STYLE_STREAM)).generate_state(1)[0]) % styles


def graded(picture: Picture, style: int, styles: int) -> Picture:
    """A picture uint8 [H, W, 3] in grade `style` of so many; as it is where there is only one."""
    if styles == 1:
        return picture
    angle = 2 * np.pi * style / styles
    blue, red = _GRADE * np.cos(angle), _GRADE * np.sin(angle)  # of Cb and Cr of ITU-R BT.601
    shift = np.array([1.402 * red, -0.344136 * blue - 0.714136 * red, 1.772 * blue])
    result: Picture = np.clip(np.rint(picture + shift), 0, 255).astype(np.uint8)
    return result


def _render(what: Scene, size: int, domains: str, depth: Floats | None = None) -> list[Picture]:
    """A picture for each of the domains; distances are written into `depth`. Layers are drawn once and not kept."""
    _check_size(size)
    lenses = {"A": PHONE, "B": dslr(what.aperture)}
    exposures = {domain: Exposure(lenses[domain], what.focus, size) for domain in domains}
    for distance, rgba, distances in rasterise(what, size, distances=depth is not None):
        for exposure in exposures.values():
            exposure.add(distance, rgba)
        if depth is not None and distances is not None:
            np.minimum(depth, distances, out=depth)
    develop = {"A": develop_phone, "B": develop_dslr}
    gain = dict(zip("AB", what.exposure.tolist(), strict=True))
    return [develop[d](exposures[d].light(), gain[d], what.develop_seed) for d in domains]


def _check_size(size: int) -> None:
    if not 16 <= size <= 4096:
        raise ValueError(f"size = {size} is not allowed: a picture is 16 to 4096 pixels wide")


@dataclass(frozen=True)
class _Parameters:
    """What decides every pixel of a data set."""

    train: int
    test: int
    size: int
    seed: int
    format: int = _FORMAT
    aligned: bool = False
    styles: int = 1

    def __str__(self) -> str:
        text = f"train={self.train}, test={self.test}, size={self.size}, seed={self.seed}, format={self.format}"
        return text + ", aligned" * self.aligned + f", styles={self.styles}" * (self.styles > 1)

    def indices(self, split: str) -> range:
        """Scenes of a split. Splits take turns, so that they share none and a larger set begins with a smaller one."""
        count = self.train if split.startswith("train") else self.test
        first = SPLITS.index(split)
        return range(first, first + 4 * count, 4)

    def jobs(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """(folders, scene) of every scene: a folder for each of its renderings, whose domain ends its name."""
        if self.aligned:
            for split in ("train", "test"):
                yield from (((f"{split}A", f"{split}B"), index) for index in self.indices(f"{split}A"))
            return
        for split in SPLITS:
            folders = (split, _TRUTH[split]) if split in _TRUTH else (split,)
            yield from ((folders, index) for index in self.indices(split))

    def files(self) -> Iterator[tuple[str, int]]:
        """(folder, scene) of every picture."""
        for folders, index in self.jobs():
            yield from ((folder, index) for folder in folders)


def ensure_dataset(
    root: str | Path,
    *,
    train: int,
    test: int,
    size: int,
    seed: int,
    aligned: bool = False,
    styles: int = 1,
    workers: int = 0,
    progress: bool = False,
) -> Path:
    """The rendered data set at `root`: reused when complete and rendered with the same parameters, else built.

    Holds trainA, trainB (`train` pictures each), testA, testB (`test` each), truthB (the DSLR's rendering of each scene
    of testA, under the same file name), truthA likewise for testB, and synthetic.json. Pictures are JPEG (quality 95,
    4:4:4), size x size pixels, named by their scene; no scene is in two of the four splits. It is built by `workers`
    processes (0: one for each core) in a folder beside `root` that is renamed when complete, so that `root` never holds
    half a set; `progress` shows a bar on stderr. styles: see `graded`.

    With `aligned` both cameras see the same scenes instead: trainB holds the partners of trainA, and testB of testA,
    under the same names, and there are no truth folders.

    Raises DataError when `root` holds anything else, and when it cannot be written.
    """
    root = Path(root)
    wanted = _Parameters(train, test, size, seed, aligned=aligned, styles=styles)
    for name, value, low, high in (("train", train, 1, 10**7), ("test", test, 1, 10**7), ("size", size, 16, 4096)):
        if not low <= value <= high:
            raise DataError(f"synthetic flowers: {name} = {value} is not allowed: {low} to {high}")
    if seed < 0:
        raise DataError(f"synthetic flowers: seed = {seed} is not allowed: an integer >= 0")
    if _is_there(root, wanted):
        return root
    with _building(root) as partial_folder:
        _render_all(partial_folder, wanted, workers, progress)
        (partial_folder / _INDEX).write_text(json.dumps(_index(wanted), indent=1) + "\n", encoding="utf-8")
        _move_in(partial_folder, root, wanted)
    return root


def _index(wanted: _Parameters) -> dict[str, Any]:
    return {"made_by": _MAKER, **asdict(wanted)}


def _is_there(root: Path, wanted: _Parameters) -> bool:
    """True: `root` is the wanted set. False: there is nothing yet. Anything else raises DataError."""
    try:
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            return False
        index = json.loads((root / _INDEX).read_text(encoding="utf-8"))
        later = {"aligned": False, "styles": 1}  # not in sets of earlier versions
        found = _Parameters(**{key: (later | index)[key] for key in asdict(wanted)})
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{root} holds something else than a rendered data set: synthetic flowers are only written to a new or "
            f"empty folder; choose another one (data.root)"
        ) from None
    if found != wanted:
        raise DataError(
            f"{root} holds synthetic flowers of {found}, but {wanted} are asked for: choose another folder (data.root) "
            f"or delete that one"
        )
    missing = [path for folder, i in wanted.files() if not _usable(path := _picture_path(root, folder, i))]
    if missing:
        raise DataError(
            f"{root} lacks {len(missing)} of its pictures, the first is {missing[0].relative_to(root)}: delete the "
            f"folder to have it rendered again"
        )
    return True


def _usable(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _picture_path(root: Path, folder: str, index: int) -> Path:
    return root / folder / f"{index:06d}.jpg"


@contextmanager
def _building(root: Path) -> Iterator[Path]:
    """A folder beside `root` to build in, removed on any failure; OSError becomes DataError."""
    folder: Path | None = None
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        folder = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".partial", dir=root.parent))
        folder.chmod(0o755)
        yield folder
    except OSError as error:
        raise DataError(f"{root}: the synthetic flowers could not be written: {error.strerror or error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Delete what a killed build left; a build that still goes on touches its folders all the time."""
    for leftover in root.parent.glob(f".{root.name}.*.partial"):
        try:
            latest = max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
        except OSError:
            continue
        if time.time() - latest > _STALE:
            shutil.rmtree(leftover, ignore_errors=True)


def _move_in(folder: Path, root: Path, wanted: _Parameters) -> None:
    """Rename the finished folder; another process may have finished the same set a moment before."""
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()
    try:
        folder.rename(root)
    except OSError:
        if not root.exists() or not _is_there(root, wanted):
            raise


def _render_all(folder: Path, wanted: _Parameters, workers: int, progress: bool) -> None:
    jobs = list(wanted.jobs())
    for name in dict.fromkeys(name for folders, _ in jobs for name in folders):
        (folder / name).mkdir()
    render = partial(_render_job, str(folder), wanted)
    with Bar(total=len(jobs), desc="rendering flowers", unit="scene", disable=not progress, file=sys.stderr) as bar:
        for _ in _in_processes(render, jobs, _worker_count(workers, len(jobs) * wanted.size**2)):
            bar.update()


def _worker_count(workers: int, pixels: int) -> int:
    if workers:
        return workers
    if pixels <= _PIXELS_WORTH_A_PROCESS:
        return 1
    return usable_cores()


def _in_processes(render: partial[None], jobs: list[tuple[tuple[str, ...], int]], workers: int) -> Iterable[None]:
    if workers == 1:
        yield from map(render, jobs)
        return
    # Spawned, not forked: the caller may hold threads, locks and a CUDA context.
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn"))
    try:
        with _one_blas_thread():
            results = pool.map(render, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))
        yield from results
    except BrokenProcessPool:
        raise DataError(
            "synthetic flowers: a rendering process died, for want of memory perhaps: use fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Processes started inside get one BLAS thread each: there is one of them a core already."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _render_job(folder: str, wanted: _Parameters, job: tuple[tuple[str, ...], int]) -> None:
    """Render one scene into its folders."""
    names, index = job
    pictures = _render(scene(wanted.seed, index), wanted.size, "".join(name[-1] for name in names))
    for name, picture in zip(names, pictures, strict=True):
        if name.endswith("B"):
            picture = graded(picture, style_of(wanted.seed, index, wanted.styles), wanted.styles)
        Image.fromarray(picture).save(_picture_path(Path(folder), name, index), "JPEG", quality=95, subsampling=0)
