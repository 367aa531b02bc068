"""Audio in and out: reading and writing files, resampling, channels and lengths, measurements.

Arrays are float32 tensors (C, N): channels, samples; full scale is ±1.
"""
