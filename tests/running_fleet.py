"""A `hotset fleet` over tiny replicas, in processes."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from servers import CHAT
from tiny_models import make_model
from tiny_tokenizer import VOCAB_SIZE, make_tokenizer


def wait_long(condition: Callable[[], Any]) -> None:
    """Until it is true, two minutes at most: a replica takes many imports on a busy machine."""
    for _ in range(480):
        if condition():
            return
        time.sleep(0.25)
    raise AssertionError("it did not happen")


class RunningFleet:
    """A fleet of tiny replicas in a process, two of them unless said otherwise."""

    def __init__(self, folder: Path, *more: str, num_replicas: int = 2) -> None:
        self.folder, self.num_replicas = folder, num_replicas
        model = self.model = folder / "model"
        make_model("llama", vocab_size=VOCAB_SIZE).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        self.said = folder / "said"
        folder.mkdir(exist_ok=True)
        argv = [
            "fleet",
            "--replicas",
            str(num_replicas),
            "--directory",
            str(folder / "f"),
            "--port",
            "0",
        ]
        argv += ["--model", str(model), "--hot-gib", "0.01", "--shared-gib", "0"]
        argv += ["--device", "cpu", "--files-path", str(folder / "files"), *more]
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hotset", *argv], stdout=said, stderr=said
            )

    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.text()
            return (
                f"{self.num_replicas} replicas serve" in self.text()
                and self.text().count("status page") == 2
                and "files and batches at" in self.text()
            )

        wait_long(is_ready)
        found = re.search(r"status page (http://\S+)/,", self.text())
        assert found is not None
        self.url = found[1]

    def all(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def of(self, *words: str) -> list[psutil.Process]:
        """Processes whose command line has these words in a row."""
        found = []
        for one in self.all():
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(words) in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def replicas(self) -> list[psutil.Process]:
        return self.of("-m hotset replica")

    def chat(self) -> int:
        return self.ask().status_code

    def ask(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json={**CHAT, **fields}, timeout=60)

    def close(self) -> None:
        """Kill what is left of it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [psutil.Process(self.process.pid), *self.all()]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self.process.wait()
