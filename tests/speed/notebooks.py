"How long Run All of the library's notebooks takes."
import os
import tempfile

import nbformat
from measuring import ROOT, Bound, seconds
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

BOUNDS = (
    Bound("notebooks that do not get through Run All", "of them", 0),
    Bound("slowest Run All of a library notebook", "s", 60))


def notebooks():
    "Each in a fresh kernel, one thread, start of the kernel included."
    taken, failed = {}, []
    paths = [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs").glob("[!p]*/*.ipynb")]
    for path in sorted(paths):
        client = NotebookClient(nbformat.read(path, 4), kernel_name="python3",
                                resources={"metadata": {"path": path.parent}})
        with tempfile.TemporaryDirectory() as home:
            own = {**os.environ, "MEDVLTHINKER_HOME": home, "OMP_NUM_THREADS": "1"}
            try:
                taken[path.stem] = seconds(lambda: client.execute(env=own))
            except CellExecutionError as error:
                failed.append(path.stem)
                print(f"    {path.stem} stops: {error.ename}: {error.evalue}", flush=True)
    slowest = max(taken, key=taken.get)
    print(f"    {len(taken)} notebooks in {sum(taken.values()):.0f} s; the slowest is {slowest}")
    yield len(failed)
    yield taken[slowest]
