"""Serve an artefact behind OpenAI's protocol, with llama.cpp or vLLM, and ask it questions. May import what delivery
may, with artifacts, gguf and hub of delivery itself.
"""
