"""Language models as policies: load, adapt with LoRA, quantize, compute log-probabilities, save and restore. Loads
torch; may import algorithms, tasks, runs and everything below them.
"""
