"""What every room stands on: errors, logging, files, dataclass checks, devices and safetensors files.

Imports no other room.
"""
