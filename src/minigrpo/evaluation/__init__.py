"""Grade models on unseen prompts, compare two of them with the statistics that this takes, and check a task before
training. May import rollouts and everything below it, but neither training nor delivery.
"""
