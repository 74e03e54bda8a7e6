"""`pfsurgery ops` and `pfsurgery policies`."""

from __future__ import annotations

from pfsurgery.cli import options
from pfsurgery.ops import get_op, list_ops
from pfsurgery.policy import get_policy, list_policies
from pfsurgery.tables import add_whole, titled


def ops(json: options.Json = False) -> None:
    """List the operations that a site can become.

    Example: pfsurgery ops
    """
    _list("op", {name: get_op(name).summary for name in list_ops()}, json)


def policies(json: options.Json = False) -> None:
    """List the named policies.

    Example: pfsurgery policies --json
    """
    _list("policy", {name: get_policy(name).summary for name in list_policies()}, json)


def _list(what: str, summaries: dict[str, str], json: bool) -> None:
    table = titled("")
    add_whole(table, what)
    table.add_column("what it does")
    for name, summary in summaries.items():
        table.add_row(name, summary)
    options.emit(table, json, summaries)
