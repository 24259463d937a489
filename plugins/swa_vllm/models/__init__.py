"""The models whose layers may slide, and the guards that refuse windows in others."""
