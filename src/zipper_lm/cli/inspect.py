"""`zipper inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zipper_lm.cli.common import Json, Model, Trust, console, emit, load_zipper

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree

    from zipper_lm.models.zipper import ZipperModel

LENGTHS = (100, 1000)
"""Memory lengths, in tokens of each source, for which costs are shown."""


def inspect(model: Model, trust_remote_code: Trust = False, json: Json = False) -> None:
    """Show what is zipped where, what is new, trained and frozen, the gates, and what a token costs.

    Example: [bold]zipper inspect outputs/spoken-digits/model[/bold]
    """
    loaded = load_zipper(model, trust_remote_code)
    facts = describe(loaded)
    if json:
        emit(facts)
        return
    from rich.console import Console

    out = Console(emoji=False)
    out.print(_tree(model, facts))
    out.print(_costs(facts))
    console().print("multiply-adds; see zipper_lm/evaluation/cost.py for how they are counted", style="dim")


def describe(model: ZipperModel) -> dict[str, Any]:
    """All that is shown, as plain data."""
    from zipper_lm.evaluation.cost import token_cost

    towers: dict[str, Any] = {}
    for name, spec in model.config.tower_specs.items():
        tower = model.tower(name)
        of_tower = list(tower.parameters())
        cost = token_cost(model, name)
        towers[name] = {
            "architecture": spec.architecture,
            "source": spec.source,
            "train": spec.train,
            "layers": tower.depth,
            "hidden_size": tower.hidden_size,
            "vocab_size": tower.vocab_size,
            "goes_on": tower.interface.going_on,
            "faults": list(tower.interface.faults),
            "frozen": sum(p.numel() for p in of_tower if not p.requires_grad),
            "trained": sum(p.numel() for p in of_tower if p.requires_grad),
            "new": sum(p.numel() for p in _new(model, name)),
            "cost": {
                "backbone": cost.backbone,
                "per_past_token": cost.per_past,
                "input_projection": cost.input_projection,
                "zips": {s: vars(z) for s, z in cost.zips.items()},
                "zips_at_memory": {n: cost.of_zips(n) for n in LENGTHS},
                "share_at_memory": {n: round(cost.of_zips(n) / cost.of_backbone(n), 4) for n in LENGTHS},
            },
        }
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(t["frozen"] for t in towers.values())
    trained = sum(t["trained"] for t in towers.values())
    return {
        "towers": towers,
        "zips": [
            {"reader": r, "source": s, "layers": [list(p) for p in pairs], **_gates(model, r, s)}
            for (r, s), pairs in model.layer_pairs.items()
        ],
        "parameters": {"new": total - frozen - trained, "trained": trained, "frozen": frozen, "total": total},
    }


def _new(model: ZipperModel, name: str) -> list[Any]:
    """Parameters made for one tower: the zips through which it reads, its input projection, its handover."""
    keys = [key for key, _ in model.projection_keys[name]]
    parts = [model.zips[name]] if name in model.zips else []
    parts += [*(model.input_projections[key] for key in keys), model.handover[name]]
    return [p for part in parts for p in part.parameters()]


def _gates(model: ZipperModel, reader: str, source: str) -> dict[str, list[float]]:
    gates = {k.split(".", 1)[1]: v for k, v in model.gates().items() if k.split(".")[0] == f"{reader}<-{source}"}
    found = {"gates": [round(v, 5) for k, v in gates.items() if not k.endswith(".ff")]}
    feed_forward = [round(v, 5) for k, v in gates.items() if k.endswith(".ff")]
    return found | ({"feed_forward_gates": feed_forward} if feed_forward else {})


def _tree(title: str, facts: dict[str, Any]) -> Tree:
    from rich.markup import escape
    from rich.tree import Tree

    from zipper_lm.fusion.zip_spec import EMBEDDINGS

    parameters = facts["parameters"]
    tree = Tree(
        f"[bold]{escape(title)}[/bold]: {parameters['new']:,} new + {parameters['trained']:,} trained + "
        f"{parameters['frozen']:,} frozen = {parameters['total']:,} parameters"
    )
    for name, tower in facts["towers"].items():
        branch = tree.add(
            f"[bold]{name}[/bold] {tower['architecture']}, {tower['train']}, from {escape(str(tower['source']))}"
        )
        branch.add(f"{tower['layers']} layers of width {tower['hidden_size']}, {tower['vocab_size']} ids")
        branch.add(f"goes on {tower['goes_on']}")
        for fault in tower["faults"]:
            branch.add(f"not used: {fault}")
        branch.add(f"{tower['new']:,} new, {tower['trained']:,} trained, {tower['frozen']:,} frozen parameters")
        for entry in (z for z in facts["zips"] if z["reader"] == name):
            zips = branch.add(f"reads [bold]{entry['source']}[/bold]")
            for (layer, source_layer), gate in zip(entry["layers"], entry["gates"]):
                read = "embeddings" if source_layer == EMBEDDINGS else f"layer {source_layer}"
                zips.add(f"layer {layer} <- {read}, gate {gate:+.4f}")
    return tree


def _costs(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="cost of one generated token; n: own tokens so far, m: tokens of each source")
    for heading in ("tower", "backbone", "zips", *(f"zips / backbone at n = m = {n}" for n in LENGTHS)):
        table.add_column(heading)
    for name, tower in facts["towers"].items():
        cost = tower["cost"]
        fixed = cost["input_projection"] + sum(z["step"] for z in cost["zips"].values())
        growing = sum(z["per_memory"] for z in cost["zips"].values())
        table.add_row(
            name,
            f"{cost['backbone']:,} + {cost['per_past_token']:,} n",
            f"{fixed:,} + {growing:,} m",
            *(f"{100 * cost['share_at_memory'][n]:.1f} %" for n in LENGTHS),
        )
    return table
