"""What makes a linear-time model out of a pretrained one: surgery, alignment, finetuning, export."""
