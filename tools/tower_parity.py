"""Which Hugging Face decoders are towers, bit for bit? Runs the parity suite and writes docs/towers.md.

    python tools/tower_parity.py [--output docs/towers.md] [family ...]

With families named, it prints what is found of those and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from zipper_lm.generation.engine.capture import Capture

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tower_families import KNOWN, LAYERS_PATH, Known, Outcome, captured, examine, families, may_fail  # noqa: E402

NUMBER = re.compile(r"\d[\d.e-]*")

HEAD = """# Which decoders are towers

Made by `python tools/tower_parity.py` with transformers {version} and torch {torch}: a tiny random model of each
causal-LM family, fp32 on a CPU, is compared with itself as a tower. **{passed} of {total} families pass**
({classes} model classes). Your own model: `zipper_lm.evaluation.parity.check_parity(model)`.

"Passes" means `torch.equal` to the bare model, while every hidden state between layers is replaced by an equal one, in:
forward; a left-padded and a right-padded batch; prefill and five cached steps, without and with left padding; greedy
`generate()`; and the same state-dict keys. A change made at any depth is heard by the logits, and neither by other rows
nor by earlier tokens. The note says what the bare model itself cannot do; a tower then cannot do it either.

"Cache continues": whether the tower can go on from what it has read, in rows of different length, with the logits of
reading everything at once; by several tokens at once, or one by one only (a stream is then read again before the tower
writes), or not at all (the tower is then used without a cache, and a warning says why).

"Captured": whether [an engine](engine.md) writes with it, each token of many documents by one captured step:
**{captured} families**. Their step gives the bare model's logits of each row alone, in rows that begin at different
times, go on from a past, and are moved. Others are written on the plain path:

{reasons}

Of the families:

{counts}

| family | model class | tower | cache continues by several tokens | captured | note |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Examine the families one after the other, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, such as llama; all by default")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "towers.md")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - set(families()):
        parser.error(
            f"families: {sorted(unknown)} are not causal-LM families of transformers {transformers.__version__}"
        )
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    start = time.monotonic()
    outcomes = []
    captures: dict[str, Capture] = {}
    for family in arguments.families or families():
        outcomes.append(examine(family))
        if outcomes[-1].passed:
            captures[family] = captured(family)
        how = f"captured: {_captured(captures.get(family))}"
        print(f"{family:28} {_tower(outcomes[-1])}; {how}; {_note(outcomes[-1])}", flush=True)
    counts = Counter("passes" if o.passed else _kind(o) for o in outcomes)
    print(f"{counts['passes']} of {len(outcomes)} families pass ({time.monotonic() - start:.0f} s)")
    for kind, count in [*counts.most_common(), *_reasons(captures).most_common()]:
        print(f"  {kind}: {count}")
    if not arguments.families:
        _write(arguments.output, _page(outcomes, counts, captures))
        print(f"written: {arguments.output}")


def _page(outcomes: list[Outcome], counts: Counter[str], captures: Mapping[str, Capture]) -> str:
    head = HEAD.format(
        version=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        passed=counts["passes"],
        total=len(outcomes),
        classes=len({o.parity.name for o in outcomes if o.parity and o.passed}),
        counts=_listed(counts),
        captured=sum(capture.fault is None for capture in captures.values()),
        reasons=_listed(_reasons(captures)),
    )
    rows = [
        f"| `{o.family}` | {o.parity.name if o.parity else ''} | {_tower(o)} | {_going_on(o)} | "
        f"{_captured(captures.get(o.family))} | {_note(o).replace('|', '/')} |"
        for o in sorted(outcomes, key=lambda o: o.family)
    ]
    return head + "\n".join(rows) + "\n"


def _listed(counts: Counter[str]) -> str:
    return "\n".join(f"- {kind}: {count}" for kind, count in counts.most_common())


def _reasons(captures: Mapping[str, Capture]) -> Counter[str]:
    """How many families are not captured for the same reason, whatever the figures in it."""
    faults = [capture.fault for capture in captures.values() if capture.fault is not None]
    return Counter(NUMBER.sub("so much", fault) if "off by" in fault else fault for fault in faults)


def _captured(capture: Capture | None) -> str:
    if capture is None:
        return ""
    return "yes" if capture.fault is None else f"no: {capture.fault}"


def _kind(outcome: Outcome) -> str:
    known = _known(outcome)
    return known.kind if known else "not looked into"


def _known(outcome: Outcome) -> Known | None:
    known = KNOWN.get(outcome.family) or may_fail(outcome.family)
    return known if known and known.explains(outcome.reason) else None


def _tower(outcome: Outcome) -> str:
    return "yes" if outcome.passed else f"no: {_kind(outcome)}"


def _going_on(outcome: Outcome) -> str:
    if outcome.parity is None or (interface := outcome.parity.interface) is None:
        return ""
    if interface.cache is None:
        return "no cache"
    return "yes" if interface.cache.several else "one by one"


def _note(outcome: Outcome) -> str:
    if not outcome.passed:
        known = _known(outcome)
        said = " ".join(outcome.reason.split())
        return f"{known.why if known else ''} ({said if len(said) < 160 else said[:160] + '...'})"
    notes = [n for n in outcome.parity.notes if not n.endswith("no cache")] if outcome.parity else []
    notes += outcome.parity.interface.faults if outcome.parity and outcome.parity.interface else ()
    if path := LAYERS_PATH.get(outcome.family):
        notes.insert(0, f'name the list: `layers="{path}"`')
    return "; ".join(notes)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
