"""Figures and pages from results."""

from __future__ import annotations

from hippos.report.loss_curve import draw_loss_curve
from hippos.report.page import write_page

__all__ = ["draw_loss_curve", "write_page"]
