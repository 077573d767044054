"""Harnesses that look for what is lost, changed or answered with a trace: ``python -m tests.harness.NAME --n N --seed S``."""
