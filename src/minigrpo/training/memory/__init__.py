"""Plan the memory of a run: what each part takes, and whether a machine has room for it. May import what training
may.
"""
