"""Creating an attempt: all of it, within its size, privately, or one plain error and nothing left."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gradwatch.journal import JournalError, JournalReader, JournalWriter, attempt_directory, find_attempts
from gradwatch.journal import mapping as file_mapping
from gradwatch.journal.manifest import Manifest, Optimizer, Section, Tensor
from gradwatch.journal.writer import DEFAULT_CAPACITY, LEAST_ROWS, share_out

MakeManifest = Callable[..., Manifest]
Append = Callable[..., None]


def files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir()) if directory.exists() else []


def large(tensors: int, histograms: bool) -> Manifest:
    names = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(tensors))
    return Manifest(
        run="run",
        model="model",
        optimizers=(Optimizer("default", "AdamW", False, ({"name": "0"}, {"name": "1"})),),
        tensors=tuple(Tensor(n, (4096, 4096), "torch.bfloat16", 4096**2, 0, 1, n[:-7]) for n in names),
        host_columns=tuple(f"h{i}" for i in range(16)),
        device_columns=tuple(f"d{i}" for i in range(6)),
        sections=(Section("all", 0, 8 + (24 if histograms else 4) * tensors),),
    )


# -- size


@pytest.mark.parametrize("tensors", [0, 1, 6, 100, 2_000, 20_000, 65_536])
def test_an_attempt_stays_within_its_capacity(tensors: int) -> None:
    manifest = large(tensors, histograms=tensors <= 20_000)
    size = len(manifest.to_json())
    rings = share_out(manifest, DEFAULT_CAPACITY, size)
    assert sum(r.file_size for r in rings.values()) + DEFAULT_CAPACITY // 8 + size <= DEFAULT_CAPACITY
    assert min(r.capacity for r in rings.values()) >= 4
    assert rings["tensors.ring"].capacity >= LEAST_ROWS


def test_small_models_have_long_histories() -> None:
    rings = share_out(large(100, histograms=True), DEFAULT_CAPACITY)
    assert rings["steps.ring"].capacity == rings["tensors.ring"].capacity > 25_000


def test_a_model_too_large_for_its_histograms_is_told_what_to_leave_out(tmp_path: Path) -> None:
    manifest = large(65_536, histograms=True)
    with pytest.raises(ValueError, match=r"65536 tensors.*leave the weight histograms out"):
        JournalWriter(attempt_directory(tmp_path, "run", 0, 0), manifest)
    assert files(tmp_path) == []


def test_the_largest_model_is_written_and_read(tmp_path: Path) -> None:
    writer = JournalWriter(attempt_directory(tmp_path, "run", 0, 0), large(65_536, histograms=False))
    assert sum(p.stat().st_size for p in writer.directory.iterdir()) <= DEFAULT_CAPACITY
    writer.tensors.payload[:] = 2.0
    writer.steps.append(0, 1.0, [0.0] * 16, [0.0] * 6)
    writer.tensors.append(1, 0, 1.0)
    writer.close()
    reader = JournalReader(writer.directory)
    assert reader.manifest == writer.manifest
    assert reader.poll().tensors.values.sum() == 2 * 65_536
    reader.close()


def test_the_space_is_allocated(writer: JournalWriter) -> None:
    for ring in ("steps.ring", "tensors.ring", "samples.ring"):
        found = (writer.directory / ring).stat()
        assert found.st_blocks * 512 >= found.st_size


# -- whose


def test_an_attempt_that_was_there_is_refused_and_left_alone(
    writer: JournalWriter, directory: Path, make_manifest: MakeManifest, append: Append
) -> None:
    append(writer, 3)
    writer.close()
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    with pytest.raises(FileExistsError, match="take the next one"):
        JournalWriter(directory, make_manifest())
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_an_attempt_whose_writer_lives_here_is_refused_and_goes_on(
    writer: JournalWriter, directory: Path, make_manifest: MakeManifest, append: Append
) -> None:
    with pytest.raises(BlockingIOError):
        JournalWriter(directory, make_manifest())
    append(writer, 1)
    writer.close()
    reader = JournalReader(directory)
    assert len(reader.poll().steps) == 1
    reader.close()


def test_an_attempt_whose_writer_lives_elsewhere_is_refused(
    writer: JournalWriter, directory: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from gradwatch.journal import JournalWriter\n"
        "from gradwatch.journal.manifest import Manifest\n"
        "try: JournalWriter(Path(sys.argv[1]), Manifest('run', 'model'))\n"
        "except BlockingIOError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True, timeout=60)
    assert "another process writes this attempt" in done.stdout
    assert files(directory) == ["events.jsonl", "lock", "manifest.json", "samples.ring", "steps.ring", "tensors.ring"]


# -- modes


def test_files_are_private(writer: JournalWriter, directory: Path, tmp_path: Path) -> None:
    assert {stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()} == {0o600}
    made = [tmp_path / "run", tmp_path / "run/rank-0", directory]
    assert {stat.S_IMODE(p.stat().st_mode) for p in made} == {0o700}


def test_files_below_a_setgid_root_are_the_groups_to_read(tmp_path: Path, make_manifest: MakeManifest) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(0o2770)
    writer = JournalWriter(attempt_directory(root, "run", 0, 0), make_manifest())
    assert {stat.S_IMODE(p.stat().st_mode) for p in writer.directory.iterdir()} == {0o640}
    assert {stat.S_IMODE(p.stat().st_mode) for p in (root / "run", writer.directory)} == {0o2750}
    writer.events.write({"kind": "x", "text": "y" * 5000})
    writer.close()


# -- places that cannot hold it


def test_missing_parents_are_created(tmp_path: Path, make_manifest: MakeManifest) -> None:
    JournalWriter(attempt_directory(tmp_path / "a" / "b", "run", 0, 0), make_manifest()).close()
    assert len(list(find_attempts(tmp_path / "a" / "b"))) == 1


@pytest.mark.parametrize("place", ["root", "root/run", "root/run/rank-0", "root/run/rank-0/attempt-0"])
def test_a_component_that_is_a_file_is_an_os_error(tmp_path: Path, make_manifest: MakeManifest, place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("in the way")
    with pytest.raises(OSError):
        JournalWriter(attempt_directory(tmp_path / "root", "run", 0, 0), make_manifest())
    assert (tmp_path / place).read_text() == "in the way"


@pytest.mark.parametrize("place", ["run", "run/rank-0", "run/rank-0/attempt-0"])
def test_a_symbolic_link_below_the_root_is_refused(tmp_path: Path, make_manifest: MakeManifest, place: str) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    elsewhere.mkdir()
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links are not followed"):
        JournalWriter(attempt_directory(root, "run", 0, 0), make_manifest())
    assert files(elsewhere) == []


def test_a_root_that_is_a_symbolic_link_is_its_owners_choice(tmp_path: Path, make_manifest: MakeManifest) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    writer = JournalWriter(attempt_directory(tmp_path / "root", "run", 0, 0), make_manifest())
    writer.close()
    assert len(files(tmp_path / "real/run/rank-0/attempt-0")) == 6


@pytest.mark.parametrize(("run", "rank", "attempt"), [("../x", 0, 0), (".x", 0, 0), ("a\n", 0, 0), ("r", -1, 0)])
def test_a_name_that_would_leave_the_root_is_refused(tmp_path: Path, run: str, rank: int, attempt: int) -> None:
    with pytest.raises(JournalError):
        attempt_directory(tmp_path, run, rank, attempt)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_disk_that_is_full_is_one_error_and_nothing_is_left(
    tmp_path: Path, make_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, calls = os.posix_fallocate, []

    def allocate(fd: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    directory = attempt_directory(tmp_path, "run", 0, 0)
    with pytest.raises(OSError, match=r"No space left on device.*ring"):
        JournalWriter(directory, make_manifest())
    assert files(directory) == []
    before = len(list(Path("/proc/self/fd").iterdir()))
    JournalWriter(directory, make_manifest()).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_where_space_cannot_be_allocated_rows_go_by_pwrite(
    tmp_path: Path, make_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, append: Append
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    _writes_by_pwrite(attempt_directory(tmp_path, "run", 0, 0), make_manifest(), append)


def test_on_an_unknown_file_system_rows_go_by_pwrite(
    tmp_path: Path, make_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, append: Append
) -> None:
    monkeypatch.setattr(file_mapping, "file_system_type", lambda fd: 0x794C7630)  # overlayfs
    _writes_by_pwrite(attempt_directory(tmp_path, "run", 0, 0), make_manifest(), append)


def _writes_by_pwrite(directory: Path, manifest: Manifest, append: Append) -> None:
    writer = JournalWriter(directory, manifest)
    assert isinstance(writer.steps._file, file_mapping.WrittenFile)
    append(writer, 3)
    writer.steps.complete(2, (8.0, 8.0))
    writer.close()
    reader = JournalReader(directory)
    got = reader.poll()
    assert got.steps["loss"].tolist() == [1.0, 8.0, 1.0]
    assert got.tensors.row.tolist() == [1, 2, 3]
    reader.close()


def test_a_short_pwrite_is_a_full_disk(
    tmp_path: Path, make_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, append: Append
) -> None:
    monkeypatch.setattr(file_mapping, "file_system_type", lambda fd: 0)
    writer = JournalWriter(attempt_directory(tmp_path, "run", 0, 0), make_manifest())
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:5], offset))
    with pytest.raises(OSError, match="No space"):
        append(writer, 1)
    monkeypatch.setattr(os, "pwrite", real)
    append(writer, 1)
    writer.close()
    reader = JournalReader(writer.directory)
    assert reader.poll().steps.sequence.tolist() == [1]
    reader.close()


@pytest.mark.parametrize(("kind", "magic"), [("tmpfs", 0x01021994), ("ext4", 0xEF53), ("xfs", 0x58465342)])
def test_the_file_system_is_known_by_its_number(kind: str, magic: int) -> None:
    places = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    for place, found in places:
        if found == kind:
            try:
                fd = os.open(place, os.O_RDONLY)
            except OSError:
                continue
            assert file_mapping.file_system_type(fd) == magic
            os.close(fd)
            return
    pytest.skip(f"no {kind} is mounted here")


FULL_TMPFS = """
import os, signal, subprocess, sys
from pathlib import Path
from gradwatch.journal import JournalReader, JournalWriter, attempt_directory, mapping
from gradwatch.journal.manifest import Manifest
place = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], check=True)
manifest = Manifest("run", "model", host_columns=("a",), device_columns=("b",))
try:
    JournalWriter(attempt_directory(place, "run", 0, 0), manifest, 32 * 2**20)
