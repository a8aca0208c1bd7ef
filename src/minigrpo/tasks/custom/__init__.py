"""Tasks that users make from reward functions and rows. May import what tasks may, with common of tasks itself."""
