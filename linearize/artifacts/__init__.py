"""What is written and read: atomic folders, the manifest, checked checkpoints. Import the modules by name."""
