"""What report.py is made of: records read, networks looked at, figures drawn, pages written."""
