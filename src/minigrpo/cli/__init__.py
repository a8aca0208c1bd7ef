"""The `minigrpo` command: options, commands, and their help. May import everything; loads torch only when a command
that needs it runs, so that `minigrpo --help` answers at once.
"""
