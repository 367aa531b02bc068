"""Measures of generated audio.

Attributes that can be heard (pitch, onsets, endings) and a classifier of instruments.
"""
