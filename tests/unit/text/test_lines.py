"""Text files of a folder: links, unreadable folders, outputs that lie in the way."""

import os

import pytest

from berth.errors import ConfigError, DataError
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
