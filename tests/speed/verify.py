"What the check of a run costs over the hashing that it needs."
import hashlib
import os
import tempfile
from pathlib import Path

from measuring import Bound, alternate
from medvlthinker.app.verify import check_run
from medvlthinker.core.files import write_record

BOUNDS = (Bound("verifying 2 GiB of weights, over hashlib on the same files, one after the other",
                "x", 1.2),)


def verify():
    "Eight files of 256 MiB, read again and compared with their record, and bare hashing."
    def bare():
        for path in paths:
            with open(path, "rb") as file:
                hashlib.file_digest(file, "sha256")

    with tempfile.TemporaryDirectory() as folder:
        root, block = Path(folder), os.urandom(2**28)
        (model := root / "checkpoints" / "model").mkdir(parents=True)
        paths = [model / f"model-{number}.safetensors" for number in range(8)]
        with write_record(model, {}):
            for number, path in enumerate(paths):
                path.write_bytes(number.to_bytes(8, "big") + block)
        assert {finding.state for finding in check_run(root)} == {"unchanged"}
        yield [ours / alone for ours, alone in alternate(lambda: check_run(root), bare, 3)]
