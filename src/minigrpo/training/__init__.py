"""Train a policy with GRPO: the loop, its optimizer steps, checkpoints, preflight and the warm-up. Loads torch; may
import rollouts and everything below it, but neither evaluation nor delivery.
"""
