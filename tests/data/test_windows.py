"""Files that a Windows editor has saved: a byte-order mark at the front, CRLF at the line ends."""
import subprocess

import pytest
from conftest import ROOT
from medvlthinker.core.commands import load_plugin
from medvlthinker.app.profile import load_profile

BOM = b"\xef\xbb\xbf"


def as_windows(text: str) -> bytes:
    return BOM + text.replace("\n", "\r\n").encode()


@pytest.mark.parametrize("name", ["reproduce.sh", "locks/lock.sh", ".ci/run", "settings.ini", "nbs/index.ipynb"])
def test_git_keeps_the_line_ends_of_what_is_run(name):
    done = subprocess.run(["git", "check-attr", "eol", name], cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no checkout of git, whose .gitattributes are tested here")
    assert done.stdout.strip() == f"{name}: eol: lf"


def test_settings_are_read_as_they_are(tmp_path, monkeypatch):
    plain = load_profile("smoke")
    (tmp_path / "settings.ini").write_bytes(as_windows((ROOT / "settings.ini").read_text(encoding="utf-8")))
    monkeypatch.chdir(tmp_path)
    assert load_profile("smoke") == plain


def test_a_file_of_ones_own_runs(tmp_path):
    (tmp_path / "mine.py").write_bytes(as_windows("first = 1\nif first:\n    second = 2\n"))
    assert load_plugin(tmp_path / "mine.py").second == 2
