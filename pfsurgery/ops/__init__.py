"""What a site can become: one file a family, and a registry."""

from pfsurgery.ops import blur, bottleneck, eff_attention, pool, shift
from pfsurgery.ops.base import Op, Support, get_op, list_ops, register_op
from pfsurgery.ops.window import Window

__all__ = ["Op", "Support", "Window", "get_op", "list_ops", "register_op"]

del blur, bottleneck, eff_attention, pool, shift
