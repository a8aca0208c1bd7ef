"""Turn a trained run into something that others can use: check and merge the adapter, export GGUF files, verify, serve
and publish them. May import rollouts and everything below it, but neither training nor evaluation.
"""
