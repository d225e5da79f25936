"""All targets, many inputs: `make fuzz`, or ``python tests/fuzz/run.py --inputs 100000 --seed 0``. The last line is the
record, as JSON.

Each target runs in a process of its own, which this one forks once all is imported, and forks anew after an input that
ended it. Inputs with a grammar are drawn by hypothesis. Bytes are led by coverage, by atheris where it is installed;
else they are changed blindly. Each new bug's shortest input goes to a folder, by target; those worth keeping go to
tests/fuzz/corpus, which `make test` replays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
INSTRUMENTED = (
    *("zipper_lm.codecs.audio", "zipper_lm.codecs.containers", "zipper_lm.codecs.mp3", "zipper_lm.codecs.picture"),
    *("zipper_lm.data.sources", "zipper_lm.data.prepared", "zipper_lm.utils.json_files", "zipper_lm.utils.weights"),
    *("PIL", "soundfile", "tarfile"),
)
HUNG = 60.0
"""Seconds of the processor on one input, after which its process is ended: nothing could interrupt it."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only these")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="folder for inputs that show bugs")
    parser.add_argument("--merge", type=Path, nargs="+", help="records of parts, to be made one; nothing is run")
    given = parser.parse_args()
    if given.merge:
        print(json.dumps(_merged([json.loads(file.read_text().splitlines()[-1]) for file in given.merge])))
        return
    led = _coverage()
    _settle()
    from fuzz.targets import BYTES, MODULES, target

    targets = [target(name) for name in given.target or MODULES]
    shares = sum(each.share for each in targets)
    told: dict[str, Any] = {}
    for each in targets:
        count = -(-given.inputs * each.share // shares)
        found = _whole(each, count, given.seed, led and each.name in BYTES)
        told[each.name] = {k: v for k, v in found.items() if k != "bugs"}
        for bug in found["bugs"]:
            place = given.found / each.name
            place.mkdir(parents=True, exist_ok=True)
            (place / bug["key"]).write_bytes(bytes.fromhex(bug["data"]))
            (place / f"{bug['key']}.txt").write_text(f"{bug['kind']}\n\n{bug['told']}")
        told[each.name]["bugs"] = sorted(bug["kind"] for bug in found["bugs"])
        print(each.name, json.dumps(told[each.name]), file=sys.stderr, flush=True)
    print(json.dumps(_record(told, given.seed, led)))


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of several processes; a target may be in several, each with another seed."""
    told: dict[str, Any] = {}
    seen: set[tuple[str, int]] = set()
    for part in parts:
        for name, found in part["targets"].items():
            assert (name, part["seed"]) not in seen, f"{name} twice with seed {part['seed']}"
            seen.add((name, part["seed"]))
            other = told.setdefault(name, dict.fromkeys(found, 0) | {"bugs": []})
            told[name] = {
                **{key: other[key] + found[key] for key in ("inputs", "accepted", "refused")},
                **{key: max(other[key], found[key]) for key in ("worst_seconds", "worst_mebibytes")},
                "bugs": sorted({*other["bugs"], *found["bugs"]}),
            }
    told = {name: told[name] for name in sorted(told)}
    return _record(told, min(seed for _, seed in seen), any(part["coverage"] == "atheris" for part in parts))


def _record(told: dict[str, Any], seed: int, led: bool) -> dict[str, Any]:
    return {
        "what": "fuzz",
        "seed": seed,
        "inputs": sum(each["inputs"] for each in told.values()),
        "bugs": sum(len(each["bugs"]) for each in told.values()),
        "worst_seconds": max(each["worst_seconds"] for each in told.values()),
        "worst_mebibytes": max(each["worst_mebibytes"] for each in told.values()),
        "coverage": "atheris" if led else "none",
        "targets": told,
    }


def _coverage() -> bool:
    """Have what is imported from now on count which of its lines were reached; whether that can be."""
    try:
        import atheris
    except ImportError:
        return False
    with contextlib.redirect_stderr(open(os.devnull, "w")), atheris.instrument_imports(include=list(INSTRUMENTED)):
        import tarfile  # noqa: F401

        import PIL.Image
        import soundfile  # noqa: F401

        import zipper_lm.codecs.picture
        import zipper_lm.data.prepared
        import zipper_lm.utils.weights  # noqa: F401

        PIL.Image.init()
    return True


def _settle() -> None:
    """Quiet, on one thread, without a network, and with a cache of its own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["ZIPPER_CACHE"] = tempfile.mkdtemp(prefix="zipper-fuzz-cache-")
    sys.path[:0] = [str(HERE.parent)]
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import torch
    from transformers.utils import logging as of_transformers

    torch.set_num_threads(1)
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


def _whole(target: Any, count: int, seed: int, led: bool) -> dict[str, Any]:
    """So many inputs of a target, over as many processes as that takes."""
    total: dict[str, Any] = {"inputs": 0, "accepted": 0, "refused": 0, "worst_seconds": 0.0, "worst_mebibytes": 0.0}
    bugs: dict[str, Any] = {}
    ended = 0
    while total["inputs"] < count and ended < 20:
        with tempfile.TemporaryDirectory(prefix="zipper-fuzz-run-") as folder:
            report, current = Path(folder) / "report.json", Path(folder) / "current"
            child = os.fork()
            if child == 0:
                _child(target, count - total["inputs"], seed + 1000 * ended, led, report, current)
            how = _waited(child, current)
            part = json.loads(report.read_text()) if report.exists() else {}
            if how is not None:
                ended += 1
                data = current.read_bytes() if current.exists() else b""
                part.setdefault("bugs", []).append(
                    {"key": f"ended-{ended}", "kind": how, "told": how, "data": data.hex()}
                )
        for key in ("inputs", "accepted", "refused"):
            total[key] += part.get(key, 0)
        for key in ("worst_seconds", "worst_mebibytes"):
            total[key] = max(total[key], round(part.get(key, 0.0), 3))
        bugs |= {bug["kind"]: bug for bug in part["bugs"]}
        if how is None:
            break
    return {**total, "bugs": list(bugs.values())}


def _waited(child: int, current: Path) -> str | None:
    """What ended a process, if it did not end by itself."""
    import psutil

    process, last, begun = psutil.Process(child), 0.0, 0.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if status == 0 else f"ended by {status}"
        with contextlib.suppress(psutil.Error, OSError):
            changed, cpu = current.stat().st_mtime, process.cpu_times()
            if changed != last:
                last, begun = changed, cpu.user + cpu.system
            elif cpu.user + cpu.system - begun > HUNG:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"hung for more than {HUNG:g} s of the processor"
        time.sleep(0.2)


def _child(target: Any, count: int, seed: int, led: bool, report: Path, current: Path) -> None:
    from fuzz.inputs import from_bytes, from_grammar
    from fuzz.watch import Watch, bound_memory

    def tell(tally: Any) -> None:
        bugs = [{"key": b.key, "kind": b.kind, "told": b.told, "data": b.data.hex()} for b in tally.bugs.values()]
        names = ("inputs", "accepted", "refused", "worst_seconds", "worst_mebibytes")
        said = {name: getattr(tally, name) for name in names}
        (new := report.with_suffix(".new")).write_text(json.dumps({**said, "bugs": bugs}))
        new.rename(report)

    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    code = 1
    try:
        with target.around(), Watch(target.run, current=current) as watch:
            bound_memory()
            corpus = HERE / "corpus" / target.name
            for data in [
                *target.seeds,
                *(f.read_bytes() for f in (sorted(corpus.iterdir()) if corpus.is_dir() else [])),
            ]:
                watch.check(data)

            def check(data: bytes) -> None:
                watch.check(data)
                if watch.tally.inputs % 100 == 0 or watch.tally.inputs >= count:
                    tell(watch.tally)

            left = max(1, count - watch.tally.inputs)
            if led:
                _led(target, left, seed, check)
            elif target.inputs is not None:
                from_grammar(target, left, seed, check)
            else:
                from_bytes(target, left, seed, check)
            tell(watch.tally)
            code = 0
    finally:
        os._exit(code)


def _led(target: Any, count: int, seed: int, check: Any) -> None:
    """So many inputs led by coverage; every second one is changed by what knows the form."""
    import atheris

    done = 0

    def one(data: bytes) -> None:
        nonlocal done
        check(data)
        done += 1
        if done >= count:
            os._exit(0)

    def changed(data: bytes, most: int, start: int) -> bytes:
        draw = Random(start)
        new = target.change(data, draw) if start % 2 else atheris.Mutate(data, most)
        return bytes(new[:most])

    folder = tempfile.mkdtemp(prefix="zipper-fuzz-seeds-")
    for number, data in enumerate(target.seeds):
        (Path(folder) / str(number)).write_bytes(data)
    how = [
        "-timeout=100000",
        "-rss_limit_mb=0",
        "-max_len=65536",
        "-len_control=0",
        "-print_final_stats=0",
        "-handle_segv=0",
    ]
    atheris.Setup(["fuzz", f"-seed={seed + 1}", "-runs=-1", *how, folder], one, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent)]
    main()
