"""Studies: what sites and operations cost and gain."""
