"""A plan on a page: the network as a strip, and the table of its sites."""

from __future__ import annotations

from pfsurgery.plan import Plan
from pfsurgery.report.figures import Axis, Measure, strip
from pfsurgery.report.numbers import NOTHING, amount
from pfsurgery.report.page import Chip, Figure, Section, Table
from pfsurgery.report.palette import colors, family


def plan_sections(plan: Plan) -> tuple[Section, ...]:
    """The network and the plan; nothing for a plan without sites."""
    if not len(plan):
        return ()
    labels = [d.label for d in plan]
    palette = colors(labels)
    saved = [d.macs_saved for d in plan]
    measures = [
        Measure(
            Axis("MACs saved", ticks="~s"),
            saved,
            [
                f"saves {amount(s, 'MACs')} of {amount(d.site.macs, 'MACs')}" if d.replaced else ""
                for d, s in zip(plan, saved, strict=True)
            ],
        )
    ]
    said = "Below, the multiply-adds that each site saves"
    errors = [d.structure.error if d.structure else None for d in plan]
    if any(error is not None for error in errors):
        shown = ["" if e is None else f"relative error {e:.3f}" for e in errors]
        measures.insert(0, Measure(Axis("relative error (1)", zero=True), errors, shown))
        said = (
            "Below, the relative error of the fitted output of each site (0: none, 1: as large as "
            "the output; less what a ReLU hides that alone reads it), and the multiply-adds saved"
        )
    network = Figure(
        f"The sites from input (left) to output (right), coloured by what stands there. {said}.",
        strip([d.site.name for d in plan], labels, palette, measures),
    )
    table = Table(
        f"Policy {plan.policy}: {len(plan.replaced)} of {len(plan)} sites change.",
        ("no.", "site", "was", "became", "parameters saved", "MACs saved", "reason"),
        "rcllrrt",
        tuple(
            (
                str(number),
                d.site.name,
                f"{d.site.kind} {d.site.geometry}",
                Chip(
                    d.label + (", tail dropped" if d.tail == "drop" and d.replaced else ""),
                    palette[family(d.label)],
                ),
                amount(d.parameters_saved, "") if d.replaced else NOTHING,
                amount(d.macs_saved, "MACs") if d.replaced else NOTHING,
                d.reason,
            )
            for number, d in enumerate(plan, 1)
        ),
    )
    return Section("The network", (network,)), Section("The plan", (table,))
