"""A page of tables and plots from measured figures."""

from .page import write_page
from .record import METRICS, Point, Report, Row, Study, read_report

__all__ = ["METRICS", "Point", "Report", "Row", "Study", "read_report", "write_page"]
