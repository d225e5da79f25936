"""A process that has imported all of zipper-lm and is copied (`fork`) for each command: a start costs milliseconds.

Its standard input has a request a line, JSON; its standard output an answer a line. `{"start": ...}` is answered by the
number of the process, `{"wait": number, "seconds": limit}` by its exit status as `subprocess` has it, or null.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
import time
from pathlib import Path
from typing import Any


def _import_all() -> None:
    import tensorboard.summary.writer.record_writer
    import torch.utils.tensorboard
    import transformers
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401 (lazy there)

    import zipper_lm

    for module in pkgutil.walk_packages(zipper_lm.__path__, "zipper_lm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # else each copy would walk all of it, and own it
    assert transformers
    assert tensorboard


def _become(request: dict[str, Any]) -> None:
    """The child: a command in a session and a folder of its own."""
    os.setsid()
    os.chdir(request["folder"])
    told = os.open(request["told"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, goal in ((null, 0), (told, 1), (told, 2)):
        os.dup2(source, goal)
    os.environ.update(request["environment"])
    from tests.faults.points import Points

    faulthandler.register(signal.SIGUSR1)  # where does it wait?
    if request["points"] is not None:
        Points(Path(request["folder"]), **request["points"]).install()
    sys.argv = ["zipper", *request["words"]]
    from zipper_lm.cli import app

    app()


def _waited(number: int, seconds: float) -> int | None:
    """Exit status of a child; `None` if it lives on."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.01)


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.dup(1)
    os.dup2(2, 1)
    _import_all()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            found = _waited(request["wait"], request["seconds"])
        else:
            found = os.fork()
            if found == 0:
                os.close(answers)
                _become(request["start"])
                return
        os.write(answers, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main()
