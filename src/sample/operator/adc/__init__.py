"""Automatic defect classification on panel images."""
