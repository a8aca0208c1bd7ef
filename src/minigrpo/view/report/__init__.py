"""One file of HTML that tells a run, to be mailed or kept: no script, nothing from elsewhere. Loads no torch; may
import what view may, with charts, library, metrics_log, stages, why, group_index and server of view itself.
"""
