"""What was extracted, at a glance: `report.html`, one file that needs no network.

`build` chooses the rows to look at and collects what the report shows; `agreement` decides whether an answer agrees
with its ground truth; `charts` draws SVG; `thumbnails` makes small pictures; `page` fills in templates/report.html.
"""
