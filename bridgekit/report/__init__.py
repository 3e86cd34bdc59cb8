"""The report on a bridge: one HTML file that opens from disk, with figures, mistakes and a map to look and listen at."""

from bridgekit.report.page import FILE as FILE
from bridgekit.report.page import report_or_warning as report_or_warning
from bridgekit.report.page import report_page as report_page
from bridgekit.report.page import write_report as write_report
from bridgekit.report.shown import show_table as show_table
