"""Sample completions of a task's prompts and grade them: groups, asynchronous grading, and how they are serialized.
Loads torch; may import models and everything below it.
"""
