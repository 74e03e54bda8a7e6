"""Make trained vision models faster: swap spatial convolutions for parameter-free operations."""

from pfsurgery import kernels
from pfsurgery.attention import register_attention
from pfsurgery.base import Base, set_base
from pfsurgery.checkpoint import load, save
from pfsurgery.convert import convert, convert_, plan
from pfsurgery.errors import SurgeryError
from pfsurgery.fastest import Fastest
from pfsurgery.hub import push
from pfsurgery.measure import Comparison, Measurement, compare, measure
from pfsurgery.ops import Op, Support, list_ops, register_op
from pfsurgery.optimize import optimize
from pfsurgery.plan import Decision, Plan
from pfsurgery.policy import Policy, Rule, get_policy, list_policies, register_policy
from pfsurgery.record import Record, record
from pfsurgery.recover import (
    FinetuneConfig,
    bare,
    budget,
    evaluate,
    finetune,
    recalibrate,
    reconstruct,
)
from pfsurgery.scan import scan
from pfsurgery.sites import Geometry, Neighbours, Site, register_convolution
from pfsurgery.study import search, sensitivity

__version__ = "0.1.0"

__all__ = [
    "Base",
    "Comparison",
    "Decision",
    "Fastest",
    "FinetuneConfig",
    "Geometry",
    "Measurement",
    "Neighbours",
    "Op",
    "Plan",
    "Policy",
    "Record",
    "Rule",
    "Site",
    "Support",
    "SurgeryError",
    "bare",
    "budget",
    "compare",
    "convert",
    "convert_",
    "evaluate",
    "finetune",
    "get_policy",
    "kernels",
    "list_ops",
    "list_policies",
    "load",
    "measure",
    "optimize",
    "plan",
    "push",
    "recalibrate",
    "reconstruct",
    "record",
    "register_attention",
    "register_convolution",
    "register_op",
    "register_policy",
    "save",
    "scan",
    "search",
    "sensitivity",
    "set_base",
]
