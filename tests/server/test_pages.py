"""The scripts of the server's pages are JavaScript."""

import re
import shutil
import subprocess
from importlib.resources import files

import pytest

NODE = shutil.which("node")
PAGES = ("status.html", "docs.html")


@pytest.mark.skipif(NODE is None, reason="needs node")
@pytest.mark.parametrize("page", PAGES)
def test_the_script_of_a_page_can_be_parsed(page: str) -> None:
    text = (files("hotset.server") / "static" / page).read_text("utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert scripts
    for script in scripts:
        assert NODE is not None
        checked = subprocess.run(
            [NODE, "--check", "-"], input=script, capture_output=True, text=True, timeout=60
        )
        assert checked.returncode == 0, checked.stderr
