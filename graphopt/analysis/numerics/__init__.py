"""Numerics: how hard values are to quantize, and where the error of a quantized program comes from."""

from graphopt.analysis.numerics.sites import Noise, SiteError, Spread, explain_sites, site_errors, site_spreads
from graphopt.analysis.numerics.vectors import (
    Summary,
    kurtosis,
    max_to_median,
    qsur,
    quantization_sqnr_db,
    quantized_rows,
)

__all__ = [
    "Noise", "SiteError", "Spread", "Summary", "explain_sites", "kurtosis", "max_to_median", "qsur",
    "quantization_sqnr_db", "quantized_rows", "site_errors", "site_spreads",
]  # fmt: skip
