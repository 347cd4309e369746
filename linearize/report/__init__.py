"""The report of a conversion: one self-contained HTML file. `linearize.report(...)` makes it."""
