"""A local web page that explains runs: what moved the reward, the groups behind it, and the stages after training.

Only reads run folders, with the standard library's HTTP server; loads no torch, and starts `minigrpo inspect` as a
process of its own where somebody asks for it. May import training.monitor (the alarms
are told again from the log) and everything below training, but neither pipeline nor cli.
"""
