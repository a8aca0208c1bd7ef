"""Attention over packed rows that hold each prompt once, on a GPU and on a CPU. Loads torch; may import what models
may.
"""
