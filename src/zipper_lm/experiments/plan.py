"""What an experiment file says, and the runs it stands for.

An experiment is a fusion recipe, the arms that are compared (each a list of changes to it), the points at which they
are compared (such as shares of the data), and seeds. Where an arm has trials, they are run first with a seed of their
own, at every point, and the one with the lowest validation error is used: every arm gets as many as it names. Trials
may be shorter than the runs that they choose for (`trial_set`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zipper_lm.jobs.recipes.reader import read_recipe, recipe_hash, to_mapping
from zipper_lm.jobs.recipes.schema import DataRecipe, FuseRecipe

PLAIN = "all"
"""Name of the one point of an experiment that has none."""

BEFORE = "before"
"""In place of a point, for the run that an arm wants before all others."""


@dataclass(kw_only=True)
class Arm:
    """One thing that is compared.

    Args:
        set: changes to the recipe, ``key=value`` each.
        before: changes to a run that comes first, once, with all the data and no pseudo-labels; the first tower of the
            arm's own runs starts from its model. For a single decoder that shall have seen unaligned data.
        trials: name to changes; one of them is chosen on the validation split.
        points: where it is compared; none named is all.
    """

    set: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    trials: dict[str, list[str]] = field(default_factory=dict)
    points: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Experiment:
    """What an experiment file says.

    Args:
        question: what it answers, in a sentence.
        recipe: the fusion recipe, relative to the experiment file.
        set: changes to it, for every run.
        arms: by name.
        points: name to changes; the places at which arms are compared, in order. None is one place.
        axis: what the points are, for the report, such as ``"share of the aligned pairs"``.
        seeds: of the runs that are reported.
        trial_seed: of the trials; not among `seeds`.
        trial_set: further changes for trials alone, such as fewer steps.
        tasks: what is scored on the test split.
        forgetting: text that no run trains on (a folder or file as of data, its split ``test``), relative to the
            experiment file: what a run's text decoder has forgotten is measured on it, and by questions; none measures
            nothing. questions: a file of them, relative too, in place of the package's own (`evaluation.forgetting`).
        second_judge: folder or Hub id of a speech recogniser that hears what the recipe's judge hears, or ``"fitted"``:
            a small one is fitted on the data.
        finding: what came of it, in a sentence, for the report; written when it has run.
        notes: what a reader of the figures must know, a sentence each, for the report.
        paper: what the paper found for this question (arXiv 2405.18669), a sentence each, for the report.
    """

    question: str
    recipe: str
    set: list[str] = field(default_factory=list)
    arms: dict[str, Arm]
    points: dict[str, list[str]] = field(default_factory=dict)
    axis: str = ""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    trial_seed: int = 0
    trial_set: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: ["asr", "tts"])
    forgetting: str = ""
    questions: str = ""
    second_judge: str = ""
    finding: str = ""
    notes: list[str] = field(default_factory=list)
    paper: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("arms: an experiment compares at least one")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be distinct and at least one, got {self.seeds}")
        if self.trial_seed in self.seeds and any(arm.trials for arm in self.arms.values()):
            raise ValueError(
                f"trial_seed {self.trial_seed} is among seeds {self.seeds}: choices need runs of their own"
            )
        if self.questions and not self.forgetting:
            raise ValueError(f"questions {self.questions!r} are asked only beside a text: set forgetting")
        if BEFORE in self.points:
            raise ValueError(f"points: {BEFORE!r} is taken")
        trials = {trial for arm in self.arms.values() for trial in arm.trials}
        for kind, names in (("arms", self.arms), ("points", self.points), ("trials", trials)):
            if bad := [name for name in names if not _is_name(name)]:
                raise ValueError(f"{kind}: {bad[0]!r} is no name: letters, digits, '.', '-' and '_'")
        for name, arm in self.arms.items():
            if unknown := [point for point in arm.points if point not in self.points]:
                raise ValueError(f"arms.{name}.points: {unknown[0]!r} is none of the points {list(self.points)}")


def _is_name(text: str) -> bool:
    return bool(text) and all(c.isalnum() or c in "._-" for c in text) and not text.startswith(".")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fusion of an experiment.

    Args:
        arm, point: where it belongs. trial: which trial it is, or uses; ``""`` if the arm has none.
        seed: of everything.
        reported: scored on the test split; a trial is not.
        changes: to the experiment's recipe.
    """

    arm: str
    point: str
    trial: str
    seed: int
    reported: bool
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its record."""
        parts = [
            self.arm,
            self.point,
            *([f"trial-{self.trial}"] if self.trial and not self.reported else []),
            f"seed{self.seed}",
        ]
        return "--".join(parts)


def read_experiment(path: str | Path, changes: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
        path: YAML. changes: further ``key=value`` changes to the recipe of every run, such as ``data=PATH``.

    Raises:
        ValueError: as `read_recipe`.
    """
    experiment = read_recipe(path, [], Experiment)
    experiment.set += changes
    for name in ("recipe", "forgetting", "questions"):
        if given := getattr(experiment, name):
            setattr(experiment, name, str(Path(path).parent / given))
    return experiment


def trials_of(experiment: Experiment, arm: str, point: str) -> list[Run]:
    """The trials of an arm at a point."""
    return [
        _run(experiment, arm, point, trial, experiment.trial_seed, reported=False)
        for trial in experiment.arms[arm].trials
    ]


def runs_of(experiment: Experiment, arm: str, point: str, trial: str = "") -> list[Run]:
    """The runs that are reported: one a seed, with the trial that was chosen."""
    return [_run(experiment, arm, point, trial, seed, reported=True) for seed in experiment.seeds]


