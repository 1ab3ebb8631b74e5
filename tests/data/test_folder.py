"""folder.py: what is found, what is refused and how it is said, and that subsets are what they claim."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cyclegan_fast.data import folder as folder_module
from cyclegan_fast.data.folder import DataError, Entry, list_images, report, scan_dataset, scan_folder, subset


def picture(path: Path, size: tuple[int, int] = (20, 10), mode: str = "RGB", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **options)
    return path


def truncated(path: Path) -> Path:
    """A JPEG whose header is good and whose pixels are cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for split, count in (("trainA", 3), ("trainB", 2), ("testA", 1), ("testB", 1)):
        for i in range(count):
            picture(root / split / f"{i}.png", (20 + i, 10))
    return root


def test_listing_is_recursive_sorted_and_without_the_hidden(tmp_path: Path) -> None:
    names = ["b.JPG", "a/z.png", "a/b/c.heic", "a.webp", "A.tiff", "ä.bmp", "a-1/x.jpeg", "z.avif", "q.ppm"]
    ignored = [
        ".hidden.jpg",
        ".cache/a.jpg",
        "a/.thumbs/b.png",
        "notes.txt",
        "Thumbs.db",
        "clip.gif",
        "jpg",
        "a.jpg.part",
    ]
    for name in names + ignored:
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "root" / "folder.png").mkdir()
    picture(tmp_path / "root" / "folder.png" / "inside.png")
    found = [path.relative_to(tmp_path / "root").as_posix() for path in list_images(tmp_path / "root")]
    assert found == sorted([*names, "folder.png/inside.png"])


def test_listing_follows_links_once(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    picture(root / "b.png")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "dead.png").symlink_to(tmp_path / "nowhere.png")
    assert [path.relative_to(root).as_posix() for path in list_images(root)] == ["b.png", "dead.png", "link/a.png"]
    (tmp_path / "whole").symlink_to(root)
    assert len(list_images(tmp_path / "whole")) == 3
    scan = scan_folder(root, split="trainA")
    assert [entry.name for entry in scan.entries] == ["b.png", "link/a.png"]
    assert scan.bad == ((root / "dead.png", "cannot be read: No such file or directory"),)


def test_listing_what_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere: the folder cannot be listed: No such file"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "a" / "locked").mkdir(parents=True)
    iterdir = Path.iterdir

    def locked(self: Path) -> object:
        if self.name == "locked":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", locked)
    with pytest.raises(DataError, match="locked: the folder cannot be listed: Permission denied"):
        list_images(tmp_path / "a")


def test_entries_say_what_the_file_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = picture(tmp_path / "sub" / "turned.jpg", (20, 10), exif=exif)
    os.utime(path, ns=(1, 1_234_567_890_123_456_789))
    (entry,) = scan_folder(tmp_path, split="trainB").entries
    size = path.stat().st_size
    assert entry == Entry(path, "sub/turned.jpg", 10, 20, "RGB", "JPEG", size, 1_234_567_890_123_456_789)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_full_scan_finds_what_the_headers_hide(tmp_path: Path, workers: int) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    cut = truncated(tmp_path / "2a.jpg")
    quick = scan_folder(tmp_path, split="trainA", workers=workers)
    assert (len(quick.entries), quick.bad) == (5, ())
    full = scan_folder(tmp_path, split="trainA", full=True, workers=workers)
    assert [entry.name for entry in full.entries] == [f"{i}.png" for i in range(4)]
    ((path, reason),) = full.bad
    assert path == cut
    assert "truncated" in reason


def test_full_scan_compares_header_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "a.png", (20, 10))
    real = folder_module.read_header(path)
    other = type(real)(21, 10, real.mode, real.format)
    monkeypatch.setattr(folder_module, "read_header", lambda _: other)
    ((_, reason),) = scan_folder(tmp_path, split="trainA", full=True).bad
    assert reason == "its header says 21x10, but it decodes to 20x10"


def test_a_file_that_vanishes_during_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    read_header = folder_module.read_header

    def read_and_remove(path: Path) -> object:
        header = read_header(path)
        path.unlink()
        return header

    monkeypatch.setattr(folder_module, "read_header", read_and_remove)
    scan = scan_folder(tmp_path, split="trainA")
    assert scan.entries == ()
    assert scan.bad[0][1] == "cannot be read: No such file or directory"


