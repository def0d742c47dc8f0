"""The report: one HTML file about what was measured, learnt and chosen, which opens without a network.

`saved_results` and `report_inputs` hold what the report is about, the `section_*` modules draw its charts with Plotly,
and `page` puts them into the Jinja2 templates. `picture_files` saves the same charts as PNG and SVG.
"""
