"""Foundations of all other packages: errors, logging, files, typed settings, dtypes, devices, safetensors files.

Imports no other package of sa3train.
"""
