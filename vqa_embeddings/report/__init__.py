"""`report.html`: what was extracted, at a glance."""
