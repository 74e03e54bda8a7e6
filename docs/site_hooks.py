"""Pages that MkDocs makes from what lies outside of docs/: notebooks, figures, the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# A link that is right in the repository, and what it is on the site.
_LINKS = (
    (re.compile(r"\]\((?:\.\./)?benchmarks/results/"), "](results/"),
    (re.compile(r"\]\((?:\.\./)?examples/(\w+)\.ipynb"), r"](examples/\1.md"),
    (re.compile(r"\]\((?:\.\./)?CONTRIBUTING\.md"), "](contributing.md"),
    (re.compile(r"\]\((?:\.\./)?CHANGELOG\.md"), "](changelog.md"),
    (re.compile(r"\]\(docs/"), "]("),
)
_NOTEBOOK_LINKS = (
    (re.compile(r"\]\((\w+)\.ipynb"), r"](\1.md"),
    (re.compile(r"\]\(\.\./docs/"), "](../"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and figures that lie elsewhere in the repository."""
    pages = {
        f"examples/{path.stem}.md": notebook_page(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted((ROOT / "examples").glob("*.ipynb"))
    }
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        pages[name.lower()] = (ROOT / name).read_text(encoding="utf-8")
    pages["command_line.md"] = command_line_page()
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the repository into links of the site."""
    links = _NOTEBOOK_LINKS if page.file.src_uri.startswith("examples/") else _LINKS
    for pattern, replacement in links:
        markdown = pattern.sub(replacement, markdown)
    return markdown


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: text, code, what was printed, and pictures."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for kind, outputs in groupby(cell["outputs"], key=lambda output: output["output_type"]):
            if kind == "stream":  # what was printed line by line is one text
                text = "".join("".join(output["text"]) for output in outputs)
                outputs = iter([{"text": text}])
            parts += [shown for output in outputs if (shown := _output(output))]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        encoded = "".join(data["image/png"]).replace("\n", "")
        return f"![Output of the cell above](data:image/png;base64,{encoded})"
    text = "".join(output.get("text", data.get("text/plain", ""))).strip("\n")
    return f"```text\n{text}\n```" if text.strip() else ""


def command_line_page() -> str:
    """Every command with its options, as the program itself declares them."""
    from typer.main import get_command

    from pfsurgery.cli import app

    lines = ["# Command line", "", _intro()]
    for name, command in _commands(get_command(app)):
        about, *examples = re.split(r"\n\s*Example: ", command.help.strip())
        lines += [f"## pfsurgery {name}", "", " ".join(about.split()), ""]
        if examples:
            lines += ["```bash", *(" ".join(example.split()) for example in examples), "```", ""]
        lines += ["| option | what it says | default |", "|---|---|---|"]
        lines += [_option(parameter) for parameter in command.params if parameter.name != "help"]
        lines.append("")
    return "\n".join(lines)


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each command with its name, those of groups behind the group's."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _intro() -> str:
    return (
        "`pfsurgery COMMAND --help` shows the same in a terminal. Most commands print JSON with "
        "`--json`. Bad input ends in one message and exit code 2.\n"
    )


def _option(parameter: Any) -> str:
    names = " / ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    about = (parameter.help or "").replace("|", "\\|")
    if parameter.required:
        default = "required"
    else:
        default = "" if parameter.default in (None, ()) else f"`{parameter.default}`"
    return f"| {names} | {about} | {default} |"
