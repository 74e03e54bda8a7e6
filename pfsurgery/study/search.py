"""Search: spend a budget by measured damage instead of relative error, and repair the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from pfsurgery.convert import marker
from pfsurgery.errors import PolicyError
from pfsurgery.example import Example
from pfsurgery.policy import Tell
from pfsurgery.recover.budget import Budget
from pfsurgery.recover.choices import Choices, Places, read_choices
from pfsurgery.recover.device import site_times
from pfsurgery.recover.progress import tracked
from pfsurgery.run_folder import note_run
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
from pfsurgery.study.damage import damages, judge_by_all, judge_of, seen_of
from pfsurgery.study.optuna_search import (
    STORAGE,
    STUDY_PAGE,
    Outcome,
    draw_study,
    explore,
    open_study,
)
from pfsurgery.study.programme import programme

OPS = ("max_pool", "avg_pool")
_FITTED = 12  # bottlenecks of a site that compete
_SEEDS = 6  # budgets whose solutions Optuna begins with
_ROUNDS = 2  # of repair


def search(
    model: nn.Module,
    policy: Budget,
    images: Any,
    *,
    ops: Sequence[str] = OPS,
    validate: Callable[[nn.Module], float] | None = None,
    example: Example | None = None,
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
    3. Damages interact, so forms near the chosen ones are measured again, each inside the converted
       network, and the programme picks again; this is kept where it brings the output closer.

    So the result is never further from the original, on these images, than that of `budget`. It
    takes several times as long.

    Args:
        model: The trained model; left as it is.
        policy: What may be spent, see `pfsurgery.budget`.
        images: A few hundred to a few thousand unlabelled images; a tenth is held out to judge by.
        ops: Ops that are not fitted and compete too.
        validate: Accuracy in percent of a model, if labels are at hand; it is only reported.
        example: As for `pfsurgery.plan`.
        include: Patterns of the sites that may change.
        exclude: Patterns of sites that are kept.
        out: Folder for `search.json`, and for what was measured, with which a search that was
            stopped goes on.
        tell: Called with a line of text for each step.

    Raises:
        PolicyError: The budget cannot be met; the message says what the least is.
        MissingExtraError: SciPy is not installed.
    """
    folder = _noted(model, policy, out)
    mark = marker(model, policy, example, include, exclude, None)
    choices = on_hull(read_choices(model, mark, images, policy.forms, tell), _FITTED)
    rivals = with_unfitted(choices, ops)
    bench = Bench(rivals, judge_by_all(rivals), validate, policy.batch, policy.unit, tell)

    equal = bench.make("equal relative errors", "budget", policy.choose(choices, tell)[0])
    alone = measured_alone(bench, folder)
    places, _ = policy.choose(rivals, tell, damages_alone(rivals, alone), programme)
    best, points = equal, [equal.point]
    for number in range(_ROUNDS + 1):
        origin = "repair" if number else "sensitivity"
        made = bench.make(f"repair {number}" if number else "measured damage", origin, places)
        points.append(made.point)
        if number and made.point.damage >= best.point.damage:
            break
        best = min(best, made, key=lambda one: one.point.damage)
        places = _repaired(policy, bench, best)
        if places == best.places:
            break
    return found(model, policy, bench, best, points, alone, folder)


def search_front(
    model: nn.Module,
    policy: Budget,
    images: Any,
    *,
    trials: int = 50,
    storage: str | Path | None = None,
    ops: Sequence[str] = OPS,
    validate: Callable[[nn.Module], float] | None = None,
    example: Example | None = None,
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
        trials: How many networks are made in all, by all processes and earlier runs together.
        storage: See `pfsurgery.study.optuna_search.open_study`; by default `optuna.db` in `out`.
        ops: Ops that are not fitted and compete too.
        validate: Accuracy in percent of a model, if labels are at hand; it is only reported.
        example: As for `pfsurgery.plan`.
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
    folder = _noted(model, policy, out)
    if storage is None and folder is None:
        raise PolicyError("A search with Optuna needs a place for its trials: give out or storage.")
    mark = marker(model, policy, example, include, exclude, None)
    choices = with_unfitted(
        on_hull(read_choices(model, mark, images, policy.forms, tell), _FITTED), ops
    )
    study, options = open_study(
        storage or Path(out or ".") / STORAGE,
        choices.options,
        {"unit": policy.unit, "batch": policy.batch, "ops": list(ops)},
    )
    choices = replace(choices, options=options)
    bench = Bench(choices, judge_by_all(choices), validate, policy.batch, policy.unit, tell)
    alone = measured_alone(bench, folder)
    front = explore(
        study,
        options,
        lambda places: _as_outcome(bench.make("tried", "optuna", places)),
        _solutions(policy, choices, damages_alone(choices, alone)),
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
    return found(model, policy, bench, made, [*others, made.point], alone, folder)


def _noted(model: nn.Module, policy: Budget, out: str | Path | None) -> Path | None:
    """The run folder, with what is known of the run so far."""
    if policy.max_drop is not None:
        raise PolicyError(
            "A search spends macs, params or latency. For a drop of accuracy convert with "
            "budget(max_drop=..., validate=...)."
        )
    if out is None:
        return None
    note_run(out, "search", model=model)
    return Path(out)


def _as_outcome(made: Made) -> Outcome:
    return made.point.damage, made.share, asdict(made.point)


def _solutions(
    policy: Budget, choices: Choices, harm: Mapping[str, Sequence[float]]
) -> list[Places]:
    """The programme's choices at budgets from the least to nearly all of the convolutions' cost."""
    if policy.unit == "latency":
        costs = site_times(choices, policy.batch)
    else:
        costs = {
            site.name: [policy.cost(site, option) for option in choices.options[site.name]]
            for site in choices.sites
        }
    points = {name: list(zip(costs[name], harm[name], strict=True)) for name in costs}
    least = sum(min(values) for values in costs.values())
    most = sum(values[0] for values in costs.values())
    return [programme(points, least + (most - least) * i / _SEEDS) for i in range(_SEEDS)]


def _repaired(policy: Budget, bench: Bench, best: Made) -> Places:
    """The programme's choice among forms near the chosen ones, measured inside the network."""
    choices = bench.choices
    near = {site.name: _near(choices, site.name, best.places[site.name]) for site in choices.sites}
    options = {name: [choices.options[name][i] for i in places] for name, places in near.items()}
    judge, seen = judge_of(choices), seen_of(choices)
    harm = {
        site.name: damages(choices, best.network, site, options[site.name], judge, seen)
        for site in tracked(choices.sites, "measuring sites inside")
    }
    picked, _ = policy.choose(replace(choices, options=options), bench.tell, harm, programme)
    return {name: near[name][place] for name, place in picked.items()}


def _near(choices: Choices, name: str, place: int) -> list[int]:
    """The option and those beside it in cost, fitted ones and the convolution; alone if bare."""
    options = choices.options[name]
    chosen = options[place]
    if chosen is not None and chosen.form in ("bare", "op"):
        return [place]
    fitted = [i for i, o in enumerate(options) if o is None or o.form not in ("bare", "op")]
    dense = max((o.macs for o in options if o is not None), default=0.0) + 1
    order = sorted(fitted, key=lambda i: dense if (o := options[i]) is None else o.macs)
    at = order.index(place)
    return order[max(0, at - 2) : at + 3]
