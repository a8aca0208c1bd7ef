"""Send a run's figures and completions to trackers, each through its own library. Loads none of them when imported; may
import what runs may, with rundir of runs itself.
"""
