"""Figures of results, by matplotlib: `from forebay import plot`. Each function gives the axes it drew on.

Labels come from the result: coordinates (`layer`, `token_text`, …) and the attributes `long_name` and `units`.
"""

from .attention import attention_pattern
from .bars import bars
from .curves import dose_response, explained_variance, line
from .heat_map import heat_map
from .lens_table import lens_table

__all__ = ["attention_pattern", "bars", "dose_response", "explained_variance", "heat_map", "lens_table", "line"]
