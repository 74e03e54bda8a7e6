"""From a run folder to its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pfsurgery.errors import SurgeryError
from pfsurgery.files import write_text
from pfsurgery.recover.logs import EPOCHS, LOG
from pfsurgery.report import finetune, layer, nas, robustness, search, sensitivity
from pfsurgery.report.page import Content, render
from pfsurgery.run_folder import RUN, Origin, read_run

PAGE = "report.html"
_KINDS: dict[str, Callable[[Path], Content]] = {
    "finetune": finetune.content,
    "sensitivity": sensitivity.content,
    "search": search.content,
    "layer": layer.content,
    "nas": nas.content,
    "robustness": robustness.content,
}


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run folder: one HTML file that needs nothing else, not even a network.

    Args:
        run: Folder that a study, a search or a fine-tuning wrote.
        out: The file; by default `report.html` in that folder.

    Returns:
        The path of the page.

    Raises:
        SurgeryError: The folder is none of a run, a file in it is missing or damaged, the page
            cannot be written, or Jinja2 or Plotly is not installed.
    """
    folder = Path(run)
    made = _what_made(folder)
    page = render(made, _KINDS[made.kind](folder))
    path = folder / PAGE if out is None else Path(out)
    write_text(path, page)
    return path


def _what_made(folder: Path) -> Origin:
    """What made the folder; `finetune` called from Python leaves a log and no `run.json`."""
    if (folder / RUN).exists():
        return read_run(folder)
    if (folder / LOG).exists() or (folder / EPOCHS).exists():
        return Origin("finetune", "", "", "", 0, {}, "")
    if not folder.is_dir():
        raise SurgeryError(f"There is no folder {folder}. Give one that a run has written.")
    raise SurgeryError(
        f"{folder} is not a run folder: it has neither {RUN} nor {LOG}. Give the folder that was "
        f"the --out of a study, a search or a fine-tuning."
    )
