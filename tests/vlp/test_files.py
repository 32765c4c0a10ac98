"""What may be replaced on the disk."""

import os

import pytest

from vlp.errors import ArgumentError
from vlp.files import check_output


def test_links_files_and_devices_are_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "dangling", "file", "fifo"):
        with pytest.raises(ArgumentError, match="is a link, a file or a device"):
            check_output(str(tmp_path / name))
    with pytest.raises(ArgumentError, match="is a link, a file or a device"):
        check_output("/dev/null")
    check_output(str(tmp_path / "folder"))
    check_output(str(tmp_path / "new"))
