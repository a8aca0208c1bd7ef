"""Watch a run's metrics: alarms that name a likely cause, and steps that were too large. Needs config and runs; may
import what training may.
"""
