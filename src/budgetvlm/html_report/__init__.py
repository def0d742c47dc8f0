"""The report: one HTML file of what was measured, learnt and chosen, that opens without a network.

`material` reads what lies on disk, the `section_*` modules turn it into blocks (`blocks`), and blocks are drawn twice:
for the page by Plotly (`interactive`, `page`), for PNG and SVG files by matplotlib (`still`).
"""
