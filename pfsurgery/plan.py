"""Plans: what each site of one model becomes and why, before anything is changed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pfsurgery.errors import NoEffectWarning, PolicyError, UnsupportedSiteError
from pfsurgery.ops import Op, Support, get_op
from pfsurgery.policy import KEEP, Policy, Rule, SitePolicy, Tail
from pfsurgery.select import Patterns, Where, check_patterns, matches
from pfsurgery.sites import Site
from pfsurgery.structure import Structure

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

Mixing = Literal["auto", "never"]
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Decision:
    """What one site becomes.

    Attributes:
        site: The site.
        op: Name of an op, or `keep`.
        pointwise: A 1x1 convolution stands behind the op, since the number of channels changes or
            nothing else would mix them. It has parameters.
        tail: What becomes of the norm and the activation behind the site.
        reason: Why.
        structure: Widths and columns, where `op` is `mixed`, `thin` or `bare`: fitted to data.
    """

    site: Site
    op: str
    pointwise: bool = False
    tail: Tail = "keep"
    reason: str = ""
    structure: Structure | None = None

    @property
    def replaced(self) -> bool:
        """Whether the site changes."""
        return self.op != KEEP

    @property
    def label(self) -> str:
        """The op with what stands behind it: `max_pool`, `max_pool+pointwise`, `keep`."""
        if self.structure is not None:
            shown = str(self.structure)
            return shown if shown.startswith(self.op) else f"{self.op}: {shown}"
        return f"{self.op}+pointwise" if self.pointwise else self.op

    @property
    def parameters_saved(self) -> int:
        """Parameters that the model loses."""
        if not self.replaced:
            return 0
        geometry = self.site.geometry
        if self.structure is not None:
            saved = geometry.parameters - self.structure.parameters(geometry)
            return saved + (self.site.neighbours.tail_parameters if self.tail == "drop" else 0)
        op = get_op(self.op)
        kept = geometry.parameters if op.keeps_convolution else op.parameters(self.site)
        if self.pointwise:
            kept = self._pointwise_macs + (geometry.out_channels if geometry.bias else 0)
        dropped = self.site.neighbours.tail_parameters if self.tail == "drop" else 0
        return geometry.parameters - kept + dropped

    @property
    def macs_saved(self) -> int:
        """Multiply-adds saved in one forward pass of the example."""
        if not self.replaced:
            return 0
        geometry = self.site.geometry
        if self.structure is not None:
            left = self.structure.macs_per_position(geometry)
            return (geometry.macs_per_position - left) * self.site.positions
        op = get_op(self.op)
        kept = op.macs_per_position(self.site)
        if op.keeps_convolution:
            kept += geometry.macs_per_position
        if self.pointwise:
            kept += self._pointwise_macs
        return (geometry.macs_per_position - kept) * self.site.positions

    @property
    def _pointwise_macs(self) -> int:
        geometry = self.site.geometry
        return geometry.out_channels * (geometry.in_channels // geometry.groups)


def decide(
    site: Site, rule: Rule | None, *, mixing: Mixing = "auto", forced: bool = False
) -> Decision:
    """What `rule` makes of `site`; kept, with the reason, where it cannot be done.

    Args:
        site: The site.
        rule: The rule that matched it, None where none did.
        mixing: `"never"` keeps sites that would need a pointwise convolution.
        forced: The user named this site, so stems and output convolutions may change too.
    """
    if rule is None:
        return Decision(site, KEEP, reason="no rule matches")
    if rule.op == KEEP:
        return Decision(site, KEEP, reason=rule.why or "a rule keeps it")
    op = get_op(rule.op)
    why_not = site.blocked
    if why_not is None and op.attention != (site.kind == "attention"):
        why_not = f"{rule.op} takes the place of {'attention' if op.attention else 'convolutions'}"
    if why_not is None and not forced:
        if site.stem:
            why_not = "stem: it reads the model's input"
        elif site.output:
            why_not = "it feeds the model's output"
    if why_not is None:
        support = _support(op, site)
        why_not = None if support else f"{rule.op}: {support.reason}"
    mixes = op.keeps_convolution or op.fitted or op.attention
    pointwise = not mixes and needs_pointwise(site)
    if why_not is None and pointwise and mixing == "never":
        why_not = f"{rule.op} would need a pointwise convolution, and mixing is 'never'"
    if why_not is not None:
        return Decision(site, KEEP, reason=why_not)
    return Decision(site, rule.op, pointwise, rule.tail, rule.why or _why(site, pointwise))


def _support(op: Op, site: Site) -> Support:
    if op.fitted and site.geometry.dims != 2:
        return Support(f"fitted bottlenecks are for images, and this one is {site.geometry.dims}-D")
    return op.supports(site)


def needs_pointwise(site: Site) -> bool:
    """Whether an op at `site` needs a pointwise convolution to keep or mix the channels."""
    geometry = site.geometry
    if geometry.in_channels != geometry.out_channels:
        return True
    return site.kind != "depthwise" and site.neighbours.pointwise_after is None


def _why(site: Site, pointwise: bool) -> str:
    geometry = site.geometry
    if site.kind == "attention":
        return "two linear layers mix the channels"
    if not pointwise:
        after = site.neighbours.pointwise_after
        return f"{after} mixes the channels" if after else "depthwise: channels were never mixed"
    if geometry.in_channels != geometry.out_channels:
        return f"{geometry.in_channels} channels become {geometry.out_channels}"
    return "nothing else mixes the channels"


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions for one model, in the order of execution. Editing returns a new plan.

    Attributes:
        policy: Name of the policy that decided.
        decisions: One for each site.
    """

    policy: str
    decisions: tuple[Decision, ...]

    @property
    def replaced(self) -> tuple[Decision, ...]:
        """The decisions that change something."""
        return tuple(decision for decision in self.decisions if decision.replaced)

    @property
    def changed(self) -> frozenset[str]:
        """Names of the sites that change."""
        return frozenset(name for decision in self.replaced for name in decision.site.names)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __getitem__(self, name: str) -> Decision:
        for decision in self.decisions:
            if name in decision.site.names:
                return decision
        check_patterns((d.site for d in self.decisions), name)
        raise KeyError(name)

    def keep(self, patterns: Patterns) -> Plan:
        """A plan in which the sites that match stay as they are.

        Raises:
            PatternError: A pattern matches no site.
        """
        return self._edit(patterns, lambda site: Decision(site, KEEP, reason="kept by hand"))

    def set(self, patterns: Patterns, op: str, *, tail: Tail = "keep") -> Plan:
        """A plan in which the sites that match become `op`, stems and outputs included.

        Raises:
            PatternError: A pattern matches no site.
            UnknownNameError: No op has that name.
            UnsupportedSiteError: The op cannot stand at one of the sites.
        """
        rule = Rule(op, tail=tail)
        if op != KEEP and get_op(op).fitted:
            raise UnsupportedSiteError(
                f"{op} is fitted to images: convert with policy=pfsurgery.budget(...) or "
                f"pfsurgery.bare() and images=."
            )

        def chosen(site: Site) -> Decision:
            decision = decide(site, rule, forced=True)
            if op != KEEP and not decision.replaced:
                raise UnsupportedSiteError(f"{site.name} cannot become {op}: {decision.reason}.")
            return replace(decision, reason="set by hand")

        return self._edit(patterns, chosen)

    def _edit(self, patterns: Patterns, chosen: Any) -> Plan:
        check_patterns((d.site for d in self.decisions), patterns)
        return replace(
            self,
            decisions=tuple(
                chosen(d.site) if matches(d.site, patterns) else d for d in self.decisions
            ),
        )

    def to_json(self) -> str:
        """The plan as JSON; `from_json` gives it back unchanged."""
        return json.dumps(self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        decisions = [
            {
                "op": d.op,
                "pointwise": d.pointwise,
                "tail": d.tail,
                "reason": d.reason,
                "structure": d.structure.to_dict() if d.structure else None,
                "site": d.site.to_dict(),
            }
            for d in self.decisions
        ]
        return {"format": _FORMAT, "policy": self.policy, "decisions": decisions}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            PolicyError: The text is not a plan; the message names the key.
            UnknownNameError: It names an op that is not registered.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise PolicyError(f"The plan is not JSON: {error}.") from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Any) -> Plan:
        """The plan that `to_dict` wrote; raises as `from_json` does."""
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise PolicyError(f'Not a plan that this version reads: it needs "format": {_FORMAT}.')
        try:
            decisions = tuple(_decision_from_dict(entry) for entry in values["decisions"])
            return cls(str(values["policy"]), decisions)
        except KeyError as error:
            raise PolicyError(f"The plan lacks the key {error}.") from None
        except (TypeError, AttributeError) as error:
            raise PolicyError(f"The plan has a value of the wrong form: {error}.") from None

    def figure(self, path: str | Path) -> None:
        """Write a figure of the sites that were fitted to images, as PNG.

        Raises:
            PolicyError: No site was fitted.
            OSError: `path` cannot be written.
        """
        from pfsurgery.measure.structures import draw_structures

        draw_structures(self, path)

    def __str__(self) -> str:
        from pfsurgery.tables import render

        return render(self.__rich__())

    def __rich__(self) -> Table:
        """The plan as a Rich table."""
        from pfsurgery.tables import plan_table

        return plan_table(self)


