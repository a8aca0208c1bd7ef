"""The stages of a run in order: preflight, warm-up, training, evaluation, delivery. May import everything but the
command line and the notebook.
"""
