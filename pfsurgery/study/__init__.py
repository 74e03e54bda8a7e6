"""Studies and search: what sites and operations cost and gain, and the best choice of them."""

from pfsurgery.study.bench import Found, Point
from pfsurgery.study.search import search, search_front
from pfsurgery.study.sensitivity import Sensitivity, sensitivity

__all__ = ["Found", "Point", "Sensitivity", "search", "search_front", "sensitivity"]