def _decision_from_dict(entry: dict[str, Any]) -> Decision:
    site = Site.from_dict(entry["site"])
    for key, valid, wanted in (
        ("op", isinstance(entry["op"], str), "text"),
        ("pointwise", isinstance(entry["pointwise"], bool), "true or false"),
        ("tail", entry["tail"] in get_args(Tail), "'keep' or 'drop'"),
        ("reason", isinstance(entry["reason"], str), "text"),
    ):
        if not valid:
            raise PolicyError(
                f"The plan's {key} of {site.name} must be {wanted}, not {entry[key]!r}."
            )
    decision = Decision(
        site=site,
        op=entry["op"],
        pointwise=entry["pointwise"],
        tail=entry["tail"],
        reason=entry["reason"],
        structure=Structure.from_dict(entry["structure"]) if entry["structure"] else None,
    )
    if decision.replaced and decision.structure is None:
        get_op(decision.op)
    return decision


def warn_of_no_effect(model: nn.Module, plan: Plan, *, stacklevel: int) -> None:
    """Say that `plan` replaces nothing; the level counts from here."""
    warnings.warn(
        f"Policy {plan.policy} changes nothing in {type(model).__name__}; "
        f"pfsurgery.plan(model, policy) says why for each site.",
        NoEffectWarning,
        stacklevel=stacklevel,
    )