def before_of(experiment: Experiment, arm: str) -> Run | None:
    """The run that comes before all others of an arm, if it wants one."""
    chosen = experiment.arms[arm]
    if not chosen.before:
        return None
    changes = (*experiment.set, *chosen.set, *chosen.before, f"seed={experiment.trial_seed}")
    return Run(arm=arm, point=BEFORE, trial="", seed=experiment.trial_seed, reported=False, changes=changes)


def points_of(experiment: Experiment) -> list[str]:
    """The names of the points, in order."""
    return list(experiment.points) or [PLAIN]


def cells_of(experiment: Experiment) -> list[tuple[str, str]]:
    """Every point and arm that belong together, point by point."""
    return [
        (point, name)
        for point in points_of(experiment)
        for name, arm in experiment.arms.items()
        if not arm.points or point in arm.points
    ]


def _run(experiment: Experiment, arm: str, point: str, trial: str, seed: int, *, reported: bool) -> Run:
    chosen = experiment.arms[arm]
    changes = [
        *experiment.set,
        *chosen.set,
        *experiment.points.get(point, []),
        *([] if reported else experiment.trial_set),
        *chosen.trials.get(trial, []),
        f"seed={seed}",
    ]
    return Run(arm=arm, point=point, trial=trial, seed=seed, reported=reported, changes=tuple(changes))


def recipe_of(experiment: Experiment, run: Run, output: str | Path, work: str | Path = "") -> FuseRecipe:
    """The fusion recipe of a run.

    Whatever is made before it and shared lies under `work`, at a place named by the hash of how it is made: towers that
    the recipe pre-trains, from data of their own or all that the run's recipe would have without its share of it; the
    model that the arm starts from; and the one that writes pseudo-labels. So no run can take what was made by other
    settings for its own.

    Args:
        experiment, run: what it is of. output: where its model goes. work: folder of what is shared.

    Raises:
        ValueError: as `read_recipe`.
    """
    recipe = replace(read_recipe(experiment.recipe, run.changes, FuseRecipe), output=str(output), overwrite=True)
    if recipe.start is not None:
        raise ValueError(f"{experiment.recipe}: start={recipe.start!r} is not followed in experiments")
    if run.point == BEFORE:  # the arm's settings, but for what makes less, or something else, of the data
        recipe = replace(recipe, data=whole_data(recipe.data), pseudo_labels=None)
    recipe.towers = {n: replace(t, source=_tower_place(n, recipe, work)) for n, t in recipe.towers.items()}
    if run.point != BEFORE and (before := before_of(experiment, run.arm)) is not None:
        first = next(iter(recipe.towers.values()))
        first.source, first.pretrain = before_place(experiment, before, work), None
    if recipe.pseudo_labels is not None:
        place = "labeller"
        if work:
            made_of = to_mapping(recipe_of(experiment, run, ""), defaults=False)
            place = str(Path(work) / "labellers" / _short_hash(made_of))
        recipe.pseudo_labels = replace(recipe.pseudo_labels, model=place)
    return recipe


def whole(recipe: FuseRecipe) -> FuseRecipe:
    """The recipe by which its towers are made: all the data, whatever share is aligned, and seed 0 for all runs.

    A tower that learns to spell is told the texts of the aligned rows alone: others would be pairs that the run's share
    leaves out.

    Raises:
        ValueError: for such a tower where a fraction is aligned: it is drawn anew with each seed, towers are made once.
    """
    towers = dict(recipe.towers)
    for name, tower in towers.items():
        here = tower.pretrain
        if here is None or here.data is not None or not here.training.ctc:
            continue
        if recipe.data.fraction < 1.0:
            raise ValueError(
                f"data.fraction={recipe.data.fraction}: towers.{name}.pretrain.training.ctc spells texts, which are "
                "aligned with the tower's own; in an experiment give data.limit, whose rows are the same for all seeds"
            )
        told = [limit for limit in (here.ctc_limit, recipe.data.limit) if limit is not None]
        towers[name] = replace(tower, pretrain=replace(here, ctc_limit=min(told, default=None)))
    return replace(recipe, towers=towers, data=whole_data(recipe.data), seed=0)


def whole_data(data: DataRecipe) -> DataRecipe:
    """Without a share or a limit."""
    return replace(data, fraction=1.0, limit=None)


def before_place(experiment: Experiment, before: Run, work: str | Path) -> str:
    """Where the model that an arm starts from is, or will be."""
    return str(Path(work) / "before" / _short_hash(to_mapping(recipe_of(experiment, before, ""), defaults=False)))


def _tower_place(name: str, recipe: FuseRecipe, work: str | Path) -> str:
    made = whole(recipe)
    here = made.towers[name].pretrain
    if here is None:
        return recipe.towers[name].source
    data = to_mapping(here.data or made.data, defaults=False)
    made_of = {"modality": name, "pretrain": to_mapping(here, defaults=False), "data": data}
    return str(Path(work) / "towers" / f"{name}-{_short_hash(made_of)}")


def _short_hash(plain: Any) -> str:
    return recipe_hash(plain)[:12]


def run_hash(experiment: Experiment, run: Run) -> str:
    """SHA-256 of all that decides what a run gives: its recipe without its output, and what is scored.

    Settings left at their default do not count, so that a record stays valid when recipes learn a new one.
    """
    recipe = to_mapping(recipe_of(experiment, run, ""), defaults=False)
    measured: dict[str, Any] = {"tasks": experiment.tasks if run.reported else []}
    for name in ("forgetting", "questions", "second_judge"):  # by name alone: a folder may be moved
        if run.reported and (given := getattr(experiment, name)):
            measured[name] = Path(given).name
    return recipe_hash({"recipe": recipe, **measured})
