"""What a trained network becomes: smaller, in a small file, faster, and proved so."""
