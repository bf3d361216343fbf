"""The fixtures `results` and `samples` of the tests of the report."""

from tiny_report import results, samples  # noqa: F401