except OSError as error:
    print("creation:", error.strerror)
writer = JournalWriter(attempt_directory(place, "run", 0, 1), manifest.__class__("run", "model", attempt=1,
    host_columns=("a",), device_columns=("b",)), 4 * 2**20)
with open(place / "filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError as error:
        print("filler:", error.strerror)
for step in range(3 * writer.steps.geometry.capacity):
    writer.steps.append(step, 1.0, (1.0,), (2.0,))
    writer.tensors.append(step, step, 1.0)
try:
    for _ in range(10_000):
        writer.events.write({"kind": "x", "text": "y" * 200})
except OSError as error:
    print("event:", error.strerror)
writer.close()
reader = JournalReader(writer.directory)
print("rows:", len(reader.last_steps(10**6)) == writer.steps.geometry.capacity)
mapping.file_system_type = lambda fd: 0
(place / "filler").unlink()
written = mapping.create("x", 4096, 0o600, os.open(place, os.O_RDONLY), b"header")
print("end")
"""

FULL_PWRITE = """
import errno, os, subprocess, sys
from pathlib import Path
from gradwatch.journal import JournalReader, JournalWriter, attempt_directory, mapping
from gradwatch.journal.manifest import Manifest
place = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
def unsupported(*_): raise OSError(errno.EOPNOTSUPP, "not supported")
os.posix_fallocate = unsupported
writer = JournalWriter(attempt_directory(place, "run", 0, 0), Manifest("run", "model",
    host_columns=("a",), device_columns=("b",)), 32 * 2**20)
written = 0
try:
    for step in range(writer.steps.geometry.capacity):
        writer.steps.append(step, 1.0, (1.0,), (2.0,))
        written += 1
except OSError as error:
    print("row:", error.strerror)
writer.close()
rows = JournalReader(writer.directory).last_steps(10**6)
print("rows:", 1000 < written == len(rows))
"""


def _in_a_mount_of_its_own(script: str, place: Path) -> str:
    place.mkdir()
    command = ["unshare", "-m", "--propagation", "private", sys.executable, "-c", script, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("no mount namespace here")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_tmpfs_is_one_error_at_creation_and_never_a_signal(tmp_path: Path) -> None:
    told = _in_a_mount_of_its_own(FULL_TMPFS, tmp_path / "small").splitlines()
    full = "No space left on device"
    assert told == [f"creation: {full}", f"filler: {full}", f"event: {full}", "rows: True", "end"]


def test_a_disk_that_fills_under_pwrite_is_an_error_at_the_row(tmp_path: Path) -> None:
    told = _in_a_mount_of_its_own(FULL_PWRITE, tmp_path / "small").splitlines()
    assert told == ["row: No space left on device", "rows: True"]


def test_a_read_only_mount_is_an_error_to_write_and_fine_to_read(
    writer: JournalWriter, tmp_path: Path, append: Append
) -> None:
    append(writer, 2)
    writer.close()
    script = (
        "import subprocess, sys; from pathlib import Path\n"
        "from gradwatch.journal import *; from gradwatch.journal.manifest import Manifest\n"
        "target, source = Path(sys.argv[1]), Path(sys.argv[1]).parent\n"
        "subprocess.run(['mount', '--bind', source, target], check=True)\n"
        "subprocess.run(['mount', '-o', 'remount,ro,bind', target], check=True)\n"
        "print(len(JournalReader(attempt_directory(target, 'run', 0, 0)).poll().steps))\n"
        "try: JournalWriter(attempt_directory(target, 'run', 0, 1), Manifest('run', 'model'))\n"
        "except OSError as error: print(error.strerror)\n"
    )
    assert _in_a_mount_of_its_own(script, tmp_path / "ro").splitlines() == ["2", "Read-only file system"]


def test_a_half_made_attempt_is_no_journal(tmp_path: Path, writer: JournalWriter, directory: Path) -> None:
    (directory / "manifest.json").unlink()
    with pytest.raises(JournalError, match=r"manifest\.json: No such file"):
        JournalReader(directory)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path, make_manifest: MakeManifest) -> None:
    manifest = replace(
        make_manifest(),
        run_name="brave-otter-3",
        tier="production",
        world_size=4,
        max_norm=1.0,
        start_time=5.5,
        budgets={"clip_rate": 0.1},
        config={"a": {"b": [1, 2.5, None, True, "x"]}},
        hyperparameters={"lr": 0.1, "name": "x", "amsgrad": False},
        mlflow={"run_id": None, "tracking_uri": "http://x"},
        unchecked=({"check": "a", "reason": "b"},),
        collectives=12,
    )
    writer = JournalWriter(attempt_directory(tmp_path, "run", 0, 0), manifest)
    reader = JournalReader(writer.directory)
    assert reader.manifest == manifest
    reader.close()
    writer.close()
