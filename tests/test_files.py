import os

import pytest
from launching import time_limit
from PIL import Image
from test_checkpoints import files_of_at_most

from pals_hf.errors import InputError
from pals_hf.files import atomic_write_text, make_folder, read_json, write_result


class TestReadJson:
    def test_with_and_without_a_byte_order_mark(self, tmp_path):
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / "a.json").write_text('{"straße": 1}', encoding=encoding)
            assert read_json(tmp_path / "a.json") == {"straße": 1}

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"[" * 100_000, "nested too deeply"),
            (b'{"a":' * 100_000, "nested too deeply"),
            (b"", "Expecting value"),
            (b"\xff\xfe", "can't decode"),
            (b"1" * 5000, "4300 digits"),
            (None, "No such file"),
        ],
    )
    def test_what_is_no_json(self, content, reason, tmp_path):
        if content is not None:
            (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.json is not readable JSON: .*{reason}"):
            read_json(tmp_path / "a.json")

    def test_pipes_and_folders(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.json")
        for path in (tmp_path / "pipe.json", tmp_path):
            with time_limit(60), pytest.raises(InputError, match="is not a regular file"):
                read_json(path)


class TestWriting:
    def test_an_earlier_file_stays_if_the_disk_is_full(self, tmp_path):
        write_result(tmp_path / "a.png", Image.new("RGB", (4, 4)))
        before = (tmp_path / "a.png").read_bytes()
        for result in ("text" * 1000, b"bytes" * 1000, Image.effect_noise((200, 200), 90)):
            with files_of_at_most(2000), pytest.raises(InputError, match=r"a\.png cannot be written: File too large"):
                write_result(tmp_path / "a.png", result)
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
        assert (tmp_path / "a.png").read_bytes() == before

    def test_nothing_is_written_through_a_link(self, tmp_path):
        (tmp_path / "theirs").write_text("theirs")
        for name in ("a.txt", "_a.txt.tmp"):
            (tmp_path / name).symlink_to("theirs")
        atomic_write_text(tmp_path / "a.txt", "ours")
        assert (tmp_path / "a.txt").read_text() == "ours"
        assert (tmp_path / "theirs").read_text() == "theirs"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "theirs"]

    def test_a_folder_that_cannot_be_created(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="cannot be created: Not a directory"):
            make_folder(tmp_path / "file" / "folder")