def test_progress_is_shown_only_when_asked(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan_folder(dataset / "trainA", split="trainA")
    assert capsys.readouterr().err == ""
    scan_folder(dataset / "trainA", split="trainA", progress=True)
    assert "scan trainA: 100%" in capsys.readouterr().err


def test_the_splits_of_a_dataset(dataset: Path) -> None:
    scans = scan_dataset(dataset, unreadable="refuse", need_test=True)
    assert {split: len(scan.entries) for split, scan in scans.items()} == {
        "trainA": 3,
        "trainB": 2,
        "testA": 1,
        "testB": 1,
    }
    assert all(scan.split == split and scan.folder == dataset / split for split, scan in scans.items())
    assert list(scan_dataset(str(dataset), unreadable="skip")) == ["trainA", "trainB", "testA", "testB"]


def test_test_splits_are_optional_unless_needed(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    (dataset / "testA" / "0.png").unlink()
    with caplog.at_level(logging.WARNING, "cyclegan_fast.data"):
        assert list(scan_dataset(dataset, unreadable="refuse")) == ["trainA", "trainB", "testB"]
    assert "testA: no picture that can be used" in caplog.text
    with pytest.raises(DataError, match="testA: no picture that can be used; it is empty"):
        scan_dataset(dataset, unreadable="refuse", need_test=True)
    (dataset / "testA").rmdir()
    assert list(scan_dataset(dataset, unreadable="refuse")) == ["trainA", "trainB", "testB"]
    with pytest.raises(DataError, match="no folder testA; it holds testB/, trainA/, trainB/"):
        scan_dataset(dataset, unreadable="refuse", need_test=True)


def test_one_picture_a_domain_is_enough(tmp_path: Path) -> None:
    for split in ("trainA", "trainB"):
        picture(tmp_path / split / "only.png")
    assert [len(scan.entries) for scan in scan_dataset(tmp_path, unreadable="refuse").values()] == [1, 1]


def test_missing_folders_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist: data\.root must be a folder with trainA and trainB"):
        scan_dataset(tmp_path / "nowhere", unreadable="refuse")
    with pytest.raises(DataError, match=r"a\.png is not a folder"):
        scan_dataset(picture(tmp_path / "a.png"), unreadable="refuse")
    root = tmp_path / "set"
    for name in ("train_A/1.jpg", "train_B/1.jpg"):
        picture(root / name)
    with pytest.raises(DataError, match="no folder trainA and no folder trainB; it holds train_A/, train_B/"):
        scan_dataset(root, unreadable="refuse")
    picture(root / "x.JPG", format="JPEG")
    picture(root / "y.jpg")
    picture(root / "trainA" / "1.jpg")
    with pytest.raises(DataError, match=r"no folder trainB; it holds trainA/, train_A/, train_B/, 2 files \.jpg\."):
        scan_dataset(root, unreadable="refuse")


def test_folders_without_a_usable_picture(dataset: Path) -> None:
    for path in (dataset / "trainB").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="trainB: no picture that can be used; it is empty"):
        scan_dataset(dataset, unreadable="refuse")
    picture(dataset / "trainB" / "a.gif")
    with pytest.raises(DataError, match=r"trainB: no picture that can be used; it holds 1 file \.gif"):
        scan_dataset(dataset, unreadable="refuse")
    (dataset / "trainB" / "b.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 file cannot be used:\n.*b\.jpg: the file is empty"):
        scan_dataset(dataset, unreadable="refuse")
    with pytest.raises(DataError, match=r"trainB: no picture that can be used; it holds 1 file \.gif, 1 file \.jpg"):
        scan_dataset(dataset, unreadable="skip")


def test_unusable_files_are_refused_by_name(dataset: Path) -> None:
    (dataset / "trainA" / "empty.jpg").write_bytes(b"")
    (dataset / "testB" / "text.png").write_text("not a picture, honestly")
    with pytest.raises(DataError) as caught:
        scan_dataset(dataset, unreadable="refuse")
    first, empty, text, last = str(caught.value).splitlines()
    assert first == "2 files cannot be used:"
    assert empty == f"  {dataset / 'trainA' / 'empty.jpg'}: the file is empty (0 bytes)"
    assert text.startswith(f"  {dataset / 'testB' / 'text.png'}: not a picture in a known format")
    assert "data.unreadable=skip" in last


def test_a_long_list_of_unusable_files_is_counted(dataset: Path) -> None:
    for i in range(25):
        (dataset / "trainA" / f"bad{i:02}.jpg").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        scan_dataset(dataset, unreadable="refuse")
    lines = str(caught.value).splitlines()
    assert lines[0] == "25 files cannot be used:"
    assert [line for line in lines if "bad" in line] == lines[1:21]
    assert lines[21] == "  ... and 5 more"


def test_unusable_files_are_left_out_by_name(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncated(dataset / "trainA" / "1a.jpg")
    with caplog.at_level(logging.WARNING, "cyclegan_fast.data"):
        scans = scan_dataset(dataset, unreadable="skip", full=True)
    assert [entry.name for entry in scans["trainA"].entries] == ["0.png", "1.png", "2.png"]
    assert [path.name for path, _ in scans["trainA"].bad] == ["1a.jpg"]
    assert f"left out: {dataset / 'trainA' / '1a.jpg'}: " in caplog.text
    with pytest.raises(ValueError, match="unreadable = 'ignore' is not allowed"):
        scan_dataset(dataset, unreadable="ignore")


def test_report(tmp_path: Path) -> None:
    for i, size in enumerate([(30, 10), (10, 20), (50, 40)]):
        picture(tmp_path / "trainA" / f"{i}.png", size)
    picture(tmp_path / "trainB" / "a.jpg", (7, 5))
    picture(tmp_path / "trainB" / "b.png", (7, 9), "L")
    (tmp_path / "trainB" / "bad.png").write_bytes(b"")
    lines = report(scan_dataset(tmp_path, unreadable="skip")).splitlines()
    assert lines[0].split() == ["split", "pictures", "bad", "smallest", "median", "largest", "formats"]
    assert lines[1].split() == ["trainA", "3", "0", "10x20", "30x10", "50x40", "3", "PNG", "RGB"]
    assert lines[2].split() == ["trainB", "2", "1", "7x5", "7x5", "7x9", "1", "JPEG", "RGB,", "1", "PNG", "L"]
    assert lines[3] == f"bad: {tmp_path / 'trainB' / 'bad.png'}: the file is empty (0 bytes)"
    assert len({line.index(word) for line, word in zip(lines, ("formats", "3 PNG", "1 JPEG"), strict=False)}) == 1


def test_report_of_an_empty_split(tmp_path: Path) -> None:
    lines = report({"trainA": scan_folder(tmp_path, split="trainA")}).splitlines()
    assert lines[1].split() == ["trainA", "0", "0", "-", "-", "-", "-"]


def entries(count: int, place: str = "/p") -> list[Entry]:
    return [Entry(Path(place) / f"{i:03}.png", f"{i:03}.png", 1, 1, "L", "PNG", i, i) for i in range(count)]


def names(chosen: tuple[Entry, ...]) -> list[str]:
    return [entry.name for entry in chosen]


def test_subset_is_a_function_of_seed_domain_and_names() -> None:
    everything = entries(200)
    chosen = names(subset(everything, 50, 0, "A"))
    assert len(set(chosen)) == 50
    assert chosen == sorted(chosen)
    shuffled = list(np.random.default_rng(0).permutation(np.array(entries(200, "/elsewhere"), dtype=object)))
    assert names(subset(shuffled, 50, 0, "A")) == chosen
    assert names(subset(everything, 50, 1, "A")) != chosen
    assert names(subset(everything, 50, 0, "B")) != chosen
    assert set(names(subset(everything, 49, 0, "A"))) < set(chosen)
    one_less = [entry for entry in everything if entry.name != chosen[7]]
    assert len(set(names(subset(one_less, 50, 0, "A"))) - set(chosen)) == 1


def test_subset_limits() -> None:
    everything = entries(5)
    for limit in (None, 5, 6):
        assert subset(everything[::-1], limit, 0, "A") == tuple(everything)
    assert len(subset(everything, 1, 0, "A")) == 1
    with pytest.raises(DataError, match="a subset of 0 pictures of A"):
        subset(everything, 0, 0, "A")


def test_subset_draws_evenly() -> None:
    """Over 400 seeds each of 20 pictures is among 5 about a quarter of the time (standard deviation 8.7)."""
    counts = dict.fromkeys(names(tuple(entries(20))), 0)
    for seed in range(400):
        for name in names(subset(entries(20), 5, seed, "A")):
            counts[name] += 1
    assert all(abs(count - 100) < 40 for count in counts.values())


def test_subset_does_not_depend_on_the_process(tmp_path: Path) -> None:
    """Python's own hash of text differs from run to run; names that are not text in UTF-8 must work too."""
    program = (
        "from pathlib import Path\n"
        "from cyclegan_fast.data.folder import Entry, subset\n"
        "e = [Entry(Path('/p'), f'{i:03}.png', 1, 1, 'L', 'PNG', i, i) for i in range(200)]\n"
        "print([x.name for x in subset(e, 9, 0, 'A')])\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(folder_module.__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(names(subset(entries(200), 9, 0, "A")))
    odd = Entry(Path("/p"), os.fsdecode(b"\xff.png"), 1, 1, "L", "PNG", 0, 0)
    assert len(subset([odd, *entries(3)], 2, 0, "A")) == 2


def test_real_dataset(real_photos: Path) -> None:
    scans = scan_dataset(real_photos / "facades", unreadable="refuse", need_test=True, full=False)
    assert [len(scan.entries) for scan in scans.values()] == [120, 120, 50, 50]
    assert {(entry.width, entry.height) for scan in scans.values() for entry in scan.entries} == {(256, 256)}


def test_real_awkward_folder(real_photos: Path) -> None:
    scan = scan_folder(real_photos / "awkward", split="trainA", full=True)
    assert [path.name for path, _ in scan.bad] == [
        "big_height.webp",
        "broken_data_stream.png",
        "not_an_image_beach.jpg",
        "truncated_2725x2225.jpg",
        "truncated_small.png",
        "ultrahdr_truncated_1512x2688.jpg",
    ]
    assert len(scan.entries) == 33 - 1 - 6  # the GIF has no suffix of ours
