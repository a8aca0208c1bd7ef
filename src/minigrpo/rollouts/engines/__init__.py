"""Engines that sample completions: the native one, transformers, vLLM, and a scripted one for tests. Loads torch; may
import what rollouts may.
"""
