"""What the image builder's command line does, one module for each group of verbs. Nothing here decides what is in an image."""
