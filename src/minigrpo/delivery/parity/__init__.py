"""Measure how far an artefact is from the policy that was trained, as KL divergence on the run's own texts. May import
what delivery may, with artifacts of delivery itself.
"""
