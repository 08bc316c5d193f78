"""Arrays on disk: what was appended comes back, releasing pages changes no value, nothing stays behind."""

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.records import spool
from berth.records.spool import Spool

PAIR = np.dtype([("a", "<i8"), ("b", "?")])


@given(sizes=st.lists(st.integers(0, 9), max_size=8), dtype=st.sampled_from([np.uint16, np.int64, PAIR]))
def test_what_goes_in_comes_out(tmp_path_factory, sizes, dtype):
    folder = tmp_path_factory.mktemp("spool")
    target = Spool(folder / "out.hdf5", dtype)
    parts = [
        np.arange(size).astype(np.dtype(dtype)) if dtype is not PAIR else np.array([(n, n % 2) for n in range(size)], PAIR)
        for size in sizes
    ]
    for part in parts:
        target.append(part)
    assert target.items == sum(sizes)
    mapped = target.finish()
    assert mapped.array.dtype == dtype and mapped.array.tolist() == [value for part in parts for value in part.tolist()]
    mapped.release()
    assert not list(folder.iterdir()), "the file has no name"


def test_other_types_and_strides_are_converted(tmp_path):
    target = Spool(tmp_path / "new" / "x", np.uint16)
    target.append(np.arange(20, dtype=np.int64)[::2])
    assert target.finish().array.tolist() == list(range(0, 20, 2))


def test_releasing_keeps_values_and_gives_memory_back(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "RESIDENT_BYTES", 0)
    target = Spool(tmp_path / "x", np.int64)
    for start in range(4):
        target.append(np.arange(start << 19, (start + 1) << 19))
    mapped = target.finish()

    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as handle:
            return int(handle.read().split()[1]) * 4096

    assert (mapped.array == np.arange(1 << 21)).all()
    before = resident()
    mapped.release()
    assert before - resident() > 12 << 20
    assert (mapped.array == np.arange(1 << 21)).all()
    with pytest.raises(ValueError, match="read-only"):
        mapped.array[0] = 1


def test_a_full_disk_names_the_output(tmp_path):
    class Full:
        def __init__(self) -> None:
            self.calls = 0

        def write(self, data: memoryview) -> int:
            self.calls += 1
            if self.calls > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return 3  # disks that are nearly full write less than asked

    target = Spool(tmp_path / "out.hdf5", np.uint16)
    target._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left") as caught:
        target.append(np.arange(10))
    assert caught.value.filename == str(tmp_path / "out.hdf5") and caught.value.errno == errno.ENOSPC


def test_short_writes_are_continued(tmp_path):
    written = bytearray()

    class Slow:
        def write(self, data: memoryview) -> int:
            written.extend(data[:3])
            return min(3, len(data))

    target = Spool(tmp_path / "out.hdf5", np.uint16)
    target._file = Slow()  # type: ignore[assignment]
    target.append(np.arange(10))
    assert bytes(written) == np.arange(10, dtype=np.uint16).tobytes()