def make_plan(
    sites: Iterable[Site],
    policy: SitePolicy,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Where | None = None,
    mixing: Mixing = "auto",
) -> Plan:
    """Ask `policy` about each site.

    Args:
        sites: What `scan` found.
        policy: The policy.
        include: Only sites that match may change; a site that matches may change even if it is a
            stem or an output convolution, when its exact name is given.
        exclude: Sites that match are kept.
        where: Only sites for which it returns True may change.
        mixing: `"never"` keeps sites that would need a pointwise convolution.

    Raises:
        PatternError: A pattern, also one in a rule of the policy, matches no site.
    """
    sites = tuple(sites)
    if mixing not in ("auto", "never"):
        raise PolicyError(f"mixing must be 'auto' or 'never', not {mixing!r}.")
    named_by_rules = [rule.name for rule in policy.rules] if isinstance(policy, Policy) else []
    check_patterns(sites, include, exclude, *named_by_rules)

    def decision(site: Site) -> Decision:
        if include is not None and not matches(site, include):
            return Decision(site, KEEP, reason="not included")
        if matches(site, exclude):
            return Decision(site, KEEP, reason="excluded")
        if where is not None and not where(site):
            return Decision(site, KEEP, reason="not selected by where")
        named = include is not None and bool(set(site.names) & set(_exact(include)))
        return decide(site, policy.decide(site), mixing=mixing, forced=named)

    return Plan(policy.name, tuple(decision(site) for site in sites))


def _exact(patterns: Patterns) -> Iterable[str]:
    return (patterns,) if isinstance(patterns, str) else patterns or ()
