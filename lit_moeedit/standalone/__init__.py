"""Edits without a Trainer: a folder and some facts, or a model in memory."""

from lit_moeedit.standalone.run import TooFewFactsError, edit

__all__ = ["TooFewFactsError", "edit"]
