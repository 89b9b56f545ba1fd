"""Files are whole or not there, and what goes wrong names the file that the user asked for."""

import errno
import os

import pytest

from heterostep.files import replacing, told


def test_a_file_that_cannot_be_written_goes_by_its_own_name(tmp_path):
    path = tmp_path / "small.video.mp4"
    path.write_text("mine")
    with pytest.raises(OSError) as caught, replacing(path) as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))
    assert told(caught.value) == f"cannot write {path}: No space left on device"
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_other_errors_are_told_as_they_are(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "nothing").read_text()
    assert told(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path / 'nothing'}'"
    assert told(OSError("odd\nand more")) == "odd"
