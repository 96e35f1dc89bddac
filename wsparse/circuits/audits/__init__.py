"""Tests of a circuit, each with its control, its interval and a verdict; `wsparse.audit` runs them."""
