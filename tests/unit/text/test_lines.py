"""Text files of a folder: links, unreadable folders, outputs in the way. Their text: every piece size gives the same lines."""

import itertools
import os
import re
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import ConfigError, DataError
from berth.text import lines
from berth.text.lines import check_output, text_files


def test_linked_folders_are_read_once_and_cycles_end(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "z").mkdir(parents=True)
    other.mkdir()
    (root / "z" / "a.txt").write_text("a")
    (other / "b.txt").write_text("b")
    (other / "back").symlink_to(root)
    (root / "linked").symlink_to(other)
    (root / "copy").symlink_to(root / "z")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "c.txt").write_text("c")
    assert [path.relative_to(root).as_posix() for path in text_files(root)] == ["linked/b.txt", "z/a.txt"]
    with pytest.raises(ConfigError, match="lies in the input folder"):
        check_output("--output", other / "new.txt", [root])


def test_unreadable_folders_and_dangling_links_are_errors(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match="sub: this folder cannot be read: Permission denied"):
            text_files(tmp_path)
    (tmp_path / "b.txt").symlink_to(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"b\.txt: not a file"):
        text_files(tmp_path)


def test_outputs_in_the_way(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    for output in ("in/new.txt", "in/deep/new.TXT"):
        with pytest.raises(ConfigError, match="next run would read it"):
            check_output("--output", tmp_path / output, [tmp_path / "in"])
    (tmp_path / "link").symlink_to(tmp_path / "in" / "a.txt")
    with pytest.raises(ConfigError, match="--output .*also an input"):
        check_output("--output", tmp_path / "link", [tmp_path / "in" / "a.txt"])
    for output in ("in/a.hdf5", "b.txt", "inner/a.txt"):
        check_output("--output", tmp_path / output, [tmp_path / "in"])


# ------------------------------------------------------------------------------------------------------ reading in pieces

PIECES = st.lists(
    st.sampled_from(
        ["a", "őű", " ", "\t", "\n", "\r\n", "\r", "。", "漢字", "\u3000", ".", "word", "x" * 20, "\u2028", "\x0c", "e\u0301", "😀"]
    ),
    max_size=40,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=PIECES, bom=st.booleans(), block=st.integers(1, 16))
def test_pieces_are_the_text_and_cut_no_word(tmp_path_factory, text, bom, block):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes((("\ufeff" if bom else "") + text).encode())
    wanted = text.replace("\r\n", "\n").replace("\r", "\n")
    with mock.patch.object(lines, "BLOCK_BYTES", block):
        pieces = list(lines.read_pieces(path))
        assert "".join(lines.read_blocks(path)) == wanted
        assert list(lines.read_lines(path)) == wanted.removesuffix("\n").split("\n") * bool(wanted)
    assert "".join(pieces) == wanted and all(pieces)
    for one, other in itertools.pairwise(pieces):
        spaces = one[-1] in " \t\n\u3000" or one[-1] in "." or "\u3400" <= one[-1] <= "\u9fff"
        tail = re.split(r"[ \t\n\u3000]", one)[-1]
        assert spaces or len(tail.encode()) >= block // 4, (one, other)


def test_a_long_line_is_cut_between_words(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 100)
    path = tmp_path / "a.txt"
    text = " ".join(f"word{number}" for number in range(500)) + "\nshort\n"
    path.write_text(text)
    pieces = list(lines.read_pieces(path))
    assert "".join(pieces) == text and len(pieces) > 20
    assert max(map(len, pieces)) < 250
    assert [word for piece in pieces for word in piece.split()] == text.split()
    path.write_text("漢字" * 400 + "。")
    pieces = list(lines.read_pieces(path))
    assert "".join(pieces) == "漢字" * 400 + "。" and max(map(len, pieces)) < 250


@pytest.mark.parametrize("read", [lines.read_pieces, lines.read_blocks, lines.read_lines])
@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.parametrize(
    ("data", "offset", "byte"),
    [(b"ab\xe1c", 2, "e1"), ("é".encode() + b"x\xc5", 3, "c5"), (b"\xff", 0, "ff"), (b"a\n\xed\xa0\x80", 2, "ed")],
)
def test_bytes_that_are_not_utf_8_are_named(tmp_path, monkeypatch, read, block, data, offset, byte):
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt: byte 0x{byte} at offset {offset} is not UTF-8"):
        list(read(tmp_path / "a.txt"))


def test_a_part_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    data = "\ufeffegy\r\nkettő\r\n\r\nhárom".encode()
    path.write_bytes(data)
    edges = [0, *(number + 1 for number, byte in enumerate(data) if byte == 10), len(data)]
    for block in (1, 4, 100):
        monkeypatch.setattr(lines, "BLOCK_BYTES", block)
        for read in (lines.read_blocks, lines.read_pieces):
            assert ["".join(read(path, start, stop)) for start, stop in itertools.pairwise(edges)] == ["egy\n", "kettő\n", "\n", "három"]
            assert "".join(read(path, edges[1])) == "kettő\n\nhárom"
    with pytest.raises(DataError, match="no such text file"):
        list(lines.read_pieces(tmp_path))


@pytest.mark.parametrize("where", ["", "below"])
def test_the_folder_of_an_unfinished_stage_is_refused(tmp_path, where):
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    (folder / "sentences_00000.txt").write_text("One.\n")
    assert len(lines.text_files(tmp_path)) == 1
    (folder / ".sentences.journal").write_text("")
    with pytest.raises(DataError, match=r"the stage sentences has not finished here, .* delete \.sentences\.journal"):
        lines.text_files(tmp_path)
