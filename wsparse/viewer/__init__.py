"""Circuits in a browser: what `python -m wsparse.view` collects, and the one page it writes."""
