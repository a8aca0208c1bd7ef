"""What every stage of delivery works with: what was trained and where it lies, and the merged weights. May import what
delivery may, but no other package of delivery.
"""
