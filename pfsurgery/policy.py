"""Policies: ordered rules that say what each site becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import yaml
from torch import Tensor, nn

from pfsurgery.errors import PolicyError, UnknownNameError, closest
from pfsurgery.ops import get_op
from pfsurgery.select import Where, as_patterns, matches
from pfsurgery.sites import AttentionGeometry, Geometry, Site

if TYPE_CHECKING:
    from pfsurgery.plan import Plan

Tail = Literal["keep", "drop"]
KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Rule:
    """What the sites that it matches become. All conditions given must hold.

    Attributes:
        op: Name of an op, or `keep`.
        tail: `"keep"` leaves norm and activation behind the site as they are; `"drop"` turns them
            into `nn.Identity`, as in the paper's efficient bottleneck.
        name: Name patterns: exact, glob, or `re:` and a regular expression.
        kind: `"depthwise"`, `"grouped"`, `"dense"` or `"attention"`.
        block: `"odd"` for every second attention of a stage, the second one first; `"even"` for
            the others.
        depth: `"deep"` for the deeper half of the resolution stages, `"shallow"` for the rest.
        stride: True for sites with a stride, False for those without.
        bottleneck: True for sites between two pointwise convolutions.
        same_channels: True for sites with as many output as input channels.
        where: Any further condition, as a function of the site (Python only).
        why: What the plan gives as the reason; a reason of the rule's kind where it is empty.
    """

    op: str
    tail: Tail = "keep"
    name: str | tuple[str, ...] | None = None
    kind: str | None = None
    block: Literal["odd", "even"] | None = None
    depth: Literal["deep", "shallow"] | None = None
    stride: bool | None = None
    bottleneck: bool | None = None
    same_channels: bool | None = None
    where: Where | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if self.op != KEEP:
            get_op(self.op)
        _check_choice("tail", self.tail, ("keep", "drop"))
        _check_choice("kind", self.kind, (None, "depthwise", "grouped", "dense", "attention"))
        _check_choice("block", self.block, (None, "odd", "even"))
        _check_choice("depth", self.depth, (None, "deep", "shallow"))
        for flag in ("stride", "bottleneck", "same_channels"):
            _check_choice(flag, getattr(self, flag), (None, True, False))
        if not isinstance(self.why, str | None):
            raise PolicyError(f"A rule's why is text (quote it in YAML), not {self.why!r}.")

    def matches(self, site: Site) -> bool:
        """Whether all conditions hold for `site`."""
        geometry = site.geometry
        facts = (
            (self.kind, site.kind),
            (self.block, _parity(geometry)),
            (self.depth, "deep" if site.depth >= 0.5 else "shallow"),
            (self.stride, geometry.strided),
            (self.bottleneck, site.bottleneck),
            (self.same_channels, geometry.in_channels == geometry.out_channels),
        )
        return (
            all(wanted is None or wanted == fact for wanted, fact in facts)
            and (self.name is None or matches(site, self.name))
            and (self.where is None or self.where(site))
        )


def _parity(geometry: Geometry) -> str | None:
    if not isinstance(geometry, AttentionGeometry):
        return None
    return "odd" if geometry.block % 2 else "even"


def _check_choice(what: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is choice or value == choice for choice in allowed):
        shown = ", ".join(repr(choice) for choice in allowed if choice is not None)
        raise PolicyError(f"A rule's {what} must be one of {shown}, not {value!r}.")


@dataclass(frozen=True, slots=True)
class Policy:
    """Ordered rules; the first that matches a site decides, and a site that none matches is kept.

    Attributes:
        name: What the registry and the plan call it.
        rules: The rules.
        summary: One line for listings.
    """

    name: str
    rules: tuple[Rule, ...]
    summary: str = ""

    @property
    def attention(self) -> bool:
        """Whether self-attentions are sites for it."""
        ops = (get_op(rule.op) for rule in self.rules if rule.op != KEEP)
        return any(op.attention for op in ops) or any(r.kind == "attention" for r in self.rules)

    def decide(self, site: Site) -> Rule | None:
        """The first rule that matches `site`, None where none does."""
        return next((rule for rule in self.rules if rule.matches(site)), None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "custom") -> Policy:
        """A policy from the content of a YAML file.

        Raises:
            PolicyError: A key is unknown or a value has the wrong form.
            UnknownNameError: A rule names an op that does not exist.
        """
        _check_keys("policy", values, ("name", "summary", "rules"))
        rules = values.get("rules")
        if not isinstance(rules, list) or not rules:
            raise PolicyError(f"Policy {values.get('name', name)!r} needs a list of rules.")
        return cls(
            name=str(values.get("name", name)),
            rules=tuple(_rule_from_dict(rule) for rule in rules),
            summary=str(values.get("summary", "")),
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> Policy:
        """A policy from a YAML file.

        Raises:
            PolicyError: The file is unreadable or not a policy.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PolicyError(f"{path} cannot be read as a YAML policy: {error}.") from None
        if not isinstance(values, dict):
            raise PolicyError(f"{path} is not a policy: it needs the keys name and rules.")
        return cls.from_dict(values, name=path.stem)


