"""Weights in and out: any BERT file into berth (:func:`load_weights`, :func:`match_weights`), berth into Hugging Face
(:mod:`berth.export.huggingface`). Works on state dicts; knows no model class.
"""

from berth.export.match import MatchReport, match_weights
from berth.export.weights import LoadedWeights, load_weights

__all__ = ["LoadedWeights", "MatchReport", "load_weights", "match_weights"]
