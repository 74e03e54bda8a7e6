"""Search with Optuna: which form each site takes, for small damage and small cost at once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfsurgery.errors import SurgeryError, needs
from pfsurgery.files import write_text
from pfsurgery.recover.choices import Options, Places
from pfsurgery.recover.options import Option

if TYPE_CHECKING:
    import optuna

STORAGE = "optuna.db"
STUDY_PAGE = "optuna.html"
_NAME = "pfsurgery"
_HEARTBEAT_S = 60  # a process that was silent for twice as long is taken for dead
_OPTIONS = "options"
_FACTS = "facts"
_ATTEMPTS = 3

Outcome = tuple[float, float, dict[str, Any]]  # damage, cost, and what else is known


@dataclass(frozen=True, slots=True)
class Trial:
    """One network of a study.

    Attributes:
        number: Of the trial, over all processes.
        places: Index of each site's option.
        damage: Distance of its outputs to the original's.
        cost: In the unit of the study.
        facts: What else is known of it, JSON-ready.
    """

    number: int
    places: Places
    damage: float
    cost: float
    facts: dict[str, Any]


def open_study(
    storage: str | Path, options: Options, setting: Mapping[str, Any]
) -> tuple[optuna.Study, Options]:
    """The study in a storage, begun if it is not there, and the options that all its trials mean.

    Args:
        storage: A file for SQLite (`.db`) or for Optuna's journal (`.log`, for file systems that
            machines share), or the URL of a database, such as `postgresql://...`.
        options: The options of each site, as found here. Another machine may have found slightly
            different ones: those that the study was begun with count.
        setting: What the study is about, JSON-ready.

    Raises:
        SurgeryError: The storage cannot be opened, or the study in it is about something else.
        MissingExtraError: Optuna is not installed.
    """
    with needs("study", "Search with Optuna"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _created(str(storage))
    wanted = {**setting, "sites": list(options)}
    for key, value in wanted.items():
        before = study.user_attrs.get(key)
        if before is None:
            study.set_user_attr(key, value)
        elif before != value:
            raise SurgeryError(
                f"The study in {storage} was begun with another {key}: {before!r:.200} there, "
                f"{value!r:.200} now. Take another storage, or the same setting."
            )
    if _OPTIONS not in study.user_attrs:
        study.set_user_attr(_OPTIONS, _to_values(options))
    return study, _from_values(study.user_attrs[_OPTIONS])


def explore(
    study: optuna.Study,
    options: Options,
    evaluate: Callable[[Places], Outcome],
    seeds: Sequence[Places],
    *,
    trials: int,
) -> list[Trial]:
    """Search the options of all sites by NSGA-II (Deb et al. 2002), for little damage and cost.

    Several processes, on one machine or many, may work on one study at the same time. Each trial
    is kept as soon as it is done, and what a killed process was working on is done again, where the
    storage has heartbeats (databases do, a journal file does not). A choice that is known, from
    whichever process, is not carried out again.

    Args:
        study: From `open_study`.
        options: From `open_study`.
        evaluate: Damage, cost and facts of a network with one option a site.
        seeds: Choices that are tried first, such as those of a programme at several budgets.
        trials: How many networks the study shall have in all.

    Returns:
        The trials that no other beats in both damage and cost (the Pareto front), by cost.
    """
    if not study.trials:
        for places in seeds:
            study.enqueue_trial(dict(places), skip_if_exists=True)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        places = {
            name: trial.suggest_int(name, 0, len(found) - 1) for name, found in options.items()
        }
        damage, cost, facts = _known(study, places) or evaluate(places)
        trial.set_user_attr(_FACTS, facts)
        return damage, cost

    def enough(study: optuna.Study, _: Any) -> None:
        if _finished(study) >= trials:
            study.stop()

    left = trials - _finished(study)
    if left > 0:
        study.optimize(objective, n_trials=left, callbacks=[enough])
    front = [_as_trial(trial) for trial in study.best_trials]
    return sorted(front, key=lambda trial: (trial.cost, trial.damage))


def draw_study(study: optuna.Study, unit: str, path: Path) -> None:
    """Write Optuna's figures of a study as one page: its front, and which sites it hung on.

    Raises:
        SurgeryError: `path` cannot be written.
    """
    with needs("study", "Drawing a study"):
        from optuna import visualization
        from plotly.io import to_html
    cost = f"share of the original's {unit}"
    figures = [
        visualization.plot_pareto_front(study, target_names=["damage (nats)", cost]),
        visualization.plot_slice(study, target=lambda t: t.values[0], target_name="damage (nats)"),
    ]
    parts = [to_html(f, full_html=False, include_plotlyjs=i == 0) for i, f in enumerate(figures)]
    write_text(path, "<!doctype html><meta charset='utf-8'><title>Optuna</title>" + "".join(parts))


def _to_values(options: Options) -> dict[str, list[Any]]:
    return {
        name: [None if option is None else asdict(option) for option in found]
        for name, found in options.items()
    }


def _from_values(values: Mapping[str, Sequence[Any]]) -> Options:
    return {
        name: [None if v is None else Option(**{**v, "sizes": tuple(v["sizes"])}) for v in found]
        for name, found in values.items()
    }


def _created(text: str) -> optuna.Study:
    import optuna

    for attempt in range(_ATTEMPTS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
                return optuna.create_study(
                    study_name=_NAME,
                    storage=_storage(text),
                    sampler=optuna.samplers.NSGAIISampler(population_size=16),
                    directions=("minimize", "minimize"),
                    load_if_exists=True,
                )
        except Exception as error:  # each kind of storage raises its own
            if attempt == _ATTEMPTS - 1:
                raise SurgeryError(f"The storage {text} cannot be opened: {error}") from error
            time.sleep(1)  # another process may be making it at this moment
    raise AssertionError("the last attempt returns or raises")


def _storage(text: str) -> Any:
    from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
    from optuna.storages.journal import JournalFileBackend

    if text.endswith(".log"):
        return JournalStorage(JournalFileBackend(text))
    return RDBStorage(
        text if "://" in text else _sqlite_url(text),
        heartbeat_interval=_HEARTBEAT_S,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        engine_kwargs={"connect_args": {"timeout": 60}} if "://" not in text else {},
    )


def _sqlite_url(path: str) -> str:
    from sqlalchemy import URL

    url = URL.create("sqlite", database=path).render_as_string(hide_password=False)
    return url.replace("{", "{{").replace("}", "}}")  # Optuna formats it


def _finished(study: optuna.Study) -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _known(study: optuna.Study, places: Places) -> Outcome | None:
    """What an earlier trial with the same choice found."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.params == places:
            damage, cost = trial.values
            return damage, cost, trial.user_attrs[_FACTS]
    return None


def _as_trial(trial: optuna.trial.FrozenTrial) -> Trial:
    damage, cost = trial.values
    return Trial(trial.number, dict(trial.params), damage, cost, trial.user_attrs[_FACTS])
