"""Publish a run's artefacts on the Hugging Face Hub: the client, what goes into the repository, and the model card.
May import what delivery may, with artifacts and parity of delivery itself.
"""
