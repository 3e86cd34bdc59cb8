"""The report on a bridge: one self-contained HTML file with recall, mistakes, and a map to see and hear."""

from bridgekit.report.page import FILE as FILE
from bridgekit.report.page import report_or_warning as report_or_warning
from bridgekit.report.page import report_page as report_page
from bridgekit.report.tables import TableResults as TableResults
from bridgekit.report.tables import table_results as table_results
