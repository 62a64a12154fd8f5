"""Shared vocabulary of Bedplate's programs; knows no program."""
