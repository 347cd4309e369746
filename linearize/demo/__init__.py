"""The demo: text that every machine has and a small teacher pretrained on it."""
