"""OpenCSG's UltraFeedback-chinese: UltraFeedback's shapes with Chinese text."""

import re
from dataclasses import replace

from raylign.data.formats import ultrafeedback
from raylign.data.formats.parts import Cells, Parts

CHINESE = re.compile(r"[\u4e00-\u9fff]")


def parse(row: Cells) -> Parts:
    """One row. Raises BadRow."""
    return replace(ultrafeedback.parse(row), language="zh")


def is_chinese(value: object) -> bool:
    """Whether a cell is text with a Chinese character."""
    return isinstance(value, str) and CHINESE.search(value) is not None
