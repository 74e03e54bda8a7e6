"""Search with Optuna: which form each site takes, for small damage and small cost at once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfsurgery.errors import SurgeryError, needs
from pfsurgery.recover.choices import Choices

if TYPE_CHECKING:
    import optuna

STORAGE = "optuna.db"
_NAME = "pfsurgery"
_HEARTBEAT_S = 60  # a process that was silent for twice as long is taken for dead
_FINGERPRINT = "options"
_FACTS = "facts"
_ATTEMPTS = 3

Places = dict[str, int]
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


def explore(
    choices: Choices,
    evaluate: Callable[[Places], Outcome],
    seeds: Sequence[Places],
    *,
    trials: int,
    storage: str | Path,
    setting: Mapping[str, Any],
) -> list[Trial]:
    """Search the options of all sites by NSGA-II (Deb et al. 2002), for few damage and low cost.

    Several processes, on one machine or many, may work on one storage at the same time. Each trial
    is kept as soon as it is done, and what a killed process was working on is done again. A choice
    that was tried before, by whichever process, is not carried out again.

    Args:
        choices: The options of each site.
        evaluate: Damage, cost and facts of a network with one option a site.
        seeds: Choices that are tried first, such as those of a programme at several budgets.
        trials: How many networks the study shall have in all.
        storage: A file for SQLite (`.db`) or for Optuna's journal (`.log`, for file systems that
            machines share), or the URL of a database, such as `postgresql://...`.
        setting: What the study is about; a study that was begun with another one is refused.

    Returns:
        The trials that neither damage less at equal cost nor cost less at equal damage than another
        (the Pareto front), by cost.

    Raises:
        SurgeryError: The storage cannot be opened, or belongs to a study of something else.
        MissingExtraError: Optuna is not installed.
    """
    study = _opened(storage, dict(setting) | {_FINGERPRINT: _described(choices)})
    if not study.trials:
        for places in seeds:
            study.enqueue_trial(dict(places), skip_if_exists=True)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        places = {
            name: trial.suggest_int(name, 0, len(options) - 1)
            for name, options in choices.options.items()
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


def _opened(storage: str | Path, setting: dict[str, Any]) -> optuna.Study:
    with needs("study", "Search with Optuna"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    text = str(storage)
    study = _created(text)
    for key, value in setting.items():
        before = study.user_attrs.get(key)
        if before is None:
            study.set_user_attr(key, value)
        elif before != value:
            raise SurgeryError(
                f"The study in {text} was begun with another {key}: {before!r:.200} there, "
                f"{value!r:.200} now. Take another storage, or the same setting."
            )
    return study


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
        text if "://" in text else f"sqlite:///{text}",
        heartbeat_interval=_HEARTBEAT_S,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        engine_kwargs={"connect_args": {"timeout": 60}} if "://" not in text else {},
    )


def _described(choices: Choices) -> list[list[str]]:
    """Which options there are, so that indices mean the same to every process."""
    return [[name, *map(str, options)] for name, options in choices.options.items()]


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
