"""Check an adapter, and merge it into its base model. May import what delivery may, with artifacts and parity of
delivery itself.
"""
