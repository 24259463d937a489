"""What Ray needs: nodes checked before workers start on them, and logical devices for CPUs."""
