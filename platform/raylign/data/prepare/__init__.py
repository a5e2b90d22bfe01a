"""From any mix of sources to clean, mixed pairs with a report: ratings, filters, duplicates, languages, the mix."""

from raylign.data.prepare.pipeline import prepare
from raylign.data.prepare.report import PAIRS_NAME, Report

__all__ = ["PAIRS_NAME", "Report", "prepare"]
