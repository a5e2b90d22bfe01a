"""From any mix of sources to clean, mixed pairs with a report: ratings, filters, duplicates, languages, the mix."""

from raylign.data.prepare.page import PAIRS_NAME, Report
from raylign.data.prepare.pipeline import prepare

__all__ = ["PAIRS_NAME", "Report", "prepare"]
