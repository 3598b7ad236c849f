"""Pages in a file with little of them in memory: the same as in memory, through any order of operations."""

import errno
import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant

from elsewhere import CPU, HEADS, WIDTH, chunk, twins
from kvfold.files import NAMELESS, nameless, remove_stale
from kvfold.formats import POSITION, Dense, Fp8, Kivi, Segment, Spec
from kvfold.ops.dispatch import use
from kvfold.pages import FastMemory, PagePool, Plane, SpillFile, SpillFull
from kvfold.pages.spill import UNIT
from test_pages_machine import Segments


def memory(nbytes: int, folder: Path) -> FastMemory:
    return FastMemory(nbytes, SpillFile(nameless(folder), str(folder)))


class SpilledSegments(Segments):
    """The machine of pages, with room for 6 blocks: every plane of a segment has one of its own at least."""

    @initialize(batch=st.integers(1, 3), length=st.integers(0, 9))
    def start(self, batch, length):
        self.memory = memory(6 * UNIT, Path(os.environ.get("TMPDIR", "/tmp")))
        segment, model = self.open(batch, length)
        fork = segment.select(np.arange(batch))
        self.live = [(segment, model), (fork, [list(row) for row in model])]

    @invariant()
    def no_more_than_the_limit_is_in_memory(self):
        if self.memory is not None:
            assert self.memory.residency.resident_nbytes <= self.memory.residency.capacity * UNIT == 6 * UNIT


TestSpilledSegments = pytest.mark.slow(SpilledSegments.TestCase)
TestSpilledSegments.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=False)


# -- what has no room at once ----------------------------------------------------------------------------------


def pair(form, folder: Path, room: int, tokens: int) -> tuple[Segment, Segment, FastMemory]:
    """A segment in memory, and one that has room for little of itself, of the same tokens."""
    little = memory(room * UNIT, folder)
    return *twins(form, little, tokens), little


@pytest.mark.parametrize("form", [Dense(), Dense(dtype=torch.float16), Fp8(), Kivi(bits=4, residual=32)], ids=str)
@pytest.mark.parametrize("naive", [False, True])
def test_stretches_answer_as_one(tmp_path, form, naive):
    """3000 tokens of 3 heads are 3.5 MB in float32: a seventh of them, or less, has room."""
    here, spilled, little = pair(form, tmp_path, 24, 3000)
    assert little.file.nbytes > 24 * UNIT or isinstance(form, Fp8 | Kivi)
    q = torch.randn(1, HEADS, 2, 1, WIDTH)
    read = torch.rand(1, HEADS, 3000) < 0.3
    for options in ({}, {"weights": True}, {"read": read}):
        expected = here.attend(q, 0.125, **options)
        if naive:
            with use("naive"):
                got = spilled.attend(q, 0.125, **options)
        else:
            got = spilled.attend(q, 0.125, **options)
        for mine, theirs in zip(got, expected, strict=True):
            if theirs is not None and mine is not None:
                torch.testing.assert_close(mine, theirs, atol=3e-4 if isinstance(form, Kivi) else 1e-5, rtol=0)
    assert torch.equal(spilled.dense().keys, here.dense().keys)
    assert little.residency.resident_nbytes <= 24 * UNIT and little.residency.misses


