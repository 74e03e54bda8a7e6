"""Run folders as web pages: one file, no network."""

from pfsurgery.report.write import write_report

__all__ = ["write_report"]
