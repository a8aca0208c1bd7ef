"""The tasks that come with the package: GSM8K, reasoning-gym, Sudoku strategies and word problems. May import what
tasks may, with common of tasks itself.
"""