def test_rows_grow_in_place_and_holes_are_left_out(tmp_path):
    """Tokens come one by one behind a prompt, and some go: nothing is copied from page to page."""
    here, spilled, little = pair(Dense(), tmp_path, 16, 2000)
    moved, plane = spilled.pool.moved_nbytes, spilled.pool.planes["keys"].data_ptr()
    for at in range(2000, 2300):
        step = chunk(1, at, seed=at)
        for each in (here, spilled):
            each.append(step, even=True)
    assert spilled.pool.moved_nbytes == moved and spilled.pool.planes["keys"].data_ptr() == plane
    mask = torch.ones(1, HEADS, 2300, dtype=torch.bool)
    for gone in (17, 900, 2299):
        mask[..., gone] = False
    for each in (here, spilled):
        each.keep(mask, {}, slack=True)
    q = torch.randn(1, HEADS, 2, 1, WIDTH)
    for mine, theirs in zip(spilled.attend(q, 0.125)[:2], here.attend(q, 0.125)[:2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    stays = torch.rand(2300) < 0.5
    for each in (here, spilled):  # by the tokens: one of the two may have closed its holes
        valid, columns = each.columns()
        each.keep(valid & stays[columns[POSITION].long()], {})
    assert np.array_equal(spilled.counts(), here.counts())
    one, other = spilled.state()[1], here.state()[1]
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert little.residency.resident_nbytes <= 16 * UNIT


def test_what_is_let_go_of_takes_no_disk(tmp_path):
    _, spilled, little = pair(Dense(), tmp_path, 16, 2000)
    full = little.file.nbytes
    assert full >= spilled.pool.nbytes - spilled.pool.refs.nbytes
    assert os.fstat(little.file.file).st_blocks * 512 >= full
    del spilled
    gc.collect()
    assert little.file.nbytes == 0 == little.residency.resident_nbytes
    assert os.fstat(little.file.file).st_blocks * 512 < UNIT  # and the disk has it back
    again = little.blank((UNIT,), torch.uint8)  # where others were
    assert not again.any()


def test_what_stands_beside_takes_room(tmp_path):
    class Owner:
        pass

    owner, little = Owner(), memory(8 * UNIT, tmp_path)
    plane = little.blank((8, UNIT), torch.uint8)
    for _ in little.visits((plane,), np.arange(8), written=True):
        plane.fill_(7)
    assert little.resident_nbytes == 8 * UNIT
    little.hold(owner, 5 * UNIT)
    assert little.residency.room == 3 and little.resident_nbytes == 8 * UNIT and little.residency.written_nbytes > 0
    assert bool((plane == 7).all())
    del owner
    gc.collect()
    little.hold(Owner(), 0)
    assert little.residency.room == 8


def test_a_page_without_room_is_said(tmp_path):
    little = memory(UNIT, tmp_path)
    pool = PagePool({"keys": Plane(64, torch.float32), "values": Plane(64, torch.float32)}, CPU, memory=little)
    pool.grow(4)
    with pytest.raises(ValueError, match="2 blocks of 65536 bytes are wanted at once"):
        list(pool.visits(["keys", "values"], np.arange(4)))


# -- the file --------------------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_is_its_owners(tmp_path):
    little = memory(4 * UNIT, tmp_path)
    assert list(tmp_path.iterdir()) == []
    found = os.fstat(little.file.file)
    assert found.st_nlink == 0 and found.st_mode & 0o777 == 0o600
    assert not os.get_inheritable(little.file.file)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, here = int(gone.stdout), os.getpid()
    names = [f".kvfold-{number}-{'0' * 16}.part" for number in (dead, here)] + [f".kvfold-{dead}-short.part", "mine"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    link = f".kvfold-{dead}-{'1' * 16}.part"
    (tmp_path / link).symlink_to(tmp_path / "mine")
    assert NAMELESS.fullmatch(link) and remove_stale(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], link])


@pytest.mark.usefixtures("unchecked")
def test_a_folder_that_takes_no_file_is_named(tmp_path):
    for wrong in ("", tmp_path / "none", b"x", 7, __file__):
        with pytest.raises(ValueError, match="spill="):
            os.close(nameless(wrong, "spill"))


def test_a_full_disk_changes_nothing(tmp_path):
    """A real limit of this process: no file may be longer than 20 blocks."""
    little = memory(64 * UNIT, tmp_path)
    spec = Spec(1, HEADS, WIDTH, WIDTH, torch.float32, CPU, memory=little)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    segment = Dense().open(spec)
    segment.append(chunk(100), even=True)
    held, state = little.file.nbytes, segment.state()[1]
    pages, used = segment.pool.pages, little.residency.resident_nbytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * UNIT, before[1]))
    try:
        with pytest.raises(SpillFull) as caught:
            segment.append(chunk(4000, 100), even=True)
        with pytest.raises(SpillFull):
            little.file.check_room(40 * UNIT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(caught.value)
    assert f"spill={str(tmp_path)!r}" in said and f"{caught.value.needed} bytes more" in said and "free" in said
    assert isinstance(caught.value, OSError) and caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert segment.counts().tolist() == [[100] * HEADS] and segment.pool.pages == pages
    assert little.file.nbytes - held <= 20 * UNIT and little.residency.resident_nbytes == used
    assert all(torch.equal(now, state[name]) for name, now in segment.state()[1].items())
    segment.append(chunk(4000, 100), even=True)  # and with room it goes on
    assert segment.counts().tolist() == [[4100] * HEADS]


def resident(little: FastMemory) -> int:
    """Bytes of the file that this process holds, as the system counts them."""
    begins = f"{little.file.address:x}-"
    found = Path("/proc/self/smaps").read_text().partition(f"\n{begins}")[2]
    return int(found.partition("\nRss:")[2].split()[0]) << 10


def test_the_system_counts_no_more_than_the_limit(tmp_path):
    """In what is read at every step too, and what was read without a word is gone after a sweep."""
    _, spilled, little = pair(Dense(), tmp_path, 24, 4000)
    assert 0 < resident(little) <= 24 * UNIT < little.file.nbytes
    q = torch.randn(1, HEADS, 2, 1, WIDTH)
    for _ in range(3):
        spilled.attend(q, 0.125)
        assert resident(little) <= 24 * UNIT
    float(spilled.pool.planes["keys"].sum())  # as some code may do
    assert resident(little) > 24 * UNIT
    little.sweep(spilled.pool)
    assert resident(little) <= 24 * UNIT
    spilled.attend(q, 0.125)
    little.hold(little.file, 20 * UNIT)
    assert resident(little) <= 4 * UNIT
