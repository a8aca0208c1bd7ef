"""Tools to build tasks with: find and compare answers, read data sets, weigh rewards, run programs. May import what
tasks may, but no other package of tasks.
"""
