"""What runs left: read from their folders, tabulated and drawn."""