def _rule_from_dict(values: object) -> Rule:
    if not isinstance(values, dict) or "op" not in values:
        raise PolicyError(
            f"A rule needs the key op, as in {{kind: depthwise, op: max_pool}}: {values!r}"
        )
    _check_keys("rule", values, tuple(f.name for f in fields(Rule) if f.name != "where"))
    name = values.get("name")
    patterns = name if isinstance(name, list) else [name]
    if not isinstance(values["op"], str) or not all(
        isinstance(pattern, str) for pattern in patterns if name is not None
    ):
        raise PolicyError(f"A rule's op and name are text (quote them in YAML): {values!r}")
    return Rule(**{**values, "name": as_patterns(name) if name is not None else None})


def _check_keys(what: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise PolicyError(f"A {what} has no key {key!r}. {closest(str(key), known)}")


SiteFunction = Callable[[Site], str | None]


@dataclass(frozen=True, slots=True)
class FunctionPolicy:
    """A policy that asks a function of the site for an op's name, `keep`, or None.

    Attributes:
        name: What the plan calls it.
        function: The function.
        summary: One line for listings.
    """

    name: str
    function: SiteFunction
    summary: str = ""

    @property
    def attention(self) -> bool:
        """Whether self-attentions are sites for it: the function decides about all there is."""
        return True

    def decide(self, site: Site) -> Rule | None:
        """The function's answer as a rule.

        Raises:
            PolicyError: It is neither text nor None.
        """
        op = self.function(site)
        if op is not None and not isinstance(op, str):
            raise PolicyError(
                f"{self.name}({site.name}) must return the name of an op, {KEEP!r} or None, "
                f"not {op!r}."
            )
        return None if op is None else Rule(op)


Tell = Callable[[str], None]


class SitePolicy(Protocol):
    """What every policy answers."""

    @property
    def name(self) -> str:
        """What the plan calls it."""

    def decide(self, site: Site) -> Rule | None:
        """What becomes of `site`, None if nothing does."""


@runtime_checkable
class DevicePolicy(SitePolicy, Protocol):
    """A policy that measures on the device of the model, such as `fastest`."""

    @property
    def summary(self) -> str:
        """One line for listings."""

    @property
    def attention(self) -> bool:
        """Whether self-attentions are sites for it."""

    def on(self, model: nn.Module) -> DevicePolicy:
        """The policy for the device of `model`."""


@runtime_checkable
class DataPolicy(SitePolicy, Protocol):
    """A policy that fits what it chooses to images, such as `budget`."""

    @property
    def pointwise(self) -> bool:
        """Whether 1x1 convolutions are sites too."""

    def convert(
        self, model: nn.Module, mark: Callable[[Tensor], Plan], images: Any, tell: Tell
    ) -> tuple[nn.Module, Plan]:
        """A converted copy of the model, and the plan that was carried out.

        `mark` says for an image of shape (1, C, H, W) which sites take part.
        """


NamedPolicy = Policy | FunctionPolicy | DevicePolicy
PolicyLike = NamedPolicy | str | Path | SiteFunction

_REGISTRY: dict[str, NamedPolicy] = {}
Registered = TypeVar("Registered", bound=NamedPolicy)


def register_policy(policy: Registered) -> Registered:
    """Make `policy` available under its name.

    Raises:
        UnknownNameError: The name is taken.
    """
    if policy.name in _REGISTRY or policy.name in _shipped():
        raise UnknownNameError(
            f"A policy named {policy.name!r} exists already; choose another name."
        )
    _REGISTRY[policy.name] = policy
    return policy


def get_policy(policy: PolicyLike) -> NamedPolicy:
    """The policy that a name, a YAML path, or a function of a site stands for.

    Raises:
        UnknownNameError: No policy has that name; the message lists the closest.
        PolicyError: The YAML file is not a policy.
    """
    if isinstance(policy, Policy | FunctionPolicy | DevicePolicy):
        return policy
    if isinstance(policy, Path) or (isinstance(policy, str) and policy.endswith((".yaml", ".yml"))):
        return Policy.from_yaml(policy)
    if isinstance(policy, str):
        known = {**_shipped(), **_REGISTRY}
        if policy in ("budget", "bare"):
            raise UnknownNameError(
                f"{policy} is fitted to images: pass policy=pfsurgery.{policy}(...) and images=."
            )
        if policy not in known:
            raise UnknownNameError(
                f"No policy is named {policy!r}. {closest(policy, known)} "
                f"A path to a policy must end in .yaml."
            )
        return known[policy]
    if callable(policy):
        return FunctionPolicy(getattr(policy, "__name__", "custom"), policy)
    raise PolicyError(
        f"A policy is a name, a Policy, a path to a .yaml file or a function of a site, "
        f"not {type(policy).__name__}."
    )


def list_policies(pattern: str = "*") -> list[str]:
    """Names of the known policies that match a glob, sorted."""
    return sorted(name for name in {**_shipped(), **_REGISTRY} if fnmatchcase(name, pattern))


@cache
def _shipped() -> dict[str, Policy]:
    folder = resources.files("pfsurgery") / "policies"
    policies = [
        Policy.from_dict(yaml.safe_load(file.read_text(encoding="utf-8")))
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    ]
    return {policy.name: policy for policy in policies}
