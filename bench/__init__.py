"""Measurements: the real model, and the table of cases that the project and the released package run side by side."""
