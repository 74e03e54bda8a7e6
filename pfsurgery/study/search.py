"""Search: spend a budget by measured damage instead of relative error, and repair the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from pfsurgery.convert import marker
from pfsurgery.digests import digest, digest_of_images
from pfsurgery.errors import PolicyError, needs
from pfsurgery.policy import Tell
from pfsurgery.recover.budget import Budget
from pfsurgery.recover.choices import Choices, Places, halved, read_choices
from pfsurgery.recover.device import site_times
from pfsurgery.select import Patterns
from pfsurgery.study.bench import (
    Bench,
    Found,
    Made,
    Point,
    damages_alone,
    found,
    measured_alone,
)
from pfsurgery.study.competitors import on_hull, with_unfitted
from pfsurgery.study.inside import weights_inside
from pfsurgery.study.known import Known
from pfsurgery.study.optuna_search import (
    STORAGE,
    STUDY_PAGE,
    Outcome,
    draw_study,
    explore,
    open_study,
)
from pfsurgery.study.programme import programme
from pfsurgery.study.sensitivity import ALONE, begun

OPS = ("max_pool", "avg_pool")
_FITTED = 12  # bottlenecks of a site that compete
_SEEDS = 6  # budgets whose solutions Optuna begins with
_ROUNDS = 2  # of repair
_TRUSTS = (0.5, 1.0)  # powers of the weights that are tried: a whole step may go too far


def search(
    model: nn.Module,
    policy: Budget,
    images: Any,
    *,
    ops: Sequence[str] = OPS,
    validate: Callable[[nn.Module], float] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    out: str | Path | None = None,
    tell: Tell = lambda line: None,
) -> Found:
    """Convert within a budget that is spent by measured damage.

    1. Every form of every site (fitted bottlenecks, one operation a channel, plain ops, or the
       convolution) is put into the otherwise untouched network, repaired, and its damage to the
       output measured. A mixed-integer programme picks one form a site within the budget.
    2. That choice, and the one that `budget` makes by relative errors, are carried out; the one
       whose outputs are closer to the original's goes on.
    3. Damages interact, so it is measured how much those of each part of the network count in the
       converted one, with all behind it refitted; the programme picks again with these weights. A
       choice is kept where it brings the output closer, and then step 3 is repeated once.

    Networks that are compared are fitted to every other image and judged by the rest (by the same
    if there are fewer than 64); the one that is returned is fitted as `budget` would. So on images
    that they were not fitted to, the choice is never further from the original than that of
    `budget`. It takes several times as long.

    Args:
        model: The trained model; left as it is.
        policy: What may be spent, see `pfsurgery.budget`.
        images: A few hundred to a few thousand unlabelled images.
        ops: Ops that are not fitted and compete too.
        validate: Accuracy in percent of a model, if labels are at hand; it is only reported.
        include: Patterns of the sites that may change.
        exclude: Patterns of sites that are kept.
        out: Folder for `search.json`, and for what was measured, with which a search that was
            stopped goes on.
        tell: Called with a line of text for each step.

    Raises:
        PolicyError: The budget cannot be met; the message says what the least is.
        MissingExtraError: SciPy is not installed.
    """
    with needs("study", "Search by a programme"):
        import_module("scipy.optimize")  # missing, it is told before hours of measuring
    folder = _begun(model, policy, out)
    choices, equal = _competing(model, policy, images, ops, include, exclude, tell)
    times = cache(lambda: site_times(choices, policy.batch))
    alone = measured_alone(choices, times, policy.batch, folder, tell)
    harm = damages_alone(choices, alone)
    bench = Bench(halved(choices), validate, policy.batch, policy.unit, Known(folder), tell)

    def chosen(damages: Mapping[str, Sequence[float]]) -> Places:
        """The programme's choice, which with a budget of time depends on what was timed."""
        ms = times() if policy.unit == "latency" else None
        return bench.known_places(
            {"budget": policy.name, "damages": damages},
            lambda: policy.choose(choices, tell, damages, programme, ms)[0],
        )

    tried = [] if equal is None else [bench.make("equal relative errors", "budget", equal)]

    def meeting(name: str, damages: Mapping[str, Sequence[float]]) -> Places | None:
        """The choice; none, which is told, where it misses the budget and others meet it."""
        try:
            return chosen(damages)
        except PolicyError as error:  # of time, which is measured
            if not tried:
                raise
            tell(f"{name}: {error}")
            return None

    if (places := meeting("measured damage", harm)) is not None:
        tried.append(bench.make("measured damage", "sensitivity", places))
    best = min(tried, key=_damage)
    for number in range(1, _ROUNDS + 1):
        weights = weights_inside(
            *(bench.choices, best.places, policy.points(choices, harm)),
            *(bench.judge, bench.known, tell),
        )
        for trust in _TRUSTS:
            weighted = {
                name: [weights[name] ** trust * damage for damage in damages]
                for name, damages in harm.items()
            }
            name = f"repair {number}, trust {trust:g}"
            places = meeting(name, weighted)
            if places is not None and all(places != made.places for made in tried):
                tried.append(bench.make(name, "repair", places))
        nearest = min(tried, key=_damage)
        if nearest is best:
            break
        best = nearest
    points = [made.point for made in tried]
    return found(model, policy, choices, bench, best, points, alone, folder)


