"""The report: what a run did, as data, text, JSON and HTML."""

from graphopt.report.report import Change, PassRow, Places, Report

__all__ = ["Change", "PassRow", "Places", "Report"]