def search_front(
    model: nn.Module,
    policy: Budget,
    images: Any,
    *,
    trials: int = 50,
    storage: str | Path | None = None,
    ops: Sequence[str] = OPS,
    validate: Callable[[nn.Module], float] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    out: str | Path | None = None,
    tell: Tell = lambda line: None,
) -> Found:
    """Search the form of every site with Optuna, for small damage and small cost at once.

    NSGA-II starts from the programme's choices at several budgets (see `search`), and carries out
    and repairs every network that it tries. The result is the one with the least damage within the
    budget; `points` holds the front. The same call on several machines with one `storage` URL
    shares the work.

    Args:
        model: The trained model; left as it is.
        policy: What the result may cost, and so which cost is searched for.
        images: As for `search`.
        trials: How many trials the study shall have in all, by all processes and earlier runs
            together. A choice that comes up again is not made again, but counts.
        storage: See `pfsurgery.study.optuna_search.open_study`; by default `optuna.db` in `out`.
        ops: Ops that are not fitted and compete too.
        validate: Accuracy in percent of a model, if labels are at hand; it is only reported.
        include: Patterns of the sites that may change.
        exclude: Patterns of sites that are kept.
        out: Folder for `search.json`, the storage, what was measured, and `optuna.html`, Optuna's
            own figures of the study.
        tell: Called with a line of text for each network.

    Raises:
        PolicyError: The budget cannot be met, or no network that was tried meets it.
        SurgeryError: The storage cannot be opened, or belongs to another search.
        MissingExtraError: Optuna or SciPy is not installed.
    """
    with needs("study", "Search with Optuna"):
        import_module("plotly")  # missing, it is told before hours of measuring
    folder = _begun(model, policy, out)
    if storage is None and folder is None:
        raise PolicyError("A search with Optuna needs a place for its trials: give out or storage.")
    choices, _ = _competing(model, policy, images, ops, include, exclude, tell)
    setting = {
        "model": digest(choices.teacher),
        "images": digest_of_images([*choices.batches, *choices.judges]),
        "unit": policy.unit,
        "batch": policy.batch,
        "forms": list(policy.forms),
        "ops": list(ops),
    }
    study, options = open_study(storage or Path(out or ".") / STORAGE, choices.options, setting)
    choices = replace(choices, options=options)
    times = cache(lambda: site_times(choices, policy.batch))
    alone = measured_alone(choices, times, policy.batch, folder, tell)
    known = Known(None)  # the storage knows the trials
    bench = Bench(halved(choices), validate, policy.batch, policy.unit, known, tell)
    front = explore(
        study,
        options,
        lambda places: _as_outcome(bench.make("tried", "optuna", places)),
        _solutions(policy, choices, damages_alone(choices, alone), times),
        trials=trials,
    )
    if folder is not None:
        draw_study(study, policy.unit, folder / STUDY_PAGE)
    allowed = bench.allowed(policy)
    within = [trial for trial in front if trial.cost <= allowed]
    if not within:
        raise PolicyError(
            f"None of {trials} networks is within {policy.name}; the cheapest has "
            f"{front[0].cost:.1%} of the original's. Ask for that or more, or allow more trials."
        )
    best = min(within, key=lambda trial: trial.damage)
    made = bench.make(f"trial {best.number}", "optuna", best.places)
    others = [
        Point(**trial.facts | {"name": f"trial {trial.number}"})
        for trial in front
        if trial is not best
    ]
    return found(model, policy, choices, bench, made, [*others, made.point], alone, folder)


def _begun(model: nn.Module, policy: Budget, out: str | Path | None) -> Path | None:
    """The run folder."""
    if policy.max_drop is not None:
        raise PolicyError(
            "A search spends macs, params or latency. For a drop of accuracy convert with "
            "budget(max_drop=..., validate=...)."
        )
    return None if out is None else begun(out, model, ALONE, policy.batch, None)


def _competing(
    model: nn.Module,
    policy: Budget,
    images: Any,
    ops: Sequence[str],
    include: Patterns,
    exclude: Patterns,
    tell: Tell,
) -> tuple[Choices, Places | None]:
    """The options that compete, and what `budget` would choose, if its forms can meet the budget.

    Raises:
        PolicyError: There is nothing to choose, or not even all forms can meet it.
    """
    mark = policy.checked(model, marker(model, policy, include, exclude))
    choices = read_choices(model, mark, images, policy.forms, tell)
    if not choices.sites:
        raise PolicyError(
            f"No convolution of {type(model).__name__} can be converted, so there is nothing to "
            f"search; pfsurgery.plan(model, {policy.name}) says why for each."
        )
    try:
        equal, _ = policy.choose(choices, tell)
    except PolicyError:  # plain ops may be cheaper than what is fitted
        few = with_unfitted(on_hull(choices, _FITTED, policy.cost), ops)
        policy.choose(few, tell, {name: [0.0] * len(o) for name, o in few.options.items()})
        return few, None
    kept = {name: choices.options[name][place] for name, place in equal.items()}
    few = with_unfitted(on_hull(choices, _FITTED, policy.cost, kept), ops)
    return few, {name: few.options[name].index(option) for name, option in kept.items()}


def _as_outcome(made: Made) -> Outcome:
    return made.point.damage, made.share, asdict(made.point)


def _damage(made: Made) -> float:
    return made.point.damage


def _solutions(
    policy: Budget,
    choices: Choices,
    harm: Mapping[str, Sequence[float]],
    times: Callable[[], Mapping[str, Sequence[float]]],
) -> list[Places]:
    """The programme's choices at budgets from the least to nearly all of the convolutions' cost."""
    points = policy.points(choices, harm)
    if policy.unit == "latency":
        points = {name: list(zip(ms, harm[name], strict=True)) for name, ms in times().items()}
    least = sum(min(cost for cost, _ in options) for options in points.values())
    most = sum(options[0][0] for options in points.values())
    return [programme(points, least + (most - least) * i / _SEEDS) for i in range(_SEEDS)]
